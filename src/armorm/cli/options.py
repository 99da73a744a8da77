"""Arguments and options that several commands share, and how scales of columns are written."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from armorm.errors import RecipeError

if TYPE_CHECKING:
    from armorm.objectives import Direction


class Place(Enum):
    """Mark of a parameter that names a place; `cli/command.py` checks these before a command starts."""

    FILE = "a file that is written"
    FOLDER = "a folder that is written"
    INPUT = "a file or folder that is read; other names are no place"


_MODEL = "Reward model: a folder, a hub id, or armorm-small-rm (default)."

ModelArgument = Annotated[str, Argument(help=_MODEL), Place.INPUT]
ModelOption = Annotated[str, Option("--model", "-m", help=_MODEL), Place.INPUT]
DtypeOption = Annotated[str, Option(help="Weight dtype: auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, Option(help="Device: auto, cpu, cuda, cuda:1, ...")]
ScorerOption = Annotated[
    str | None,
    Option(
        metavar="MODULE:FUNCTION",
        help="Score with a Python function instead of --model; it maps a list of conversations to a list of numbers.",
    ),
]
FeaturesOption = Annotated[
    Path | None, Option(help="Feature store to reuse and extend; features are computed only once.")
]
IncludeSeenOption = Annotated[
    bool, Option("--include-seen", help="Evaluate also on prompts that the model was trained on.")
]
SplitOption = Annotated[str | None, Option(help="Split of a hub data set or of a folder saved by datasets.")]
HtmlOption = Annotated[Path | None, Option(help="Also write an HTML page to this file."), Place.FILE]
JsonOption = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]


def column_scales(texts: Sequence[str]) -> dict[str, tuple[float, float, Direction | None]]:
    """Scales of columns, each written COLUMN=LOW:HIGH[:lower|:neutral] (see `objectives.parse_scale`)."""
    from armorm.objectives import ObjectiveError, parse_scale

    try:
        return dict(map(parse_scale, texts))
    except ObjectiveError as error:
        raise typer.BadParameter(str(error)) from None


def parse_layer(text: str | None) -> int | float | None:
    """A number of layers, or a fraction with a point; None as it is."""
    try:
        return None if text is None else int(text) if text.isdigit() else float(text)
    except ValueError:
        raise RecipeError(f"layer: found {text!r}, expected a number of layers, or a fraction such as 0.5") from None
