"""The Python face: `pipeline(model)` answers prompts, streams pieces and holds conversations.

It is the place where strings become token ids and token ids become strings; the engine below sees ids only.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pagoda.config import EngineConfig, GenerationConfig
from pagoda.engine.client import EngineClient, Ticket, start_engine
from pagoda.engine.params import read_generation_defaults, sampling_params
from pagoda.engine.request import EngineRequest, Output, TokenLogprobs
from pagoda.errors import NotFoundError, PromptTooLongError, RequestError, named_error
from pagoda.models.find import resolve_model, text_folder
from pagoda.models.workspace import remembered_template
from pagoda.text.stream import TextStream
from pagoda.text.template import ChatTemplate, load_template
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

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


class Pipeline:
    """A model that answers. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        chat_template: str | None = None,
        inline: bool = True,
        progress: Callable[[float], None] | None = None,
        engine: EngineClient | None = None,
    ):
        """`engine`: one that runs already, instead of starting one."""
        folder = resolve_model(str(model))
        text = text_folder(folder)
        self.tokenizer: Tokenizer = load_tokenizer(text)
        self._template_name, self._text_folder = chat_template or remembered_template(folder), text
        self._template: ChatTemplate | None = None
        self._defaults = read_generation_defaults(text)
        self.engine: EngineClient = engine or start_engine(folder, config or EngineConfig(), inline, progress)

    @property
    def template(self) -> ChatTemplate:
        """The chat template, read when first needed; a missing one raises `TemplateError`."""
        if self._template is None:
            self._template = load_template(self._text_folder, self._template_name, self.tokenizer)
        return self._template

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | None = None,
        *,
        do_preprocess: bool = True,
    ) -> Any:
        """Answer one prompt (text or OpenAI-style messages) with a `Reply`, or a list of them with a list.

        `do_preprocess=False` sends the text as it is, without the chat template.
        """
        many = _is_many(prompts)
        batch = list(prompts) if many else [prompts]
        most, running = self.engine.info.max_queued, []  # more at once would be refused
        try:
            for i, prompt in enumerate(batch):
                if i >= most:
                    running[i - most].read()
                running.append(self.start(prompt, gen_config, do_preprocess=do_preprocess))
            for answering in running[max(0, len(batch) - most) :]:
                answering.read()
        except BaseException:
            for answering in running:
                answering.ticket.abort()
            raise
        replies = [answering.reply for answering in running]
        return replies if many else replies[0]

    def stream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> Iterator[Piece]:
        """Answer one prompt piece by piece. Leaving the loop ends the request."""
        yield from _pieces(self.start(prompt, gen_config, do_preprocess=do_preprocess))

    async def acall(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> Reply:
        """`__call__` for one prompt in an event loop; cancelling it ends the request."""
        answering = self.start(prompt, gen_config, do_preprocess=do_preprocess)
        async for _ in _apieces(answering):
            pass
        return answering.reply

    async def astream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> AsyncIterator[Piece]:
        """`stream` in an event loop."""
        async for piece in _apieces(self.start(prompt, gen_config, do_preprocess=do_preprocess)):
            yield piece

    def session(self, session_id: str | None = None, system: str | None = None) -> "Session":
        """A conversation that the engine remembers."""
        return Session(self, session_id, system)

    def prompt_ids(self, prompt: Prompt, *, do_preprocess: bool = True) -> list[int]:
        """Token ids of a prompt, as the engine will get them."""
        if not do_preprocess:
            if not isinstance(prompt, str):
                raise RequestError("do_preprocess=False takes a text, not messages.", "do_preprocess")
            self._check_length(prompt)
            return self.tokenizer.encode(prompt, add_bos=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self.encode_rendered(self.template.render(messages))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered template; the template itself wrote the beginning of sequence, if it wants one."""
        self._check_length(text)
        ids = self.tokenizer.encode(text, add_bos=False)
        return ids if ids else self.tokenizer.encode(text, add_bos=True)

    def _check_length(self, text: str) -> None:
        """Refuse what cannot fit before it is tokenized, which takes seconds for megabytes."""
        most = self.engine.info.session_len * self._longest_token
        if len(text) > most:
            raise PromptTooLongError(
                f"The prompt has {len(text)} characters, more than a session of {self.engine.info.session_len} tokens "
                "can hold: shorten it.",
                "prompt",
            )

    @cached_property
    def _longest_token(self) -> int:
        return max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))

    def start(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> Answering:
        """Submit one prompt; iterate `.ticket`, feed `.take`, read `.reply`."""
        stops = self.template.stop_words if do_preprocess else ()
        ids = self.prompt_ids(prompt, do_preprocess=do_preprocess)
        return self.launch(self.prepare(ids, gen_config, stop_words=stops))

    def prepare(
        self,
        prompt_ids: list[int],
        gen_config: GenerationConfig | None = None,
        *,
        stop_words: Sequence[str] = (),
        session_id: str | None = None,
        history_len: int = 0,
        max_new_tokens: int | None = 512,
        grammar: str | None = None,
        max_wait: float = 0.0,
        continues: bool = False,
    ) -> Prepared:
        """A request for token ids, checked; may be called in any thread. `history_len`: tokens that the session holds
        already. `grammar`: a compiled one, before that of `gen_config`. `continues`: as in `TextStream`."""
        gen = gen_config or GenerationConfig()
        if not prompt_ids:
            raise RequestError("The prompt has no tokens: write some text.", "prompt")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self.engine.info.vocab_size:
            last = self.engine.info.vocab_size - 1
            raise RequestError(f"The prompt has a token id outside 0 to {last}, those the model has.", "prompt")
        stop_ids, words = self._split_stops([*stop_words, *(gen.stop_words or ())])
        if grammar is None and gen.response_format is not None:
            from pagoda.text.grammar import compile_grammar  # its library is slow to import

            grammar = compile_grammar(gen.response_format)
        params = sampling_params(
            gen,
            self._defaults,
            self.engine.info,
            history_len + len(prompt_ids),
            self.tokenizer.encode,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            grammar=grammar,
        )
        request = EngineRequest(
            id=uuid.uuid4().hex,
            prompt_ids=prompt_ids,
            params=params,
            session_id=session_id,
            priority=gen.priority,
            salt=gen.cache_salt or "",
            arrival=time.monotonic(),
            max_wait=max_wait,
        )
        return Prepared(request, tuple(words), gen.skip_special_tokens, continues)

    def launch(self, prepared: Prepared, inbox: "asyncio.Queue[Output] | None" = None) -> Answering:
        """Send a prepared request to the engine; `inbox` as in `EngineClient.submit`."""
        request, stop_words, skip_special, continues = prepared
        stream = TextStream(self.tokenizer, stop_words, skip_special, continues)
        return Answering(self.engine.submit(request, inbox), stream, request.arrival)

    def _split_stops(self, words: list[str]) -> tuple[tuple[int, ...], list[str]]:
        """Stop texts that are one special token become stop ids, which cost nothing to watch for."""
        ids, texts = [], []
        for word in words:
            token = self.tokenizer.id_of(word)
            if token is not None and token in self.tokenizer.special_ids:
                ids.append(token)
            else:
                texts.append(word)
        return tuple(ids), texts

    def close(self) -> None:
        """Stop the engine and give back its memory."""
        self.engine.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """A conversation: each turn sends only its new text, the engine supplies the rest from its cache or recomputes it.

    `history` is the messages so far. A turn that was aborted keeps what was received.
    """

    def __init__(self, pipe: Pipeline, session_id: str | None, system: str | None):
        self.id = session_id or uuid.uuid4().hex
        self.history: list[Message] = [{"role": "system", "content": system}] if system else []
        self._pipe = pipe
        self._rendered = ""  # all text that the engine holds for this session
        self._held = 0  # tokens that it holds

    def __call__(self, text: str, gen_config: GenerationConfig | None = None) -> Reply:
        """Say something and wait for the whole reply."""
        answering = self.start(text, gen_config)
        try:
            for _ in _pieces(answering):
                pass
        finally:
            self.finish(text, answering)
        return answering.reply

    def stream(self, text: str, gen_config: GenerationConfig | None = None) -> Iterator[Piece]:
        """Say something and get the reply piece by piece. Leaving the loop stops the reply and keeps what came."""
        answering = self.start(text, gen_config)
        try:
            yield from _pieces(answering)
        finally:
            self.finish(text, answering)

    def start(self, text: str, gen_config: GenerationConfig | None = None) -> Answering:
        """Submit a turn; pair it with `finish`."""
        template = self._pipe.template
        full = template.render([*self.history, {"role": "user", "content": text}])
        if self._rendered and (not full.startswith(self._rendered) or not self._is_held()):
            # The template rewrites history (it drops old reasoning, say), or the engine has forgotten it (a session
            # lives for `session_ttl`): begin anew, the prefix cache helps.
            self._pipe.engine.call("delete_session", session_id=self.id)
            self._rendered, self._held = "", 0
        if self._rendered:
            new_ids = self._pipe.tokenizer.encode_continuation(full[len(self._rendered) :])
        else:
            new_ids = self._pipe.encode_rendered(full)
        prepared = self._pipe.prepare(
            new_ids,
            gen_config,
            stop_words=template.stop_words,
            session_id=self.id,
            history_len=self._held,
            max_new_tokens=None,
        )
        answering = self._pipe.launch(prepared)
        self._pending = (full, self._held + len(new_ids))
        return answering

    def _is_held(self) -> bool:
        """Whether the engine still holds what this session believes."""
        try:
            return len(self._pipe.engine.call("session_tokens", session_id=self.id)) == self._held
        except NotFoundError:
            return False

    def finish(self, text: str, answering: Answering) -> None:
        """Take the reply into the history; a turn that failed leaves no trace, here as in the engine."""
        full, held = self._pending
        reply = answering.reply
        if reply.finish_reason == "error":
            return
        self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": reply.text}]
        self._rendered, self._held = full + reply.text, held + len(reply.token_ids)

    def close(self) -> None:
        """Forget the conversation."""
        self._pipe.engine.call("delete_session", session_id=self.id)
        self.history, self._rendered, self._held = [], "", 0

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pipeline(
    model: str | Path = "mini",
    backend_config: EngineConfig | None = None,
    *,
    chat_template: str | None = None,
    inline: bool = True,
    progress: Callable[[float], None] | None = None,
) -> Pipeline:
    """Load a model (checkpoint folder, workspace, hub id or `mini`) and return something to call with prompts.

    `chat_template` names a template; otherwise the checkpoint's own is used. `inline=False` runs the engine as a
    process of its own.
    """
    return Pipeline(model, backend_config, chat_template=chat_template, inline=inline, progress=progress)


def _is_many(prompts: Any) -> bool:
    """A list of prompts, as opposed to one text or one list of messages."""
    if isinstance(prompts, str):
        return False
    if not isinstance(prompts, (list, tuple)):
        raise RequestError("A prompt is a text, a list of messages, or a list of these.", "prompts")
    return not prompts or not all(isinstance(p, dict) for p in prompts)


def _pieces(answering: Answering) -> Iterator[Piece]:
    try:
        for output in answering.ticket:
            piece = answering.take(output)
            if piece is not None:
                yield piece
    finally:
        if answering.reply.finish_reason is None:
            answering.ticket.abort(len(answering.reply.token_ids))
            answering.reply.finish_reason = "abort"


async def _apieces(answering: Answering) -> AsyncIterator[Piece]:
    try:
        async for output in answering.ticket:
            piece = answering.take(output)
            if piece is not None:
                yield piece
    finally:
        if answering.reply.finish_reason is None:
            answering.ticket.abort(len(answering.reply.token_ids))
            answering.reply.finish_reason = "abort"
