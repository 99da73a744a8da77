"""`armorm suggest`: what to rate next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from armorm.cli.input import input_rows, split_rejected
from armorm.cli.options import (
    DeviceOption,
    DtypeOption,
    FeaturesOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    Place,
    StrictOption,
)
from armorm.cli.output import emit, output_rows, require_unused, say_rejected, table, with_columns
from armorm.data.cells import is_missing
from armorm.data.row_writer import require_row_format
from armorm.errors import ArmormError, DataError
from armorm.files import write_json

if TYPE_CHECKING:
    from armorm.conversation import Conversation
    from armorm.data.rows import Row
    from armorm.training.suggest import Suggestions

SHOWN = 10
LAYOUTS = ("rows", "argilla")
_LONGEST = 60  # characters of a text that are shown


def suggest(
    model: ModelArgument,
    data: Annotated[
        str,
        Argument(help="Candidates: file, folder or hub id; - for standard input. Rated rows are skipped."),
        Place.INPUT,
    ],
    objective: Annotated[str, Option(help="Objective of the model that is to be rated, or a new one.")],
    count: Annotated[int, Option("--count", "-n", help="Rows to suggest.", min=1)] = 100,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="File to rate in: .csv, .tsv, .jsonl or .parquet; .json for --layout argilla."),
        Place.FILE,
    ] = None,
    layout: Annotated[str, Option(help="rows, with an empty column for the rating; or argilla, its records.")] = "rows",
    features: FeaturesOption = None,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Choose what to rate next: the rows from which the objective's head would learn most.

    The first row lowers the variance of the objective's predictions over all candidates the most, the second the most
    once the first is rated, and so on, in closed form and without any rating. Prompts are taken in turns. The model is
    a run's folder (exact), or any model with uncertainty.

    Example: `armorm suggest runs/mine replies.jsonl --objective ours-polite -n 100 --output to-rate.csv`

    Example: `armorm suggest runs/mine replies.jsonl --objective ours-polite --layout argilla --output records.json`
    """
    from armorm.features.store import dtype_for
    from armorm.reward_model import ArmoRM
    from armorm.training.suggest import suggest as choose

    if layout not in LAYOUTS:
        raise typer.BadParameter(f"--layout: found {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "argilla" and output is not None and output.suffix != ".json":
        raise typer.BadParameter(f"--output: found {output.name}, expected NAME.json for records of Argilla")
    if layout == "rows" and output is not None:
        require_row_format(output)
    require_unused(output, force)
    valid, rejected = split_rejected(input_rows(data, strict=strict), strict=strict)
    columns = dict.fromkeys((objective, objective.partition("-")[2] or objective))
    left = [(row, c) for row, c in valid if all(is_missing(row.values.get(name)) for name in columns)]
    if not left:
        reason = f"row {rejected[0][0]}: {rejected[0][1]}" if rejected else f"all {len(valid):,} are rated"
        raise ArmormError(f"{data}: no candidate is left; {reason}")
    rm = ArmoRM.from_pretrained(model, dtype=dtype_for(features, dtype), device=device)
    conversations = [conversation for _, conversation in left]
    found = choose(rm, conversations, objective, count, run=model, features=features)
    chosen = [left[i] for i in found.rows]
    if output is not None:
        _write(output, layout, objective, chosen)
    skipped = [*rejected, *((left[i][0].number, reason) for i, reason in found.rejected)]
    say_rejected([DataError(reason, file=data, row=number) for number, reason in skipped])
    emit(
        _result(found, chosen, len(valid) - len(left), len(skipped)),
        *_shown(found, chosen, output),
        as_json=as_json,
    )


def _write(path: Path, layout: str, objective: str, chosen: list[tuple[Row, Conversation]]) -> None:
    from armorm.data.argilla import argilla_record

    if layout == "argilla":
        records = [argilla_record(conversation, {"row": row.number}) for row, conversation in chosen]
        write_json(path, records)
        return
    with output_rows(path) as write:
        for place, (row, _) in enumerate(chosen, 1):
            columns = {name: value for name, value in row.columns.items() if name != objective}
            write({**with_columns({"index": place, "row": row.number}, columns, texts=True), objective: None})


def _result(found: Suggestions, chosen: list[tuple[Row, Conversation]], rated: int, skipped: int) -> dict[str, Any]:
    return {
        "objective": found.objective,
        "candidates": found.candidates,
        "rated_already": rated,
        "left_out": skipped,
        "exact": found.exact,
        "suggestions": [
            {"row": row.number, "leverage": float(leverage), "removed": float(removed)}
            for (row, _), leverage, removed in zip(chosen, found.leverage, found.removed, strict=True)
        ],
    }


def _shown(found: Suggestions, chosen: list[tuple[Row, Conversation]], output: Path | None) -> list[Any]:
    rows = table("row", "variance removed", "response", left=0)
    rows.columns[2].justify, rows.columns[2].overflow = "left", "ellipsis"
    for (row, conversation), removed in list(zip(chosen, found.removed, strict=True))[:SHOWN]:
        text = " ".join(conversation.response.split())
        rows.add_row(str(row.number), f"{removed:.1%}", text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")
    share = f"{found.removed[-1]:.1%}" if len(found) else "0%"
    line = (
        f"\n{found.objective}: rating these {len(found):,} of {found.candidates:,} candidates removes {share} of the "
        "variance of its predictions over them"
    )
    approximate = "" if found.exact else "\n(from the stored part of the rated rows' spectrum: no statistics in work/)"
    return [rows, line + approximate, *([f"wrote {output}"] if output else [])]
