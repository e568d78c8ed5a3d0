"""One request on its way: the engine's outputs become text, pieces and a reply."""

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pagoda.engine.client import Ticket
from pagoda.engine.request import EngineRequest, Output, TokenLogprobs
from pagoda.errors import named_error
from pagoda.text.stream import TextStream

Message = dict[str, Any]
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Piece:
    """Part of a reply: new `text` and the `token_ids` behind it. The last piece carries `finish_reason`."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass
class Reply:
    """A whole answer. `finish_reason`: stop, length, tool_calls, abort or error. Lengths count tokens;
    `cached_token_len` of the input were found in the prefix cache. Times are seconds since the request was made."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    input_token_len: int = 0
    cached_token_len: int = 0
    generate_token_len: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    first_token_time: float = 0.0
    total_time: float = 0.0


class Prepared(NamedTuple):
    """A request that is ready to go, and how its tokens become text."""

    request: EngineRequest
    stop_words: tuple[str, ...]
    skip_special: bool
    continues: bool


class Answering:
    """One request on its way: turns the engine's outputs into pieces and fills `reply`."""

    def __init__(self, ticket: Ticket, stream: TextStream, started: float):
        self.ticket, self.reply, self._stream, self._started = ticket, Reply(), stream, started
        self._received = 0

    def take(self, output: Output) -> Piece | None:
        """The piece that an output adds; None when it adds nothing. Raises the error that ended the request."""
        reply, now = self.reply, time.monotonic() - self._started
        reply.total_time = now
        if output.finish_reason == "error":
            reply.finish_reason = "error"
            raise named_error(output.error_kind or "EngineError", output.error or "The engine failed on this request.")
        if output.num_prompt_tokens:
            reply.input_token_len, reply.cached_token_len = output.num_prompt_tokens, output.num_cached_tokens
        if output.prompt_logprobs is not None:
            reply.prompt_logprobs = output.prompt_logprobs
        if reply.finish_reason is not None:
            return None
        if output.token_ids and not reply.token_ids:
            reply.first_token_time = now
        text = self._stream.push(output.token_ids)
        tokens, logprobs, reason = output.token_ids, output.logprobs, output.finish_reason
        if self._stream.stopped_by is not None:
            keep = self._stream.num_tokens
            extra = max(0, self._received + len(tokens) - keep)
            tokens, reason = tokens[: len(tokens) - extra], "stop"
            logprobs = logprobs[: len(tokens)] if logprobs is not None else None
            if output.finish_reason is None:
                self.ticket.abort(keep)
        elif reason is not None:
            text += self._stream.flush()
        self._received += len(output.token_ids)
        reply.text += text
        reply.token_ids += tokens
        reply.generate_token_len = len(reply.token_ids)
        if logprobs is not None:
            reply.logprobs = (reply.logprobs or []) + logprobs
        reply.finish_reason = reason
        if not text and not tokens and reason is None:
            return None
        return Piece(text, tokens, reason, logprobs)

    def read(self) -> None:
        """Take all outputs."""
        for output in self.ticket:
            self.take(output)

    def pieces(self) -> Iterator[Piece]:
        """Piece by piece. Leaving the loop ends the request; what was received counts."""
        try:
            for output in self.ticket:
                piece = self.take(output)
                if piece is not None:
                    yield piece
        finally:
            self._leave()

    async def apieces(self) -> AsyncIterator[Piece]:
        """`pieces` in the event loop that submitted the request."""
        try:
            async for output in self.ticket:
                piece = self.take(output)
                if piece is not None:
                    yield piece
        finally:
            self._leave()

    def _leave(self) -> None:
        if self.reply.finish_reason is None:
            self.ticket.abort(len(self.reply.token_ids))
            self.reply.finish_reason = "abort"
