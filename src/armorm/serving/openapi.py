"""The OpenAPI schema: what goes in at each route, what comes out, and which refusals there are.

In:  the forms of the requests, the types of the answers. Out: `GET /openapi.json`.

Bodies are read by hand (bounded, off the event loop), so FastAPI knows nothing of them; what it is told here is held
against the running server by tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from armorm.serving.answers import ErrorAnswer, ModelList, State
from armorm.serving.routes import ROUTES, Route

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
