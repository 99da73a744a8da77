"""`armorm calibrate`: the factor that makes score margins the logits of preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    Place,
    SplitOption,
    StrictOption,
)
from armorm.cli.output import emit, facts, require_unused
from armorm.progress import say


def calibrate(
    model: ModelArgument,
    pairs: Annotated[
        list[str],
        Argument(
            metavar="PAIRS...", help="Preference pairs: files, folders or hub ids.", autocompletion=completion.data
        ),
        Place.INPUT,
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for the model (default: not saved)."), Place.FOLDER
    ] = None,
    split: SplitOption = None,
    limit: Annotated[int | None, Option(min=1, help="Approximate number of pairs.")] = None,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "all",
) -> None:
    """Fit the factor with which sigmoid(factor x margin) is the probability that a response is preferred.

    Without it, comparisons state a margin and no probability. Scores do not change. Pairs of prompts that the model
    was trained on are skipped; the model may be any sequence classifier with one logit.

    Example: `armorm calibrate runs/demo pairs.jsonl --output runs/calibrated`
    """
    from armorm.evaluation.margin_calibration import calibrate as fit
    from armorm.evaluation.margin_calibration import save_calibrated
    from armorm.evaluation.results import seen_in_training

    require_unused(output, force)
    found, settings = fit(model, pairs, split=split, limit=limit, strict=strict, dtype=dtype, device=device)
    shown = facts(
        [
            ("factor of margins", f"{found.scale:.4g}, relative standard error {found.scale_error:.2f}"),
            ("pairs", f"{found.pairs:,} of {found.prompts:,} prompts"),
            ("accuracy", f"{found.accuracy:.1%}; {found.expected_accuracy:.1%} is expected of these probabilities"),
            ("log loss", f"{found.loss:.3f}"),
        ]
    )
    emit(settings, shown, *([seen_in_training(settings["seen"])] if "seen" in settings else []), as_json=as_json)
    if output is None:
        say("not saved (set --output to save the calibrated model)")
        return
    save_calibrated(model, settings, output)
    say(f"wrote {output}")
