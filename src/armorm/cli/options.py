"""Arguments and options that several commands share, and how scales of columns are written."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from armorm.cli import completion
from armorm.errors import RecipeError

if TYPE_CHECKING:
    from armorm.objectives import Direction


class Place(Enum):
    """Mark of a parameter that names a place; `cli/command.py` checks these before a command starts."""

    FILE = "a file that is written"
    ROWS = "a file of rows that is written, in the format of its suffix"
    FOLDER = "a folder that is written"
    INPUT = "a file or folder that is read; other names are no place"


_MODEL = "Reward model: a folder, a hub id, or armorm-small-rm"

ModelArgument = Annotated[str, Argument(help=f"{_MODEL}.", autocompletion=completion.models), Place.INPUT]
ModelOption = Annotated[
    str, Option("--model", "-m", help=f"{_MODEL} (default).", autocompletion=completion.models), Place.INPUT
]
DtypeOption = Annotated[
    str,
    Option(
        help="Weight dtype: auto, float32, bfloat16 or float16.",
        autocompletion=completion.one_of("auto", "float32", "bfloat16", "float16"),
    ),
]
DeviceOption = Annotated[
    str,
    Option(
        "--devices",
        "--device",
        help="Devices: all (every GPU, else the processor), cpu, cuda:0,cuda:1, or ray (a cluster; ray:N workers).",
        autocompletion=completion.one_of("all", "cpu", "cuda:0", "ray"),
    ),
]
ScorerOption = Annotated[
    str | None,
    Option(
        metavar="MODULE:FUNCTION",
        help="Score with a Python function instead of --model; it maps a list of conversations to a list of numbers.",
    ),
]
ServerOption = Annotated[
    str | None,
    Option(
        metavar="URL",
        help="Score with the model of a server instead of --model: armorm serve or vLLM (detected; or URL,api="
        "armorm|plugin|classify|pooling). URL,tokenizer=NAME sends token ids to vLLM, many conversations a request.",
    ),
]
ApiKeyEnvOption = Annotated[
    str | None,
    Option(metavar="NAME", help="Environment variable with the key of a server (default: ARMORM_API_KEY)."),
]
FeaturesOption = Annotated[
    Path | None,
    Option(help="Feature store to reuse and extend; with it, --dtype auto is the features' own."),
]
IncludeSeenOption = Annotated[
    bool, Option("--include-seen", help="Evaluate also on prompts that the model was trained on.")
]
SplitOption = Annotated[str | None, Option(help="Split of a hub data set or of a folder saved by datasets.")]
RowsArgument = Annotated[
    str | None,
    Argument(
        help="File, folder or hub id; - (or nothing, in a pipe) for standard input.", autocompletion=completion.data
    ),
    Place.INPUT,
]
RowsOutput = Annotated[
    Path | None,
    Option(
        "--output",
        "-o",
        callback=lambda path: None if path == Path("-") else path,  # standard output, as without the option
        help="File of the result: .jsonl, .csv, .tsv or .parquet (default: standard output).",
    ),
    Place.ROWS,
]
HtmlOption = Annotated[Path | None, Option(help="Also write an HTML page to this file."), Place.FILE]
AllOption = Annotated[bool, Option("--all", help="Show every objective; by default those under 2% are one line.")]
ForceOption = Annotated[bool, Option("--force", help="Overwrite existing output.")]


def _reasoning(value: str | None) -> str | None:
    if value not in (None, "keep", "drop"):
        raise typer.BadParameter(f"found {value!r}, expected keep or drop")
    return value


ReasoningOption = Annotated[
    str | None,
    Option(
        callback=_reasoning,
        autocompletion=completion.one_of("keep", "drop"),
        help="keep or drop: replies with or without their `<think>` block (default: as the model was trained).",
    ),
]
StrictOption = Annotated[
    bool,
    Option("--strict", help="Stop at a row or rating that cannot be read, instead of leaving it out and listing it."),
]
TextsOption = Annotated[
    bool, Option("--texts/--no-texts", help="Write the texts of the conversations, with the other columns.")
]
JsonOption = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]


def chosen_model(context: typer.Context, model: str, server: str | None, scorer: str | None = None) -> str:
    """The model of a command: its server's if one is named.

    Raises:
        typer.BadParameter: if more than one of --model, --server and --scorer are given, or no URL for a server.
    """
    from armorm.evaluation.scorer_names import ScorerName

    source = context.get_parameter_source("model")
    named = source is not None and source.name == "COMMANDLINE"
    for option, value in (("--scorer", scorer), ("--server", server)):
        if value is not None and (named or (scorer is not None and server is not None)):
            raise typer.BadParameter(
                f"{option} replaces --model: expected only one of --model, --server and --scorer "
                "(the others may be --against)"
            )
    if server is None:
        return model
    parsed = ScorerName.parse(server)
    if parsed is None or parsed.kind != "server":
        raise typer.BadParameter(f"--server: found {server!r}, expected a URL, such as http://127.0.0.1:8008")
    return server


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
