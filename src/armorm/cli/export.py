"""`armorm export`: a reward model in the layout that another reader expects."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table


class Layout(str, Enum):
    """Checkpoint layouts."""

    armorm = "armorm"
    released = "released"


def export(
    model: Annotated[str, typer.Argument(help="Folder, hub id or embedded name of a reward model.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    layout: Annotated[
        Layout, typer.Option(help="armorm, or released: that of RLHFlow/ArmoRM-Llama3-8B-v0.1 (Llama, Gemma-2).")
    ] = Layout.armorm,
    self_contained: Annotated[
        bool,
        typer.Option(
            "--self-contained", help="Add a remote-code file: trust_remote_code=True loads it without armorm."
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Weights beyond it are split over several files.")] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a reward model, from either layout, in either layout; scores stay the same.

    Example: `armorm export armorm-tiny-rm exported --self-contained`
    """
    from armorm.reward_model import ArmoRM

    rm = ArmoRM.from_pretrained(model, dtype="weights", device="cpu")
    rm.save_pretrained(folder, layout=layout.value, self_contained=self_contained, max_shard_size=max_shard_size)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    if as_json:
        print(json.dumps({"folder": str(folder), "layout": layout.value, "files": files}, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(str(folder))
    table.add_column("size", justify="right")
    for name, size in files.items():
        table.add_row(name, decimal(size))
    Console(highlight=False).print(table)
