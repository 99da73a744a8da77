"""`armorm init`: a recipe for rated data files, with every guessed scale shown and confirmed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.options import ForceOption, Place, StrictOption, column_scales
from armorm.cli.output import emit, require_unused, table
from armorm.errors import DataError, LayoutError
from armorm.files import DEFAULT_BACKBONE, write_text
from armorm.progress import Terminal, say

if TYPE_CHECKING:
    from armorm.data.inspection import Inspection

_BETTER = {"higher": "more", "lower": "less", "neutral": "neither"}
_ROLES = ("prompt", "response", "messages", "chosen", "rejected", "split")


def init(
    data: Annotated[
        list[str],
        Argument(help="CSV, TSV, JSON lines or Parquet files, folders or hub ids.", autocompletion=completion.data),
        Place.INPUT,
    ],
    output: Annotated[Path, Option("--output", "-o", help="Recipe to write."), Place.FILE] = Path("recipe.yaml"),
    scale: Annotated[
        list[str] | None,
        Option(help="Scale of a column: COLUMN=LOW:HIGH, with :lower or :neutral if higher is not better. Repeatable."),
    ] = None,
    skip: Annotated[list[str] | None, Option(help="Numeric column that is not a rating. Repeatable.")] = None,
    column: Annotated[list[str] | None, Option(help="Column role: prompt=NAME, response=NAME, ... Repeatable.")] = None,
    backbone: Annotated[
        str,
        Option(help="Backbone: a folder, a hub id, a GGUF file, or armorm-small.", autocompletion=completion.backbones),
    ] = DEFAULT_BACKBONE,
    name: Annotated[str | None, Option(help="Name of the model (default: from the recipe file).")] = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Accept the guessed scales.")] = False,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: Annotated[bool, Option("--json", help="Also print what was found as JSON.")] = False,
) -> None:
    """Inspect rated data and write a recipe for it.

    Rating scales are guessed from the values. Confirm them at the prompt or with --yes, or state them with --scale;
    otherwise no recipe is written. Rows that cannot be read and cells without a number on their scale are listed, and
    skipped in training.

    Example: `armorm init ratings.csv --output mine.yaml`
    """
    from armorm.data.inspection import inspect_set
    from armorm.data.sources import Location
    from armorm.training.dataset import enough_for_gate, read_training_data
    from armorm.training.recipe import Recipe
    from armorm.training.recipe_draft import draft_recipe, too_few_pairs

    scales, columns = column_scales(scale or ()), dict(map(_column, column or ()))
    require_unused(output, force)
    try:
        found = [inspect_set(Location.find(name), columns=columns, scales=scales, skipped=skip or ()) for name in data]
    except LayoutError as fault:
        problem = f"{fault.problem}; name them with --column prompt=NAME --column response=NAME"
        raise DataError(problem, file=fault.file, row=fault.row, field=fault.field) from None
    model = name or output.name.split(".")[0]
    text = draft_recipe(found, model, backbone)
    console = Terminal(stderr=True, highlight=False, soft_wrap=True)
    for part in found:
        for shown in _shown(part):
            console.print(shown, markup=False)
    emit([_summary(part) for part in found], as_json=as_json)
    if strict and (error := next((error for part in found for error in part.rejections.errors), None)):
        raise error
    guessed = sum(not guess.stated for part in found for guess in part.guesses)
    if guessed and not yes:
        answer = console.input("\nare these scales right? [y/N] ") if sys.stdin.isatty() else ""
        if answer.strip().lower() not in ("y", "yes"):
            say(f"\n{guessed} guessed scales: accept them with --yes, or state them with --scale COLUMN=LOW:HIGH")
            raise typer.Exit(2)
    counts = read_training_data(Recipe.from_text(text, name=str(output))).counts()
    from_pairs = any(part.kind == "pairs" for part in found)
    if not from_pairs and not enough_for_gate(counts["pairs_train"]):
        text = draft_recipe(found, model, backbone, pairs_from_ratings=False)
        say(f"\nnote: {too_few_pairs(counts['pairs_train'])}")
        counts |= {"pairs_train": 0, "pairs_test": 0}
    head = f"# Written by armorm init from {', '.join(data)}; comments give the basis of each scale."
    write_text(output, f"{head}\n{text}")
    say(
        f"\nwrote {output}: {counts['rated_train']:,} rated rows and {counts['pairs_train']:,} pairs for training, "
        f"{counts['rated_test']:,} and {counts['pairs_test']:,} held out; next: armorm train {output}"
    )


def _column(text: str) -> tuple[str, str]:
    role, equals, name = text.partition("=")
    if not equals or role not in _ROLES:
        raise typer.BadParameter(f"found {text!r}, expected prompt=NAME, response=NAME, messages=NAME, ...")
    return role, name


def _shown(found: Inspection) -> Iterator[RenderableType]:
    from armorm.data.rejections import CELLS, ROWS, SHOWN
    from armorm.training.recipe_draft import evidence

    yield f"\n{found.location.name}: {found.rows:,} rows ({found.kind}), {found.prompts:,} prompts"
    yield from (f"  {role}: column {name!r}" for role, name in found.columns.items())
    if found.guesses:
        scales = table("  objective", "scale", "better", left=3)
        scales.add_column("basis")
        for guess in found.guesses:
            scale = f"{guess.low:g} to {guess.high:g}"
            scales.add_row(f"  {guess.column}", scale, _BETTER[guess.direction], evidence(guess))
        yield scales
    yield from (f"  not used as a rating: {column}: {reason}" for column, reason in found.aside.items())
    for name, errors in ((ROWS, found.rejections.rows), (CELLS, found.rejections.cells)):
        yield from (f"  skipped: {error}" for error in errors[:SHOWN])
        if len(errors) > SHOWN:
            yield f"  skipped in total: {len(errors):,} {name}"


def _summary(found: Inspection) -> dict[str, Any]:
    from armorm.data.rejections import SHOWN

    entry = {name: getattr(found, name) for name in ("columns", "kind", "rows", "prompts", "several", "aside")}
    rejected = found.rejections
    entry |= {"name": found.location.name, "refused": len(rejected.rows), "left_out_cells": len(rejected.cells)}
    entry["faults"] = [str(error) for error in (*rejected.rows[:SHOWN], *rejected.cells[:SHOWN])]
    return entry | {"scales": [asdict(guess) for guess in found.guesses]}
