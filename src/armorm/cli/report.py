"""`armorm report`: an HTML report on a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from armorm.cli import completion
from armorm.cli.options import (
    DeviceOption,
    DtypeOption,
    FeaturesOption,
    ForceOption,
    IncludeSeenOption,
    ModelArgument,
    Place,
    StrictOption,
)
from armorm.cli.output import emit, require_unused
from armorm.files import write_text
from armorm.progress import say


def report(
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        Option(
            "--data",
            "-d",
            help="Rated rows or preference pairs: file, folder or hub id. Repeatable.",
            autocompletion=completion.data,
        ),
        Place.INPUT,
    ] = None,
    output: Annotated[Path, Option("--output", "-o", help="HTML file to write."), Place.FILE] = Path("report.html"),
    run: Annotated[Path | None, Option(help="Folder of the training run (default: that of the model).")] = None,
    features: FeaturesOption = None,
    limit: Annotated[int | None, Option(min=1, help="Approximate number of examples of each kind.")] = None,
    include_seen: IncludeSeenOption = False,
    strict: StrictOption = False,
    force: ForceOption = False,
    perturbations: Annotated[
        int, Option(min=0, help="Responses that each edit of the perturbation audit is applied to; 0 for none.")
    ] = 60,
    as_json: Annotated[bool, Option("--json", help="Also print the numbers as JSON, without texts.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "all",
) -> None:
    """Write a self-contained HTML report on a reward model, with warnings at the top.

    Covers the data, the objectives and their errors, correlations, length bias before and after debiasing, the gate,
    evaluation with confidence intervals, how much known edits of the responses (an insult, padding, other names) move
    the score, and the largest mistakes. Without data, it shows what the training run has recorded. Of rows with a
    `split` column, only the test split is used.

    Example: `armorm report runs/demo --data runs/demo/data/workshop.jsonl --data runs/demo/data/choices.jsonl`
    """
    from armorm.features.store import dtype_for
    from armorm.report.page import report as page_of
    from armorm.reward_model import ArmoRM

    require_unused(output, force)
    rm = ArmoRM.from_pretrained(model, dtype=dtype_for(features, dtype), device=device)
    options: dict[str, Any] = {"run": run, "features": features, "limit": limit, "include_seen": include_seen}
    options["strict"] = strict
    page, found = page_of(rm, data or [], **options, perturbations=perturbations)
    write_text(output, page)
    emit(found, as_json=as_json)
    say(" ".join(found["verdict"]))
    for notice in found["notices"]:
        say(f"warning: {notice['title']}. {notice['text']}")
    say(f"wrote {output}")
