"""Plots as inline SVG: lines, scatter plots, histograms and intervals, in the colours of the page.

Drawn here rather than by a plotting library because a plot must follow the page from light to dark, stay legible at the
width of a phone, and contain no style or address of its own. Functions return the `Markup` of one `<svg>`, 320 units
wide, with labels next to what they name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 12, 12, 26
_LINES = (("line", "first"), ("line other", "other"), ("line third", "third"))  # of a line, and of its label


class Frame:
    """Plotting area with its scales: `x` and `y` are ranges of the data, `right` is the margin for labels."""

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        log_x: bool = False,
        height: int = HEIGHT,
        right: int = _RIGHT,
    ) -> None:
        self.log_x, self.height, self.right = log_x, height, right
        self.x = tuple(math.log10(value) for value in x) if log_x else x
        self.y = y
        self.parts: list[str] = []

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Position of a data point in the drawing, clipped to the area."""
        x = math.log10(x) if self.log_x else x
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        across, up = min(max(across, 0), 1), min(max(up, 0), 1)
        inner = self.height - _TOP - _BOTTOM
        return round(_LEFT + across * (WIDTH - _LEFT - self.right), 1), round(_TOP + (1 - up) * inner, 1)

    def text(self, x: float, y: float, label: str, *, anchor: str = "start", kind: str = "") -> None:
        """A label at a position of the drawing."""
        name = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}"{name}>{escape(label)}</text>')

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through data points."""
        places = " ".join(f"{x},{y}" for x, y in (self.at(*point) for point in points))
        self.parts.append(f'<polyline class="{kind}" points="{places}"/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 2.5) -> None:
        """A data point."""
        across, down = self.at(x, y)
        self.parts.append(f'<circle class="{kind}" cx="{across}" cy="{down}" r="{radius}"/>')

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str = "", y_format: str = "g") -> None:
        """Ticks and labels of both axes."""
        for tick in y_ticks:
            left, down = self.at(10 ** self.x[0] if self.log_x else self.x[0], tick)
            self.parts.append(f'<line class="axis" x1="{left}" x2="{WIDTH - self.right}" y1="{down}" y2="{down}"/>')
            self.text(left - 5, down + 4, f"{tick:{y_format}}", anchor="end")
        bottom = self.height - _BOTTOM + 15
        for place, tick in enumerate(x_ticks):
            across, _ = self.at(tick, self.y[0])
            anchor = "start" if place == 0 else "end" if place == len(x_ticks) - 1 else "middle"
            self.text(across, bottom, _short(tick), anchor=anchor)
        if x_label:
            self.text((WIDTH + _LEFT) / 2, bottom, x_label, anchor="middle")

    def svg(self, label: str) -> Markup:
        """The drawing; `label` describes it to screen readers."""
        inner = "".join(self.parts)
        return Markup(f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(label)}">{inner}</svg>')


def error_by_alpha(alphas: Sequence[float], errors: Sequence[float], chosen: float, name: str) -> Markup:
    """Validation error (share of variance) over the ridge penalty; the selected one is ringed."""
    known = [(a, e) for a, e in zip(alphas, errors, strict=True) if np.isfinite(e)]
    top = max(1.0, min(max((e for _, e in known), default=1.0), 1.5))
    low = min([1.0, *(e for _, e in known)])
    lowest = low - 0.22 * (top - low)  # space for the label below the smallest error
    frame = Frame((alphas[0], alphas[-1]), (lowest, top), log_x=True)
    frame.axes([alphas[0], alphas[-1]], [tick for tick in _ticks(low, top) if tick >= 0], "penalty alpha")
    frame.path(known, "line")
    for alpha, error in known:
        frame.dot(alpha, error, "dot", 2.2)
    best = next((point for point in known if point[0] == chosen), None)
    if best is not None:
        frame.dot(*best, "ring", 6)
        across, down = frame.at(*best)
        anchor = "end" if across > WIDTH * 0.7 else "start" if across < WIDTH * 0.3 else "middle"
        frame.text(across, down + 19, f"{best[1]:.2f} at {chosen:g}", anchor=anchor, kind="key")
    return frame.svg(
        f"{name}: validation error by penalty, {best[1] if best else float('nan'):.2f} at alpha {chosen:g}"
    )


def predicted_against_given(
    predicted: np.ndarray,
    given: np.ndarray,
    means: Sequence[tuple[float, float, int]],
    span: tuple[float, float],
    name: str,
) -> Markup:
    """Held-out over predicted rating (n,), raw scale of range `span`: points, and `means` as of `binned_means`."""
    low, high = float(min(span[0], np.min(predicted))), float(max(span[1], np.max(predicted)))
    frame = Frame((low, high), span)
    frame.axes([low, high], _ticks(*span), "predicted rating")
    frame.path([(max(low, span[0]),) * 2, (min(high, span[1]),) * 2], "zero")
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, len(given)) * (span[1] - span[0])
    for x, y in zip(predicted, given + jitter, strict=True):
        frame.dot(float(x), float(y), "dot pale", 2)
    points = [(x, y) for x, y, _ in means]
    if len(points) > 1:
        frame.path(points, "line other")
    for point in points:
        frame.dot(*point, "dot other", 3.2)
    return frame.svg(f"{name}: predicted against given rating of {len(given)} rows")


def histogram(values: np.ndarray, span: tuple[float, float], label: str, unit: str, mark: str = "") -> Markup:
    """Histogram over a range, with the mean marked."""
    counts, edges = np.histogram(np.clip(values, *span), bins=24, range=span)
    frame = Frame(span, (0, 1.3 * float(max(counts.max(), 1))), height=150)  # space for the label above
    frame.axes([span[0], span[1]], [], unit)
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        (x0, y0), (x1, y1) = frame.at(float(left), float(count)), frame.at(float(right), 0.0)
        if count:
            size = f'width="{x1 - x0 - 1:.1f}" height="{y1 - y0:.1f}"'
            frame.parts.append(f'<rect class="column" x="{x0 + 0.5}" y="{y0}" {size} rx="1"/>')
    mean = float(np.mean(values))
    across, down = frame.at(mean, frame.y[1])
    frame.parts.append(
        f'<line class="zero" x1="{across}" x2="{across}" y1="{down - 2}" y2="{frame.height - _BOTTOM}"/>'
    )
    anchor = "end" if across > WIDTH / 2 else "start"
    frame.text(across + (-5 if anchor == "end" else 5), down + 6, mark or f"mean {mean:.2f}", anchor=anchor, kind="key")
    return frame.svg(f"{label}: {len(values)} values, mean {mean:.2f}")


def learning_curve(
    steps: Sequence[float], training: Sequence[float], held_out: Sequence[float], best: float, label: str
) -> Markup:
    """Loss of the gate over the steps; lines are labelled at their ends, the selected step is ringed."""
    values = [value for value in (*training, *held_out) if np.isfinite(value)]
    low, high = min(values), max(values)
    margin = 0.08 * ((high - low) or 1)
    frame = Frame((steps[0], max(steps[-1], 1)), (low - margin, high + margin), right=62)
    ticks = _ticks(low, high)
    digits = max(2, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9) if len(ticks) > 1 else 2)
    frame.axes([steps[0], steps[-1]], ticks, "step", f".{min(digits, 4)}f")
    ends = []
    for losses, kind, name in ((training, "", "training"), (held_out, " other", "held out")):
        known = [(s, v) for s, v in zip(steps, losses, strict=True) if np.isfinite(v)]
        frame.path(known, f"line{kind}")
        ends.append((frame.at(*known[-1]), "other" if kind else "first", name))
    (one, two) = ends[0][0], ends[1][0]
    nudge = max(0.0, 13 - abs(one[1] - two[1])) / 2
    for (across, down), kind, name in ends:
        other = two if (across, down) == one else one
        shift = -nudge if (down, kind) <= (other[1], "first") else nudge
        frame.text(across + 5, down + 4 + shift, name, kind=kind)
    selected = [(s, v) for s, v in zip(steps, held_out, strict=True) if s == best]
    if selected:
        frame.path([(selected[0][0], frame.y[0]), (selected[0][0], frame.y[1])], "zero")
        frame.dot(*selected[0], "ring", 6)
        across, down = frame.at(selected[0][0], frame.y[1])
        anchor = "end" if across > WIDTH * 0.6 else "start"
        frame.text(
            across + (-6 if anchor == "end" else 6), down + 4, f"selected: step {best:g}", anchor=anchor, kind="key"
        )
    return frame.svg(f"{label}: loss by step, the weights of step {best:g} were selected")


def curves_by_layer(layers: Sequence[int], curves: Mapping[str, Sequence[float]], label: str) -> Markup:
    """A figure over the layers, a line for each pooling, labelled at its end; the highest point is ringed."""
    known = {
        name: [(x, y) for x, y in zip(layers, values, strict=True) if np.isfinite(y)] for name, values in curves.items()
    }
    points = [point for line in known.values() for point in line]
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.08 * ((high - low) or 0.1)
    frame = Frame(
        (layers[0], layers[-1] if len(layers) > 1 else layers[0] + 1), (low - margin, high + margin), right=76
    )
    frame.axes([layers[0], layers[-1]] if len(layers) > 1 else [layers[0]], _ticks(low, high), "layer", ".2f")
    ends = sorted((frame.at(*line[-1])[1], name) for name, line in known.items() if line)
    height = -math.inf
    for down, name in ends:  # labels keep a line apart
        height = max(down + 4, height + 13)
        frame.text(WIDTH - 72, height, name, kind=_LINES[list(curves).index(name)][1])
    for (_, line), (kind, _) in zip(known.items(), _LINES, strict=False):
        frame.path(line, kind)
    best = max(points, key=lambda point: point[1])
    frame.dot(*best, "ring", 6)
    return frame.svg(f"{label}: best at layer {best[0]}, {best[1]:.3f}")


def effects(edits: Mapping[str, Mapping[str, Any]], span: tuple[float, float], tolerance: float, label: str) -> Markup:
    """Mean changes by edit, as of `perturbation_audit`, one under another on a scale of range `span`.

    A thick line is the 95% interval, the thin line behind it the one that the verdict uses; changes within the shaded
    tolerance count as none. A change is a dot, a diamond if it is a fault, a ring if it is undecided.
    """
    frame = Frame(span, (0, len(edits)), height=_TOP + _BOTTOM + 34 * len(edits))
    (left, top), (right, bottom) = frame.at(-tolerance, len(edits)), frame.at(tolerance, 0)
    size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
    frame.parts.append(f'<rect class="tolerance" x="{left}" y="{top}" {size}/>')
    frame.axes([span[0], 0, span[1]], [])
    frame.path([(0, 0), (0, len(edits))], "zero")
    for place, (name, edit) in enumerate(edits.items()):
        level = len(edits) - place - 0.68
        kind = " other" if edit["fault"] else ""
        for interval, line in ((edit["of_all"], "whisker"), (edit["interval"], f"line{kind}")):
            if interval is not None:
                frame.path([(interval[0], level), (interval[1], level)], line)
        across, down = frame.at(edit["change"], level)
        if edit["fault"]:
            points = f"{across},{down - 5} {across + 5},{down} {across},{down + 5} {across - 5},{down}"
            frame.parts.append(f'<polygon class="dot other" points="{points}"/>')
        elif edit["verdict"] in ("unclear", "too few rows"):
            frame.dot(edit["change"], level, "ring open", 3.5)
        else:
            frame.dot(edit["change"], level, "dot", 4)
        frame.text(0, down - 9, name, kind="key")
        frame.text(WIDTH, down - 9, edit["verdict"], anchor="end", kind="other" if edit["fault"] else "")
    described = "; ".join(f"{name} {edit['change']:+.2f}, {edit['verdict']}" for name, edit in edits.items())
    return frame.svg(f"{label}: {described}")


def model_intervals(models: Mapping[str, tuple[float, tuple[float, float] | None, str]], label: str) -> Markup:
    """Values of models with their intervals, one under another.

    Args:
        models: value, 95% interval or None, and the text to print, by name, best first.
    """
    known = [*(value for value, _, _ in models.values())]
    known += [end for _, interval, _ in models.values() if interval is not None for end in interval]
    low, high = min(known), max(known)
    room = 0.05 * ((high - low) or abs(high) or 1.0)
    frame = Frame((low - room, high + room), (0, len(models)), height=_TOP + _BOTTOM + 34 * len(models))
    frame.axes(_ticks(low - room, high + room), [])
    for place, (name, (value, interval, shown)) in enumerate(models.items()):
        level = len(models) - place - 0.68
        if interval is not None:
            frame.path([(interval[0], level), (interval[1], level)], "line")
        frame.dot(value, level, "dot", 4)
        down = frame.at(value, level)[1]
        frame.text(0, down - 9, name, kind="key")
        frame.text(WIDTH, down - 9, shown, anchor="end")
    described = "; ".join(f"{name} {shown}" for name, (_, _, shown) in models.items())
    return frame.svg(f"{label}: {described}")


def standalone(plot: Markup, style: str) -> str:
    """A plot as an SVG file of its own, with the style sheet of the pages."""
    opening, _, rest = str(plot).partition(">")
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{escape(style)}</style>{rest}\n'


def _ticks(low: float, high: float) -> list[float]:
    """About four round numbers within a range."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-12)))
    for factor in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0):
        if (high - low) / (step * factor) <= 5:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if float(value).is_integer() and abs(value) < 10_000:
        return f"{value:.0f}"
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
