"""Rendering of audits: bias, objectives, decisions, gate and calibration as tables of eighty columns.

In:  `Results`.
Out: rich renderables, only of the audits that the result holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from armorm.evaluation.audits.objectives import ALL
from armorm.evaluation.results import Results

_OBJECTIVES_SHOWN = 8
_DECIDING_SHOWN = 3


def audits_tables(results: Results) -> list[RenderableType]:
    """All audits of a result."""
    audits = results.audits
    parts: list[RenderableType] = []
    if any(name in audits for name in ("length", "markdown", "lists")):
        parts += [Text(""), _bias(audits)]
    if audits.get("objectives"):
        parts += [Text(""), _objectives(audits["objectives"], audits["decisions"].get(ALL, {}))]
    if audits.get("decisions"):
        parts += [Text(""), _decisions(audits["decisions"])]
    if audits.get("gate"):
        parts += [Text(""), _gate(audits["gate"])]
    if audits.get("calibration", {}).get("comparisons"):
        parts += [Text(""), _calibration(audits["calibration"])]
    return parts


def _bias(audits: Mapping[str, Any]) -> Table:
    """Accuracy where more of a quantity is right and wrong, win rate of more, correlations."""
    compared = any(
        audits[name]["examples_more_is_better"] for name in audits if name in ("length", "markdown", "lists")
    )
    columns = ("more of it", "is better", "is worse", "wins", "corr.", "in prompt")
    table = _table(columns if compared else (columns[0], *columns[4:]), 30)
    for name in ("length", "markdown", "lists"):
        audit = audits.get(name)
        if audit is None:
            continue
        if compared:
            label = f"{name}: examples, base rate"
            base = [f"{audit['examples_more_is_better']:,}", f"{audit['examples_more_is_worse']:,}"]
            table.add_row(label, *base, _percent(audit["more_is_better"]), "", "", style="dim")
        for view, figures in audit["views"].items():
            shares = [_percent(figures[key]) for key in ("more_is_better", "more_is_worse", "more_wins")]
            cells = [_signed(figures[key]) for key in ("correlation", "correlation_within_prompts")]
            table.add_row(f"{name}, {view}", *(shares if compared else ()), *cells)
    return table


def _objectives(alone: Mapping[str, Any], decisions: Mapping[str, Any]) -> Table:
    table = _table(("objective alone, %", "reward", "debiased", "weight", "decides wins", "losses"), 30)
    ranked = sorted(alone.items(), key=lambda entry: -entry[1]["mean_weight"])
    for name, figures in ranked[:_OBJECTIVES_SHOWN]:
        table.add_row(
            Text(name),
            _percent(figures["reward"]),
            _percent(figures["debiased"]),
            _percent(figures["mean_weight"]),
            _percent(decisions.get("deciding_wins", {}).get(name, 0.0)),
            _percent(decisions.get("deciding_losses", {}).get(name, 0.0)),
        )
    if len(ranked) > _OBJECTIVES_SHOWN:
        table.add_row(Text(f"and {len(ranked) - _OBJECTIVES_SHOWN} with less weight", style="dim"))
    return table


def _decisions(decisions: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("what decides", max_width=24, overflow="fold")
    table.add_column("wins", max_width=26, overflow="fold")
    table.add_column("losses", max_width=26, overflow="fold")
    for subset, entry in decisions.items():
        if subset == ALL and len(decisions) > 1:
            continue
        table.add_row(
            Text(subset),
            *(_named(entry[outcome], entry[f"deciding_{outcome}"]) for outcome in ("wins", "losses")),
        )
    return table


def _named(count: int, shares: Mapping[str, float]) -> Text:
    text = Text(f"{count:,}")
    for name, share in list(shares.items())[:_DECIDING_SHOWN]:
        text.append(f"\n{100 * share:.0f}% ", style="dim").append(name)
    return text


def _gate(gate: Mapping[str, Any]) -> Table:
    table = _table(("gate by source, %", "gate", "mean wts", "uniform", "gain", "95% interval", "prompts"), 24)
    for source, figures in gate.items():
        interval = figures["interval"]
        table.add_row(
            Text(source or "(no name)"),
            *(_percent(figures[key]) for key in ("gate", "mean_weights", "uniform")),
            _percent(figures["gain"], sign=True),
            "" if interval is None else " ".join(_percent(end, sign=True) for end in interval),
            f"{figures['prompts']:,}",
        )
    return table


def _calibration(figures: Mapping[str, Any]) -> Text:
    return Text.assemble(
        ("calibration  ", "bold"),
        f"error {_percent(figures['expected_calibration_error'])}%, log loss {figures['log_loss']:.3f}, "
        f"Brier {figures['brier']:.3f};\nmargins times {figures['best_scale']:.3g} would give "
        f"log loss {figures['log_loss_at_best_scale']:.3f}",
    )


def _table(columns: tuple[str, ...], first_width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for place, name in enumerate(columns):
        if place == 0:
            table.add_column(name, max_width=first_width, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:{'+' if sign else ''}.1f}"


def _signed(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:+.2f}"
