"""uvicorn's HTTP/1.1 with limits on the head of a request, which uvicorn does not have."""

import asyncio
import http

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD = 2**16  # bytes of a request's line and headers


class Protocol(HttpToolsProtocol):
    """Cuts off a client whose request's head takes longer than `head_timeout` or more than MAX_HEAD.

    A connection without a request waits for one as long: from its start on, or, once it has had one,
    for uvicorn's time to keep connections alive.
    """

    def __init__(self, *args, head_timeout: float, **kwargs):
        """`head_timeout` in seconds; the others are HttpToolsProtocol's."""
        super().__init__(*args, **kwargs)
        self._head_timeout = head_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._head = 0  # bytes received while the timer ran

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Starts the timer."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Starts the timer where a request begins, and counts."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        super().data_received(data)
        if self._timer is not None:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._cut_off(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_headers_complete(self) -> None:
        """Stops the timer."""
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        timeout = http.HTTPStatus.REQUEST_TIMEOUT
        self._timer = self.loop.call_later(self._head_timeout, self._cut_off, timeout)
        self._head = 0

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut_off(self, status: http.HTTPStatus) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(STATUS_LINE[status] + b"Connection: close\r\n\r\n")
            self.transport.close()
