"""`armorm extend`: own objectives for a trained or the released model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table


def extend(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or an embedded name.")],
    ratings: Annotated[list[str], typer.Option("--ratings", help="Rated rows; may be given several times.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the extended model.")],
    objectives: Annotated[
        Optional[list[str]],
        typer.Option(
            "--objective",
            help="COLUMN=LOW:HIGH, with :lower or :neutral behind it where more is not better; by default every "
            "column of numbers, from its lowest to its highest value.",
        ),
    ] = None,
    preferences: Annotated[
        Optional[list[str]], typer.Option("--preferences", help="Pairs to train the gate on; several times, too.")
    ] = None,
    share: Annotated[
        Optional[float], typer.Option(help="Of the gate's weight for new objectives, where no preferences are given.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the gate's training.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the gate's training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Add objectives, or ratings, to a trained or the released model; its old ratings are not needed.

    Only rows of W for what is rated here are fitted, and the gate.

    Example: `armorm extend armorm-tiny-rm --ratings ours.jsonl --objective politeness=1:5 --output runs/ours`
    """
    from armorm.training.extend import extend as run
    from armorm.training.extension_data import preference_locations, rated_sets

    sets, taken = rated_sets(model, ratings, objectives or [])
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for name, low, high in taken:
        console.print(f"{name}: rated from {low:g} to {high:g}, by the data; --objective says otherwise")
    run(model, sets, output, preferences=preference_locations(preferences or []), share=share, steps=steps, seed=seed)
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(metrics, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("objective", "ratings", "alpha", "R2", "test", "Spearman"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for report in metrics["regression"]:
        test = metrics["evaluation"]["ratings"].get(report["objective"], {})
        spearman = test.get("spearman")
        table.add_row(
            report["objective"],
            f"{report['ratings']:,}",
            f"{report['alpha']:g}",
            f"{report['r2']:.2f}",
            str(test.get("n", "")),
            "" if spearman is None else f"{spearman:.3f}",
        )
    Console(highlight=False).print(table, f"\nmodel, card and metrics: {output}", sep="")
