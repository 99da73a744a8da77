"""`armorm extend`: new objectives, or more ratings, for a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from armorm.cli import completion
from armorm.cli.options import JsonOption, ModelArgument, Place, StrictOption, column_scales
from armorm.cli.output import AGAIN, emit, table
from armorm.interruption import keep
from armorm.locks import locked
from armorm.progress import say


def extend(
    model: ModelArgument,
    ratings: Annotated[
        list[str],
        Option("--ratings", help="Rated rows: file, folder or hub id. Repeatable.", autocompletion=completion.data),
        Place.INPUT,
    ],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the extended model."), Place.FOLDER],
    objectives: Annotated[
        list[str] | None,
        Option(
            "--objective",
            help="Rated column and its scale: COLUMN=LOW:HIGH, with :lower or :neutral if higher is not better. "
            "Repeatable. Default: every rating column, on the scale that `armorm init` guesses.",
        ),
    ] = None,
    preferences: Annotated[
        list[str] | None,
        Option(
            "--preferences", help="Preference pairs for training the gate. Repeatable.", autocompletion=completion.data
        ),
    ] = None,
    share: Annotated[float | None, Option(help="Weight of the new objectives if there are no --preferences.")] = None,
    steps: Annotated[
        int | None, Option(help="Training steps of the gate (default: those of the model's recipe).", min=1)
    ] = None,
    seed: Annotated[int | None, Option(help="Random seed of gate training (default: that of the recipe).")] = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add objectives or ratings to a trained model, without its old ratings.

    Fits only the regression rows of the objectives that are rated here, and the gate.

    Example: `armorm extend armorm-small-rm --ratings ours.jsonl --objective politeness=1:5 --output runs/ours`
    """
    from armorm.data.inspection import rated_sets
    from armorm.data.sources import Location
    from armorm.model.configuration import ArmoRMConfig
    from armorm.training.extend import extend as run
    from armorm.training.summary import number

    known = ArmoRMConfig.from_pretrained(model).objective_set
    sets, guessed = rated_sets(known, ratings, column_scales(objectives or ()))
    for name, low, high in guessed:
        say(f"{name}: scale {low:g} to {high:g} guessed from the data; set it with --objective")
    pairs = [Location.find(name) for name in preferences or ()]
    keep(f"finished work is kept in {output / 'work'}; {AGAIN}")
    with locked(output / "work"):
        run(model, sets, output, preferences=pairs, share=share, steps=steps, seed=seed, strict=strict)
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    shown = table("objective", "ratings", "alpha", "R2", "test", "Spearman")
    for report in metrics["regression"]:
        test = metrics["evaluation"]["ratings"].get(report["objective"], {})
        fitted = f"{report['ratings']:,}", f"{report['alpha']:g}", number(report["r2"], 2)
        shown.add_row(report["objective"], *fitted, str(test.get("n", "")), number(test.get("spearman")))
    emit(metrics, shown, f"\nmodel, card and metrics: {output}", as_json=as_json)
