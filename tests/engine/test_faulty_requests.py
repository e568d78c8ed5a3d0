"""What goes wrong with one request ends that one, and nobody else."""

import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pagoda.config import EngineConfig
from pagoda.engine import grammars
from pagoda.engine.client import start_engine
from pagoda.engine.process import build_engine
from pagoda.engine.request import EngineRequest, SamplingParams
from pagoda.errors import EngineError
from pagoda.text.grammar import compile_grammar

COLD = {"temperature": 0.0, "max_tokens": 20}


def last(engine, request_id, prompt, **params):
    return list(engine.submit(EngineRequest(request_id, prompt, SamplingParams(**{**COLD, **params}))))


def broken(model: Path, place: Path, token: int) -> Path:
    """The model with an embedding of one token that is no number."""
    folder = shutil.copytree(model, place / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def run_to_end(loop, requests) -> dict[str, tuple]:
    """Why each request ended, with which tokens."""
    outputs = {request.id: [] for request in requests}
    loop.connect(None, lambda _, message: [outputs[o.id].append(o) for o in message.outputs])
    for request in requests:
        loop._submit(b"", request)
    while loop._scheduler.has_work or loop._flights:
        loop._step()
    return {i: (all_[-1].finish_reason, [t for o in all_ for t in o.token_ids]) for i, all_ in outputs.items()}


@pytest.mark.parametrize("quant_policy", ["none", "int8", "int4"])
def test_blocks_of_a_request_that_left_before_its_error_showed_harm_nobody(tiny_llama, tmp_path, quant_policy) -> None:
    """Prompts whose keys and values are NaN are aborted between their chunks; others get their blocks. All blocks are
    taken by the former and then by the latter."""
    poison = 299
    config = EngineConfig(
        device="cpu", session_len=128, max_batch_size=4, cache_block_seq_len=16, cache_max_entry_count=16,
        max_prefill_token_num=24, quant_policy=quant_policy,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=20, bad_words=((poison,),))
    clean = [EngineRequest(f"good{i}", list(range(5 + i, 12 + 8 * i)), params) for i in range(4)]
    folder = broken(tiny_llama, tmp_path, poison)
    loop = build_engine(folder, config)
    wanted = run_to_end(loop, clean)
    loop._workers.close()
    loop = build_engine(folder, config)
    for i in range(4):
        loop._scheduler.add(EngineRequest("bad", [poison, 7 + i] * 56, params))
        for _ in range(4):
            loop._step()
        assert loop._scheduler.abort("bad") is not None
    assert run_to_end(loop, clean) == wanted
    assert {reason for reason, _ in wanted.values()} == {"length"}
    loop._workers.close()


@pytest.mark.parametrize("quant_policy", ["none", "int8", "int4"])
def test_a_spoiled_end_of_a_prompt_does_not_spoil_its_beginning_for_others(tiny_llama, tmp_path, quant_policy) -> None:
    """The prompt leaves before its error shows, in a chunk that holds both; others share its beginning."""
    poison, beginning = 299, list(range(5, 45))
    config = EngineConfig(
        device="cpu", session_len=256, max_batch_size=4, cache_block_seq_len=16, max_prefill_token_num=60,
        quant_policy=quant_policy,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=8, bad_words=((poison,),))
    clean = [EngineRequest("good", beginning + [7, 8, 9], params)]
    ends = []
    for spoils in (False, True):
        loop = build_engine(broken(tiny_llama, tmp_path / str(spoils), poison), config)
        if spoils:
            loop._scheduler.add(EngineRequest("bad", beginning + [poison, 7] * 50, params))
            loop._step()
            assert loop._scheduler.abort("bad") is not None
        ends.append(run_to_end(loop, clean))
        loop._workers.close()
    assert ends[0] == ends[1] and ends[0]["good"][0] == "length"


@pytest.mark.parametrize("knobs", [{}, {"speculative_ngram": 3}])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 1}, {"logprobs": 2, "frequency_penalty": 0.5}])
def test_scores_that_are_no_numbers_end_the_request(tiny_llama: Path, tmp_path: Path, params, knobs) -> None:
    """The embedding of one token is NaN, so whatever a prompt with it says is, too; a neighbour that later takes over
    its block does not notice."""
    config = EngineConfig(device="cpu", session_len=256, max_batch_size=8, cache_block_seq_len=16, **knobs)
    good = [5, 6, 5, 6, 5, 6]
    with start_engine(tiny_llama, config) as engine:
        whole = [t for output in last(engine, "good", good, **params) for t in output.token_ids]
    poison = next(token for token in range(7, 300) if token not in whole)
    with start_engine(broken(tiny_llama, tmp_path, poison), config) as engine:
        ticket = engine.submit(EngineRequest("good", good, SamplingParams(**{**COLD, **params})))
        [end] = last(engine, "bad", [5, poison, *good], **params)
        assert (end.finish_reason, end.token_ids) == ("error", []) and "finite" in str(end.error)
        assert [t for output in ticket for t in output.token_ids] == whole
        assert engine.stats().num_running == 0 and engine.dead is None


class Matcher:
    """Allows all; fails as its grammar says, at its second token."""

    def __init__(self, grammar: str):
        self.grammar, self.num = grammar, 0
        if grammar == "begin":
            raise RuntimeError("no grammar")

    def copy(self):
        return Matcher(self.grammar)

    def fill_mask(self, row_W):
        row_W[:] = -1
        if self.grammar == "mask" and self.num == 2:
            raise RuntimeError("no mask")

    def accept(self, token: int):
        self.num += 1
        if self.grammar == "accept" and self.num == 2:
            raise RuntimeError("no token")


@pytest.mark.parametrize("where", ["begin", "mask", "accept"])
def test_a_grammar_that_fails_ends_its_request(engines, where: str) -> None:
    engine = engines()
    state = engine._transport._loop._grammars
    state._masks = type("Masks", (), {"matcher": staticmethod(Matcher)})
    alone = [t for output in last(engine, "alone", [5, 6]) for t in output.token_ids]
    ticket = engine.submit(EngineRequest("good", [5, 6], SamplingParams(**COLD, grammar="good")))
    outputs = last(engine, "bad", [5, 6], grammar=where)
    assert outputs[-1].finish_reason == "error" and "failed on this request" in str(outputs[-1].error)
    assert sum(len(output.token_ids) for output in outputs) <= 2
    assert [t for output in ticket for t in output.token_ids] == alone
    assert engine.stats().num_running == 0 and not state._matchers


def test_a_call_that_fails_is_answered(engines) -> None:
    engine = engines()

    def fail():
        raise OSError("the disk is gone")

    engine._transport._loop.calls["list_sessions"] = fail
    with pytest.raises(EngineError, match="list_sessions"):
        engine.sessions()
    assert engine.stats().num_running == 0


def test_the_first_grammar_of_a_server_reads_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read beside the weights, where no stream waits."""
    readers = []
    load = grammars.load_tokenizer
    monkeypatch.setattr(grammars, "load_tokenizer", lambda path: (readers.append(threading.get_ident()), load(path))[1])
    loop = build_engine("mini", EngineConfig(device="cpu", session_len=256, max_batch_size=2), for_grammars=True)
    try:
        assert len(readers) == 1 and readers[0] != threading.get_ident()
        grammar = compile_grammar({"type": "regex", "regex": "a+"})
        assert grammar is not None
        loop._grammars.begin("a", grammar)
        loop._grammars._threads.shutdown()
        assert list(loop._grammars.settled()) == [("a", None)] and len(readers) == 1
    finally:
        loop._workers.close()
