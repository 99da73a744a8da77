"""`armorm export`: a reward model in the checkpoint layout that another program reads."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from typer import Argument, Option

from armorm.cli.options import ForceOption, JsonOption, ModelArgument, Place
from armorm.cli.output import emit, require_unused, table


class Weights(str, Enum):
    """Integer weights of the backbone."""

    int8 = "int8"
    int4 = "int4"


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
    quantize: Annotated[
        Weights | None, Option(help="Write the backbone with integer weights (torchao), and print how far scores move.")
    ] = None,
    data: Annotated[
        str | None,
        Option(help="With --quantize, rows whose scores are compared (default: 16 conversations of the package)."),
        Place.INPUT,
    ] = None,
    max_drift: Annotated[
        float,
        Option(min=0, help="With --quantize, the root mean square drift, in standard deviations, that is accepted."),
    ] = 0.1,
    max_shard_size: Annotated[str, Option(help="Maximum size of a weight file.")] = "5GB",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a reward model between the armorm and the released checkpoint layout.

    Either layout is read; scores do not change, except with --quantize, where nothing is written if they move by more
    than --max-drift.

    Example: `armorm export armorm-small-rm exported --self-contained`, or `armorm export my-rm small --quantize int8`
    """
    if quantize is not None:
        if layout is not Layout.armorm or self_contained or heads_only:
            raise typer.BadParameter("--quantize writes whole models in the armorm layout, without further options")
        require_unused(folder, force)
        _export_quantized(model, folder, quantize, data, max_drift, as_json=as_json)
        return
    if data is not None:
        raise typer.BadParameter("--data needs --quantize")
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
    files = _sizes(folder)
    shown = table(str(folder), "size")
    for name, size in files.items():
        shown.add_row(name, decimal(size))
    emit({"folder": str(folder), "layout": layout.value, "files": files}, shown, as_json=as_json)


def _export_quantized(
    model: str, folder: Path, quantize: Weights, data: str | None, max_drift: float, *, as_json: bool
) -> None:
    import tempfile
    from dataclasses import asdict

    from armorm.backbone.drift import reference_rows
    from armorm.cli.input import input_rows, split_rejected
    from armorm.errors import CheckpointError, DataError
    from armorm.model.quantized import ScoreDrift, quantization, quantized_layers, save_quantized
    from armorm.reward_model import ArmoRM

    settings = quantization(quantize.value)
    rows = (
        reference_rows() if data is None else [found for _, found in split_rejected(input_rows(data), strict=True)[0]]
    )
    if len(rows) < 2:
        raise DataError(f"found {len(rows)} conversation, expected at least two to compare", file=data or "--data")
    rm = ArmoRM.from_pretrained(model, dtype="weights", device="cpu")
    before = rm.score(rows).scores
    with tempfile.TemporaryDirectory() as whole:  # a model stored as heads takes its backbone from elsewhere
        rm.save_pretrained(whole)
        small = ArmoRM.from_pretrained(whole, dtype="weights", device_map="cpu", quantization_config=settings)
    if not quantized_layers(small.model):
        raise CheckpointError(f"{model}: found no layer that torchao quantizes to {quantize.value}")
    drift = ScoreDrift.between(before, small.score(rows).scores, [row.prompt_key for row in rows])
    found = f"{drift.root_mean_square:.3f} standard deviations"
    if not drift.root_mean_square <= max_drift:
        raise CheckpointError(
            f"{model}: with {quantize.value} weights the scores of {drift.rows} rows move by {found} (root mean "
            f"square) and {drift.flipped:.1%} of {drift.pairs:,} decisions change, expected at most {max_drift:g} "
            "(--max-drift); nothing was written"
        )
    save_quantized(small.model, small.tokenizer, folder)
    files = _sizes(folder)
    shown = table(str(folder), "size")
    for name, size in files.items():
        shown.add_row(name, decimal(size))
    said = (
        f"{quantize.value}: the scores of {drift.rows} rows move by {found} (root mean square; at most "
        f"{drift.largest:.3f}), {drift.flipped:.1%} of {drift.pairs:,} decisions change"
    )
    result = {"folder": str(folder), "quantized": quantize.value, "drift": asdict(drift), "files": files}
    emit(result, shown, said, as_json=as_json)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
