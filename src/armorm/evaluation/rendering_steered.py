"""Rendering of a steering's preview: tables of at most eighty columns.

In:  `Preview`.
Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from armorm.evaluation.rendering import number, span
from armorm.evaluation.steering_preview import AFTER, BEFORE, Preview
from armorm.steering import sentences

_FLIPS_SHOWN = 3
_PROMPT_SHOWN = 60
_LENGTH = (
    ("accuracy where the longer is better", "more_is_better", "share"),
    ("accuracy where it is worse", "more_is_worse", "share"),
    ("how often the longer one wins", "more_wins", "share"),
    ("correlation of score and length", "correlation", "correlation"),
    ("the same within prompts", "correlation_within_prompts", "correlation"),
)


def preview_tables(found: Preview) -> RenderableType:
    """Everything of a preview."""
    parts: list[RenderableType] = [Text(f"- {sentence}") for sentence in sentences(found.steering)]
    parts += [Text(""), _accuracy(found), Text(""), _flips(found), Text(""), _length(found), Text(""), _weights(found)]
    if found.changed:
        parts += [Text(""), _examples(found)]
    return Group(*parts)


def _accuracy(found: Preview) -> Table:
    table = _table(("accuracy, %", "before", "after", "change", "95% interval", "pairs"))
    for name, entry in found.accuracy.items():
        table.add_row(
            Text(name, style="bold" if name == "all" else ""),
            number(entry["before"], "share"),
            Text(number(entry["after"], "share"), style="cyan"),
            number(entry["difference"], "share", sign=True),
            span(entry["interval"], "share", sign=True),
            f"{entry['pairs']:,}",
        )
    return table


def _flips(found: Preview) -> Table:
    table = _table(("rankings that flip", "to right", "to wrong"))
    flips = found.flips
    table.add_row(
        Text(f"all: {flips['share']:.1%} of scored pairs", style="bold"),
        f"{flips['to_right']:,.0f}",
        f"{flips['to_wrong']:,.0f}",
    )
    for subset, entry in found.by_subset.items():
        table.add_row(Text(f"  {subset}"), f"{entry['to_right']:,}", f"{entry['to_wrong']:,}")
    shorter, longer = found.by_length["to_shorter"], found.by_length["to_longer"]
    table.caption = f"{shorter:,} go from the longer response to the shorter one, {longer:,} the other way"
    table.caption_justify, table.caption_style = "left", "dim"
    return table


def _length(found: Preview) -> Table:
    table = _table(("length", "before", "after"))
    for label, key, unit in _LENGTH:
        cells = [number(found.length[view][key], unit, sign=unit != "share") for view in (BEFORE, AFTER)]
        table.add_row(label, *cells)
    return table


def _weights(found: Preview) -> Table:
    table = _table(("mean weight, %", "before", "after"))
    ranked = sorted(found.weights.items(), key=lambda entry: -abs(entry[1][1] - entry[1][0]))
    shown = [entry for entry in ranked if max(entry[1]) >= 0.0005]
    for name, (before, after) in shown:
        table.add_row(Text(name), number(before, "share"), number(after, "share"))
    if len(shown) < len(ranked):
        table.add_row(Text(f"and {len(ranked) - len(shown)} with less than 0.05", style="dim"))
    return table


def _examples(found: Preview) -> RenderableType:
    parts: list[RenderableType] = [Text("flips with the largest change of margin", style="bold")]
    for flip in found.changed[:_FLIPS_SHOWN]:
        prompt = " ".join(flip.better.messages[-2].content.split())
        prompt = prompt if len(prompt) <= _PROMPT_SHOWN else prompt[: _PROMPT_SHOWN - 1] + "…"
        way = Text("right", "green") if flip.after > 0 else Text("wrong", "red")
        parts.append(Text.assemble(f"row {flip.row}, now ", way, f": {flip.before:+.3f} to {flip.after:+.3f}"))
        parts.append(Text(f"  {prompt}", style="dim"))
        parts.append(Text(f"  decided by {', '.join(flip.decides[:3])}", style="dim"))
    return Group(*parts)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for place, name in enumerate(columns):
        if place == 0:
            table.add_column(name, max_width=38, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table
