"""Rendering: results and comparisons as tables of at most eighty columns.

In:  `Results`, `Comparison`.
Out: rich renderables.

Shares are printed in percent, correlations and raw errors as they are. Beside each figure stand its 95%
interval (none below thirty prompts), the number of prompts, and what length alone, the prompt alone and
chance come to. Published figures follow in a table of their own, marked as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from armorm.evaluation.audit_tables import audits_tables
from armorm.evaluation.benchmarks import ratings
from armorm.evaluation.metrics import LEVELS
from armorm.evaluation.model_comparison import Comparison
from armorm.evaluation.registry import BENCHMARKS
from armorm.evaluation.results import FigureResult, Results, published
from armorm.evaluation.steering_preview import AFTER, BEFORE, Preview
from armorm.steering import sentences

_NAME_WIDTH = 31

_LACKING_SHOWN = 6


def results_tables(results: Results) -> RenderableType:
    """Everything of one result."""
    figures = _ratings(results) if results.benchmark == "ratings" else _figures(results)
    parts: list[RenderableType] = [_head(results), Text(""), figures]
    parts += _lacking(results)
    parts += _published(results)
    parts += audits_tables(results)
    return Group(*parts)


def comparison_table(comparison: Comparison) -> RenderableType:
    """Paired differences, first minus second."""
    head = Text.assemble(
        (BENCHMARKS[comparison.benchmark].title, "bold"),
        f": {comparison.first} against {comparison.second}, {comparison.shared:,} shared examples",
    )
    if comparison.only_first or comparison.only_second:
        head.append(f" ({comparison.only_first:,} only in the first, {comparison.only_second:,} only in the second)")
    table = _table(("", "this", "other", "difference", "95% interval", "p", "prompts"))
    for level in LEVELS:
        rows = [difference for difference in comparison.differences if difference.level == level]
        for difference in rows:
            if math.isnan(difference.first) and math.isnan(difference.second):
                continue
            unit = difference.unit
            mark = "*" if difference.significant else ""
            table.add_row(
                _name(difference.name, level),
                number(difference.first, unit),
                number(difference.second, unit),
                Text(number(difference.difference, unit, sign=True) + mark, style="bold" if mark else ""),
                span(difference.interval, unit, sign=True),
                "" if difference.p is None else f"{difference.p:.3f}" if difference.p >= 0.001 else "<.001",
                f"{difference.prompts:,}",
            )
    note = Text(
        "* p < .05 after Holm's correction over the figures of its level; tested by exchanging the models on "
        "whole prompts; no test below 30 prompts.",
        style="dim",
    )
    return Group(head, Text(""), table, Text(""), note)


def number(value: float | None, unit: str, *, sign: bool = False) -> str:
    """A figure: a share in percent, anything else as it is; nothing where there is none."""
    if value is None or math.isnan(value):
        return ""
    signed = "+" if sign else ""
    return f"{100 * value:{signed}.1f}" if unit == "share" else f"{value:{signed}.3f}"


def span(interval: Sequence[float] | None, unit: str, *, sign: bool = False) -> str:
    """An interval."""
    if interval is None:
        return ""
    return " ".join(number(end, unit, sign=sign) for end in interval)


def _head(results: Results) -> Text:
    backbone = results.model.get("backbone") or {}
    counts = results.counts
    text = Text.assemble((BENCHMARKS[results.benchmark].title, "bold"), ": ", (str(results.model["name"]), "bold"))
    text.append(f" ({results.model['kind']}")
    text.append(f" on {backbone['name']}, {backbone['dtype']})" if backbone.get("name") else ")")
    text.append(f"\n{', '.join(results.data['sources'])}: {_count(counts['examples'], 'example')} of ")
    text.append(f"{_count(counts['prompts'], 'prompt')}, {_count(counts['conversations'], 'distinct conversation')}")
    for reason, count in results.data.get("left_out", {}).items():
        text.append(f"\nleft out: {count:,} {reason}")
    if counts["refused_responses"]:
        of = f"{_count(counts['refused_responses'], 'response')} of {_count(counts['refused_examples'], 'example')}"
        text.append(f"\nrefused: {of}, kept in place", style="yellow")
    if counts["truncated_examples"]:
        text.append(f"\ntruncated: prompts of {_count(counts['truncated_examples'], 'example')}", style="yellow")
    ties = f"{_count(counts['ties'], 'example')} with a tie; " if counts["ties"] else ""
    text.append(f"\n{ties}{BENCHMARKS[results.benchmark].rule}", style="dim")
    return text


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _figures(results: Results) -> Table:
    table = _table(("%", "score", "95% interval", "prompts", "length", "prompt", "chance"))
    for level in LEVELS:
        for figure in results.level(level).values():
            if math.isnan(figure.value):
                continue
            table.add_row(
                _name(figure.name + (" (part)" if figure.lacking and level != "subsets" else ""), level),
                Text(number(figure.value, figure.unit), style="cyan"),
                span(figure.interval, figure.unit),
                f"{figure.prompts:,}",
                *(number(figure.baselines.get(key), figure.unit) for key in ("length", "prompt_only", "chance")),
            )
    return table


def _ratings(results: Results) -> Group:
    overall = _table(("", "value", "95% interval", "prompts", "length", "prompt"))
    for figure in results.level("overall").values():
        overall.add_row(figure.name, *_beside(figure))
    parts: list[RenderableType] = [overall, Text("")] if overall.row_count else []
    for kind, title in ((ratings.SPEARMAN, "Spearman"), (ratings.WITHIN, "within prompts, %"), (ratings.MAE, "error")):
        table = _table((f"objective: {title}", "value", "95% interval", "prompts", "length", "prompt"))
        for objective, found in ratings.by_objective(results.level("subsets")).items():
            shown = found.get(kind)
            if isinstance(shown, FigureResult) and not math.isnan(shown.value):
                table.add_row(Text(objective), *_beside(shown))
        if table.row_count:
            parts += [table, Text("")]
    return Group(*parts[:-1])


def _beside(figure: FigureResult) -> list[RenderableType]:
    return [
        Text(number(figure.value, figure.unit), style="cyan"),
        span(figure.interval, figure.unit),
        f"{figure.prompts:,}",
        *(number(figure.baselines.get(key), figure.unit) for key in ("length", "prompt_only")),
    ]


def _lacking(results: Results) -> list[RenderableType]:
    """What the data lacks of the published benchmark, said once for all figures that lack the same."""
    found: dict[tuple[str, ...], list[str]] = {}
    for level in ("overall", "sections"):
        for figure in results.level(level).values():
            if figure.lacking:
                state = " (missing)" if math.isnan(figure.value) else " (in part)"
                found.setdefault(figure.lacking, []).append(figure.name + state)
    parts: list[RenderableType] = []
    for lacking, names in found.items():
        more = len(lacking) - _LACKING_SHOWN
        named = ", ".join(lacking[:_LACKING_SHOWN]) + (f" and {more} more" if more > 0 else "")
        parts.append(Text.assemble((", ".join(names), "yellow"), f": the data is short of {named}"))
    return [Text(""), *parts] if parts else []


def _published(results: Results) -> list[RenderableType]:
    found = published(results)
    parts: list[RenderableType] = []
    if found.rows:
        table = _table(("published figures, %", *found.columns.values()), first_width=33)
        table.add_row(
            Text(f"this: {results.model['name']}", style="bold"),
            *(Text(number(found.own[place], "share"), style="cyan") for place in found.columns),
        )
        for row in found.rows:
            cells = [number(row["figures"].get(place), "share") for place in found.columns]
            table.add_row(Text(f"{row['model']} (published)"), *cells)
        sources = dict.fromkeys(str(row["source"]) for row in found.rows)
        parts += [Text(""), table, *(Text(f"published: {source}", style="dim") for source in sources)]
    elif found.withheld:
        headings = ", ".join(found.withheld)
        parts += [
            Text(""),
            Text(f"no published figures beside {headings}: they are over the whole benchmark", style="dim"),
        ]
    parts += [Text(f"published on another basis: {line}", style="dim") for line in found.unplaced]
    return parts


def _table(columns: Sequence[str], first_width: int = _NAME_WIDTH) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for place, name in enumerate(columns):
        if place == 0:
            table.add_column(name, max_width=first_width, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(name: str, level: str) -> Text:
    return Text(("  " if level == "subsets" else "") + name, style="bold" if level == "overall" else "")


def as_json(results: Results, comparison: Comparison | None) -> Mapping[str, Any]:
    """What `--json` prints: the result without its examples, and the comparison where there is one."""
    found = results.to_dict(examples=False)
    table = published(results)
    found["published"] = {"columns": table.columns, "rows": table.rows, "withheld": table.withheld}
    if comparison is not None:
        found["against"] = comparison.to_dict()
    return found


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
    table = _preview_table(("accuracy, %", "before", "after", "change", "95% interval", "pairs"))
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
    table = _preview_table(("rankings that flip", "to right", "to wrong"))
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
    table = _preview_table(("length", "before", "after"))
    for label, key, unit in _LENGTH:
        cells = [number(found.length[view][key], unit, sign=unit != "share") for view in (BEFORE, AFTER)]
        table.add_row(label, *cells)
    return table


def _weights(found: Preview) -> Table:
    table = _preview_table(("mean weight, %", "before", "after"))
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


def _preview_table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for place, name in enumerate(columns):
        if place == 0:
            table.add_column(name, max_width=38, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table
