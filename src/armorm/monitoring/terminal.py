"""A run on a terminal: what is wrong first, then every series as a line of eighths, with its change as a signed bar.

In:  `MonitorOutcome`. Out: a rich renderable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from armorm.explain.explanation import signed_bar
from armorm.monitoring.summary import Drift, MonitorOutcome

_LEVELS = "▁▂▃▄▅▆▇█"


class MonitorView:
    """Prints an outcome, as wide as there is room."""

    def __init__(self, outcome: MonitorOutcome) -> None:
        self._outcome = outcome

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        outcome = self._outcome
        wide = options.max_width >= 104
        place = "steps" if outcome.by_step else "rows"
        yield Text.assemble(
            (f"{outcome.samples:,} samples", "bold"),
            f", {place} {outcome.first_step:,.0f} to {outcome.last_step:,.0f}",
            (f"; false alarms at most {outcome.false_alarms:.0%} of runs", "dim"),
        )
        for flag in outcome.flags:
            yield Padding(Text.assemble(("! ", "bold red"), (outcome.sentence(flag), "red")), (1, 0, 0, 0))
        if not outcome.flags:
            yield Padding(Text.assemble(("✓ ", "bold green"), (outcome.verdict, "green")), (1, 0, 0, 0))
        yield Text("")
        yield self._table(wide)
        if outcome.notes:
            yield Text("")
            yield Group(*(Text(f"- {note}", style="dim") for note in outcome.notes))

    def _table(self, wide: bool) -> Table:
        outcome, width = self._outcome, 32 if wide else 16
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("", min_width=27, max_width=34 if wide else 28, overflow="fold")
        table.add_column("over the run", no_wrap=True)
        table.add_column("start", justify="right", no_wrap=True)
        table.add_column("end", justify="right", no_wrap=True)
        table.add_column("fell ← change → grew" if wide else "change", no_wrap=True)
        table.add_column("in sd", justify="right", no_wrap=True)
        if wide:
            table.add_column("usual share", justify="right", no_wrap=True, style="dim")
        largest = max([abs(drift.change) for drift in (*outcome.objectives, outcome.score)] + [1e-9])
        flagged = {flag.objective for flag in outcome.flags}
        self._row(table, outcome.score, width, largest, wide, "bold")
        for drift in outcome.objectives:
            self._row(table, drift, width, largest, wide, "red" if drift.name in flagged else "")
        kinds = {flag.kind for flag in outcome.flags}
        others = (
            (outcome.length, "length, tokens", "length" in kinds),
            (outcome.uncertainty, "uncertainty, start = 1", "out_of_distribution" in kinds),
            (outcome.distance, outcome.distance_title, False),
        )
        for other, title, red in others:
            if other is not None:
                cells = [Text(title, "red" if red else ""), Text(sparkline(other.series, width), "cyan")]
                table.add_row(*cells, number(other.start), number(other.end), "", "", *([""] if wide else []))
        return table

    def _row(self, table: Table, drift: Drift, width: int, largest: float, wide: bool, style: str) -> None:
        cells: list[str | Text] = [
            Text(drift.name, style),
            Text(sparkline(drift.series, width), "cyan"),
            number(drift.start),
            number(drift.end),
            signed_bar(drift.change / largest, 20 if wide else 10),
            Text(f"{drift.change:+.2f}", style),
        ]
        if wide:
            cells.append("" if drift.usual_share is None else f"{drift.usual_share:.0%}")
        table.add_row(*cells)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a line of `width` characters, the lowest mean at the bottom and the highest at the top."""
    edges = np.linspace(0, len(values), min(width, len(values)) + 1).astype(int)
    cells = np.array([np.mean(values[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    low, high = cells.min(), cells.max()
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        return _LEVELS[0] * len(cells)
    return "".join(_LEVELS[int(level)] for level in np.minimum((cells - low) / (high - low) * 8, 7))


def number(value: float) -> str:
    """A figure in a handful of characters."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
