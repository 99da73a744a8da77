"""What a run reached, as tables for a terminal.

In:  the metrics of a run (metrics.json), or the plan of one.
Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from armorm.objectives import ObjectiveSet


def metrics_summary(metrics: Mapping[str, Any]) -> RenderableType:
    """Objectives, debiasing, gate and pairs of a finished run."""
    parts: list[RenderableType] = [_objectives(metrics)]
    gate = metrics["gate"]
    parts.append(
        Text.from_markup(
            f"\n[bold]gate[/bold]  {gate['pairs']:,} pairs, {gate['held_out_pairs']:,} held out by prompt: "
            f"accuracy [cyan]{gate['accuracy']:.3f}[/cyan], uniform weights {gate['uniform_accuracy']:.3f}; "
            f"kept step {gate['best_step']:,}; entropy {gate['mean_entropy']:.2f} nats; "
            f"logit scale {gate['logit_scale']:.2f}\n"
        )
    )
    pairs = metrics["evaluation"].get("pairs", {})
    if pairs:
        parts.append(_pairs(pairs))
    return Group(*parts)


def _objectives(metrics: Mapping[str, Any]) -> Table:
    rated = metrics["evaluation"].get("ratings", {})
    debiasing = metrics.get("debiasing") or {}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("objective", "left"), ("ratings", "right"), ("alpha", "right"), ("R2", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    if rated:
        for name in ("test n", "Spearman", "within prompt"):
            table.add_column(name, justify="right")
    if debiasing:
        table.add_column(f"corr. with {debiasing['against']}", justify="right")
        table.add_column("debiased", justify="right")
    for report in metrics["regression"]:
        name = report["objective"]
        cells = [name, f"{report['ratings']:,}", f"{report['alpha']:g}", number(report["r2"])]
        if rated:
            figures = rated[name]
            cells += [f"{figures['n']:,}", number(figures["spearman"]), number(figures["within_prompt"])]
        if debiasing:
            reference = debiasing["reference"]
            cells += [number(reference["before"][name], sign=True), number(reference["after"][name], sign=True)]
        table.add_row(*cells)
    return table


def _pairs(pairs: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("pairs", no_wrap=True)
    for name in ("n", "prompts", "accuracy", "uniform", "longer", "longer right", "longer wrong"):
        table.add_column(name, justify="right")
    for name, figures in pairs.items():
        baselines = figures["baselines"]
        table.add_row(
            name,
            f"{figures['pairs']:,}",
            f"{figures['prompts']:,}",
            f"[cyan]{number(figures['accuracy'])}[/cyan]",
            number(baselines["uniform_weights"]),
            number(baselines["longer_response"]),
            number(figures["longer_right"]["accuracy"]),
            number(figures["longer_wrong"]["accuracy"]),
        )
        for subset, entry in figures["subsets"].items():
            table.add_row(
                Text(f"  {subset}", style="dim"), f"{entry['pairs']:,}", "", number(entry["accuracy"]), "", "", "", ""
            )
    return table


def objectives_table(objectives: ObjectiveSet, columns: Mapping[str, Mapping[str, Any]] | None = None) -> Table:
    """Objectives with source, range, direction and map.

    Args:
        columns: further columns, each a value by objective name.
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
    """A figure, or nothing where there is none."""
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"
