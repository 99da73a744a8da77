"""`GET /`, what is here, and `GET /docs`, every route with its fields, made from the OpenAPI schema.

Both load nothing, so they work without a network. `/` is plain text for programs such as curl, and
HTML for browsers (`Accept: text/html`).
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from armorm.explain.html import render
from armorm.serving.engine import ScoringEngine
from armorm.version import __version__

HOME_PATH, DOCS_PATH, SCHEMA_PATH = "/", "/docs", "/openapi.json"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept",
}


def add_pages(app: FastAPI, engine: ScoringEngine) -> None:
    """Add both pages to an application that has its other routes."""

    @app.get(HOME_PATH, include_in_schema=False)
    async def home(request: Request) -> Response:
        values = _home(app, engine, str(request.base_url).rstrip("/"))
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(render("server_home", **values), headers=_HEADERS)
        return PlainTextResponse(_home_text(**values), headers=_HEADERS)

    @app.get(DOCS_PATH, include_in_schema=False)
    async def docs(request: Request) -> Response:
        schema, base = app.openapi(), str(request.base_url).rstrip("/")
        values = {"operations": operations(schema, base), "types": types(schema), "schema_path": SCHEMA_PATH}
        page = render("server_docs", name=engine.settings.name, version=__version__, **values)
        return HTMLResponse(page, headers=_HEADERS)


def _home(app: FastAPI, engine: ScoringEngine, base: str) -> dict[str, Any]:
    found = operations(app.openapi(), base)
    links = {DOCS_PATH: "every route with its fields", SCHEMA_PATH: "the same for programs"}
    links |= {"/ui": "the playground"} if engine.settings.ui else {}
    return {
        "name": engine.settings.name,
        "version": __version__,
        "objectives": engine.rm.objectives.names,
        "operations": found,
        "links": links,
        "example": next(operation["examples"][0] for operation in found if operation["path"] == "/v1/reward"),
        "base": base,
        "with_key": engine.settings.api_key is not None,
    }


def _home_text(
    name: str,
    version: str,
    objectives: list[str],
    operations: list[dict[str, Any]],
    links: dict[str, str],
    example: str,
    base: str,
    with_key: bool,
) -> str:
    lines = [f"armorm {version} serves the reward model {name} ({len(objectives)} objectives).", ""]
    width = max(len(operation["path"]) for operation in operations)
    for operation in operations:
        lines.append(f"{operation['method']:4} {operation['path']:{width}}  {operation['summary']}")
    lines += [f"GET  {path:{width}}  {text[0].upper()}{text[1:]}." for path, text in links.items()]
    lines += ["", "Example:", "", f"  {example}"]
    lines += ["", "Requests need the API key: 'Authorization: Bearer KEY'."] * with_key
    return "\n".join(lines) + "\n"


def operations(schema: dict[str, Any], base: str) -> list[dict[str, Any]]:
    """Method, path, summary, examples (as shell commands), requests, responses and errors of each route, POST first."""
    found = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            answers = operation["responses"]
            examples = [_command(base + path, entry["value"]) for entry in body.get("examples", {}).values()]
            found.append(
                {
                    "method": method.upper(),
                    "path": path,
                    "summary": operation["summary"],
                    "examples": examples or [f"curl {shlex.quote(base + path)}"],
                    "requests": _named(body.get("schema", {})),
                    "responses": _named(_content(answers["200"])),
                    "errors": {code: a["description"] for code, a in answers.items() if code != "200"},
                }
            )
    return sorted(found, key=lambda operation: operation["method"] != "POST")


def types(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Description and fields of each type, by name."""
    return {
        name: {
            "description": entry.get("description", ""),
            "fields": [
                {
                    "name": field,
                    "type": type_text(value),
                    "refs": sorted(_named(value)),
                    "required": field in entry.get("required", ()),
                    "description": value.get("description", ""),
                }
                for field, value in entry.get("properties", {}).items()
            ],
        }
        for name, entry in schema["components"]["schemas"].items()
    }


def type_text(value: dict[str, Any]) -> str:
    """A JSON schema in words: `list of number`, `string or null`."""
    if "$ref" in value:
        return str(value["$ref"].rpartition("/")[2])
    for form in ("anyOf", "oneOf"):
        if form in value:
            return " or ".join(dict.fromkeys(type_text(entry) for entry in value[form]))
    if "const" in value:
        return json.dumps(value["const"])
    if "enum" in value:
        return " or ".join(json.dumps(entry) for entry in value["enum"])
    if value.get("type") == "array":
        return f"list of {type_text(value['items'])}" if value.get("items") else "list"
    if value.get("type") == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"object of {type_text(value['additionalProperties'])}"
    return str(value.get("type", "any value"))


def _named(value: Any) -> list[str]:
    """Names of the types that a schema refers to."""
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if isinstance(value.get("$ref"), str) else []
        return list(dict.fromkeys([*own, *(name for inner in value.values() for name in _named(inner))]))
    if isinstance(value, list):
        return list(dict.fromkeys(name for inner in value for name in _named(inner)))
    return []


def _content(response: dict[str, Any]) -> Any:
    """The schema of a response's body, of whatever media type."""
    return next((body.get("schema") for body in response.get("content", {}).values()), None)


def _command(url: str, body: Any) -> str:
    return f"curl {shlex.quote(url)} --json {shlex.quote(json.dumps(body, ensure_ascii=False))}"
