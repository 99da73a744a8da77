"""Metrics of a training run, and objectives of a model, as terminal tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from armorm.objectives import ObjectiveSet

_NARROW = (0, 1, 0, 0)  # one space between columns, to fit eighty characters


def metrics_summary(metrics: Mapping[str, Any]) -> RenderableType:
    """Objectives, debiasing, gate and preference pairs of metrics.json."""
    parts: list[RenderableType] = [_objectives(metrics)]
    gate = metrics["gate"]
    if gate:
        parts.append(
            Text.from_markup(
                f"\n[bold]gate[/bold]  {gate['pairs']:,} training pairs, {gate['calibration_pairs']:,} held out "
                f"by prompt: accuracy [cyan]{gate['accuracy']:.3f}[/cyan], uniform weights "
                f"{gate['uniform_accuracy']:.3f}; best step {gate['best_step']:,}; "
                f"entropy {gate['mean_entropy']:.2f} nats; logit scale {gate['logit_scale']:.2f}\n"
            )
        )
    constructs = metrics["evaluation"].get("constructs", {})
    if constructs:
        parts += [_constructs(constructs), ""]
    remaining = (metrics.get("debiasing") or {}).get("stability")
    if remaining:
        parts.append(_remaining(remaining))
    pairs = metrics["evaluation"].get("pairs", {})
    if pairs:
        parts.append(_pairs(pairs))
    return Group(*parts)


def _objectives(metrics: Mapping[str, Any]) -> RenderableType:
    rated = metrics["evaluation"].get("ratings", {})
    debiasing = metrics.get("debiasing") or {}
    columns = ["ratings", "alpha", "R2", *(("test", "corr.", "within") if rated else ())]
    table = numbers_table("objective", *columns, *(("bias", "after") if debiasing else ()), padding=_NARROW)
    for report in metrics["regression"]:
        name = report["objective"]
        cells = [name, f"{report['ratings']:,}", f"{report['alpha']:g}", number(report["r2"], 2)]
        if rated:
            held_out = rated[name]
            cells += [f"{held_out['n']:,}", number(held_out["spearman"]), number(held_out["within_prompt"])]
        if debiasing:
            reference = debiasing["reference"]
            cells += [number(reference[when][name], 2, sign=True) for when in ("before", "after")]
        table.add_row(*cells)
    notes = []
    if rated:
        notes.append("corr.: Spearman correlation on the test rows; within: accuracy within prompts")
    if debiasing:
        notes.append(f"bias, after: correlation with {debiasing['against']} before and after debiasing")
    return Group(table, Text("\n".join(notes), style="dim"))


def _constructs(constructs: Mapping[str, Any]) -> Table:
    """Accuracy of each constructed objective within held-out prompts, and by kind of edit."""
    table = numbers_table("constructed objective", "pairs", "acc.", padding=_NARROW)
    for name, entry in constructs.items():
        table.add_row(name, f"{entry['pairs']:,}", f"[cyan]{number(entry['accuracy'])}[/cyan]")
        for edit, values in entry["edits"].items():
            table.add_row(Text(f"  {edit}", style="dim"), f"{values['pairs']:,}", number(values["accuracy"]))
    return table


def _remaining(stability: Mapping[str, Any]) -> RenderableType:
    """Correlation of the score with every bias on held-out rows, and the largest of an objective."""
    table = numbers_table("on held-out rows", "score before", "after", "largest objective", padding=_NARROW)
    for bias, of in stability.items():
        for label, name in (("predicted", f"{bias}, predicted"), ("actual", of["measured_by"])):
            pooled = of[label]["pooled"]
            left = [entry["after"] for entry in pooled["objectives"].values() if entry["after"] is not None]
            cells = [pooled["score"]["before"], pooled["score"]["after"], max(left, key=abs, default=None)]
            table.add_row(name, *(number(value, 2, sign=True) for value in cells))
    return Group(table, Text("correlation with each bias, pooled over the test rows, after debiasing\n", style="dim"))


def _pairs(pairs: Mapping[str, Any]) -> Table:
    columns = ("n", "prompts", "acc.", "uniform", "longer", "longer\nright", "longer\nwrong")
    table = numbers_table("pairs", *columns, padding=_NARROW)
    for name, values in pairs.items():
        baselines = values["baselines"]
        accuracies = [
            baselines["uniform_weights"],
            baselines["longer_response"],
            values["longer_right"]["accuracy"],
            values["longer_wrong"]["accuracy"],
        ]
        accuracy = f"[cyan]{number(values['accuracy'])}[/cyan]"
        table.add_row(name, f"{values['pairs']:,}", f"{values['prompts']:,}", accuracy, *map(number, accuracies))
        for subset, entry in values["subsets"].items():
            table.add_row(Text(f"  {subset}", style="dim"), f"{entry['pairs']:,}", "", number(entry["accuracy"]))
    return table


def numbers_table(first: str, *others: str, **options: Any) -> Table:
    """A table of names, left-aligned, and numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", **options)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def objectives_table(objectives: ObjectiveSet, columns: Mapping[str, Mapping[str, Any]] | None = None) -> Table:
    """Objectives with source, range, direction and scale.

    Args:
        columns: further columns, each with values by objective name.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("objective", "source", "raw range", "better", "raw = scale x reward + offset", *(columns or {})):
        table.add_column(name, no_wrap=name == "objective")
    for objective in objectives:
        kind = f"computed: {objective.compute}" if objective.compute else objective.source
        table.add_row(
            objective.name,
            kind,
            f"{objective.low:.4g} to {objective.high:.4g}",
            objective.direction,
            f"{objective.scale:.4g} x reward {'+' if objective.offset >= 0 else '-'} {abs(objective.offset):.4g}",
            *(str(values.get(objective.name, "")) for values in (columns or {}).values()),
        )
    return table


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A formatted number; empty for None."""
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"
