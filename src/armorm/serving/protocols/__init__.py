"""Wire formats of the server. To add one, write its module (see `base.py`) and name it in `PROTOCOLS`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.protocols import armorm, llamafactory, nim, openrlhf, sglang, vllm
from armorm.serving.protocols.base import ParsedRequest, Read, Route

# Where two protocols share a path, the first whose route accepts a body answers it.
PROTOCOLS = (armorm, openrlhf, sglang, vllm, llamafactory, nim)

ROUTES: tuple[Route, ...] = tuple(route for protocol in PROTOCOLS for route in protocol.ROUTES)
ROUTES_BY_PATH: dict[str, list[Route]] = {
    path: list(routes) for path, routes in groupby(sorted(ROUTES, key=lambda route: route.path), lambda r: r.path)
}


def reader_of(routes: list[Route]) -> Read:
    """Reads a body by the first of the routes that accepts it."""

    def read(body: Mapping[str, Any], reader: RenderedReader) -> ParsedRequest:
        return next(route for route in routes if route.accepts(body)).read(body, reader)

    return read
