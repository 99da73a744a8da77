"""The routes: HTTP in, HTTP out.

In:  a scorer. Out: a FastAPI application.

Bodies are read here, bounded in size and time; what is in them is read in threads. A request whose client has
gone is dropped where it stands. Every error is `{"error": {"message", "type", "code"}}` with one sentence.

vLLM and SGLang share the path `/classify`: a body with `text` is SGLang's, one with `input` or `messages` vLLM's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from armorm.serving.exchange import Exchange, Read
from armorm.serving.failures import RequestError
from armorm.serving.guard import CLIENT_GONE, Bodies, Guard, failure_response, overload_status, unless_gone, within_time
from armorm.serving.metrics import CONTENT_TYPE
from armorm.serving.rendered import RenderedReader
from armorm.serving.scoring import Scorer
from armorm.serving.stacks import llamafactory, native, nim, openrlhf, sglang, vllm
from armorm.version import __version__

_SENTENCES = {404: "no such route", 405: "this route takes another method"}


def read_classify(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request on the path that vLLM and SGLang share."""
    if "text" in body and "input" not in body and "messages" not in body:
        return sglang.read_classify(body, reader)
    return vllm.read_classify(body, reader)


# Path, reader, forms of its body, summary.
ROUTES: tuple[tuple[str, Read, tuple[type[BaseModel], ...], str], ...] = (
    ("/v1/reward", native.read, (native.RewardRequest,), "Scores with everything they are made of."),
    ("/get_reward", openrlhf.read, (openrlhf.GetRewardRequest,), "OpenRLHF's remote reward model."),
    ("/classify", read_classify, (vllm.PoolingRequest, sglang.ClassifyRequest), "vLLM's or SGLang's classification."),
    ("/pooling", vllm.read_pooling, (vllm.PoolingRequest,), "vLLM's pooling."),
    ("/score", vllm.read_score, (vllm.ScoreRequest,), "vLLM's score of text pairs."),
    ("/v1/embeddings", sglang.read_embeddings, (sglang.EmbeddingsRequest,), "SGLang's reward, as verl calls it."),
    ("/v1/score/evaluation", llamafactory.read, (llamafactory.ScoreEvaluationRequest,), "LLaMA-Factory's scores."),
    ("/v1/chat/completions", nim.read, (nim.ChatCompletionRequest,), "NIM's reward format."),
)


def make_app(scorer: Scorer) -> FastAPI:
    """The application around a scorer, which it starts and stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        scorer.start()
        yield
        await asyncio.to_thread(scorer.stop)

    app = FastAPI(title="armorm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    bodies = Bodies(scorer.settings)
    for path, read, forms, summary in ROUTES:
        app.add_api_route(
            path,
            _endpoint(scorer, bodies, read),
            methods=["POST"],
            summary=summary,
            openapi_extra={
                "requestBody": {"required": True, "content": {"application/json": {"schema": _schema(forms)}}}
            },
        )
    _add_state_routes(app, scorer)
    app.add_exception_handler(RequestError, _answer_failure)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    if scorer.settings.ui:
        from armorm.serving.playground.mount import add_playground

        add_playground(app, scorer)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(Guard, settings=scorer.settings, metrics=scorer.metrics, paths=paths)
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

    @app.get("/health", summary="Whether the model still answers.")
    async def health() -> Response:
        healthy = scorer.batcher.healthy
        return JSONResponse({"status": "ok" if healthy else "the model has failed"}, 200 if healthy else 503)

    @app.get("/ready", summary="Whether a request would be taken now.")
    async def ready() -> Response:
        accepting = scorer.batcher.accepting
        return JSONResponse({"status": "ready" if accepting else "not ready"}, 200 if accepting else 503)

    @app.get("/metrics", summary="Metrics for Prometheus.")
    async def metrics() -> Response:
        return Response(scorer.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", summary="The model and its objectives.")
    async def models() -> dict[str, Any]:
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
        return {"object": "list", "data": [card]}


def _schema(forms: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    schemas = [form.model_json_schema(ref_template="#/components/schemas/{model}") for form in forms]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


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
