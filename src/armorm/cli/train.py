"""`armorm demo` and `armorm train`: a recipe in, a reward model out."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table

from armorm.cli.init import column_scales
from armorm.embedded import embedded_path
from armorm.files import plain

if TYPE_CHECKING:
    from armorm.training.dry_run import DryRun
    from armorm.training.recipe import Recipe


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
        show_dry_run(parsed, hardware, share, price, row_tokens, as_json, console)
        return
    from armorm.training.pipeline import train as run
    from armorm.training.summary import metrics_summary

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


def extend(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or an embedded name.")],
    ratings: Annotated[list[str], typer.Option("--ratings", help="Rated rows; may be given several times.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the extended model.")],
    objectives: Annotated[
        Optional[list[str]],
        typer.Option(
            "--objective",
            help="COLUMN=LOW:HIGH, with :lower or :neutral behind it where more is not better; by default every "
            "column of numbers, from its lowest to its highest value.",
        ),
    ] = None,
    preferences: Annotated[
        Optional[list[str]], typer.Option("--preferences", help="Pairs to train the gate on; several times, too.")
    ] = None,
    share: Annotated[
        Optional[float], typer.Option(help="Of the gate's weight for new objectives, where no preferences are given.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the gate's training.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the gate's training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Add objectives, or ratings, to a trained or the released model; its old ratings are not needed.

    Only rows of W for what is rated here are fitted, and the gate.

    Example: `armorm extend armorm-tiny-rm --ratings ours.jsonl --objective politeness=1:5 --output runs/ours`
    """
    from armorm.data.inspection import rated_sets
    from armorm.data.sources import Location
    from armorm.model.configuration import ArmoRMConfig
    from armorm.training.extend import extend as run

    known = ArmoRMConfig.from_pretrained(embedded_path(model) or model).objective_set
    sets, taken = rated_sets(known, ratings, column_scales(objectives or ()))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for name, low, high in taken:
        console.print(f"{name}: rated from {low:g} to {high:g}, by the data; --objective says otherwise")
    pairs = [Location.find(name) for name in preferences or ()]
    run(model, sets, output, preferences=pairs, share=share, steps=steps, seed=seed)
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(metrics, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("objective", "ratings", "alpha", "R2", "test", "Spearman"):
        table.add_column(name, justify="left" if name == "objective" else "right")
    for report in metrics["regression"]:
        test = metrics["evaluation"]["ratings"].get(report["objective"], {})
        spearman = test.get("spearman")
        table.add_row(
            report["objective"],
            f"{report['ratings']:,}",
            f"{report['alpha']:g}",
            f"{report['r2']:.2f}",
            str(test.get("n", "")),
            "" if spearman is None else f"{spearman:.3f}",
        )
    Console(highlight=False).print(table, f"\nmodel, card and metrics: {output}", sep="")


def show_dry_run(
    recipe: Recipe,
    hardware: str,
    share: float,
    price: float | None,
    row_tokens: float,
    as_json: bool,
    console: Console,
) -> None:
    """Print the dry run of a recipe."""
    from armorm.training.cost import DEVICES
    from armorm.training.dry_run import dry_run, require_known_device

    require_known_device(hardware, list(DEVICES))
    device = replace(DEVICES[hardware], price=price)
    found = dry_run(recipe, device, share=share, row_tokens=row_tokens)
    summary = _summary(found, share)
    if as_json:
        print(json.dumps(plain(summary), indent=1))
        return
    console.print(_data_table(found, summary))
    if found.work is not None:
        console.print(_work_table(found))
    for part in _cost_tables(found, share):
        console.print(part)
    for name in found.missing:
        console.print(f"not available offline: {name}", markup=False, soft_wrap=True)


def _summary(found: DryRun, share: float) -> dict[str, Any]:
    recipe, data = found.recipe, found.data
    summary: dict[str, Any] = {"recipe": recipe.name, "hash": recipe.hash, "backbone": recipe.backbone.model}
    if data is not None:
        summary |= {
            "finetune": recipe.finetune.model_dump() if recipe.finetune else None,
            "counts": data.counts(),
            "left_out": data.left_out,
            "ratings": data.table.take(data.train_rows).counts,
            "computed": dict(data.computed),
        }
    summary |= {"sets": found.sets, "missing": found.missing, "tokens_from": found.tokens_from}
    summary |= {"work": asdict(found.work) if found.work else None, "shape_from": found.shape_from, "share": share}
    summary["costs"] = {name: [asdict(stage) for stage in parts] for name, _, parts in found.fleets}
    return summary


def _data_table(found: DryRun, summary: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("recipe", f"{summary['recipe']} ({summary['hash']})")
    origin = f" (cost from {found.shape_from})" if found.shape_from else ""
    table.add_row("backbone", f"{summary['backbone']}{origin}")
    for name, count in summary.get("counts", {}).items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    for reason, count in summary.get("left_out", {}).items():
        table.add_row("left out", f"{count:,} {reason}")
    for name, count in summary.get("ratings", {}).items():
        table.add_row(f"  {name}", f"{count:,} training ratings")
    for name, measure in summary.get("computed", {}).items():
        table.add_row(f"  {name}", f"computed: {measure}")
    if found.data is None:
        for entry in found.sets:
            rows = "rows not known" if entry["rows"] is None else f"{entry['rows']:,} rows"
            table.add_row(f"  {entry['place']}", f"{entry['set']}: {rows} ({entry['from']})")
    table.add_row("stages", "tokens, features, regression, debiasing, gate, evaluation, model")
    return table


def _work_table(found: DryRun) -> Table:
    work = found.work
    assert work is not None
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("conversations", f"{work.conversations:,.0f}, prompts {work.prompts:,.0f}")
    table.add_row("tokens", f"{work.tokens:,.0f} ({found.tokens_from})")
    if found.shape is not None:
        flops = found.shape.forward_flops(work.tokens, work.squares)
        table.add_row("forward FLOPs", f"{flops:.3g}")
    return table


def _cost_tables(found: DryRun, share: float) -> list[Any]:
    from armorm.training.cost import readable_bytes, readable_hours

    if not found.fleets:
        return []
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in (f"\nat {share:.0%} of peak", "\nfeatures", "\nstage 1", "\nstage 2", "\nmoney"):
        table.add_column(head, justify="left" if "peak" in head else "right", no_wrap=True)
    for name, _, parts in found.fleets:
        money = parts[0].money
        table.add_row(
            name, *(readable_hours(stage.hours) for stage in parts), "-" if money is None else f"{money:,.2f}"
        )
    memory = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("\nstage", "\nmemory", "\nof", "\ndisk", ""):
        memory.add_column(head, justify="right" if head in ("\nmemory", "\ndisk") else "left", no_wrap=True)
    for stage in found.fleets[0][2]:
        verdict = "" if stage.fits else "does not fit: see docs/scale.md"
        disk = readable_bytes(stage.disk) if stage.disk else ""
        memory.add_row(stage.name, readable_bytes(stage.memory), f"one {stage.where}", disk, verdict)
    return [table, memory]
