"""Pages: what people read in a browser, each one file that needs nothing else.

In:  the name of a template beside this file, and what stands in it.
Out: HTML with its style inside: no script, no font, no address of anything. Texts are escaped by the template engine;
     a policy in the page forbids the browser to load or run anything, so that a hostile text stays text.

Light and dark follow the reader's system; widths from a phone's on; printed on white.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """The page of a template.

    Args:
        template: its name, without `.html.jinja`.
    """
    return _environment().get_template(f"{template}.html.jinja").render(**values)


def signed(value: float | None, digits: int = 4) -> str:
    """A number with its sign; nothing where there is none."""
    return "" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number; nothing where there is none."""
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent; nothing where there is none."""
    return "" if value is None else f"{100 * value:.{digits}f}%"


@cache
def _environment() -> Environment:
    loader = PackageLoader("armorm.explain", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"signed": signed, "number": number, "percent": percent}
    style, _, _ = loader.get_source(environment, "page.css")
    environment.globals["style"] = Markup(style)  # our own file
    return environment
