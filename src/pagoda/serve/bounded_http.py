"""HTTP/1.1 whose heads are bounded: neither a huge one nor one that never ends holds a connection."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10
HEAD_SECONDS = 20.0


class BoundedHttp(HttpToolsProtocol):
    """Uvicorn's protocol, which answers 400 to a head (request line and headers) of more than `MAX_HEAD_BYTES` and
    closes a connection whose head is not complete `HEAD_SECONDS` after it began. A connection without a request yet
    has begun one; idle ones between requests are uvicorn's matter."""

    _head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None  # while a head is on its way

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The headers are larger than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            raise ValueError("the headers are too large")  # the parser stops, which uvicorn answers with 400
        super().on_headers_complete()

    def _expect_head(self) -> None:
        self._end_head()
        self._head_bytes = 0
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
