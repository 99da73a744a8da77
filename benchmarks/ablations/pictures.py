"""The plots of docs/findings.md, as SVG files that are byte-identical for the same results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ablations.measuring import LONGER
from ablations.studies import QUANTILE_LEVELS
from armorm.files import write_whole

INK, FAINT, BLUE, ORANGE = "#222222", "#bbbbbb", "#2166ac", "#d6604d"
STYLE: Any = {
    "svg.hashsalt": "armorm",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
}


def draw(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Draw every picture; returns their paths."""
    with mpl.rc_context(STYLE):
        made = {
            "methods": _methods(results["methods"]["figures"]),
            "references": _references(results["references"]["table"]),
        }
        if results["domains"]:
            made["weights"] = _weights(results["domains"], results["setting"]["bias"])
        if results["quantiles"]:
            made["quantiles"] = _quantiles(results["quantiles"])
        paths = []
        for name, figure in made.items():
            path = folder / f"{name}.svg"
            write_whole(path, partial(_save, figure))
            paths.append(path)
    return paths


def _save(figure: Figure, place: Path) -> None:
    figure.savefig(place, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")


def _methods(figures: Mapping[str, Any]) -> Figure:
    """Accuracy of every method on every set, with intervals."""
    names = list(figures)[::-1]
    sets = [name for name in next(iter(figures.values())) if name not in ("against", LONGER)]
    figure = Figure(figsize=(2.4 * len(sets) + 2.6, 0.26 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, sets, strict=True):
        for place, method in enumerate(names):
            entry = figures[method][name]
            colour = BLUE if method == "gate" else INK
            if entry["interval"]:
                axis.plot(entry["interval"], [place, place], color=colour, linewidth=1.2)
            axis.plot(entry["value"], place, "o", color=colour, markersize=4)
        axis.axvline(figures["gate"][name]["value"], color=BLUE, linewidth=0.6, linestyle=":")
        axis.axvline(0.5, color=FAINT, linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.tick_params(length=0)
    axes[0].set_yticks(range(len(names)), names)
    figure.supxlabel("accuracy on held-out pairs, 95% interval over prompts; dotted: the gate", fontsize=8)
    return figure


def _weights(domains: Mapping[str, Any], bias: str) -> Figure:
    """Mean gating weights by source."""
    sources = list(domains)
    objectives = list(next(iter(domains.values()))["weights"])
    values = np.array([[domains[s]["weights"][o] for o in objectives] for s in sources])
    figure = Figure(figsize=(0.36 * len(objectives) + 2.4, 0.28 * len(sources) + 1.9), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    axis.set_xticks(
        range(len(objectives)), [o + (" (bias)" if o == bias else "") for o in objectives], rotation=55, ha="right"
    )
    axis.set_yticks(range(len(sources)), sources)
    axis.tick_params(length=0, labelsize=8)
    figure.colorbar(shown, ax=axis, label="mean gating weight", shrink=0.8)
    return figure


def _references(table: Mapping[str, Any]) -> Figure:
    """Correlation with length that each choice of reference data leaves in each set."""
    choices, places = list(table), list(next(iter(table.values()))["left"])
    values = np.array([[table[c]["left"][p] for p in places] for c in choices])
    figure = Figure(figsize=(0.5 * len(places) + 3.4, 0.28 * len(choices) + 1.5), layout="constrained")
    axis = figure.subplots()
    top = float(values.max())
    axis.imshow(values, cmap="OrRd", vmin=0, vmax=top, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        colour = "white" if values[row, column] > 0.6 * top else INK
        axis.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(places)), places, rotation=40, ha="right")
    axis.set_yticks(range(len(choices)), choices)
    axis.tick_params(length=0, labelsize=8)
    axis.set_ylabel("reference data", fontsize=8)
    figure.suptitle("mean |Spearman| of debiased rewards\nwith predicted length, by where it is measured", fontsize=8)
    return figure


def _quantiles(found: Mapping[str, Any]) -> Figure:
    """Share of held-out ratings below each quantile."""
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, way in zip(axes, ("quantile heads", "training ratings"), strict=True):
        axis.plot([0, 1], [0, 1], color=FAINT, linewidth=0.8)
        for entry in found.values():
            large = entry["test"] >= 100
            axis.plot(
                QUANTILE_LEVELS,
                entry[way]["below"],
                "o-",
                color=BLUE if large else ORANGE,
                alpha=0.75,
                markersize=2.5,
                linewidth=1,
            )
        axis.set_title(way, fontsize=9)
        axis.set_xlabel("quantile level", fontsize=8)
        axis.set_aspect("equal")
    axes[0].set_ylabel("share of held-out ratings below", fontsize=8)
    axes[0].text(0.98, 0.02, "blue: 100 test rows or more", ha="right", fontsize=7, color=BLUE)
    return figure
