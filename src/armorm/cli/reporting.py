"""`armorm report`: a reward model, looked at from all sides, as one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from armorm.cli.scoring import DeviceOption, DtypeOption
from armorm.files import write_text


def report(
    model: Annotated[str, typer.Argument(help="Folder, hub id or embedded name of a reward model.")],
    data: Annotated[
        Optional[list[str]],
        typer.Option("--data", "-d", help="Rated rows or preference pairs: file, folder or hub id. May be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    run: Annotated[
        Optional[Path], typer.Option(help="Folder of the run, with its metrics.json; by default the model's.")
    ] = None,
    features: Annotated[Optional[Path], typer.Option(help="Feature store to read and fill.")] = None,
    limit: Annotated[
        Optional[int], typer.Option(min=1, help="About how many examples of each kind to keep, whole prompts.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Also print the figures as JSON, without texts.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Report on a reward model: one HTML file that opens from disk, with warnings in plain words at its top.

    Data, objectives with their errors, correlations, verbosity before and after debiasing, the gate, evaluation with
    intervals, the largest mistakes with their contributions. Without data it shows what the model's run has written.
    Of rows with a `split` only those of the test split count.

    Example: `armorm report runs/demo --data runs/demo/data/workshop.jsonl --data runs/demo/data/choices.jsonl`
    """
    from armorm.report.page import report as page_of
    from armorm.reward_model import ArmoRM

    rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device)
    page, found = page_of(rm, data or [], run=run, features=features, limit=limit)
    write_text(output, page)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for notice in found["notices"]:
        console.print(f"warning: {notice['title']}. {notice['text']}")
    console.print(f"wrote {output}")
