"""HTML pages from the templates next to this file, each one self-contained.

A page has no script, font or external address. Texts are escaped, and a policy in the page forbids the browser to load
or run anything, so that hostile text stays text. Pages follow the system's light or dark mode, fit a phone, and print.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from armorm.explain import text
from armorm.files import demonstration


def render(template: str, **values: Any) -> str:
    """The page of a template, named without `.html.jinja`."""
    return _environment().get_template(f"{template}.html.jinja").render(**values)


# Filters: an empty text for None.
def signed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else text.signed(value, digits)


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}%"


def page_style() -> str:
    """The style sheet of the pages."""
    return str(_environment().globals["style"])


@cache
def _environment() -> Environment:
    loader = PackageLoader("armorm.explain", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"signed": signed, "number": number, "percent": percent}
    for name in ("style", "word_style"):  # (our own files)
        source, _, _ = loader.get_source(environment, "page.css" if name == "style" else "word_map.css")
        environment.globals[name] = Markup(source)
    environment.globals["demonstration"] = demonstration
    return environment
