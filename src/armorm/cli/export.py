"""`armorm export`: a reward model in the checkpoint layout that another program reads."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from rich.filesize import decimal
from typer import Argument, Option

from armorm.cli.options import ForceOption, JsonOption, ModelArgument, Place
from armorm.cli.output import emit, require_unused, table


class Layout(str, Enum):
    """Checkpoint layouts."""

    armorm = "armorm"
    released = "released"


def export(
    model: ModelArgument,
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder to write."), Place.FOLDER],
    layout: Annotated[
        Layout, Option(help="Checkpoint layout; released is that of RLHFlow/ArmoRM-Llama3-8B-v0.1.")
    ] = Layout.armorm,
    self_contained: Annotated[
        bool,
        Option(
            "--self-contained", help="Include the model code, so that trust_remote_code=True loads it without armorm."
        ),
    ] = False,
    heads_only: Annotated[
        bool, Option("--heads-only", help="Leave the backbone out: the config names it, with the hash of its weights.")
    ] = False,
    max_shard_size: Annotated[str, Option(help="Maximum size of a weight file.")] = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a reward model between the armorm and the released checkpoint layout.

    Either layout is read; scores do not change.

    Example: `armorm export armorm-small-rm exported --self-contained`
    """
    from armorm.reward_model import ArmoRM

    require_unused(folder, force)
    rm = ArmoRM.from_pretrained(model, dtype="weights", device="cpu")
    rm.save_pretrained(
        folder,
        layout=layout.value,
        self_contained=self_contained,
        heads_only=heads_only,
        max_shard_size=max_shard_size,
    )
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    shown = table(str(folder), "size")
    for name, size in files.items():
        shown.add_row(name, decimal(size))
    emit({"folder": str(folder), "layout": layout.value, "files": files}, shown, as_json=as_json)
