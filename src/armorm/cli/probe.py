"""`armorm probe`: which layer and pooling of a backbone give the best heads on a recipe's data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.options import ForceOption, HtmlOption, JsonOption, Place, parse_layer
from armorm.cli.output import emit, require_unused, table, write_page
from armorm.errors import RecipeError


def probe(
    recipe: Annotated[Path, Argument(help="Recipe (YAML file).", autocompletion=completion.recipes), Place.INPUT],
    layers: Annotated[
        str | None, Option(help="Layers, such as 6,12,0.5 (default: eight, spread evenly, the last included).")
    ] = None,
    poolings: Annotated[str, Option(help="Poolings of the response.")] = "last,mean,last+mean",
    limit: Annotated[int, Option(min=50, help="Approximate number of rows of each data set.")] = 2000,
    overrides: Annotated[list[str] | None, Option("--set", help="Override a recipe key. Repeatable.")] = None,
    html: HtmlOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure layers and poolings of the recipe's backbone, in one forward pass per row.

    Ratings: Spearman, and accuracy within prompts. Pairs: accuracy of a linear head. All on a fifth of the training
    prompts that is held out; test rows are not read. The cost is that of a forward pass that stops at the layer,
    relative to the whole backbone.

    Example: `armorm probe recipes/real-small.yaml --layers 6,12,18 --html probe.html`
    """
    from armorm.training.probe import FIGURES, POOLINGS
    from armorm.training.probe import probe as run
    from armorm.training.recipe import Recipe

    require_unused(html, force)
    asked = [name.strip() for name in poolings.split(",")]
    unknown = [name for name in asked if name not in POOLINGS]
    if unknown:
        raise RecipeError(f"--poolings: found {unknown[0]!r}, expected {', '.join(POOLINGS)}")
    found = run(
        Recipe.from_yaml(recipe, overrides or []),
        layers=[layer for text in (layers or "").split(",") if text and (layer := parse_layer(text)) is not None],
        poolings=asked,  # type: ignore[arg-type]
        limit=limit,
    )
    best = {figure: found.best(figure) for figure in FIGURES}
    shown = table("layer", "pooling", "Spearman", "within prompts", "pairs", "cost", left=2)
    for entry in found.readouts:
        values = [getattr(entry, figure) for figure in FIGURES]
        marks = ["*" if best[figure] is entry else " " for figure in FIGURES]
        cells = ["" if math.isnan(v) else f"{v:.3f}{mark}" for v, mark in zip(values, marks, strict=True)]
        shown.add_row(f"{entry.layer}/{found.layers}", entry.pooling, *cells, f"{entry.cost:.0%}")
    lines = [
        f"best for {FIGURES[figure]}: backbone: {{layer: {entry.layer}, pooling: {entry.pooling}}}"
        for figure, entry in best.items()
        if entry is not None
    ]
    emit(found.to_dict(), shown, "", *lines, as_json=as_json)
    if html is not None:
        from armorm.report.probe_page import probe_page

        write_page(html, probe_page(found))
