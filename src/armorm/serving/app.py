"""The FastAPI application: routes of all protocols, state routes, pages and /openapi.json.

Bodies are read here, within the time limit of a request, and parsed in threads (`engine.py`). A request whose client
disconnects is cancelled. Every error is `{"error": {"message", "type", "code"}}` with one sentence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar, Union

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import generate_latest
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from typing_extensions import NotRequired, TypedDict

from armorm.serving.body import InFlight
from armorm.serving.engine import ScoringEngine
from armorm.serving.errors import RequestError
from armorm.serving.hosts import HostRules
from armorm.serving.metrics import CONTENT_TYPE
from armorm.serving.middleware import OPEN_PATHS, RequestMiddleware
from armorm.serving.pages import add_pages
from armorm.serving.protocols import ROUTES, ROUTES_BY_PATH, parsed_request
from armorm.serving.protocols.base import ErrorAnswer, Route, closed
from armorm.version import __version__

CLIENT_DISCONNECTED = 499
_GIVEN_UP_SECONDS = 10.0
_MESSAGES = {404: "no such route", 405: "this route does not support the method"}
T = TypeVar("T")


@closed
class State(TypedDict):
    """Response of `GET /health` and `GET /ready`."""

    status: str


@closed
class ReliabilityCard(TypedDict):
    """How well an objective is predicted (`armorm.objectives.Reliability`)."""

    r2: float
    signal_variance: float
    epistemic_variance: Union[float, None]


@closed
class ObjectiveCard(TypedDict):
    """An objective: raw rating = scale * reward + offset."""

    name: str
    source: str
    low: float
    high: float
    scale: float
    offset: float
    direction: Literal["higher", "lower", "neutral"]
    compute: Union[str, None]
    reliability: NotRequired[ReliabilityCard]  # if it was measured


@closed
class Reference(TypedDict):
    """Mean and standard deviation of the scores of the model's reference data, null if its config lacks them."""

    score_mean: Union[float, None]
    score_std: Union[float, None]


@closed
class ModelCard(TypedDict):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Union[int, None]
    objectives: list[ObjectiveCard]
    debiased_against: list[str]
    steering: dict[str, Any]
    reward_transform: list[list[float]]
    margin_scale: Union[float, None]
    reference: Reference


@closed
class ModelList(TypedDict):
    """Response of `GET /v1/models`: one model."""

    object: Literal["list"]
    data: list[ModelCard]


def make_app(engine: ScoringEngine, hosts: Sequence[str] | None = None) -> FastAPI:
    """The application around an engine, which it starts and stops.

    Args:
        hosts: names in `Host` that are answered besides those of this machine; None answers every name.
    """
    in_flight = InFlight()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.batcher.start()
        yield
        # Requests that were given up wait for no result; the pass of the model that is running ends within seconds.
        await asyncio.to_thread(engine.stop, _GIVEN_UP_SECONDS if in_flight.ended else engine.settings.shutdown_seconds)

    app = FastAPI(title="armorm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.in_flight = in_flight
    app.state.before_stop = []  # callbacks that end streams which would stay open as long as their page
    for path, routes in ROUTES_BY_PATH.items():
        app.add_api_route(
            path,
            _endpoint(engine, routes),
            methods=["POST"],
            name=path,
            summary=" or ".join(route.summary for route in routes) + ".",
            responses={200: _response("The scores.", [route.response for route in routes]), **_errors(_ERRORS)},
            openapi_extra={"requestBody": _request_body(routes)},
        )
    _add_state_routes(app, engine)
    add_pages(app, engine)
    _add_schema(app, with_key=engine.settings.api_key is not None)
    overload_status = {path: routes[0].overload_status for path, routes in ROUTES_BY_PATH.items()}

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return error.response(overload_status.get(request.url.path, 429))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = RequestError(error.status_code, _MESSAGES.get(error.status_code, error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        return RequestError(500, "internal error of the server; see its log").response()

    if engine.settings.ui:
        from armorm.serving.playground.page import add_playground

        add_playground(app, engine)
    app.add_middleware(
        RequestMiddleware,
        settings=engine.settings,
        metrics=engine.metrics,
        paths=frozenset(route.path for route in app.routes if hasattr(route, "path")),
        overload_status=overload_status,
        queue_full=lambda: engine.queue_full,
        in_flight=in_flight,
        hosts=HostRules(hosts, engine.settings.allowed_origins),
    )
    return app


def _endpoint(engine: ScoringEngine, routes: list[Route]) -> Callable[[Request], Awaitable[Response]]:
    seconds = engine.settings.request_seconds

    async def answer(request: Request) -> bytes:
        body = await request.body()
        return await _unless_disconnected(request, engine.answer(lambda: parsed_request(routes, body, engine.reader)))

    async def endpoint(request: Request) -> Response:
        try:
            content = await asyncio.wait_for(answer(request), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise RequestError(504, f"not scored within {seconds:g} s") from None
        except ClientDisconnect:
            return Response(status_code=CLIENT_DISCONNECTED)
        return Response(content, media_type="application/json")

    return endpoint


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine; if the client disconnects, it is cancelled. Call it after reading the body."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _add_state_routes(app: FastAPI, engine: ScoringEngine) -> None:
    started = int(time.time())
    state = _response("The state.", [State])
    guarded = _errors((401, 403, 421, 429, 500))
    open_errors = _errors((403, 421))

    @app.get("/health", summary="Whether the model works.", responses={200: state, 503: state, **open_errors})
    async def health() -> Response:
        healthy = engine.batcher.healthy
        return JSONResponse({"status": "ok" if healthy else "the model has failed"}, 200 if healthy else 503)

    @app.get(
        "/ready", summary="Whether a request would be accepted now.", responses={200: state, 503: state, **open_errors}
    )
    async def ready() -> Response:
        accepting = engine.batcher.accepting
        return JSONResponse({"status": "ready" if accepting else "not ready"}, 200 if accepting else 503)

    text = {"description": "Exposition format.", "content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", summary="Prometheus metrics.", responses={200: text, **guarded})
    async def metrics() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE)

    listing = _response("The model.", [ModelList])

    @app.get("/v1/models", summary="The model and its objectives.", responses={200: listing, **guarded})
    async def models() -> Response:
        config = engine.rm.model.config
        card = {
            "id": engine.settings.name,
            "object": "model",
            "created": started,
            "owned_by": "armorm",
            "max_model_len": engine.max_length,
            "objectives": engine.rm.objectives.to_dicts(),
            "debiased_against": config.debiasing.get("against", []),
            "steering": config.steering,
            "reward_transform": engine.rm.transform.tolist(),
            "margin_scale": engine.rm.margin_scale,
            "reference": {key: engine.rm.reference.get(key) for key in ("score_mean", "score_std")},
        }
        return JSONResponse({"object": "list", "data": [card]})


# --- /openapi.json ---------------------------------------------------------------------------------------

_ROUTE_TYPES = [kind for route in ROUTES for kind in (route.request, route.response)]
# The schema of each type, usually a reference, and what they refer to.
_SCHEMAS, _SHARED = TypeAdapter.json_schemas(
    [(kind, "validation", TypeAdapter(kind)) for kind in dict.fromkeys([*_ROUTE_TYPES, ErrorAnswer, State, ModelList])],
    ref_template="#/components/schemas/{model}",
)
_RETRY_AFTER = {"headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}}
_ERRORS = {
    400: "The request cannot be read.",
    401: "Missing or wrong API key.",
    403: "The request comes from a page of another site.",
    408: "The body stopped coming.",
    413: "The request is larger than the server accepts.",
    415: "The headers do not say that the body is JSON, plain or gzip.",
    421: "The server does not answer for this Host.",
    422: "Nothing in the request can be scored.",
    429: "The queue is full.",
    500: "The model failed.",
    503: "The server is shutting down.",
    504: "Not scored in time.",
}


def _add_schema(app: FastAPI, *, with_key: bool) -> None:
    """Make the application's OpenAPI schema contain all types that its routes name."""

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            found["components"] = {"schemas": dict(sorted(_SHARED["$defs"].items()))}
            if with_key:
                found["components"]["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"},
                    "password": {"type": "http", "scheme": "basic", "description": "The key is the password."},
                }
                for path, methods in found["paths"].items():
                    for operation in methods.values():
                        operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {"password": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _one_of(types: Sequence[Any]) -> dict[str, Any]:
    schemas = [_SCHEMAS[kind, "validation"] for kind in dict.fromkeys(types)]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _request_body(routes: Sequence[Route]) -> dict[str, Any]:
    examples = {route.summary: {"value": route.example} for route in routes}
    schema = _one_of([route.request for route in routes])
    return {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}}


def _response(description: str, types: Sequence[Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _one_of(types)}}}


def _errors(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    return {
        status: _response(_ERRORS[status], [ErrorAnswer]) | (_RETRY_AFTER if status in (429, 503) else {})
        for status in statuses
    }
