"""Bodies of requests as they arrive: bytes of one and of all, time without a byte, gzip.

Limits apply to unpacked bytes. gzip is unpacked piece by piece in a thread, never further than the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from armorm.serving.errors import RequestError
from armorm.serving.settings import ServingSettings

ENCODINGS = ("", "identity", "gzip", "x-gzip")  # of `Content-Encoding`
_GZIP_WINDOW = 16 + zlib.MAX_WBITS  # a gzip header is required
_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 1 << 20


class InFlight:
    """Requests that are being answered, their bytes, and whether the server has stopped working on them."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.bytes = 0
        self.ended = False

    def end(self) -> None:
        """Cancel all requests, which `RequestMiddleware` then answers with 503; those that still come too."""
        self.ended = True
        for task in list(self.tasks):
            task.cancel()


class RequestBody:
    """The body of one request; `receive` replaces the function of that name in ASGI.

    Raises:
        RequestError: 400 for a broken gzip stream, 408 if no byte comes for too long, 413 for too many bytes, 429 for
            too many bytes of all requests together.
    """

    def __init__(self, headers: Headers, receive: Receive, settings: ServingSettings, in_flight: InFlight) -> None:
        self._receive, self._settings, self._in_flight = receive, settings, in_flight
        zipped = headers.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip")
        self._gzip = zlib.decompressobj(_GZIP_WINDOW) if zipped else None
        self._size = 0
        # Whether everything that the client announced has arrived.
        self.complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        if self.complete:  # what comes is the end of the connection, at any time
            return await self._receive()
        seconds = self._settings.body_idle_seconds
        try:
            message = await asyncio.wait_for(self._receive(), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise RequestError(408, f"no byte of the body came for {seconds:g} s") from None
        if message["type"] != "http.request":
            return message
        self.complete = not message.get("more_body", False)
        body = message.get("body", b"")
        if self._gzip is not None:
            body = await asyncio.to_thread(self._unpacked, body)
        self._size += len(body)
        self._in_flight.bytes += len(body)
        error = too_large(self._size, self._settings)
        if error is None and self._in_flight.bytes > self._settings.max_bytes:
            error = RequestError(429, "too many bytes in flight; try again later", 1)
        if error is not None:
            raise error
        return {**message, "body": body}

    def release(self) -> None:
        """Count the bytes no longer; called once, when the request has been answered."""
        self._in_flight.bytes -= self._size

    async def drain(self) -> None:
        """Discard what still arrives, for a short time.

        A connection closed on unread bytes is reset, and the client may lose the response that it was sent.
        """
        end, left = time.monotonic() + _DRAIN_SECONDS, _DRAIN_BYTES
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            while not self.complete and left > 0 and (seconds := end - time.monotonic()) > 0:
                message = await asyncio.wait_for(self._receive(), seconds)
                left -= len(message.get("body", b""))
                self.complete = not message.get("more_body", False)

    def _unpacked(self, packed: bytes) -> bytes:
        assert self._gzip is not None
        try:
            found = self._gzip.decompress(packed, self._settings.max_body - self._size + 1)
        except zlib.error as error:
            raise RequestError(400, f"the body is not gzip: {error}") from None
        if self._gzip.unused_data:
            raise RequestError(400, "the body is not gzip: found bytes behind its end")
        if self.complete and not self._gzip.eof and self._size + len(found) <= self._settings.max_body:
            raise RequestError(400, "the body is not gzip: it ends early")
        return found


def too_large(size: int, settings: ServingSettings) -> RequestError | None:
    """The error of a body of this many bytes, if there are too many."""
    if size <= settings.max_body:
        return None
    return RequestError(413, f"the body is too large, expected at most {settings.max_body} bytes")
