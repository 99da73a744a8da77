"""Page of `armorm probe`: a curve over the layers for each figure, and the table behind them."""

from __future__ import annotations

import math

from armorm.explain.html import render
from armorm.report.plots import curves_by_layer
from armorm.training.probe import FIGURES, Probe


def probe_page(found: Probe) -> str:
    """One self-contained page."""
    layers = sorted({entry.layer for entry in found.readouts})
    plots = []
    for figure, title in FIGURES.items():
        best = found.best(figure)
        if best is not None:
            curves = {
                str(pooling): [
                    next(
                        (getattr(e, figure) for e in found.readouts if (e.layer, e.pooling) == (layer, pooling)),
                        math.nan,
                    )
                    for layer in layers
                ]
                for pooling in dict.fromkeys(entry.pooling for entry in found.readouts)
            }
            plots.append({"title": title, "best": best, "svg": curves_by_layer(layers, curves, title)})
    rows = [
        [f"{e.layer} of {found.layers}", e.pooling, *(_cell(getattr(e, figure)) for figure in FIGURES), f"{e.cost:.0%}"]
        for e in found.readouts
    ]
    return render("probe", found=found, plots=plots, heads=["layer", "pooling", *FIGURES.values(), "cost"], rows=rows)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
