"""The routes: HTTP in, HTTP out.

In:  a scorer. Out: a FastAPI application.

Bodies are read here, bounded in size and time; what is in them is read in threads. A request whose client has
gone is dropped where it stands. Every error is `{"error": {"message", "type", "code"}}` with one sentence. What goes in
and comes out is described at `/openapi.json`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from armorm.serving import openapi
from armorm.serving.answers import ModelList, State
from armorm.serving.engine import Scorer
from armorm.serving.errors import RequestError
from armorm.serving.metrics import CONTENT_TYPE
from armorm.serving.middleware import (
    CLIENT_GONE,
    Bodies,
    Guard,
    failure_response,
    overload_status,
    unless_gone,
    within_time,
)
from armorm.serving.protocols.base import Read
from armorm.serving.routes import ROUTES
from armorm.version import __version__

_SENTENCES = {404: "no such route", 405: "this route takes another method"}


def make_app(scorer: Scorer) -> FastAPI:
    """The application around a scorer, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scorer.start()
        yield
        await asyncio.to_thread(scorer.stop)

    app = FastAPI(title="armorm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.before_stop = []  # calls that end streams which would stay open for as long as a page does
    bodies = Bodies(scorer.settings)
    for route in ROUTES:
        app.add_api_route(
            route.path,
            _endpoint(scorer, bodies, route.read),
            methods=["POST"],
            name=route.path,
            summary=route.summary,
            responses=openapi.answers_of(route),
            openapi_extra=openapi.request_of(route),
        )
    _add_state_routes(app, scorer)
    openapi.describe(app, keyed=scorer.settings.api_key is not None)
    app.add_exception_handler(RequestError, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    if scorer.settings.ui:
        from armorm.serving.playground.mount import add_playground

        add_playground(app, scorer)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(
        Guard,
        settings=scorer.settings,
        metrics=scorer.metrics,
        paths=paths,
        scoring=frozenset(route.path for route in ROUTES),
        full=lambda: scorer.full,
    )
    return app


def _endpoint(scorer: Scorer, bodies: Bodies, read: Read) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        async def scored(body: bytes) -> bytes:
            return await unless_gone(request, scorer.answer(read, body))

        try:
            content = await within_time(scorer.settings.request_seconds, bodies.read(request, scored))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        return Response(content, media_type="application/json")

    return endpoint


def _add_state_routes(app: FastAPI, scorer: Scorer) -> None:
    started = int(time.time())

    @app.get(
        "/health", summary="Whether the model still answers.", responses=openapi.state_of(State, 503, guarded=False)
    )
    async def health() -> Response:
        healthy = scorer.batcher.healthy
        return JSONResponse({"status": "ok" if healthy else "the model has failed"}, 200 if healthy else 503)

    @app.get(
        "/ready", summary="Whether a request would be taken now.", responses=openapi.state_of(State, 503, guarded=False)
    )
    async def ready() -> Response:
        accepting = scorer.batcher.accepting
        return JSONResponse({"status": "ready" if accepting else "not ready"}, 200 if accepting else 503)

    @app.get("/metrics", summary="Metrics for Prometheus.", responses=openapi.metrics_answers())
    async def metrics() -> Response:
        return Response(scorer.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", summary="The model and its objectives.", responses=openapi.state_of(ModelList))
    async def models() -> Response:
        config = scorer.rm.model.config
        card = {
            "id": scorer.settings.name,
            "object": "model",
            "created": started,
            "owned_by": "armorm",
            "max_model_len": scorer.max_length,
            "objectives": scorer.rm.objectives.to_dicts(),
            "debiased_against": config.debiasing.get("against", []),
            "steering": config.steering,
            "reference": {key: scorer.rm.reference.get(key) for key in ("score_mean", "score_std")},
        }
        return JSONResponse({"object": "list", "data": [card]})


async def _answer_failure(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, RequestError)
    if failure.status == 429:
        failure.status = overload_status(request.url.path)
    return failure_response(failure)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = _SENTENCES.get(error.status_code, error.detail)
    response = failure_response(RequestError(error.status_code, sentence))
    response.headers.update(error.headers or {})
    return response


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    return failure_response(RequestError(500, "the server made a mistake; its log says which"))
