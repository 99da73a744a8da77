"""`armorm init`: from a team's own files to a recipe, with every guess shown and confirmed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from armorm.files import plain, write_text

if TYPE_CHECKING:
    from armorm.data.inspection import Inspection
    from armorm.objectives import Direction


def init(
    data: Annotated[list[str], typer.Argument(help="CSV, TSV, JSON lines, Parquet files, folders or hub ids.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    scale: Annotated[
        Optional[list[str]],
        typer.Option(help="COLUMN=LOW:HIGH, or COLUMN=LOW:HIGH:lower (less is better) or :neutral. May be repeated."),
    ] = None,
    skip: Annotated[Optional[list[str]], typer.Option(help="A column that is no rating. May be repeated.")] = None,
    column: Annotated[
        Optional[list[str]],
        typer.Option(help="prompt=NAME, response=NAME, ...: which column holds what. May be repeated."),
    ] = None,
    backbone: Annotated[str, typer.Option(help="Hub id, folder, or armorm-tiny.")] = "armorm-tiny",
    name: Annotated[Optional[str], typer.Option(help="Of the model; by default that of the recipe.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take the scales as they are shown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Look into rated data and write a recipe for it: columns, scales, pairs, gate.

    Scales are guessed from the values, shown, and confirmed: by you at the prompt, by --yes, or by stating them
    with --scale. Without a confirmation nothing is written.

    Example: `armorm init ratings.csv --output mine.yaml`
    """
    from armorm.data.inspection import inspect_set
    from armorm.data.sources import Location
    from armorm.training.dataset import read_training_data
    from armorm.training.recipe import Recipe
    from armorm.training.recipe_draft import draft_recipe

    scales, columns = column_scales(scale or ()), dict(map(_column, column or ()))
    found = [inspect_set(Location.find(name), columns=columns, scales=scales, skipped=skip or ()) for name in data]
    text = draft_recipe(found, name or output.name.split(".")[0], backbone)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for part in found:
        _show(part, console)
    if as_json:
        print(json.dumps(plain([_summary(part) for part in found]), indent=1))
    guessed = sum(not guess.stated for part in found for guess in part.guesses)
    if guessed and not yes and not _confirmed(console):
        console.print(
            f"\n{guessed} scales are guesses: take them with --yes, or state them with --scale COLUMN=LOW:HIGH"
        )
        raise typer.Exit(2)
    counts = read_training_data(Recipe.from_text(text, name=str(output))).counts()
    write_text(
        output, f"# Written by armorm init from {', '.join(data)}; scales are shown with what they rest on.\n{text}"
    )
    console.print(
        f"\nwrote {output}: {counts['rated_train']:,} rated rows and {counts['pairs_train']:,} pairs to train on, "
        f"{counts['rated_test']:,} and {counts['pairs_test']:,} held out; next: armorm train {output}"
    )


def column_scales(texts: Sequence[str]) -> dict[str, tuple[float, float, Direction | None]]:
    """Scales of columns as the command line takes them (`objectives.parse_scale`)."""
    from armorm.objectives import ObjectiveError, parse_scale

    try:
        return dict(map(parse_scale, texts))
    except ObjectiveError as error:
        raise typer.BadParameter(str(error)) from None


def _column(text: str) -> tuple[str, str]:
    ours, equals, own = text.partition("=")
    if not equals or ours not in ("prompt", "response", "messages", "chosen", "rejected", "split"):
        raise typer.BadParameter(f"found {text!r}, expected prompt=NAME, response=NAME, messages=NAME, ...")
    return ours, own


def _confirmed(console: Console) -> bool:
    if not sys.stdin.isatty():
        return False
    return console.input("\nare these scales right? [y/N] ").strip().lower() in ("y", "yes")


def _show(found: Inspection, console: Console) -> None:
    from armorm.training.recipe_draft import evidence

    console.print(
        f"\n[bold]{found.location.name}[/bold]: {found.rows:,} rows ({found.kind}), {found.prompts:,} prompts"
    )
    for ours, own in found.columns.items():
        console.print(f"  {ours} is column {own!r}", markup=False)
    if found.guesses:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in ("  objective", "scale", "better", "from"):
            table.add_column(head, no_wrap=head != "from")
        for guess in found.guesses:
            better = {"higher": "more", "lower": "less", "neutral": "neither"}[guess.direction]
            table.add_row(f"  {guess.column}", f"{guess.low:g} to {guess.high:g}", better, evidence(guess))
        console.print(table)
    for column, reason in found.aside.items():
        console.print(f"  not taken as a rating: {column}: {reason}", markup=False)
    for fault in found.faults:
        console.print(f"  refused: {fault}", markup=False)
    if found.fault_count > len(found.faults):
        console.print(f"  refused in all: {found.fault_count:,} rows")


def _summary(found: Inspection) -> dict:
    entry = {name: getattr(found, name) for name in ("columns", "kind", "rows", "prompts", "several", "aside")}
    entry |= {"name": found.location.name, "refused": found.fault_count, "faults": found.faults}
    return entry | {"scales": [asdict(guess) for guess in found.guesses]}
