"""Draws docs/images/probe-FIGURE.svg from benchmarks/results/probe-small.json, the result of `armorm probe --json`.

armorm probe recipes/small.yaml --layers 6,10,12,14,16,18,20,22,24,27,30 --limit 220 --json > probe.json
python tools/probe_pictures.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from armorm.report.plots import curves_by_layer
from armorm.training.probe import FIGURES

RESULTS = Path("benchmarks/results/probe-small.json")
TARGET = Path("docs/images")
# An image of its own has no page to take its colours from.
_STYLE = """<style>text { font: 11px sans-serif; fill: #555 } .axis { stroke: #ccc } polyline { fill: none; stroke-width: 2 }
.line { stroke: #00695c } .line.other { stroke: #c2571a } .line.third { stroke: #4a5a9e }
text.first { fill: #00695c } text.other { fill: #c2571a } text.third { fill: #4a5a9e }
.ring { fill: none; stroke: #222 }</style>"""


def main() -> None:
    """Write one picture a figure."""
    readouts = json.loads(RESULTS.read_text(encoding="utf-8"))["readouts"]
    layers = sorted({entry["layer"] for entry in readouts})
    for figure, title in FIGURES.items():
        values = {(e["layer"], e["pooling"]): math.nan if e[figure] is None else e[figure] for e in readouts}
        poolings = dict.fromkeys(entry["pooling"] for entry in readouts)
        svg = str(curves_by_layer(layers, {p: [values[layer, p] for layer in layers] for p in poolings}, title))
        opening, body = svg.split(">", 1)
        sized = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="480" ')
        (TARGET / f"probe-{figure}.svg").write_text(f"{sized}>{_STYLE}{body}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
