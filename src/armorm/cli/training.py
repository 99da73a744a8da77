"""`armorm demo` and `armorm train`: a recipe in, a reward model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from armorm.files import plain


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for the model; by default runs/NAME.")
    ] = None,
    overrides: Annotated[
        Optional[list[str]],
        typer.Option("--set", help="key=value, the key a path: gating.steps=500. May be given several times."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and check everything, say what would be done, and stop.")
    ] = False,
    hardware: Annotated[str, typer.Option(help="Of the dry run's costs: h100, h200, a100, l4, rtx4090.")] = "h100",
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of the peak that the forward pass reaches.")] = 0.4,
    price: Annotated[Optional[float], typer.Option(min=0, help="Of a device for an hour, for costs in money.")] = None,
    row_tokens: Annotated[
        float, typer.Option(min=1, help="Tokens of a conversation that is not at hand, for the dry run.")
    ] = 450,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics (or the plan) as JSON.")] = False,
) -> None:
    """Train a reward model as a recipe says; a run that was stopped goes on where it was.

    Example: `armorm train recipes/real-small.yaml --output runs/real --set gating.steps=500`
    """
    from armorm.training.recipe import Recipe

    parsed = Recipe.from_yaml(recipe, overrides or [])
    console = Console(highlight=False)
    if dry_run:
        from armorm.cli.planning import dry_run as show

        show(parsed, hardware, share, price, row_tokens, as_json, console)
        return
    from armorm.report.summary import metrics_summary
    from armorm.training.pipeline import train as run

    folder = output or Path("runs") / parsed.name
    run(parsed, folder)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(metrics, indent=1))
    else:
        console.print(metrics_summary(metrics))
        console.print(f"\nmodel, card and metrics: {folder}", markup=False)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for data, model and findings.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the generated corpus and the training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """The whole method on a generated corpus whose truth is known: does it find what was planted?

    Embedded data and backbone, no network, about a minute on two cores.

    Example: `armorm demo --output runs/demo`
    """
    from armorm.training.demo import findings_table, run_demo

    findings = run_demo(output, seed)
    if as_json:
        print(json.dumps(plain(findings), indent=1))
    else:
        Console(highlight=False).print(findings_table(findings))
