"""Wire formats of the server. To add one, write its module (see `base.py`) and name it in `PROTOCOLS`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn, get_args

from pydantic import BaseModel, ValidationError

from armorm.backbone.rendered_text import RenderedReader
from armorm.errors import nearest, shown
from armorm.serving.errors import RequestError
from armorm.serving.protocols import armorm, llamafactory, nim, openrlhf, rerank, sglang, vllm
from armorm.serving.protocols.base import ParsedRequest, Route

# Of protocols that share a path, the first whose route accepts a body answers it.
PROTOCOLS = (armorm, openrlhf, sglang, vllm, rerank, llamafactory, nim)

ROUTES: tuple[Route, ...] = tuple(route for protocol in PROTOCOLS for route in protocol.ROUTES)
ROUTES_BY_PATH: dict[str, list[Route]] = {
    path: list(routes) for path, routes in groupby(sorted(ROUTES, key=lambda route: route.path), lambda r: r.path)
}
_JSON_NAMES = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def parsed_request(routes: Sequence[Route], body: bytes, reader: RenderedReader) -> ParsedRequest:
    """Parse a body by the first of the routes that accepts it; a RequestError 400 names the first invalid field."""
    try:
        value: Any = json.loads(body, parse_constant=_no_number, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(400, f"the body is not JSON: {what}") from None
    if not isinstance(value, dict):
        raise RequestError(400, f"the body is a JSON {_JSON_NAMES.get(type(value), 'value')}, expected an object")
    route = next(route for route in routes if route.accepts(value))
    try:
        request = route.request.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "list[")))
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = _fields(route.request, first["loc"][:-1])
            what = f"unknown field{nearest(str(first['loc'][-1]), known)}; expected {', '.join(known)}"
        raise RequestError(400, f"{place[:100]}: {what}" if place else what) from None
    return route.read(request, reader)


def _fields(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Names of the fields of the object at a path in a body."""
    for part in path:
        field = model.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"found {name}, expected a finite number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; programs on the way may have read either value of a name that occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"found {shown(twice)} twice in one object")
    return found
