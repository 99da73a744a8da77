"""`armorm train --dry-run`: everything that can be said of a run before it, as tables or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from armorm.files import plain

if TYPE_CHECKING:
    from armorm.training.dry_run import Outlook
    from armorm.training.recipe import Recipe


def dry_run(
    recipe: Recipe,
    hardware: str,
    share: float,
    price: float | None,
    row_tokens: float,
    as_json: bool,
    console: Console,
) -> None:
    """Print the outlook of a recipe."""
    from armorm.training.cost import DEVICES
    from armorm.training.dry_run import outlook, require_known_device

    require_known_device(hardware, list(DEVICES))
    device = replace(DEVICES[hardware], price=price)
    found = outlook(recipe, device, share=share, row_tokens=row_tokens)
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
        console.print(f"not at hand: {name}", markup=False, soft_wrap=True)


def _summary(found: Outlook, share: float) -> dict[str, Any]:
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


def _data_table(found: Outlook, summary: dict[str, Any]) -> Table:
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


def _work_table(found: Outlook) -> Table:
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


def _cost_tables(found: Outlook, share: float) -> list[Any]:
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
