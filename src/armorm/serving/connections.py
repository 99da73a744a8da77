"""Time and number limits of connections, on uvicorn's HTTP/1.1 protocol.

uvicorn limits the size of headers (64 KiB) and how long a connection stays open between two requests. Here are limited
the time in which headers must arrive, the number of connections, and how long a client may leave a response unread.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from itertools import count
from typing import ClassVar

from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from armorm.serving.errors import RequestError
from armorm.serving.settings import ServingSettings

_TURNS = count()  # (The time of the loop is in milliseconds, the same for many connections that come at once.)
_PHRASES = {408: "Request Timeout", 503: "Service Unavailable"}


class Connection(H11Protocol):
    """One connection; subclasses set the `settings` of their server."""

    settings: ClassVar[ServingSettings]
    _header_timer: asyncio.TimerHandle | None = None
    _turn = 0  # of those that wait for a request: the one that has waited longest has the lowest

    @property
    def _waits(self) -> bool:
        """Whether no request is being received or answered, except perhaps its headers."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sys.platform == "linux" and sock is not None:  # the kernel ends a connection whose client reads nothing
            milliseconds = round(self.settings.keep_alive_seconds * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._turn = next(_TURNS)
        self._await_headers()
        if len(self.connections) > self.settings.max_connections:
            others = (one for one in self.connections if isinstance(one, Connection) and one is not self and one._waits)
            longest = min(others, key=lambda one: one._turn, default=None)
            if longest is None:
                self._reject(RequestError(503, "too many connections; try again later", 1))
            else:
                longest.transport.abort()
                self.connections.discard(longest)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._waits:
            self._end_timer()
        elif self._header_timer is None and not self.transport.is_closing():
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._turn = next(_TURNS)
        super().on_response_complete()

    def shutdown(self) -> None:
        self._end_timer()
        super().shutdown()

    def _await_headers(self) -> None:
        seconds = self.settings.header_seconds
        error = RequestError(408, f"the headers did not come within {seconds:g} s")
        self._header_timer = self.loop.call_later(seconds, self._reject, error)

    def _end_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _reject(self, error: RequestError) -> None:
        """Send an error that answers no request, and close the connection."""
        self._end_timer()
        if not self.transport.is_closing():
            self.transport.write(_raw(error.response()))
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are not HTTP; the error has the form of all others."""
        self._reject(RequestError(400, "the request is not valid HTTP/1.1"))


def connection_class(settings: ServingSettings) -> type[Connection]:
    """The class of connections of a server with these settings."""
    return type("Connection", (Connection,), {"settings": settings})


def _raw(response: Response) -> bytes:
    status = response.status_code
    head = [f"HTTP/1.1 {status} {_PHRASES.get(status, 'Bad Request')}".encode(), b"connection: close"]
    head += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*head, b"", bytes(response.body)])
