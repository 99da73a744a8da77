"""A leaderboard as HTML page, Markdown table, or plot: the values of `evaluation/leaderboard.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from armorm.evaluation.benchmarks import BENCHMARKS
from armorm.evaluation.leaderboard import Entry, Leaderboard, MetricBoard
from armorm.evaluation.results import number, span
from armorm.evaluation.tables import LEADERBOARD_NOTE, p_value
from armorm.explain.html import page_style, render
from armorm.report.plots import model_intervals, standalone

COLUMNS = ("model", "score", "95% interval", "to best", "95% interval", "p")


def leaderboard_page(boards: Sequence[Leaderboard]) -> str:
    """One self-contained page: a plot of each benchmark's first metric, and all tables."""
    shown: list[dict[str, Any]] = [
        {
            "title": BENCHMARKS[board.benchmark].title,
            "rule": BENCHMARKS[board.benchmark].rule,
            "board": board,
            "plot": _plot(board),
            "notes": _notes(board),
            "tables": [
                (_heading(metric), [_cells(entry, metric.unit) for entry in metric.entries]) for metric in board.metrics
            ],
        }
        for board in boards
    ]
    return render("leaderboard", boards=shown, columns=COLUMNS, note=LEADERBOARD_NOTE)


def leaderboard_markdown(boards: Sequence[Leaderboard]) -> str:
    """A heading for each benchmark and a table for each metric."""
    lines: list[str] = []
    for board in boards:
        title = BENCHMARKS[board.benchmark].title
        lines += [f"## {title}", "", f"{len(board.models)} models, {board.shared:,} shared examples.", ""]
        lines += [line for note in _notes(board) for line in (_escaped(note), "")]
        for metric in board.metrics:
            lines += [
                f"### {_heading(metric)}",
                "",
                f"| {' | '.join(COLUMNS)} |",
                "|---|" + "---:|" * (len(COLUMNS) - 1),
            ]
            lines += [f"| {' | '.join(map(_escaped, _cells(entry, metric.unit)))} |" for entry in metric.entries]
            lines.append("")
    return "\n".join([*lines, LEADERBOARD_NOTE, ""])


def leaderboard_plot(board: Leaderboard) -> str:
    """The plot of a benchmark's first metric as an SVG file; empty if the metric has no value."""
    plot = _plot(board)
    return standalone(plot, page_style()) if plot else ""


def _plot(board: Leaderboard) -> Markup:
    if not board.metrics:
        return Markup("")
    metric = board.metrics[0]
    factor = 100 if metric.unit == "share" else 1
    models = {
        entry.model: (
            factor * entry.value,
            None if entry.interval is None else (factor * entry.interval[0], factor * entry.interval[1]),
            number(entry.value, metric.unit) + ("*" if entry.significant else ""),
        )
        for entry in metric.entries
        if not math.isnan(entry.value)
    }
    return model_intervals(models, f"{BENCHMARKS[board.benchmark].title}, {metric.name}")


def _heading(metric: MetricBoard) -> str:
    unit = ", %" if metric.unit == "share" else ""
    return f"{metric.name}{' (part of the benchmark)' if metric.lacking else ''}{unit}"


def _cells(entry: Entry, unit: str) -> list[str]:
    mark = "*" if entry.significant else ""
    return [
        entry.model,
        number(entry.value, unit),
        span(entry.interval, unit),
        number(entry.difference, unit, sign=True) + mark,
        span(entry.difference_interval, unit, sign=True),
        p_value(entry.p),
    ]


def _notes(board: Leaderboard) -> list[str]:
    found = [
        f"{model}: {count:,} more examples are not shared, and not measured here."
        for model, count in zip(board.models, board.only, strict=True)
        if count
    ]
    return found + [
        f"{model}: a response of {count:,} examples was not scored; they count as wrong."
        for model, count in zip(board.models, board.refused, strict=True)
        if count
    ]


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
