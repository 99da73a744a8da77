"""The routes: HTTP in, HTTP out.

In:  a scorer. Out: a FastAPI application.

Bodies are read here, bounded in size and time; what is in them is read in threads. A request whose client has
gone is dropped where it stands. Every error is `{"error": {"message", "type", "code"}}` with one sentence. What goes in
and comes out is described at `/openapi.json`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving import answers
from armorm.serving.answers import ErrorAnswer, ModelList, State
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
from armorm.serving.protocols import armorm as native
from armorm.serving.protocols import llamafactory, nim, openrlhf, sglang, vllm
from armorm.serving.protocols.base import Exchange, Read
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
            responses=answers_of(route),
            openapi_extra=request_of(route),
        )
    _add_state_routes(app, scorer)
    describe(app, keyed=scorer.settings.api_key is not None)
    app.add_exception_handler(RequestError, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    if scorer.settings.ui:
        from armorm.serving.playground.page import add_playground

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

    @app.get("/health", summary="Whether the model still answers.", responses=state_of(State, 503, guarded=False))
    async def health() -> Response:
        healthy = scorer.batcher.healthy
        return JSONResponse({"status": "ok" if healthy else "the model has failed"}, 200 if healthy else 503)

    @app.get("/ready", summary="Whether a request would be taken now.", responses=state_of(State, 503, guarded=False))
    async def ready() -> Response:
        accepting = scorer.batcher.accepting
        return JSONResponse({"status": "ready" if accepting else "not ready"}, 200 if accepting else 503)

    @app.get("/metrics", summary="Metrics for Prometheus.", responses=metrics_answers())
    async def metrics() -> Response:
        return Response(scorer.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", summary="The model and its objectives.", responses=state_of(ModelList))
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


_MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]

_PROMPT = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"

_RENDERED = f"{_PROMPT}4<|im_end|>"


def read_classify(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request on the path that vLLM and SGLang share."""
    if "text" in body and "input" not in body and "messages" not in body:
        return sglang.read_classify(body, reader)
    return vllm.read_classify(body, reader)


class Route(NamedTuple):
    """A scoring route.

    Attributes:
        path: of the route.
        read: reads a body.
        forms: what a body may be.
        answers: what an answer may be.
        summary: one sentence.
        example: a body.
    """

    path: str
    read: Read
    forms: tuple[type[BaseModel], ...]
    answers: tuple[Any, ...]
    summary: str
    example: dict[str, Any]


ROUTES: tuple[Route, ...] = (
    Route(
        "/v1/reward",
        native.read,
        (native.RewardRequest,),
        (answers.RewardAnswer,),
        "Scores with everything they are made of.",
        {"conversations": [_MESSAGES], "normalize": False},
    ),
    Route(
        "/get_reward",
        openrlhf.read,
        (openrlhf.GetRewardRequest,),
        (answers.GetRewardAnswer,),
        "OpenRLHF's remote reward model.",
        {"query": [_RENDERED], "prompts": [_PROMPT], "labels": [None]},
    ),
    Route(
        "/classify",
        read_classify,
        (vllm.PoolingRequest, sglang.ClassifyRequest),
        (answers.ClassifyAnswer, answers.EmbeddedTexts),
        "vLLM's or SGLang's classification.",
        {"input": _RENDERED, "activation": False},
    ),
    Route(
        "/pooling",
        vllm.read_pooling,
        (vllm.PoolingRequest,),
        (answers.PoolingAnswer,),
        "vLLM's pooling.",
        {"messages": _MESSAGES},
    ),
    Route(
        "/score",
        vllm.read_score,
        (vllm.ScoreRequest,),
        (answers.ScoreAnswer,),
        "vLLM's score of text pairs.",
        {"text_1": "What is 2+2?", "text_2": ["4", "5"]},
    ),
    Route(
        "/v1/embeddings",
        sglang.read_embeddings,
        (sglang.EmbeddingsRequest,),
        (answers.EmbeddingsAnswer,),
        "SGLang's reward, as verl calls it.",
        {"input": [_RENDERED]},
    ),
    Route(
        "/v1/score/evaluation",
        llamafactory.read,
        (llamafactory.ScoreEvaluationRequest,),
        (answers.ScoreEvaluationAnswer,),
        "LLaMA-Factory's scores.",
        {"messages": [_RENDERED]},
    ),
    Route(
        "/v1/chat/completions",
        nim.read,
        (nim.ChatCompletionRequest,),
        (answers.ChatCompletion,),
        "NIM's reward format.",
        {"messages": _MESSAGES},
    ),
)

_REF = "#/components/schemas/{model}"

_REFUSALS = {
    400: "The request cannot be read.",
    401: "No key, or a wrong one.",
    413: "The request is larger than this server takes.",
    422: "Nothing in the request can be scored.",
    429: "The queue is full.",
    500: "The model failed.",
    503: "The server is going down.",
    504: "Not scored in time.",
}

_OF_STATE = (401, 429, 500)


def request_of(route: Route) -> dict[str, Any]:
    """Description of a route's request, for `openapi_extra`."""
    content = {"schema": _one_of(route.forms), "examples": {"plain": {"value": route.example}}}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def answers_of(route: Route) -> dict[int | str, dict[str, Any]]:
    """Description of a scoring route's answers, for `responses`."""
    return {200: _answer("The scores.", _one_of(route.answers)), **_refusals(_REFUSALS)}


def state_of(answer: Any, *failing: int, guarded: bool = True) -> dict[int | str, dict[str, Any]]:
    """Description of the answers of a route that tells a state.

    Args:
        answer: its type.
        failing: statuses under which the same is said.
        guarded: whether it asks for the key.
    """
    said: dict[int | str, dict[str, Any]] = {
        status: _answer("The state.", _one_of([answer])) for status in (200, *failing)
    }
    return {**said, **(_refusals(_OF_STATE) if guarded else {})}


def metrics_answers() -> dict[int | str, dict[str, Any]]:
    """Description of the answers of `GET /metrics`."""
    text = {"description": "The exposition format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {200: text, **_refusals(_OF_STATE)}


def describe(app: FastAPI, *, keyed: bool) -> None:
    """Let an application show its schema, with all types that its routes name.

    Args:
        keyed: whether clients must show a key.
    """

    def schema() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            components = found.setdefault("components", {})
            components["schemas"] = dict(sorted((components.get("schemas", {}) | _schemas()).items()))
            if keyed:
                components["securitySchemes"] = {
                    "key": {"type": "http", "scheme": "bearer"},
                    "password": {"type": "http", "scheme": "basic", "description": "The key is the password."},
                }
                for path, methods in found["paths"].items():
                    for operation in methods.values():
                        operation["security"] = [] if path in ("/health", "/ready") else [{"key": []}, {"password": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _schemas() -> dict[str, Any]:
    types = [kind for route in ROUTES for kind in (*route.forms, *route.answers)]
    distinct = list(dict.fromkeys([*types, ErrorAnswer, State, ModelList]))
    _, shared = TypeAdapter.json_schemas(
        [(kind.__name__, "validation", TypeAdapter(kind)) for kind in distinct], ref_template=_REF
    )
    schemas: dict[str, Any] = shared.get("$defs", {})
    return schemas


def _one_of(types: Sequence[Any]) -> dict[str, Any]:
    schemas = [{"$ref": _REF.format(model=kind.__name__)} for kind in types]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _refusals(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = _answer(_REFUSALS[status], _one_of([ErrorAnswer]))
        if status in (429, 503):
            found[status]["headers"] = {
                "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
            }
    return found


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
