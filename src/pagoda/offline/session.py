"""Conversations that the engine remembers."""

import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pagoda.config import GenerationConfig
from pagoda.errors import NotFoundError
from pagoda.offline.answering import Answering, Message, Piece, Reply

if TYPE_CHECKING:
    from pagoda.offline import Pipeline


class Session:
    """A conversation: each turn sends only its new text, the engine supplies the rest from its cache or recomputes it.

    `history` is the messages so far. A turn that was aborted keeps what was received.
    """

    def __init__(self, pipe: "Pipeline", session_id: str | None, system: str | None):
        self.id = session_id or uuid.uuid4().hex
        self.history: list[Message] = [{"role": "system", "content": system}] if system else []
        self._pipe = pipe
        self._rendered = ""  # all text that the engine holds for this session
        self._held = 0  # tokens that it holds

    def __call__(self, text: str, gen_config: GenerationConfig | None = None) -> Reply:
        """Say something and wait for the whole reply."""
        answering = self.start(text, gen_config)
        try:
            for _ in answering.pieces():
                pass
        finally:
            self.finish(text, answering)
        return answering.reply

    def stream(self, text: str, gen_config: GenerationConfig | None = None) -> Iterator[Piece]:
        """Say something and get the reply piece by piece. Leaving the loop stops the reply and keeps what came."""
        answering = self.start(text, gen_config)
        try:
            yield from answering.pieces()
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
