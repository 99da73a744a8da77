"""`armorm evaluate`: a benchmark, a model, a table of what it is worth."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from armorm.cli.score import DeviceOption, DtypeOption, ModelOption
from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.errors import DataError
from armorm.files import plain, write_text

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
    from armorm.evaluation.results import Results
    from armorm.evaluation.runner import evaluate as run
    from armorm.evaluation.scorers import CallableScorer
    from armorm.evaluation.tables import as_json as result_json
    from armorm.evaluation.tables import comparison_table, results_tables

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
        from armorm.evaluation.steering_preview import preview
        from armorm.evaluation.tables import preview_tables

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
