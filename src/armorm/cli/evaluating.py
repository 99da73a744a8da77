"""`armorm evaluate`: a benchmark, a model, a table of what it is worth."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from armorm.cli.scoring import DeviceOption, DtypeOption, ModelOption
from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.errors import DataError
from armorm.files import plain

if TYPE_CHECKING:
    from armorm.evaluation.results import Results
    from armorm.evaluation.scorers import CallableScorer

_WIDTH = 80
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def evaluate(
    benchmark: Annotated[
        str, typer.Argument(help="pairs, ratings, rewardbench, rewardbench2, rm-bench, judgebench or ppe.")
    ],
    context: typer.Context,
    model: ModelOption = EMBEDDED_REWARD_MODEL,
    data: Annotated[
        Optional[list[str]],
        typer.Option("--data", "-d", help="File, folder or hub id; the published set if absent. May be repeated."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="JSON file for the results; a run that was stopped goes on there."),
    ] = None,
    against: Annotated[
        Optional[str],
        typer.Option(
            help="Results of another run, or another model or module:function, which is then measured on the same "
            "data: print both side by side, with paired differences and their significance."
        ),
    ] = None,
    scorer: Annotated[
        Optional[str],
        typer.Option(help="module:function instead of a model: a list of conversations in, a list of numbers out."),
    ] = None,
    features: Annotated[
        Optional[Path], typer.Option(help="Feature store to read and fill, so that nothing is computed twice.")
    ] = None,
    split: Annotated[Optional[str], typer.Option(help="Split of a hub set or a saved folder.")] = None,
    limit: Annotated[
        Optional[int], typer.Option(min=1, help="About how many examples to keep, for trying things out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, without the single examples.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure a reward model on a benchmark, by the benchmark's own rules.

    Beside every figure: its 95% interval (by prompt), the number of prompts, and what length alone, the prompt
    alone and chance come to. The model is one of armorm, any sequence classifier with one logit, or a function.

    Example: `armorm evaluate rewardbench --model runs/real --output new.json --against old.json`

    Example: `armorm evaluate pairs --data pairs.jsonl --model runs/real --against owner/other-reward-model`
    """
    from armorm.evaluation.model_comparison import compare
    from armorm.evaluation.registry import BenchmarkError
    from armorm.evaluation.rendering import as_json as result_json
    from armorm.evaluation.rendering import comparison_table, results_tables
    from armorm.evaluation.results import Results
    from armorm.evaluation.runner import evaluate as run
    from armorm.evaluation.scorers import CallableScorer

    source = context.get_parameter_source("model")
    if scorer is not None and source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter("--scorer stands in place of --model; expected one of them (the other as --against)")
    # What cannot be compared is refused before any work.
    beside = None if against is None else _beside(against)
    if isinstance(beside, Results) and beside.benchmark != benchmark:
        raise DataError(f"results of {beside.benchmark}, expected {benchmark}", file=against or "")
    chosen = CallableScorer.from_name(scorer) if scorer is not None else model
    measured = partial(run, benchmark, data=data or [], split=split, limit=limit, dtype=dtype, device=device)
    try:
        results = measured(chosen, output=output, features=features)
        other = beside
        if beside is not None and not isinstance(beside, Results):
            other = measured(beside, output=output and _output_beside(output))
    except BenchmarkError as error:
        raise typer.BadParameter(str(error)) from None
    comparison = compare(results, other) if isinstance(other, Results) else None
    if as_json:
        print(json.dumps(plain(result_json(results, comparison)), indent=1, ensure_ascii=False))
        return
    console = Console(highlight=False)
    width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
    console.print(results_tables(results), width=width)
    if comparison is not None:
        console.print()
        console.print(comparison_table(comparison), width=width)
    if output is not None:
        written = f"{output}" if other is beside else f"{output} and {_output_beside(output)}"
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"wrote {written}", markup=False)


def _beside(against: str) -> Results | CallableScorer | str:
    """What `--against` names: a results file, a function, or else a model."""
    from armorm.evaluation.results import Results
    from armorm.evaluation.scorers import CallableScorer, require_known

    if Path(against).is_file() or against.endswith(".json"):
        return Results.load(against)
    if _FUNCTION.fullmatch(against):
        return CallableScorer.from_name(against)
    require_known(against)
    return against


def _output_beside(output: Path) -> Path:
    """Where the results of the other model go."""
    return output.with_name(f"{output.stem}.against{output.suffix}")
