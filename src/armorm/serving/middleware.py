"""What every request passes first: API key, limits on requests, queue and bodies, metrics, headers of the playground.

The key is compared in constant time. It is read from `Authorization: Bearer KEY`, or from the password of
`Authorization: Basic`, which clients send for `http://any:KEY@host:8008` (OpenRLHF and verl take a URL, no headers).
Requests, bytes per body and bytes of all bodies in flight are bounded, so that no number of clients can exhaust
memory. While the queue is full, scoring requests are rejected before their body is read.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armorm.serving.errors import RequestError
from armorm.serving.metrics import Metrics
from armorm.serving.settings import ServingSettings

OPEN_PATHS = frozenset({"/health", "/ready"})  # load balancers call these without a key
UI_PATH = "/ui"  # of the playground, where a browser prompts for the key
_PAGE_HEADERS = {
    # The page loads nothing from other hosts.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'self'; base-uri 'self'; "
    "form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


class RequestMiddleware:
    """ASGI middleware around all routes.

    Args:
        overload_status: status in place of 429, for each path that queues rows.
        queue_full: seconds after which to try again while the queue is full, else None.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServingSettings,
        metrics: Metrics,
        paths: frozenset[str],
        overload_status: Mapping[str, int],
        queue_full: Callable[[], int | None],
    ) -> None:
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths
        self._overload_status, self._queue_full = overload_status, queue_full
        self._key = settings.api_key.encode() if settings.api_key is not None else None
        self._requests, self._bytes = 0, 0  # in flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route has one
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, received = time.monotonic(), 500, 0
        path = scope["path"]
        on_page = path == UI_PATH or path.startswith(f"{UI_PATH}/")

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._bytes += size
            error = self._too_large(received)
            if error is None and self._bytes > self._settings.max_bytes:
                error = RequestError(429, "too many bytes in flight; try again later", 1)
            if error is None:
                return message
            if on_page:  # Gradio would turn the error into a status 500 and a traceback in the log
                return {"type": "http.disconnect"}
            raise error

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if on_page:
                    MutableHeaders(scope=message).update(_PAGE_HEADERS)
            await send(message)

        self._requests += 1
        self._metrics.in_flight.inc()
        try:
            error = None if path in OPEN_PATHS else self._rejection(path, Headers(scope=scope))
            if error is None:
                await self._app(scope, bounded_receive, observed_send)
            else:
                response = error.response(self._overload_status.get(path, 429))
                if error.status == 401:
                    response.headers["WWW-Authenticate"] = 'Basic realm="armorm"' if on_page else "Bearer"
                await response(scope, receive, observed_send)
        finally:
            self._requests -= 1
            self._bytes -= received
            route = path if path in self._paths else UI_PATH if on_page else "other"
            self._metrics.request_ended(route, status, time.monotonic() - start)

    def _rejection(self, path: str, headers: Headers) -> RequestError | None:
        if self._key is not None and not _presents(headers.get("authorization", ""), self._key):
            return RequestError(401, "no valid API key, expected 'Authorization: Bearer KEY'")
        if self._requests > self._settings.max_requests:
            return RequestError(429, "too many requests in flight; try again later", 1)
        if path in self._overload_status and (seconds := self._queue_full()) is not None:
            return RequestError(429, "the queue is full; try again later", seconds)
        declared = headers.get("content-length", "")
        return self._too_large(int(declared) if declared.isdecimal() else 0)

    def _too_large(self, size: int) -> RequestError | None:
        if size <= self._settings.max_body:
            return None
        return RequestError(413, f"the body is too large, expected at most {self._settings.max_body} bytes")


def _presents(authorization: str, key: bytes) -> bool:
    """Whether a header contains the key; takes equally long for every value."""
    scheme, _, value = authorization.partition(" ")
    presented = value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            presented = base64.b64decode(presented, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            presented = b""
    elif scheme.lower() != "bearer":
        presented = b""
    return hmac.compare_digest(presented, key)
