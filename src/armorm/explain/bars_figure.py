"""A matplotlib figure of signed bars: what each objective adds to a score or a margin."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RAISES, _LOWERS, _OTHERS = "#2563eb", "#dc5a12", "#8a8f96"


def bars_figure(
    names: Sequence[str],
    values: Sequence[float],
    title: str,
    axis: str,
    *,
    highlighted: int,
    sides: tuple[str, str] = ("", ""),
) -> Figure:
    """Horizontal bars, the first name on top; hatched bars are below 0, so that the figure reads in greyscale.

    Args:
        names, values: of the bars.
        title: the verdict.
        axis: what the values are.
        highlighted: number of bars in colour; the others are grey.
        sides: what bars to the left and to the right of zero speak for, written above them.
    """
    from matplotlib.figure import Figure  # not pyplot, which would keep it and may open a window

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=120)
            return buffer.getvalue()

    figure = NotebookFigure(figsize=(7.2, 1.1 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    colours = [(_RAISES if value >= 0 else _LOWERS) if i < highlighted else _OTHERS for i, value in enumerate(values)]
    bars = axes.barh(range(len(names)), values, color=colours)
    for bar, value in zip(bars, values, strict=True):
        if value < 0:
            bar.set(hatch="///", edgecolor="white", linewidth=0)
    axes.bar_label(bars, [f"{value:+.3f}" for value in values], padding=3, fontsize=8)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    for side, shift, alignment in zip(sides, (-6, 6), ("right", "left"), strict=True):
        axes.annotate(
            side,
            (0, 1),
            (shift, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha=alignment,
            fontsize=9,
        )
    axes.set_xlabel(axis, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle("\n".join(textwrap.wrap(title, 84)), fontsize=9.5, x=0.01, ha="left")
    return figure
