"""Terminal tables of the figures of a model, at most 100 columns wide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from armorm.evaluation.benchmarks import ratings
from targets.figures import TARGETS
from targets.parts import JUDGED

_COLUMNS = ("value", "interval", "longest", "shortest", "right", "seen")


def results_tables(results: Mapping[str, Any]) -> RenderableType:
    """Figures with targets, further sets, and objectives."""
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in results["figures"]}
    model, record = results["model"], []
    head = Text.assemble(
        (model["name"], "bold"), f"  heads {model['heads']}, backbone {model['backbone']['fingerprint']}"
    )
    judged = _table("with a target", _COLUMNS, "target", "")
    for name, target in TARGETS.items():
        row = rows.get(name, {})
        verdict = ("met", "green") if row.get("met") else ("missed", "red") if row else ("-", "yellow")
        judged.add_row(name, *_cells(row), str(target), Text(*verdict))
    counts = Text(", ".join(f"{len(names)} {kind}" for kind, names in results["verdicts"].items()), style="bold")
    further = _table("for information", _COLUMNS)
    for name, row in rows.items():
        if name not in TARGETS and ": " not in name:
            further.add_row(name, *_cells(row))
    for name in (*TARGETS, *JUDGED):
        row = rows.get(name, {})
        if row.get("seen"):
            left = row["examples"] - row["seen"]
            value = f"{_number(row['without_seen'])} ({left:,} examples)" if left else "none left"
            record.append(Text(f"without the seen prompts, {name}: {value}"))
    if results["seen_record_partial"]:
        record.append(Text("the model's record of its training prompts is incomplete: more may be seen", "yellow"))
    if results["limit"]:
        record.append(
            Text(f"a quick look at about {results['limit']} rows of each set: no figures to report", "yellow")
        )
    notes = Text(
        "\nvalue: share of pairs ranked right, or Spearman; interval: 95%, by prompt, none below 50 prompts;\n"
        "longest, shortest: the value if that response scores highest; seen: examples whose prompt the\n"
        "model was trained on; *: and the interval above .50",
        style="dim",
    )
    space = Text("")
    return Group(head, space, judged, counts, *record, space, further, space, _objectives(rows), notes)


def _objectives(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Correlation with the test ratings, and accuracy within prompts."""
    table = _table("objective", ("ratings", "Spearman", "interval", "longest", "within", "interval", "longest"))
    names = [name.removesuffix(f": {ratings.SPEARMAN}") for name in rows if name.endswith(f": {ratings.SPEARMAN}")]
    for name in names:
        found = [rows.get(f"{name}: {kind}", {}) for kind in (ratings.SPEARMAN, ratings.WITHIN)]
        cells = [cell for row in found for cell in _cells(row)[:3]]
        table.add_row(name, f"{found[0]['examples']:,}", *cells)
    return table


def _table(first: str, columns: Sequence[str], *more: str) -> Table:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in (*columns, *more):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    """One cell for each of `_COLUMNS`; empty where the row has no such figure."""
    interval, right, examples = row.get("interval"), row.get("right"), row.get("examples")
    value, longest, shortest = (_number(row.get(name)) for name in ("value", "longest", "shortest"))
    span = f"{_number(interval[0])}-{_number(interval[1])}" if interval else ""
    count = "" if examples is None else f"{examples:,}" if right is None else f"{right:,}/{examples:,}"
    return [value, span, longest, shortest, count, f"{row['seen']:,}" if row.get("seen") else ""]


def _number(value: float | None) -> str:
    """Three decimals without the leading zero; empty for None or NaN."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"
