"""`armorm evaluate`: a reward model on a benchmark."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from armorm.cli.options import (
    DeviceOption,
    DtypeOption,
    FeaturesOption,
    IncludeSeenOption,
    ModelOption,
    Place,
    ScorerOption,
    SplitOption,
)
from armorm.cli.output import AGAIN, WIDTH, emit
from armorm.errors import DataError
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.interruption import keep
from armorm.progress import say
from armorm.saved_chunks import partial_folder

if TYPE_CHECKING:
    from armorm.evaluation.results import Results
    from armorm.evaluation.scorer import CallableScorer

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def evaluate(
    benchmark: Annotated[
        str, Argument(help="pairs, ratings, rewardbench, rewardbench2, rm-bench, judgebench, judgebench-double or ppe.")
    ],
    context: typer.Context,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    data: Annotated[
        list[str] | None,
        Option("--data", "-d", help="File, folder or hub id (default: the published set). Repeatable."),
        Place.INPUT,
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="JSON file; an interrupted run resumes."), Place.FILE
    ] = None,
    against: Annotated[
        str | None,
        Option(
            help="Compare with a results file, or with another model or module:function evaluated on the same data; "
            "prints paired differences and their significance."
        ),
    ] = None,
    scorer: ScorerOption = None,
    features: FeaturesOption = None,
    split: SplitOption = None,
    limit: Annotated[int | None, Option(min=1, help="Approximate number of examples.")] = None,
    include_seen: IncludeSeenOption = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON, without the individual examples.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Evaluate a reward model on a benchmark with the benchmark's own protocol.

    Each metric comes with a 95% confidence interval over prompts and four baselines: the longest or the shortest
    response wins, the prompt alone, and chance. The model may be an armorm model, any sequence classifier with one
    logit, or a function; judgebench-double takes a function that sees both responses.

    Example: `armorm evaluate rewardbench --model runs/real --output new.json --against old.json`

    Example: `armorm evaluate pairs --data pairs.jsonl --model runs/real --against owner/other-reward-model`
    """
    from armorm.evaluation.benchmarks.base import BenchmarkError
    from armorm.evaluation.model_comparison import compare_models
    from armorm.evaluation.results import Results
    from armorm.evaluation.runner import evaluate as run
    from armorm.evaluation.scorer import CallableScorer
    from armorm.evaluation.tables import as_json as result_json
    from armorm.evaluation.tables import comparison_table, results_tables

    source = context.get_parameter_source("model")
    if scorer is not None and source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter("--scorer replaces --model: expected only one of them (the other may be --against)")
    # An impossible comparison is reported before any work.
    other = None if against is None else _other(against)
    if isinstance(other, Results) and other.benchmark != benchmark:
        raise DataError(f"results of {other.benchmark}, expected {benchmark}", file=against or "")
    chosen = CallableScorer.from_name(scorer) if scorer is not None else model
    measure = partial(
        run,
        benchmark,
        data=data or [],
        split=split,
        limit=limit,
        include_seen=include_seen,
        dtype=dtype,
        device=device,
    )
    written = [output] if output else []
    places = [place for place in (output and partial_folder(output), features) if place]
    keep(
        f"finished work is kept in {' and '.join(map(str, places))}; {AGAIN}"
        if places
        else "nothing is kept without --output or --features"
    )
    try:
        results = measure(chosen, output=output, features=features)
        if other is not None and not isinstance(other, Results):
            written += [output.with_name(f"{output.stem}.against{output.suffix}")] if output else []
            other = measure(other, output=written[-1] if written else None)
    except BenchmarkError as error:
        raise typer.BadParameter(str(error)) from None
    comparison = None if other is None else compare_models(results, other)
    shown = [results_tables(results)] + ([] if comparison is None else ["", comparison_table(comparison)])
    emit(result_json(results, comparison), *shown, as_json=as_json, width=WIDTH)
    if written and not as_json:
        say(f"wrote {' and '.join(map(str, written))}")


def _other(against: str) -> Results | CallableScorer | str:
    """What `--against` names: a results file, a function, or else a model."""
    from armorm.evaluation.results import Results
    from armorm.evaluation.scorer import CallableScorer
    from armorm.evaluation.scorers import require_known

    if Path(against).is_file() or against.endswith(".json"):
        return Results.load(against)
    if _FUNCTION.fullmatch(against):
        return CallableScorer.from_name(against)
    require_known(against)
    return against
