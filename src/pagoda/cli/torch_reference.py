"""The same chat on transformers: what Pagoda's answers are compared with."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from pagoda.config import EngineConfig, GenerationConfig
from pagoda.engine.params import read_generation_defaults
from pagoda.errors import ModelError, UsageError
from pagoda.models.find import resolve_model
from pagoda.models.workspace import is_workspace
from pagoda.offline import Piece
from pagoda.text.stream import TextStream
from pagoda.text.template import load_template
from pagoda.text.tokenizer import load_tokenizer

DEFAULT_TOKENS = 512


class TorchModel:
    """A checkpoint on transformers, without the checkpoint's own code."""

    def __init__(self, name: str, config: EngineConfig, chat_template: str | None):
        folder = resolve_model(name)
        if is_workspace(folder):
            raise UsageError(f"{folder} is a workspace, which transformers cannot read: give the original checkpoint.")
        self.tokenizer = load_tokenizer(folder)
        self.template = load_template(folder, chat_template, self.tokenizer)
        self.defaults = read_generation_defaults(folder)
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        try:
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False)
        except (ValueError, OSError, KeyError) as error:
            raise ModelError(f"transformers cannot load {folder}: {str(error).splitlines()[0]}") from None
        self.model = model.to(device).eval()

    def session(self, session_id: str | None = None, system: str | None = None) -> "TorchSession":
        return TorchSession(self, system)

    def close(self) -> None:
        del self.model


class _Tokens(BaseStreamer):
    """Hands generated ids to a queue; None marks the end."""

    def __init__(self, queue: "SimpleQueue[list[int] | None]"):
        self._queue, self._prompt = queue, True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._queue.put(value.flatten().tolist())
        self._prompt = False

    def end(self) -> None: ...


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


class TorchSession:
    """A conversation that sends its whole history each turn."""

    def __init__(self, owner: TorchModel, system: str | None):
        self._owner = owner
        self.history = [{"role": "system", "content": system}] if system else []

    def _settings(self, gen: GenerationConfig) -> dict[str, Any]:
        owner = self._owner
        ends = {*owner.tokenizer.eos_ids, *owner.template.stop_ids}
        given = {n: getattr(gen, n) for n in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
        settings = {k: v for k, v in given.items() if v is not None}
        sample = gen.do_sample if gen.do_sample is not None else owner.defaults.get("do_sample", bool(settings))
        if settings.get("temperature") == 0:
            sample = False
        if not sample:
            settings = {k: v for k, v in settings.items() if k == "repetition_penalty"}
        eos = None if gen.ignore_eos else sorted(ends)
        room = DEFAULT_TOKENS if gen.max_new_tokens is None else gen.max_new_tokens
        return settings | {"do_sample": sample, "max_new_tokens": room, "eos_token_id": eos, "pad_token_id": 0}

    def stream(self, text: str, gen_config: GenerationConfig) -> Iterator[Piece]:
        """Say something and get the reply piece by piece; leaving the loop stops it."""
        owner = self._owner
        turn = [*self.history, {"role": "user", "content": text}]
        ids = owner.tokenizer.encode(owner.template.render(turn))
        settings = self._settings(gen_config)
        queue: SimpleQueue[list[int] | None] = SimpleQueue()
        stop = threading.Event()
        if gen_config.random_seed is not None:
            torch.manual_seed(gen_config.random_seed)
        inputs = torch.tensor([ids], device=owner.model.device)

        def generate() -> None:
            try:
                criteria = StoppingCriteriaList([_Stopped(stop)])
                owner.model.generate(inputs, streamer=_Tokens(queue), stopping_criteria=criteria, **settings)
            finally:
                queue.put(None)

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        words = [*owner.template.stop_words, *(gen_config.stop_words or ())]
        stream, reply, count = TextStream(owner.tokenizer, words, gen_config.skip_special_tokens), "", 0
        ends = settings["eos_token_id"] or ()
        reason = None
        try:
            while reason is None and (tokens := queue.get()) is not None:
                count += len(tokens)
                reason = "stop" if tokens[-1] in ends else None
                kept = [t for t in tokens if t not in ends]
                piece = stream.push(kept)
                reason = "stop" if stream.stopped_by else reason
                reply += piece
                yield Piece(piece, kept, None)
            rest = stream.flush()
            reply += rest
            yield Piece(rest, [], reason or ("length" if count >= settings["max_new_tokens"] else "stop"))
        finally:
            stop.set()
            worker.join()
            self.history = [*turn, {"role": "assistant", "content": reply}]

    def close(self) -> None:
        self.history = []
