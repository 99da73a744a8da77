"""A run summary as one self-contained HTML page, and as a table for the terminal.

The score and every series are small charts of one shape, labelled directly, so that no legend is needed; the onset of a
flag is a line through all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from armorm.explain.html import render
from armorm.explain.text import signed_bar
from armorm.monitoring.summary import Drift, RunSummary

_WIDTH, _HEIGHT = 320, 84
_LEVELS = "▁▂▃▄▅▆▇█"
_TITLES = {
    "one_objective": "Only one objective grows",
    "length": "Only length grows",
    "out_of_distribution": "Out of distribution",
}


def monitor_page(run: RunSummary, title: str = "run") -> str:
    """The page of a run."""
    flagged = {flag.objective for flag in run.flags}
    span = max(max(drift.series) - min(drift.series) for drift in run.objectives)
    overview = [_chart(run.score, "score")]
    overview += [_chart(drift, name, red, in_deviations=False) for drift, name, red in _other_series(run)]
    objectives = [_chart(drift, drift.name, drift.name in flagged, span=span) for drift in run.objectives]
    return render(
        "monitor", run=run, title=title, titles=_TITLES, overview=overview, objectives=objectives, number=number,
        height=_HEIGHT,
    )  # fmt: skip


def _other_series(run: RunSummary) -> Iterator[tuple[Drift, str, bool]]:
    """The available series beside score and contributions, with their titles and whether they are flagged."""
    kinds = {flag.kind for flag in run.flags}
    if run.length is not None:
        yield run.length, "length, tokens", "length" in kinds
    if run.uncertainty is not None:
        yield run.uncertainty, "uncertainty, start = 1", "out_of_distribution" in kinds
    if run.distance is not None:
        yield run.distance, run.distance_title, False


def _chart(
    drift: Drift, title: str, flagged: bool = False, *, in_deviations: bool = True, span: float | None = None
) -> dict[str, Any]:
    """Values of a chart for the template; `span` is the height of the vertical axis, by default that of the series."""
    low, high = min(drift.series), max(drift.series)
    height = span or (high - low) or 1.0
    low -= (height - (high - low)) / 2
    step = _WIDTH / (len(drift.series) - 1)
    points = " ".join(
        f"{i * step:.1f},{_HEIGHT - 4 - (value - low) / height * (_HEIGHT - 8):.1f}"
        for i, value in enumerate(drift.series)
    )
    flat = not in_deviations or abs(drift.change) < 0.05
    tone = "quiet" if flat else "for" if drift.change > 0 else "against"
    change = f"{drift.change:+.2f} sd" if in_deviations else f"{number(drift.start)} → {number(drift.end)}"
    return {"drift": drift, "title": title, "flagged": flagged, "tone": tone, "change": change, "points": points}


class MonitorView:
    """Terminal view of a run summary, adapted to the width."""

    def __init__(self, run: RunSummary) -> None:
        self._run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run = self._run
        yield Text.assemble(
            (f"{run.samples:,} samples", "bold"),
            f", {'steps' if run.by_step else 'rows'} {run.first_step:,.0f} to {run.last_step:,.0f}",
            (f"; false alarms at most {run.false_alarms:.0%} of runs", "dim"),
        )
        for flag in run.flags:
            yield Padding(Text.assemble(("! ", "bold red"), (run.sentence(flag), "red")), (1, 0, 0, 0))
        if not run.flags:
            yield Padding(Text.assemble(("✓ ", "bold green"), (run.verdict, "green")), (1, 0, 0, 0))
        if run.warnings:
            yield Padding(Text("Alarms while the run went on:", "bold"), (1, 0, 0, 0))
            for alarm in run.warnings:
                yield Text.assemble((f"- at {run.place(alarm.step)}: ", "dim"), alarm.sentence)
        yield Text("")
        yield _table(run, wide=options.max_width >= 104)
        if run.notes:
            yield Text("")
            yield Group(*(Text(f"- {note}", style="dim") for note in run.notes))


def _table(run: RunSummary, *, wide: bool) -> Table:
    width = 32 if wide else 16
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", min_width=27, max_width=34 if wide else 28, overflow="fold")
    table.add_column("over the run", no_wrap=True)
    table.add_column("start", justify="right", no_wrap=True)
    table.add_column("end", justify="right", no_wrap=True)
    table.add_column("fell ← change → grew" if wide else "change", no_wrap=True)
    table.add_column("in sd", justify="right", no_wrap=True)
    if wide:
        table.add_column("usual share", justify="right", no_wrap=True, style="dim")

    def add(drift: Drift, title: str, style: str, *rest: str | Text) -> None:
        line = Text(sparkline(drift.series, width), "cyan")
        table.add_row(Text(title, style), line, number(drift.start), number(drift.end), *rest)

    largest = max([abs(drift.change) for drift in (*run.objectives, run.score)] + [1e-9])
    flagged = {flag.objective for flag in run.flags}
    for drift in (run.score, *run.objectives):
        style = "bold" if drift is run.score else "red" if drift.name in flagged else ""
        share = "" if drift.usual_share is None else f"{drift.usual_share:.0%}"
        bar = signed_bar(drift.change / largest, 20 if wide else 10)
        add(drift, drift.name, style, bar, Text(f"{drift.change:+.2f}", style), *[share] * wide)
    for drift, title, red in _other_series(run):
        add(drift, title, "red" if red else "")
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a line of `width` block characters, scaled from the lowest to the highest mean."""
    starts = np.linspace(0, len(values), min(width, len(values)), endpoint=False).astype(int)
    cells = np.array([part.mean() for part in np.split(np.array(values), starts[1:])])
    low, high = cells.min(), cells.max()
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        return _LEVELS[0] * len(cells)
    return "".join(_LEVELS[int(level)] for level in np.minimum((cells - low) / (high - low) * 8, 7))


def number(value: float) -> str:
    """A number in at most six characters or so."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
