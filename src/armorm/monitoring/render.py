"""A run summary as one self-contained HTML file, and as a table for the terminal.

The page opens from disk, works without network, in light and dark mode, on phones and in print. The score and every
series are small charts of one shape, labelled directly, so that no legend is needed; the onset of a flag is a line
through all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from armorm.explain.text import signed_bar
from armorm.monitoring.summary import Drift, RunSummary

_WIDTH, _HEIGHT = 320, 84

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2230; --soft: #667085; --line: #d9dde5; --back: #fbfbfd; --card: #fff;
  --blue: #2563eb; --red: #c8321f; --green: #1c7c4a; --wash: #2563eb14; --alarm: #c8321f12; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a2b3; --line: #2f3646; --back: #12151d;
  --card: #1a1f2b; --blue: #7aa5ff; --red: #ff8a75; --green: #63cf95; --wash: #7aa5ff1c; --alarm: #ff8a7518; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2.25rem 0 .75rem; }
.under { color: var(--soft); margin: .25rem 0 1.5rem; }
.flag, .fine { border-left: 4px solid var(--red); background: var(--alarm); padding: .75rem 1rem; margin: .75rem 0;
  border-radius: 0 .5rem .5rem 0; }
.fine { border-color: var(--green); background: none; }
.flag strong, .fine strong { display: block; }
.flag strong { color: var(--red); } .fine strong { color: var(--green); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(15.5rem, 1fr)); gap: .75rem; }
figure { margin: 0; padding: .75rem .9rem .6rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; break-inside: avoid; }
figure.flagged { border-color: var(--red); }
figcaption { display: flex; justify-content: space-between; gap: .75rem; font-size: .875rem; font-weight: 600; }
figcaption span:first-child { overflow-wrap: anywhere; }
.change { font-variant-numeric: tabular-nums; white-space: nowrap; }
.grew { color: var(--blue); } .fell { color: var(--red); } .flat { color: var(--soft); }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; overflow: visible; }
.curve { fill: none; stroke: var(--blue); stroke-width: 1.8; stroke-linejoin: round; }
.area { fill: var(--wash); } .began { stroke: var(--red); stroke-width: 1.2; stroke-dasharray: 4 3; }
.range { fill: var(--alarm); }
.ends { display: flex; justify-content: space-between; color: var(--soft); font-size: .75rem;
  font-variant-numeric: tabular-nums; }
ul { color: var(--soft); font-size: .875rem; padding-left: 1.1rem; }
@media print { body { max-width: none; padding: 0; background: none; } .charts { grid-template-columns: 1fr 1fr 1fr; } }
"""

_TITLES = {
    "one_objective": "Only one objective grows",
    "length": "Only length grows",
    "out_of_distribution": "Out of distribution",
}


def monitor_page(run: RunSummary, title: str = "run") -> str:
    """The page of a run."""
    unit = "steps" if run.by_step else "rows"
    flagged = {flag.objective for flag in run.flags if flag.objective}
    kinds = {flag.kind for flag in run.flags}
    verdicts = [
        f'<p class="flag"><strong>{_TITLES[flag.kind]}</strong>{escape(run.sentence(flag))}</p>' for flag in run.flags
    ] or [f'<p class="fine"><strong>No flags</strong>{escape(run.verdict)}</p>']
    overview = [_chart(run, run.score, "score", in_deviations=True)]
    if run.length is not None:
        overview.append(_chart(run, run.length, "length, tokens", red="length" in kinds))
    if run.uncertainty is not None:
        red = "out_of_distribution" in kinds
        overview.append(_chart(run, run.uncertainty, "uncertainty, 1 at the start", red=red))
    if run.distance is not None:
        overview.append(_chart(run, run.distance, run.distance_title))
    span = max(max(drift.series) - min(drift.series) for drift in run.objectives)
    charts = [
        _chart(run, drift, drift.name, in_deviations=True, red=drift.name in flagged, span=span)
        for drift in run.objectives
    ]
    notes = [
        "Changes are from the first tenth of the run to the last, in standard deviations of the scores within a step. "
        "The charts of all objectives have the same vertical scale.",
        f"Of runs without a problem, at most {run.false_alarms:.0%} get a flag of each kind. "
        "A dashed line marks the onset of a flag, the band around it the 95% range of the onset.",
        *(note[0].upper() + note[1:] + "." for note in run.notes),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}: armorm monitor</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="under">{run.samples:,} scored samples, {unit} {run.first_step:,.0f} to '
            f"{run.last_step:,.0f}</p>",
            *verdicts,
            f'<h2>The run</h2>\n<div class="charts">{"".join(overview)}</div>',
            f'<h2>Contributions of the objectives</h2>\n<div class="charts">{"".join(charts)}</div>',
            f"<h2>Notes</h2>\n<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>",
            "</body>\n</html>\n",
        ]
    )


def _chart(
    run: RunSummary,
    drift: Drift,
    title: str,
    *,
    in_deviations: bool = False,
    red: bool = False,
    span: float | None = None,
) -> str:
    kind = "flat" if abs(drift.change) < 0.05 else "grew" if drift.change > 0 else "fell"
    change = f"{drift.change:+.2f} sd" if in_deviations else f"{number(drift.start)} → {number(drift.end)}"
    label = f"{title}: from {number(drift.start)} to {number(drift.end)}"
    return (
        f"<figure{' class=flagged' if red else ''}><figcaption><span>{escape(title)}</span>"
        f'<span class="change {kind if in_deviations else "flat"}">{change}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_marks(run)}{_curve(drift.series, span)}</svg>"
        f'<div class="ends"><span>{run.first_step:,.0f}</span>'
        f"<span>{number(min(drift.series))} to {number(max(drift.series))}</span>"
        f"<span>{run.last_step:,.0f}</span></div></figure>"
    )


def _curve(series: Sequence[float], span: float | None) -> str:
    low, high = min(series), max(series)
    height = span or (high - low) or 1.0
    low -= (height - (high - low)) / 2
    points = [
        f"{i * _WIDTH / (len(series) - 1):.1f},{_HEIGHT - 4 - (value - low) / height * (_HEIGHT - 8):.1f}"
        for i, value in enumerate(series)
    ]
    line = " ".join(points)
    area = f'<polygon class="area" points="0,{_HEIGHT} {line} {_WIDTH},{_HEIGHT}"/>'
    return f'{area}<polyline class="curve" points="{line}"/>'


def _marks(run: RunSummary) -> str:
    span = (run.last_step - run.first_step) or 1.0

    def across(step: float) -> float:
        return (step - run.first_step) / span * _WIDTH

    return "".join(
        f'<rect class="range" x="{across(flag.earliest):.1f}" y="0" height="{_HEIGHT}" '
        f'width="{max(across(flag.latest) - across(flag.earliest), 1):.1f}"/>'
        f'<line class="began" x1="{across(flag.began):.1f}" x2="{across(flag.began):.1f}" y1="0" y2="{_HEIGHT}"/>'
        for flag in run.flags
    )


_LEVELS = "▁▂▃▄▅▆▇█"


class MonitorView:
    """Terminal view of a run summary, adapted to the width."""

    def __init__(self, run: RunSummary) -> None:
        self._run = run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        run = self._run
        wide = options.max_width >= 104
        place = "steps" if run.by_step else "rows"
        yield Text.assemble(
            (f"{run.samples:,} samples", "bold"),
            f", {place} {run.first_step:,.0f} to {run.last_step:,.0f}",
            (f"; false alarms at most {run.false_alarms:.0%} of runs", "dim"),
        )
        for flag in run.flags:
            yield Padding(Text.assemble(("! ", "bold red"), (run.sentence(flag), "red")), (1, 0, 0, 0))
        if not run.flags:
            yield Padding(Text.assemble(("✓ ", "bold green"), (run.verdict, "green")), (1, 0, 0, 0))
        yield Text("")
        yield self._table(wide)
        if run.notes:
            yield Text("")
            yield Group(*(Text(f"- {note}", style="dim") for note in run.notes))

    def _table(self, wide: bool) -> Table:
        run, width = self._run, 32 if wide else 16
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("", min_width=27, max_width=34 if wide else 28, overflow="fold")
        table.add_column("over the run", no_wrap=True)
        table.add_column("start", justify="right", no_wrap=True)
        table.add_column("end", justify="right", no_wrap=True)
        table.add_column("fell ← change → grew" if wide else "change", no_wrap=True)
        table.add_column("in sd", justify="right", no_wrap=True)
        if wide:
            table.add_column("usual share", justify="right", no_wrap=True, style="dim")
        largest = max([abs(drift.change) for drift in (*run.objectives, run.score)] + [1e-9])
        flagged = {flag.objective for flag in run.flags}
        self._row(table, run.score, width, largest, wide, "bold")
        for drift in run.objectives:
            self._row(table, drift, width, largest, wide, "red" if drift.name in flagged else "")
        kinds = {flag.kind for flag in run.flags}
        others = (
            (run.length, "length, tokens", "length" in kinds),
            (run.uncertainty, "uncertainty, start = 1", "out_of_distribution" in kinds),
            (run.distance, run.distance_title, False),
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
    """Values as a line of `width` block characters, scaled from the lowest to the highest mean."""
    edges = np.linspace(0, len(values), min(width, len(values)) + 1).astype(int)
    cells = np.array([np.mean(values[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    low, high = cells.min(), cells.max()
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        return _LEVELS[0] * len(cells)
    return "".join(_LEVELS[int(level)] for level in np.minimum((cells - low) / (high - low) * 8, 7))


def number(value: float) -> str:
    """A number in at most six characters or so."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
