"""One HTTP request's way through the engine, streamed or whole, ended when its client leaves."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import orjson
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from pagoda.engine.request import Output
from pagoda.errors import EngineError, PagodaError, RequestError
from pagoda.log import get_logger
from pagoda.offline import Answering, Piece, Pipeline, Prepared
from pagoda.serve.error_map import ClientGoneError

log = get_logger(__name__)
R = TypeVar("R")


class Writer(Protocol):
    """How a family of routes writes answers."""

    media_type: str

    def take(self, index: int, piece: Piece) -> bytes:
        """What a piece of choice `index` adds to the stream."""

    def end(self) -> bytes:
        """The end of the stream."""

    def failure(self, error: PagodaError) -> bytes:
        """The end of a stream that failed."""

    def whole(self) -> dict[str, Any]:
        """The answer of a request that is not streamed."""


def copies(prepared: Prepared, tenant: str, answer_id: str, first: int = 0, num: int = 1) -> list[Prepared]:
    """`num` choices of one prompt: their own seeds, and ids that `/abort` finds by the answer's id."""
    request = prepared.request
    made = []
    for i in range(num):
        params = replace(request.params, seed=(request.params.seed + i) % 2**64)
        made.append(prepared._replace(request=replace(request, id=f"{tenant}-{answer_id}-{first + i}", params=params)))
    return made


def new_answer_id() -> str:
    return uuid.uuid4().hex


class Generation:
    """All choices of one HTTP request. Iterate `pieces` until each had its end; `close` ends what is still open
    and then calls `at_end`."""

    def __init__(self, pipe: Pipeline, prepared: list[Prepared], seconds: float):
        most = pipe.engine.info.max_queued
        if len(prepared) > most:
            raise RequestError(f"{len(prepared)} answers are asked for: at most {most} can wait here at once.", "n")
        self._inbox: asyncio.Queue[Output] = asyncio.Queue()
        self.answers: list[Answering] = []
        self.at_end: Callable[[], Any] = lambda: None
        self._index = {p.request.id: i for i, p in enumerate(prepared)}
        self._timer = asyncio.get_running_loop().call_later(seconds, self._abort)
        try:
            for one in prepared:
                self.answers.append(pipe.launch(one, self._inbox))
        except BaseException:
            self.close()
            raise

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, piece) as they come. Raises the error that ended a choice."""
        left = len(self.answers)
        while left:
            output = await self._inbox.get()
            index = self._index[output.id]
            answering = self.answers[index]
            if answering.reply.finish_reason is not None:
                continue
            piece = answering.take(output)
            if piece is not None:
                left -= piece.finish_reason is not None
                yield index, piece

    def close(self) -> None:
        """Abort what has not ended; its sessions keep what was received."""
        self._timer.cancel()
        self._abort()
        at_end, self.at_end = self.at_end, lambda: None
        at_end()

    def _abort(self) -> None:
        for answering in self.answers:
            if answering.reply.finish_reason is None:
                answering.ticket.abort(len(answering.reply.token_ids))


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[R]) -> R:
    """Await `work`, but cancel it and raise `ClientGoneError` when the client disconnects."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError("The client left.")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def respond(request: Request, generation: Generation, writer: Writer, stream: bool | None) -> Response:
    """The HTTP answer. A refusal by the engine becomes a status, for the first piece is awaited before headers go."""
    pieces = generation.pieces()
    if stream:
        try:
            first = await unless_gone(request.receive, anext(pieces))  # type: ignore[arg-type]
        except BaseException:
            generation.close()
            raise
        return EventStream(first, pieces, generation, writer)

    async def run() -> bytes:
        async for _ in pieces:
            pass
        return orjson.dumps(writer.whole())

    try:
        return Response(await unless_gone(request.receive, run()), media_type="application/json")
    finally:
        generation.close()


class EventStream(Response):
    """Server-sent events (or JSON lines) of a generation."""

    def __init__(
        self, first: tuple[int, Piece], pieces: AsyncIterator[tuple[int, Piece]], generation: Generation, writer: Writer
    ):
        self.status_code, self.background, self.body = 200, None, b""
        self.raw_headers = [(b"content-type", writer.media_type.encode()), (b"cache-control", b"no-cache")]
        self._first, self._pieces, self._generation, self._writer = first, pieces, generation, writer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def run() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await _send(send, self._writer.take(*self._first))
                async for index, piece in self._pieces:
                    await _send(send, self._writer.take(index, piece))
                last = self._writer.end()
            except PagodaError as error:
                last = self._writer.failure(error)
            except Exception:
                log.exception("a stream failed")
                last = self._writer.failure(EngineError("The server failed on this request; its log says why."))
            await send({"type": "http.response.body", "body": last})

        try:
            await unless_gone(receive, run())
        except ClientGoneError:
            pass
        finally:
            self._generation.close()


async def _send(send: Any, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})
