"""`armorm evaluate`: a reward model on a benchmark."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.options import (
    ApiKeyEnvOption,
    DeviceOption,
    DtypeOption,
    FeaturesOption,
    IncludeSeenOption,
    ModelOption,
    Place,
    ScorerOption,
    ServerOption,
    SplitOption,
    StrictOption,
    chosen_model,
)
from armorm.cli.output import AGAIN, WIDTH, emit
from armorm.errors import DataError, UnreachableSetError
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
        str,
        Argument(
            help="pairs, ratings, rewardbench, rewardbench2, rm-bench, rmb, rewardmath, judgebench, judgebench-double "
            "or ppe.",
            autocompletion=completion.one_of(*completion.BENCHMARKS),
        ),
    ],
    context: typer.Context,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    data: Annotated[
        list[str] | None,
        Option(
            "--data",
            "-d",
            help="File, folder or hub id (default: the published set). Repeatable.",
            autocompletion=completion.data,
        ),
        Place.INPUT,
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="JSON file; an interrupted run resumes."), Place.FILE
    ] = None,
    against: Annotated[
        list[str] | None,
        Option(
            help="Compare with a results file, or with another model or module:function evaluated on the same data; "
            "prints paired differences and their significance. Repeatable: several give one table."
        ),
    ] = None,
    fail_if_worse: Annotated[
        bool,
        Option(
            "--fail-if-worse",
            help="Exit 1 if a metric is significantly worse than that of --against, beyond the 95% interval of the "
            "difference.",
        ),
    ] = False,
    server: ServerOption = None,
    api_key_env: ApiKeyEnvOption = None,
    scorer: ScorerOption = None,
    features: FeaturesOption = None,
    split: SplitOption = None,
    limit: Annotated[int | None, Option(min=1, help="Approximate number of examples.")] = None,
    include_seen: IncludeSeenOption = False,
    strict: StrictOption = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON, without the individual examples.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "all",
) -> None:
    """Evaluate a reward model on a benchmark with the benchmark's own protocol.

    Each metric comes with a 95% confidence interval over prompts and four baselines: the longest or the shortest
    response wins, the prompt alone, and chance. The model (`--model`, `--against`) may be an armorm model, any sequence
    classifier with one logit, a server (`http://host:8008`), a policy trained by DPO
    (`dpo:POLICY,reference=NAME,beta=0.1`), or a language model as judge behind an OpenAI-compatible server
    (`judge:http://host:8000/v1,model=NAME`, with `,mode=pairs` for verdicts on pairs in both orders).

    Example: `armorm evaluate rewardbench --model runs/real --output new.json --against old.json`

    Example: `armorm evaluate pairs --data ours.jsonl --model runs/new --against old.json --fail-if-worse` (in CI)

    Example: `armorm evaluate pairs --data pairs.jsonl --model runs/real --against owner/other-reward-model`

    Example: `armorm evaluate pairs --data pairs.jsonl --server http://rewards:8008 --against judge:http://llm:8000/v1`
    """
    from armorm.evaluation.benchmarks.base import BenchmarkError
    from armorm.evaluation.leaderboard import leaderboards
    from armorm.evaluation.model_comparison import compare_models, require_not_worse
    from armorm.evaluation.results import Results
    from armorm.evaluation.runner import evaluate as run
    from armorm.evaluation.scorer import CallableScorer
    from armorm.evaluation.tables import as_json as result_json
    from armorm.evaluation.tables import comparison_table, leaderboard_tables, results_tables

    if fail_if_worse and not against:
        raise typer.BadParameter("--fail-if-worse compares with --against: expected a results file or a model there")
    named = chosen_model(context, model, server, scorer)
    # An impossible comparison is reported before any work.
    others = [_other(name) for name in against or []]
    for name, other in zip(against or [], others, strict=True):
        if isinstance(other, Results) and other.benchmark != benchmark:
            raise DataError(f"results of {other.benchmark}, expected {benchmark}", file=name)
    measure = partial(
        run,
        benchmark,
        data=data or [],
        split=split,
        limit=limit,
        include_seen=include_seen,
        strict=strict,
        dtype=dtype,
        device=device,
        api_key_env=api_key_env,
    )
    written = [output] if output else []
    places = [place for place in (output and partial_folder(output), features) if place]
    keep(
        f"finished work is kept in {' and '.join(map(str, places))}; {AGAIN}"
        if places
        else "nothing is kept without --output or --features"
    )
    try:
        chosen = named if scorer is None else CallableScorer.from_name(scorer)
        results = measure(chosen, output=output, features=features)
        measured: list[Results] = []
        for number, other in enumerate(others, 1):
            if not isinstance(other, Results):
                written += [_against_file(output, number)] if output else []
                other = measure(other, output=written[-1] if output else None)
            measured.append(other)
    except BenchmarkError as error:
        raise typer.BadParameter(str(error)) from None
    except UnreachableSetError as error:
        raise DataError(f"{error.problem}, or pass --data FILE", file=error.file) from error
    shown = [results_tables(results)]
    comparison, boards = None, []
    if len(measured) == 1:
        comparison = compare_models(results, measured[0])
        shown += ["", comparison_table(comparison)]
    elif measured:
        boards = leaderboards([results, *measured])
        shown += ["", leaderboard_tables(boards)]
    emit(result_json(results, comparison, boards), *shown, as_json=as_json, width=WIDTH)
    if written and not as_json:
        say(f"wrote {' and '.join(map(str, written))}")
    if fail_if_worse:
        require_not_worse([comparison] if comparison else [compare_models(results, other) for other in measured])
        say("not worse in any metric")


def _against_file(output: Path, number: int) -> Path:
    """Results file of the model of the `number`-th --against: NAME.against.json, NAME.against-2.json, ..."""
    return output.with_name(f"{output.stem}.against{f'-{number}' if number > 1 else ''}{output.suffix}")


def _other(against: str) -> Results | CallableScorer | str:
    """What `--against` names: a results file, a function, or else a model."""
    from armorm.evaluation.results import Results
    from armorm.evaluation.scorer import CallableScorer
    from armorm.evaluation.scorer_names import ScorerName
    from armorm.evaluation.scorers import require_known

    if Path(against).is_file() or against.endswith(".json"):
        return Results.load(against)
    if _FUNCTION.fullmatch(against) and ScorerName.parse(against) is None:
        return CallableScorer.from_name(against)
    require_known(against)
    return against
