"""`armorm monitor`: is the score of a policy under training honest?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from armorm.data.rows import line_rows
from armorm.data.sources import Location
from armorm.errors import CheckpointError
from armorm.files import plain, write_text


def monitor(
    log: Annotated[str, typer.Argument(help="JSON lines of scored samples; - is standard input.")],
    model: Annotated[
        Optional[str], typer.Option("--model", "-m", help="The reward model, for the figures of its reference data.")
    ] = None,
    html: Annotated[Optional[Path], typer.Option(help="Write the picture as one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    fail_on_flag: Annotated[
        bool, typer.Option(help="Exit with 1 where anything is flagged, for scripts that stop a run.")
    ] = False,
) -> None:
    """Watch an RL run for reward hacking: does the score grow only through one objective, or only through length?

    The log is what `armorm score --details` writes for rows with a `step`, what the reward functions for TRL write
    with `log_file=`, or what `armorm serve --score-log` writes. It shows the drift of each objective's contribution,
    of length and of uncertainty, and says where a growth that is not broad began.

    Example: `armorm monitor run.jsonl --html run.html`
    """
    from armorm.monitoring.log import read_log
    from armorm.monitoring.render import MonitorView
    from armorm.monitoring.summary import examine
    from armorm.progress import progress

    rows = line_rows(sys.stdin.buffer, "standard input") if log == "-" else Location.find(log).rows_or_faults()

    def counted() -> Any:
        with progress("log", _lines(log), "lines") as advance:
            for row in rows:
                advance(1)
                yield row

    outcome = examine(read_log(counted(), "standard input" if log == "-" else log), _reference(model))
    if html is not None:
        from armorm.monitoring.render import monitor_page

        write_text(html, monitor_page(outcome, title="standard input" if log == "-" else Path(log).name))
        Console(stderr=True, highlight=False).print(f"wrote {html}", markup=False)
    if as_json:
        print(json.dumps(plain(outcome.to_dict()), ensure_ascii=False, allow_nan=False))
    else:
        Console(highlight=False).print(MonitorView(outcome))
    if fail_on_flag and outcome.flags:
        raise typer.Exit(1)


def _lines(log: str) -> int:
    """Lines of a plain file; 0 where they cannot be counted before they are read."""
    path = Path(log)
    if log == "-" or path.suffix not in (".jsonl", ".ndjson"):
        return 0
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _reference(model: str | None) -> dict[str, Any] | None:
    if model is None:
        return None
    from armorm.embedded import embedded_path
    from armorm.model.configuration import ArmoRMConfig

    try:
        config = ArmoRMConfig.from_pretrained(embedded_path(model) or model)
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be loaded as a reward model: {error}") from error
    return {**config.reference, "names": config.objective_set.names}
