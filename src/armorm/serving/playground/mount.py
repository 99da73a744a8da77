"""The page inside the server: at `/ui`, behind the same key, bounded, and speaking to this server alone.

In:  the server's application and its scorer. Out: the same application, with the page.

The guard stands before the page as before every route; where a key is set, a browser asks for it (any name, the key
as password). Bodies are bounded here, since Gradio reads its own. A content security policy keeps the page from
any other host, whatever a library may put into it.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armorm.serving.engine import Scorer
from armorm.serving.errors import RequestError
from armorm.serving.middleware import UI_PATH, failure_response

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


def add_playground(app: FastAPI, scorer: Scorer) -> None:
    """Put the page into an application."""
    from armorm.serving.playground import page

    page.gr.mount_gradio_app(
        app,
        page.playground(scorer),
        path=UI_PATH,
        theme=page.theme(),
        css=page.STYLE,
        head=page.HEAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=scorer.settings.max_body,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    mounted = next(route for route in app.routes if getattr(route, "path", None) == UI_PATH)
    stop = getattr(getattr(mounted, "app", None), "stop_event", None)  # Gradio's own: ends a page's heartbeat
    if stop is not None:
        app.state.before_stop.append(stop.set)
    app.add_middleware(PageBounds, most_bytes=scorer.settings.max_body)


class PageBounds:
    """ASGI middleware for the page's paths: bodies no larger than `most_bytes`, headers that keep it to this server."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request of the page on, or refuse it."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == UI_PATH or path.startswith(f"{UI_PATH}/")):
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated) > self._most:
            failure = RequestError(413, f"the body is too large, expected at most {self._most} bytes")
            await failure_response(failure)(scope, receive, send)
            return
        found = 0

        async def bounded() -> Message:
            nonlocal found
            message = await receive()
            found += len(message.get("body", b""))
            return message if found <= self._most else {"type": "http.disconnect"}

        async def kept_home(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
            await send(message)

        await self._app(scope, bounded, kept_home)
