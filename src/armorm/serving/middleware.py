"""What every request passes first: Host and Origin, API key, limits on requests, queue and bodies, metrics.

The key is compared in constant time. It is read from `Authorization: Bearer KEY`, or from the password of
`Authorization: Basic`, which clients send for `http://any:KEY@host:8008` (OpenRLHF and verl take a URL, no headers).
Requests, bytes per body and bytes of all bodies in flight are bounded, so that no number of clients can exhaust
memory. While the queue is full, scoring requests are rejected before their body is read. After a response to a request
whose body has not arrived, the connection is closed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
import time
from collections.abc import Callable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armorm.serving.body import ENCODINGS, InFlight, RequestBody, too_large
from armorm.serving.errors import RequestError
from armorm.serving.hosts import HostRules
from armorm.serving.metrics import Metrics
from armorm.serving.settings import ServingSettings

# Without a key: load balancers call the first two, browsers the others, to which they send no password.
OPEN_PATHS = frozenset({"/health", "/ready", "/favicon.ico", "/manifest.json"})
UI_PATH = "/ui"  # of the playground
_BROWSER_PATHS = frozenset({"/", "/docs", UI_PATH})  # where a browser prompts for the key
_JSON_TYPE = re.compile(r"application/(json|[a-z0-9.-]+\+json)")
_STOPPED = RequestError(503, "the server is shutting down", 5)
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
        in_flight: where requests and their bytes are counted; its `end` answers all of them with 503.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServingSettings,
        metrics: Metrics,
        paths: frozenset[str],
        overload_status: Mapping[str, int],
        queue_full: Callable[[], int | None],
        in_flight: InFlight,
        hosts: HostRules,
    ) -> None:
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths
        self._overload_status, self._queue_full = overload_status, queue_full
        self._in_flight, self._hosts = in_flight, hosts
        self._key = settings.api_key.encode() if settings.api_key is not None else None
        self._checked: ASGIApp = self._answer
        if settings.allowed_origins:
            origins, headers = list(settings.allowed_origins), ["Authorization", "Content-Encoding", "Content-Type"]
            self._checked = CORSMiddleware(self._answer, origins, allow_methods=("GET", "POST"), allow_headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route has one
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, path, headers = time.monotonic(), 0, scope["path"], Headers(scope=scope)
        on_page = path == UI_PATH or path.startswith(f"{UI_PATH}/")
        body = RequestBody(headers, receive, self._settings, self._in_flight)

        async def observed_receive() -> Message:
            try:
                return await body.receive()
            except RequestError:
                if not on_page:
                    raise
                # Gradio would turn the error into a status 500 and a traceback in the log.
                return {"type": "http.disconnect"}

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if on_page:
                    MutableHeaders(scope=message).update(_PAGE_HEADERS)
                if not body.complete:
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif not message.get("more_body", False) and not body.complete:
                await send({**message, "more_body": True})
                await body.drain()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        task = asyncio.current_task()
        assert task is not None
        self._in_flight.tasks.add(task)
        self._metrics.in_flight.inc()
        try:
            error = self._hosts.rejection(headers, scope["server"][0] if scope.get("server") else None)
            if error is None:
                await self._checked(scope, observed_receive, observed_send)
            else:
                await error.response()(scope, receive, observed_send)
        except asyncio.CancelledError:
            if not self._in_flight.ended or status:
                raise
            await _STOPPED.response()(scope, receive, observed_send)
        finally:
            self._in_flight.tasks.discard(task)
            body.release()
            route = path if path in self._paths else UI_PATH if on_page else "other"
            self._metrics.request_ended(route, status or 500, time.monotonic() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The response of the application, or why it is not asked."""
        path = scope["path"]
        error = None if path in OPEN_PATHS else self._rejection(scope["method"], path, Headers(scope=scope))
        if error is None:
            await self._app(scope, receive, send)
            return
        response = error.response(self._overload_status.get(path, 429))
        if error.status == 401:
            prompts = path in _BROWSER_PATHS or path.startswith(f"{UI_PATH}/")
            response.headers["WWW-Authenticate"] = 'Basic realm="armorm"' if prompts else "Bearer"
        if error.status == 415:
            response.headers["Accept-Encoding"] = "gzip"
        await response(scope, receive, send)

    def _rejection(self, method: str, path: str, headers: Headers) -> RequestError | None:
        if self._key is not None and not _presents(headers.get("authorization", ""), self._key):
            return RequestError(401, "no valid API key, expected 'Authorization: Bearer KEY'")
        if self._in_flight.ended:
            return _STOPPED
        if len(self._in_flight.tasks) > self._settings.max_requests:
            return RequestError(429, "too many requests in flight; try again later", 1)
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy may read another one of the two, and take a part of this body for the next request.
            return RequestError(400, "found Content-Length and Transfer-Encoding, expected one of them")
        encoding = headers.get("content-encoding", "").strip().lower()
        if encoding not in ENCODINGS:
            return RequestError(415, f"Content-Encoding {encoding[:50]}, expected gzip or none")
        scores = path in self._overload_status and method == "POST"
        if scores and not _JSON_TYPE.fullmatch(headers.get("content-type", "").partition(";")[0].strip().lower()):
            # (Pages of other sites can send other types without the browser asking the server first.)
            return RequestError(415, "expected the header 'Content-Type: application/json'")
        if path in self._overload_status and (seconds := self._queue_full()) is not None:
            return RequestError(429, "the queue is full; try again later", seconds)
        declared = headers.get("content-length", "")
        return too_large(int(declared) if declared.isdecimal() else 0, self._settings)


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
