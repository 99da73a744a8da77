"""The guard: what every request passes before anything is read of it.

In:  an ASGI request. Out: the same, bounded; or an error as JSON.

A key, where one is set, is compared in constant time. It may stand in `Authorization: Bearer KEY`, or as the
password of `Authorization: Basic`, which is what clients make of `http://any:KEY@host:8008` (OpenRLHF and verl
take an address and no headers). Requests and bytes under way are bounded, so that no crowd of clients can fill
the memory; a body larger than the limit is refused before it is read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armorm.serving.errors import RequestError
from armorm.serving.metrics import Metrics
from armorm.serving.settings import ServingSettings

OPEN_PATHS = frozenset({"/health", "/ready"})  # load balancers ask here, without a key
CLIENT_GONE = 499
UI_PATH = "/ui"  # of the playground, where a browser asks for the key
_LONGEST_MESSAGE = 1000
T = TypeVar("T")


class Guard:
    """ASGI middleware: key, count of requests, room in the queue, metrics.

    Args:
        paths: of the routes, for the metrics' labels.
        scoring: those of them that queue rows.
        full: seconds after which to try again while the queue is full, None while it is not. What is turned away for it
            costs nothing but its head: under a storm, bodies that nobody will score are neither read nor tokenized.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServingSettings,
        metrics: Metrics,
        paths: frozenset[str],
        scoring: frozenset[str],
        full: Callable[[], int | None],
    ) -> None:
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, paths
        self._scoring, self._full = scoring, full
        self._key = settings.api_key.encode() if settings.api_key is not None else None
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "websocket":  # no route has one
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 500
        page = _is_page(scope["path"])
        route = scope["path"] if scope["path"] in self._paths else UI_PATH if page else "other"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._under_way += 1
        self._metrics.request_began()
        try:
            await (self._refusal(scope) or self._app)(scope, receive, counted)
        finally:
            self._under_way -= 1
            self._metrics.request_ended(route, status, time.monotonic() - start)

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["path"] in OPEN_PATHS:
            return None
        if self._key is not None and not _shows(Headers(scope=scope).get("authorization", ""), self._key):
            failure = RequestError(401, "no valid API key, expected 'Authorization: Bearer KEY'")
            response = failure_response(failure)
            response.headers["WWW-Authenticate"] = 'Basic realm="armorm"' if _is_page(scope["path"]) else "Bearer"
            return response
        if self._under_way > self._settings.max_requests:
            return failure_response(
                RequestError(overload_status(scope["path"]), "too many requests are under way; try again later", 1)
            )
        if scope["path"] in self._scoring and (seconds := self._full()) is not None:
            return failure_response(
                RequestError(overload_status(scope["path"]), "the queue is full; try again later", seconds)
            )
        return None


class Bodies:
    """Reads bodies, each and all together bounded."""

    def __init__(self, settings: ServingSettings) -> None:
        self._settings = settings
        self._bytes = 0

    async def read(self, request: Request, then: Callable[[bytes], Awaitable[T]]) -> T:
        """Read a body, and count its bytes as long as `then` works on it.

        Raises:
            RequestError: 413 for a body beyond the limit, 429 where too many bytes are under way.
            ClientDisconnect: where the client goes before it has sent everything.
        """
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > self._settings.max_body:
            raise _too_large(self._settings.max_body)
        body = bytearray()
        try:
            async for chunk in request.stream():
                self._bytes += len(chunk)
                body += chunk
                if len(body) > self._settings.max_body:
                    raise _too_large(self._settings.max_body)
                if self._bytes > self._settings.max_bytes:
                    raise RequestError(429, "too many bytes are under way; try again later", 1)
            return await then(bytes(body))
        finally:
            self._bytes -= len(body)


async def within_time(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which ends with the client's patience or the server's.

    Raises:
        RequestError: 504 after `seconds`.
    """
    try:
        return await asyncio.wait_for(work, seconds)
    except (asyncio.TimeoutError, TimeoutError):
        raise RequestError(504, f"not scored within {seconds:g} s") from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work after the body was read, dropped when the client goes.

    Raises:
        ClientDisconnect: where it does.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def failure_response(failure: RequestError) -> Response:
    """A refusal as `{"error": {"message", "type", "code"}}`."""
    message = str(failure)
    message = message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + "..."
    error = {"message": message, "type": failure.kind, "code": failure.status}
    headers = {"Retry-After": str(failure.retry_after)} if failure.retry_after is not None else None
    return Response(json.dumps({"error": error}), failure.status, headers, "application/json")


def overload_status(path: str) -> int:
    """429; but 503 where verl calls, which gives a sample up at any 4xx and tries again after a 5xx."""
    return 503 if path in ("/classify", "/v1/embeddings") else 429


def _is_page(path: str) -> bool:
    return path == UI_PATH or path.startswith(f"{UI_PATH}/")


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"the body is too large, expected at most {limit} bytes")


def _shows(authorization: str, key: bytes) -> bool:
    """Whether a header shows the key; equally long whatever is in it."""
    scheme, _, value = authorization.partition(" ")
    shown = value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            shown = base64.b64decode(shown, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            shown = b""
    elif scheme.lower() != "bearer":
        shown = b""
    return hmac.compare_digest(shown, key)
