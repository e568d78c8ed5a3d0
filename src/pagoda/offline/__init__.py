"""The Python face: `pipeline(model)` answers prompts, streams pieces and holds conversations.

It is the place where strings become token ids and token ids become strings; the engine below sees ids only.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pagoda.config import EngineConfig, GenerationConfig
from pagoda.engine.client import EngineClient, start_engine
from pagoda.engine.params import read_generation_defaults, sampling_params
from pagoda.engine.request import EngineRequest, Output
from pagoda.errors import PromptTooLongError, RequestError
from pagoda.models.find import resolve_model, text_folder
from pagoda.models.workspace import remembered_template
from pagoda.offline.answering import Answering, Message, Piece, Prepared, Prompt, Reply
from pagoda.offline.session import Session
from pagoda.text.stream import TextStream
from pagoda.text.template import ChatTemplate, load_template
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Answering", "Message", "Piece", "Pipeline", "Prepared", "Prompt", "Reply", "Session", "pipeline"]


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
        batch: list[Any] = list(prompts) if many else [prompts]
        most = self.engine.info.max_queued  # more at once would be refused
        running: list[Answering] = []
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
        yield from self.start(prompt, gen_config, do_preprocess=do_preprocess).pieces()

    async def acall(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> Reply:
        """`__call__` for one prompt in an event loop; cancelling it ends the request."""
        answering = self.start(prompt, gen_config, do_preprocess=do_preprocess)
        async for _ in answering.apieces():
            pass
        return answering.reply

    async def astream(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> AsyncIterator[Piece]:
        """`stream` in an event loop."""
        async for piece in self.start(prompt, gen_config, do_preprocess=do_preprocess).apieces():
            yield piece

    def session(self, session_id: str | None = None, system: str | None = None) -> "Session":
        """A conversation that the engine remembers."""
        return Session(self, session_id, system)

    def prompt_ids(self, prompt: Prompt, *, do_preprocess: bool = True, add_bos: bool = True) -> list[int]:
        """Token ids of a prompt, as the engine will get them. `add_bos`: of one without a template."""
        if not do_preprocess:
            if not isinstance(prompt, str):
                raise RequestError("do_preprocess=False takes a text, not messages.", "do_preprocess")
            self.check_length(prompt)
            return self.tokenizer.encode(prompt, add_bos=add_bos)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self.encode_rendered(self.template.render(messages))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered template; the template itself wrote the beginning of sequence, if it wants one."""
        self.check_length(text)
        ids = self.tokenizer.encode(text, add_bos=False)
        return ids if ids else self.tokenizer.encode(text, add_bos=True)

    def check_length(self, text: str) -> None:
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
