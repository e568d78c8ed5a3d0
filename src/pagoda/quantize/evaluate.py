"""What a model under an engine setting is worth: perplexity of a text, exact match on mini's tasks.

Both go through the real engine, so every choice of weights, cache and device is measured as it serves. Perplexity is
exp(sum of -ln p(token) / number of tokens) over all tokens of the text: the text is tokenised once, without special
tokens, and cut into windows that fill a session behind one begin-of-sequence token; every token of a window is scored.
A model without a begin-of-sequence token gets its last end-of-sequence token there (`<|endoftext|>` in most).
"""

import math
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pagoda.config import EngineConfig
from pagoda.engine.client import start_engine
from pagoda.engine.request import EngineRequest, Output, SamplingParams
from pagoda.engine.runner import pick_device
from pagoda.errors import EngineError, UsageError
from pagoda.layers.kv_schemes import get_kv_scheme
from pagoda.models.find import resolve_model, text_folder
from pagoda.models.loader import pick_dtype, resolve_spec
from pagoda.models.spec import session_len
from pagoda.models.workspace import remembered_template
from pagoda.quantize.mini_tasks import TaskScore, held_out_dialogues, held_out_stories, questions, score
from pagoda.text.template import ChatTemplate, load_template
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

SCORED_ROWS = 1024  # most positions of a step while a text is scored: each needs a row of logits
MAX_QUEUED = 1 << 20  # all requests are submitted at once
REPLY_TOKENS = 160  # longest answer of mini's tasks
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Perplexity:
    nll: float  # sum of -ln p
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)


@dataclass(frozen=True)
class Answers:
    """Replies to mini's questions. `right` stands beside them, in their order, so that two settings can be paired."""

    scores: list[TaskScore]
    right: list[bool]
    seconds: float
    tokens: int  # generated

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


def paired_loss(before: list[bool], after: list[bool]) -> tuple[float, float]:
    """(points of accuracy lost, half width of the 95% interval), from answers to the same questions."""
    assert len(before) == len(after)
    n = len(before)
    lost = sum(b and not a for b, a in zip(before, after))
    won = sum(a and not b for b, a in zip(before, after))
    mean = (lost - won) / n
    return 100 * mean, 196 * math.sqrt(max((lost + won) / n - mean * mean, 0.0) / n)


class Evaluator:
    """A model behind an engine, ready to be measured. Use it as a context manager."""

    def __init__(self, model: str | Path, config: EngineConfig, progress: Progress | None = None):
        folder = resolve_model(str(model))
        self._spec, config = resolve_spec(folder, config)
        self.session_len = session_len(self._spec, config)
        config = config.replace(
            session_len=self.session_len + 1,  # room for the token that scoring a whole session generates
            max_queued_requests=MAX_QUEUED,
            max_prefill_token_num=min(config.max_prefill_token_num, SCORED_ROWS),
        )
        self._template_name, self._text = remembered_template(folder), text_folder(folder)
        self.tokenizer: Tokenizer = load_tokenizer(self._text)
        self.engine = start_engine(folder, config, inline=True, progress=progress)
        self.session_len = min(self.session_len, self.engine.info.session_len - 1)
        self._config, self.on_gpu = config, pick_device(config).type == "cuda"

    def text(self, text: str, progress: Progress | None = None) -> Perplexity:
        """Of a text, in windows. `UsageError` when it has no tokens."""
        ids = self.tokenizer.encode(text, parse_special=False)
        window = self.session_len - 1
        return self._score([self._begin() + ids[i : i + window] for i in range(0, len(ids), window)], progress)

    def lines(self, text: str, progress: Progress | None = None) -> Perplexity:
        """Of the text's lines, each its own sequence with the end-of-sequence token behind it, cut at the session."""
        end = list(self.tokenizer.eos_ids[:1])
        lines = [self.tokenizer.encode(line, parse_special=False) + end for line in text.splitlines() if line]
        return self.documents(lines, progress)

    def documents(self, documents: Iterable[list[int]], progress: Progress | None = None) -> Perplexity:
        """Of token sequences, each behind a begin-of-sequence token, cut at the session."""
        return self._score([(self._begin() + ids)[: self.session_len] for ids in documents], progress)

    def dialogues(self, num: int, seed: int = 0) -> Perplexity:
        """Of held-out conversations of mini's world, in the model's own template."""
        template = self._template()
        rendered = [template.render(m, add_generation_prompt=False) for m in held_out_dialogues(seed, num)]
        return self.documents(self.tokenizer.encode(text) for text in rendered)

    def stories(self, num: int, seed: int = 0) -> Perplexity:
        """Of held-out stories of mini's world."""
        return self.documents(self.tokenizer.encode(text) for text in held_out_stories(seed, num))

    def right_answers(self, num: int, seed: int = 0) -> Perplexity:
        """Of the right answers to `num` questions of mini's tasks, each behind its conversation: finer than counting
        exact matches."""
        template, sequences, starts = self._template(), [], []
        for question in questions(seed, num):
            asked = template.render(question.messages)
            turns = [*question.messages, {"role": "assistant", "content": question.answer}]
            told = template.render(turns, add_generation_prompt=False)
            sequences.append((self._begin() + self.tokenizer.encode(told))[: self.session_len])
            starts.append(1 + len(self.tokenizer.encode(asked)))
        return self._score(sequences, None, starts)

    def answer(self, num: int, seed: int = 0, progress: Progress | None = None) -> Answers:
        """Greedy replies to `num` questions of mini's tasks, matched to the letter."""
        template, asked = self._template(), questions(seed, num)
        started, room = time.monotonic(), self.session_len - REPLY_TOKENS
        stops = tuple(dict.fromkeys((*self.engine.info.eos_ids, *template.stop_ids)))
        params = SamplingParams(temperature=0.0, max_tokens=REPLY_TOKENS, stop_ids=stops)
        prompts = [self.tokenizer.encode(template.render(question.messages))[-room:] for question in asked]
        made = [[t for output in outputs for t in output.token_ids] for outputs in self._run(prompts, params, progress)]
        replies = [self.tokenizer.decode(ids) for ids in made]
        right = [question.is_right(reply) for question, reply in zip(asked, replies)]
        return Answers(score(asked, replies), right, time.monotonic() - started, sum(map(len, made)))

    def speed(self, rows: int = 8, tokens: int = 64) -> float:
        """Tokens generated a second by `rows` requests at once, prompts of 64 tokens: the best of three runs."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        prompts = [[(7 * i + 11 * r) % self._spec.vocab_size for i in range(64)] for r in range(rows)]
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            list(self._run(prompts, params, None))
            seconds.append(time.monotonic() - started)
        return rows * tokens / min(seconds)

    def cache_bytes(self) -> int:
        """Of one token of all layers in the KV cache, scales included."""
        spec, config = self._spec, self._config
        shape = (spec.num_kv_heads, spec.head_dim, config.cache_block_seq_len, pick_dtype(config, spec))
        layer = get_kv_scheme(config.quant_policy).bytes_per_block(*shape)
        return layer * spec.num_layers // config.cache_block_seq_len

    def _template(self) -> ChatTemplate:
        return load_template(self._text, self._template_name, self.tokenizer)

    def _begin(self) -> list[int]:
        """The token that stands before every scored sequence."""
        ends = self.engine.info.eos_ids
        begin = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else ends[-1] if ends else None
        if begin is None:
            raise UsageError("The model has neither a begin- nor an end-of-sequence token to score a text behind.")
        return [begin]

    def _score(
        self, sequences: list[list[int]], progress: Progress | None, starts: list[int] | None = None
    ) -> Perplexity:
        """Every token but the first of every sequence is scored, or those from its start on."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        nll, tokens = 0.0, 0
        some = [(s, first) for s, first in zip(sequences, starts or [1] * len(sequences)) if len(s) > first]
        for outputs, (_, first) in zip(self._run([s for s, _ in some], params, progress), some):
            entries = next(o.prompt_logprobs for o in outputs if o.prompt_logprobs)
            scored = [entry for entry in entries[first:] if entry is not None]
            nll -= math.fsum(entry.logprob for entry in scored)
            tokens += len(scored)
        if tokens == 0:
            raise UsageError("The text has no tokens to score: give a longer one.")
        return Perplexity(nll, tokens)

    def _run(
        self, prompts: list[list[int]], params: SamplingParams, progress: Progress | None
    ) -> Iterable[list[Output]]:
        """All prompts at once; each one's outputs in the prompts' order. `EngineError` when one fails."""
        tickets = [self.engine.submit(EngineRequest(uuid.uuid4().hex, ids, params)) for ids in prompts]
        for done, ticket in enumerate(tickets, 1):
            outputs = list(ticket)
            if outputs[-1].finish_reason == "error":
                raise EngineError(outputs[-1].error or "The engine failed on a request.")
            if progress is not None:
                progress(done / len(tickets))
            yield outputs

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_text(path: Path, max_chars: int | None = None) -> str:
    """A UTF-8 file, or its first `max_chars` characters. `UsageError` when it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(-1 if max_chars is None else max_chars)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text ({error}): give a plain text file.") from None
