"""`armorm monitor`: reward hacking in the scored samples of an RL run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from armorm.cli.input import input_rows
from armorm.cli.options import ForceOption, HtmlOption, JsonOption, Place
from armorm.cli.output import emit, require_unused, write_page
from armorm.data.sources import STANDARD_INPUT
from armorm.errors import CheckpointError
from armorm.progress import progress

if TYPE_CHECKING:
    from armorm.data.rows import Row
    from armorm.errors import DataError


def monitor(
    log: Annotated[str, Argument(help="JSON lines of scored samples; - for standard input."), Place.INPUT],
    model: Annotated[
        str | None, Option("--model", "-m", help="Reward model with the reference statistics to compare with.")
    ] = None,
    html: HtmlOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    fail_on_flag: Annotated[bool, Option(help="Exit with code 1 if anything is flagged.")] = False,
) -> None:
    """Detect reward hacking in an RL run: score gains from a single objective or from length alone.

    The log is written by `armorm score --details` for rows with a `step`, by the TRL reward functions with `log_file=`,
    or by `armorm serve --score-log`. The output shows the drift of each objective's contribution, of length and of
    uncertainty, and the step at which a narrow gain began.

    Example: `armorm monitor run.jsonl --html run.html`
    """
    from armorm.monitoring.log import read_log
    from armorm.monitoring.render import MonitorView, monitor_page
    from armorm.monitoring.summary import summarize_run

    require_unused(html, force)
    name = STANDARD_INPUT if log == "-" else log
    with progress("log", _lines(log), "lines") as advance:

        def counted() -> Iterator[Row | DataError]:
            for row in input_rows(log):
                advance(1)
                yield row

        outcome = summarize_run(read_log(counted(), name), None if model is None else _reference(model))
    if html is not None:
        write_page(html, monitor_page(outcome, title=Path(name).name))
    emit(outcome.to_dict(), MonitorView(outcome), as_json=as_json, indent=None)
    if fail_on_flag and outcome.flags:
        raise typer.Exit(1)


def _lines(log: str) -> int:
    """Lines of a plain file; 0 if they cannot be counted before they are read."""
    path = Path(log)
    if log == "-" or path.suffix not in (".jsonl", ".ndjson"):
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _reference(model: str) -> dict[str, Any]:
    from armorm.model.configuration import ArmoRMConfig

    try:
        config = ArmoRMConfig.from_pretrained(model)
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be loaded as a reward model: {error}") from error
    return {**config.reference, "names": config.objective_set.names}
