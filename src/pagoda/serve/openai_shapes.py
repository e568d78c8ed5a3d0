"""Shapes that OpenAI's chat and completion answers share. A chunk of text is a pre-rendered template around one
JSON string, because it is written once a token."""

import time
from collections.abc import Sequence
from typing import Any

import orjson

from pagoda.engine.request import TokenLogprobs
from pagoda.errors import PagodaError
from pagoda.offline import Answering
from pagoda.serve.bodies import StreamOptions
from pagoda.serve.error_map import error_body
from pagoda.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def usage(answers: Sequence[Answering], num_choices: int = 1) -> dict[str, Any]:
    """Token counts; a prompt with several choices counts once."""
    replies = [a.reply for a in answers]
    prompt = sum(r.input_token_len for r in replies[::num_choices])
    made = sum(r.generate_token_len for r in replies)
    cached = sum(r.cached_token_len for r in replies[::num_choices])
    counts = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


class EventWriter:
    """What all writers of server-sent events share."""

    media_type = "text/event-stream"

    def failure(self, error: PagodaError) -> bytes:
        return b"data: " + orjson.dumps(error_body(error)) + b"\n\n" + DONE


class Chunks:
    """Renders the events of one stream, all with one id and one time."""

    def __init__(self, answer_id: str, kind: str, model: str, options: StreamOptions | None):
        self.head = {"id": answer_id, "object": kind, "created": int(time.time()), "model": model}
        self.include_usage = bool(options and options.include_usage)
        self.continuous = bool(options and options.continuous_usage_stats and options.include_usage)
        self._head = b"data: " + orjson.dumps(self.head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self.include_usage else b"]}\n\n"

    def text(self, before: bytes, text: str, after: bytes) -> bytes:
        """A chunk whose only changing part is one text."""
        return self._head + before + orjson.dumps(text) + after + self._tail

    def choice(self, choice: dict[str, Any], counts: dict[str, Any] | None = None) -> bytes:
        """Any other chunk."""
        tail = self._tail if counts is None else b'],"usage":' + orjson.dumps(counts) + b"}\n\n"
        return self._head + orjson.dumps(choice) + tail

    def end(self, counts: dict[str, Any]) -> bytes:
        if not self.include_usage:
            return DONE
        return self._head + b'],"usage":' + orjson.dumps(counts) + b"}\n\n" + DONE


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}

    content = [{**entry(lp.token, lp.logprob), "top_logprobs": [entry(*t) for t in lp.top]} for lp in logprobs]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[tuple[int, TokenLogprobs | None]], offset: int = 0
) -> dict[str, Any]:
    """(token, its log-probabilities; None for the first of a prompt) in the older shape; `offset` in characters."""
    out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, lp in entries:
        text = token_text(tokenizer, token)
        out["tokens"].append(text)
        out["token_logprobs"].append(None if lp is None else finite(lp.logprob))
        top = None if lp is None else {token_text(tokenizer, t): finite(p) for t, p in reversed(lp.top)}
        out["top_logprobs"].append(top)
        out["text_offset"].append(offset)
        offset += len(text)
    return out
