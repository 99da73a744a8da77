"""`armorm steer`: other weights for the objectives, seen on a preference set before they are saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from armorm.cli.scoring import DeviceOption, DtypeOption
from armorm.files import plain, write_text

_NAME_AND_NUMBER = "OBJECTIVE=NUMBER"


def steer(
    model: Annotated[str, typer.Argument(help="Folder, hub id or embedded name of a reward model.")],
    policy: Annotated[
        Optional[Path],
        typer.Option("--policy", "-p", help="YAML: multiply, drop, pin, blend, debias_strength."),
    ] = None,
    multiply: Annotated[
        Optional[list[str]], typer.Option(metavar=_NAME_AND_NUMBER, help="Factor of an objective's weight; repeat.")
    ] = None,
    drop: Annotated[
        Optional[list[str]], typer.Option(metavar="OBJECTIVE", help="Share an objective's weight out; repeat.")
    ] = None,
    pin: Annotated[
        Optional[list[str]], typer.Option(metavar=_NAME_AND_NUMBER, help="Fixed share of the weight; repeat.")
    ] = None,
    debias_strength: Annotated[
        Optional[float], typer.Option(help="Of the transform: 0 before debiasing, 1 as trained.")
    ] = None,
    pairs: Annotated[
        Optional[list[str]],
        typer.Option("--pairs", "-d", help="Preference rows on which to see what it does. May be repeated."),
    ] = None,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Where to save the steered model; nothing if absent.")
    ] = None,
    self_contained: Annotated[bool, typer.Option("--self-contained", help="As for export.")] = False,
    features: Annotated[Optional[Path], typer.Option(help="Feature store to read and fill.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Weigh the objectives otherwise: see what it does to a preference set, then save the steered model.

    What is given replaces an earlier steering of the model, and counts from its gate as trained; the preview compares
    with the model as trained. Options are added to the policy. The saved model says in config and card how it is
    steered, and is served like any other.

    Example: `armorm steer runs/demo --policy policy.yaml --pairs pairs.jsonl --output runs/steered`
    """
    from armorm.steering import SteeringError, read_policy

    asked: dict[str, Any] = read_policy(policy) if policy is not None else {}
    for key, values in (("multiply", multiply), ("pin", pin)):
        if values:
            asked[key] = {**asked.get(key, {}), **dict(_named(value, f"--{key}") for value in values)}
    if drop:
        asked["drop"] = [*asked.get("drop", []), *drop]
    if debias_strength is not None:
        asked["debias_strength"] = debias_strength
    if not asked:
        raise typer.BadParameter("expected a policy, or what to steer: --multiply, --drop, --pin, --debias-strength")
    if pairs is None and output is None:
        raise typer.BadParameter("expected --pairs to see what it does, --output to save it, or both")
    from armorm.objectives import ObjectiveError
    from armorm.reward_model import ArmoRM

    rm = ArmoRM.from_pretrained(model, dtype="weights" if pairs is None else dtype, device=device)
    try:
        steered = rm.steer(**asked)
    except (SteeringError, ObjectiveError) as error:
        raise SteeringError(f"{policy}: {error}" if policy is not None else str(error)) from None
    settings = steered.model.config.steering
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    found = None
    if pairs is not None:
        from armorm.evaluation.rendering_steered import preview_tables
        from armorm.evaluation.steering_preview import preview

        found = preview(rm.steer(), steered, pairs, features=features)
        if not as_json:
            width = min(Console().width, 80)
            Console(highlight=False).print(preview_tables(found), width=width)
    if as_json:
        print(json.dumps(plain(found.to_dict() if found else {"steering": settings}), indent=1, ensure_ascii=False))
    if output is not None:
        if pairs is not None:  # what is saved has the dtype of the weights, whatever it was tried in
            rm = ArmoRM.from_pretrained(model, dtype="weights", device="cpu")
            steered = rm.steer(**asked)
        _save(rm, steered, output, self_contained, found.lines() if found else [])
        console.print(f"wrote {output}" + ("" if settings else ": nothing is steered in it"))
    else:
        console.print("nothing was saved: --output says where to")


def _save(rm: Any, steered: Any, output: Path, self_contained: bool, lines: list[str]) -> None:
    """The steered model, with the card of the one that it was made from."""
    from armorm.embedded import embedded_path
    from armorm.steering import with_steering_note

    steered.save_pretrained(output, self_contained=self_contained)
    card = (embedded_path(rm.name) or Path(rm.name)) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {Path(rm.name).name}\n"
    write_text(output / "README.md", with_steering_note(text, steered.model.config.steering, lines))


def _named(text: str, option: str) -> tuple[str, float]:
    name, equals, value = text.rpartition("=")
    try:
        return name, float(value if equals else "none")
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: expected {_NAME_AND_NUMBER}") from None
