"""`armorm train`: a reward model from a recipe, or with `--dry-run` what training it would cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.options import JsonOption, Place, StrictOption
from armorm.cli.output import AGAIN, emit, facts, require_outputs, table
from armorm.interruption import keep
from armorm.progress import say

if TYPE_CHECKING:
    from rich.table import Table

    from armorm.training.dry_run import DryRun


def train(
    recipe: Annotated[Path, Argument(help="Recipe (YAML file).", autocompletion=completion.recipes), Place.INPUT],
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for the model (default: runs/NAME)."), Place.FOLDER
    ] = None,
    overrides: Annotated[
        list[str] | None, Option("--set", help="Override a recipe key: gating.steps=500. Repeatable.")
    ] = None,
    strict: StrictOption = False,
    as_json: JsonOption = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Check everything, print cost estimates and exit.")] = False,
    hardware: Annotated[
        str,
        Option(
            help="Device for cost estimates: h100, h200, a100, l4 or rtx4090.",
            autocompletion=completion.one_of("h100", "h200", "a100", "l4", "rtx4090"),
        ),
    ] = "h100",
    share: Annotated[
        float, Option(min=0.01, max=1.0, help="Assumed MFU (fraction of peak FLOP/s) for cost estimates.")
    ] = 0.4,
    price: Annotated[float | None, Option(min=0, help="Price per device-hour.")] = None,
    row_tokens: Annotated[float, Option(min=1, help="Assumed tokens per conversation of missing data sets.")] = 450,
) -> None:
    """Train a reward model from a recipe; an interrupted run resumes.

    Example: `armorm train recipes/real-small.yaml --output runs/real --set gating.steps=500`
    """
    from armorm.training.recipe import Recipe

    parsed = Recipe.from_yaml(recipe, overrides or [])
    say(f"data paths are relative to {Path(parsed.data_root).expanduser().resolve()}")
    if dry_run:
        from armorm.training.cost import DEVICES
        from armorm.training.dry_run import dry_run as estimate
        from armorm.training.dry_run import require_known_device

        require_known_device(hardware, list(DEVICES))
        found = estimate(
            parsed, replace(DEVICES[hardware], price=price), share=share, row_tokens=row_tokens, strict=strict
        )
        lines = [f"not available offline: {name}" for name in found.missing]
        emit(_summary(found, share), *_tables(found, share), *lines, as_json=as_json)
        return
    from armorm.training.finetune.processes import Processes
    from armorm.training.pipeline import take_part
    from armorm.training.pipeline import train as run
    from armorm.training.summary import metrics_summary

    folder = output or Path("runs") / parsed.name
    require_outputs([], [folder])
    keep(f"finished work is kept in {folder / 'work'}; {AGAIN}")
    if not Processes.named().is_first:
        take_part(parsed, folder, strict=strict)
        return
    run(parsed, folder, strict=strict)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    emit(metrics, metrics_summary(metrics), f"\nmodel, card and metrics: {folder}", as_json=as_json)


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
            "constructs": [asdict(report) for report in data.constructs],
        }
    summary |= {"sets": found.sets, "missing": found.missing, "tokens_from": found.tokens_from}
    summary |= {"work": asdict(found.work), "shape_from": found.shape_from, "share": share}
    return summary | {"costs": {name: [asdict(stage) for stage in parts] for name, parts in found.fleets}}


def _tables(found: DryRun, share: float) -> Iterator[Table]:
    from armorm.training.cost import readable_bytes, readable_hours

    yield facts(_facts(found))
    if not found.fleets:
        return
    names = [f"\n{stage.name}" for stage in found.fleets[0][1]]
    times = table(f"\n(GPUs at {share:.0%} MFU)", *names, "\nprice")
    for name, parts in found.fleets:
        prices = [stage.money for stage in parts if stage.money is not None]
        money = f"{sum(prices):,.2f}" if prices else "-"
        times.add_row(name, *(readable_hours(stage.hours) for stage in parts), money)
    yield times
    memory = table("\nstage", "\nper", "\nmemory", "\ndisk", "", left=2)
    for stage in found.fleets[0][1]:
        verdict = "" if stage.fits else "does not fit: see docs/scale.md"
        disk = readable_bytes(stage.disk) if stage.disk else ""
        memory.add_row(stage.name, stage.where, readable_bytes(stage.memory), disk, verdict)
    yield memory


def _facts(found: DryRun) -> Iterator[tuple[str, str]]:
    recipe, data, work = found.recipe, found.data, found.work
    yield "recipe", f"{recipe.name} ({recipe.hash})"
    yield "backbone", recipe.backbone.model + (f" (cost from {found.shape_from})" if found.shape_from else "")
    if data is not None:
        yield from ((name.replace("_", " "), f"{count:,}") for name, count in data.counts().items())
        yield from (("skipped", f"{count:,} {reason}") for reason, count in data.left_out.items())
        ratings = data.table.take(data.train_rows).counts
        yield from ((f"  {name}", f"{count:,} training ratings") for name, count in ratings.items() if count)
        yield from ((f"  {name}", f"computed: {measure}") for name, measure in data.computed)
        for report in data.constructs:
            yield f"  {report.objective}", f"constructed from {', '.join(report.sources)}: {report.rule}"
            yield from (("", f"skipped replies: {count:,} {reason}") for reason, count in report.left_out.items())
    else:
        for entry in found.sets:
            rows = "unknown number of rows" if entry["rows"] is None else f"{entry['rows']:,} rows"
            yield f"  {entry['place']}", f"{entry['set']}: {rows} ({entry['from']})"
    tuning = "fine-tuning, " if recipe.finetune else ""
    yield "stages", f"{tuning}tokens, features, regression, debiasing, gate, evaluation, model"
    yield "conversations", f"{work.conversations:,.0f}, with {work.prompts:,.0f} prompts"
    yield "tokens", f"{work.tokens:,.0f} ({found.tokens_from})"
    if found.shape is not None:
        yield "forward FLOPs", f"{found.shape.forward_flops(work.tokens, work.squares):.3g}"
