"""`armorm steer`: other weights for the objectives of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from armorm.cli import completion
from armorm.cli.options import DeviceOption, DtypeOption, FeaturesOption, ForceOption, JsonOption, ModelArgument, Place
from armorm.cli.output import WIDTH, emit, require_unused
from armorm.files import embedded_path, write_text
from armorm.progress import say

OBJECTIVE_NUMBER = "OBJECTIVE=NUMBER"


def steer(
    model: ModelArgument,
    policy: Annotated[
        Path | None,
        Option(
            "--policy",
            "-p",
            help="YAML: multiply, drop, pin, blend, debias_strength.",
            autocompletion=completion.recipes,
        ),
    ] = None,
    multiply: Annotated[
        list[str] | None,
        Option(
            autocompletion=completion.objective_numbers,
            metavar=OBJECTIVE_NUMBER,
            help="Multiply the weight of an objective. Repeatable.",
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        Option(
            autocompletion=completion.objectives,
            metavar="OBJECTIVE",
            help="Give the weight of an objective to the others. Repeatable.",
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        Option(
            autocompletion=completion.objective_numbers,
            metavar=OBJECTIVE_NUMBER,
            help="Fix the weight of an objective (0 to 1). Repeatable.",
        ),
    ] = None,
    debias_strength: Annotated[float | None, Option(help="Debiasing: 0 for none, 1 as trained.")] = None,
    pairs: Annotated[
        list[str] | None,
        Option("--pairs", "-d", help="Preference pairs for a preview. Repeatable.", autocompletion=completion.data),
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for the model (default: not saved)."), Place.FOLDER
    ] = None,
    self_contained: Annotated[
        bool, Option("--self-contained", help="Include the model code (see `armorm export`).")
    ] = False,
    features: FeaturesOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Change the weights of objectives, preview the effect and save the steered model.

    The new settings replace any earlier steering of the model; the preview compares with the unsteered model. Options
    are added to those of the policy file. A steered model records its settings in config and model card.

    Example: `armorm steer runs/demo --policy policy.yaml --pairs pairs.jsonl --output runs/steered`
    """
    from armorm.steering import SteeringError, read_policy, with_steering_note

    changes: dict[str, Any] = read_policy(policy) if policy is not None else {}
    for key, values in (("multiply", multiply), ("pin", pin)):
        if values:
            changes[key] = {**changes.get(key, {}), **dict(_named(value, f"--{key}") for value in values)}
    if drop:
        changes["drop"] = [*changes.get("drop", []), *drop]
    if debias_strength is not None:
        changes["debias_strength"] = debias_strength
    if not changes:
        raise typer.BadParameter("expected --policy, --multiply, --drop, --pin or --debias-strength")
    if pairs is None and output is None:
        raise typer.BadParameter("expected --pairs to preview the effect, --output to save the model, or both")
    require_unused(output, force)
    from armorm.features.store import dtype_for
    from armorm.objectives import ObjectiveError
    from armorm.reward_model import ArmoRM

    rm = ArmoRM.from_pretrained(model, dtype="weights" if pairs is None else dtype_for(features, dtype), device=device)
    try:
        steered = rm.steer(**changes)
    except (SteeringError, ObjectiveError) as error:
        raise SteeringError(f"{policy}: {error}" if policy is not None else str(error)) from None
    settings = steered.model.config.steering
    lines: list[str] = []
    if pairs is not None:
        from armorm.evaluation.steering_preview import preview
        from armorm.evaluation.tables import preview_tables

        found = preview(rm.steer(), steered, pairs, features=features)
        lines = found.lines()
        emit(found.to_dict(), preview_tables(found), as_json=as_json, width=WIDTH)
    elif as_json:
        emit({"steering": settings}, as_json=True)
    if output is None:
        say("not saved (set --output to save the steered model)")
        return
    if pairs is not None:  # the preview may have used another dtype than that of the weights
        rm = ArmoRM.from_pretrained(model, dtype="weights", device="cpu")
        steered = rm.steer(**changes)
    steered.save_pretrained(output, self_contained=self_contained)
    # The card of the original model, extended by a note.
    card = (embedded_path(rm.name) or Path(rm.name)) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {Path(rm.name).name}\n"
    write_text(output / "README.md", with_steering_note(text, settings, lines))
    say(f"wrote {output}" + ("" if settings else ", without any steering"))


def _named(text: str, option: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        return name, float(value if equals else "none")
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: expected {OBJECTIVE_NUMBER}") from None
