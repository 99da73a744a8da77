"""`armorm monitor`: reward hacking in the scored samples of an RL run, finished or going on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer import Argument, Option

from armorm.cli.input import input_rows
from armorm.cli.options import DeviceOption, DtypeOption, ForceOption, HtmlOption, JsonOption, Place
from armorm.cli.output import emit, require_unused, write_out, write_page
from armorm.data.sources import STANDARD_INPUT, find_sources
from armorm.errors import CheckpointError
from armorm.progress import Terminal, progress, say

if TYPE_CHECKING:
    from armorm.data.rows import Row
    from armorm.errors import DataError
    from armorm.monitoring.alarms import Alarm


def monitor(
    log: Annotated[
        str,
        Argument(
            help="JSON lines or a table of scored samples (- for standard input), or a folder of TRL's completions."
        ),
        Place.INPUT,
    ],
    model: Annotated[
        str | None,
        Option("--model", "-m", help="Reward model: its reference statistics; it scores logs that hold only texts."),
    ] = None,
    follow: Annotated[
        bool, Option("--follow", help="Read on while the log grows; print each alarm as it is raised.")
    ] = False,
    idle: Annotated[
        float | None, Option(min=0.1, help="With --follow, end after this many seconds without a new line.")
    ] = None,
    alarm_rate: Annotated[
        float | None, Option(min=1e-6, max=0.5, help="Share of calm runs that may ever get an alarm (default: 0.01).")
    ] = None,
    reference_steps: Annotated[
        int | None, Option(min=5, help="First steps, which alarms compare the others with (default: 20).")
    ] = None,
    kl_limit: Annotated[
        float | None, Option(min=0, help="KL divergence above which a run gets an alarm (default: 0.5 a token).")
    ] = None,
    html: HtmlOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    fail_on_flag: Annotated[
        bool, Option(help="Exit with code 1 if anything is flagged; with --follow, at the first warning.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Detect reward hacking in an RL run: score gains from a single objective or from length alone.

    The log is written by `armorm score --details` for rows with a `step`, by the TRL reward functions with `log_file=`,
    or by `armorm serve --score-log`; with --model, also any rows of texts with a `step`, such as the folder
    `completions` that TRL writes with `log_completions=True`. The output shows the drift of each objective's
    contribution, of length and of uncertainty, the step at which a narrow gain began, and the alarms that watching the
    run step by step would have raised.

    Example: `armorm monitor run.jsonl --html run.html`, or `armorm monitor run.jsonl --follow`
    """
    if idle is not None and not follow:
        raise typer.BadParameter("--idle needs --follow")
    if follow and html is not None:
        raise typer.BadParameter("--html is the page of a finished log: expected it without --follow")
    given = {"rate": alarm_rate, "reference_steps": reference_steps, "kl_limit": kl_limit}
    settings = {name: value for name, value in given.items() if value is not None}
    scored = _Scorer(model, dtype, device)
    if follow:
        _follow(log, scored, settings, idle, as_json=as_json, fail_on_flag=fail_on_flag)
        return
    from armorm.monitoring.log import read_log
    from armorm.monitoring.render import MonitorView, monitor_page
    from armorm.monitoring.summary import summarize_run

    require_unused(html, force)
    name = STANDARD_INPUT if log == "-" else log
    with progress("log", _lines(log), "lines") as advance:

        def counted() -> Iterator[Row | DataError]:
            for row in scored(_rows(log)):
                advance(1)
                yield row

        reference = None if model is None else _reference(model)
        outcome = summarize_run(read_log(counted(), name), reference, watch=settings)
    if html is not None:
        write_page(html, monitor_page(outcome, title=Path(name).name))
    emit(outcome.to_dict(), MonitorView(outcome), as_json=as_json, indent=None)
    if fail_on_flag and (outcome.flags or outcome.warnings):
        raise typer.Exit(1)


def _follow(
    log: str, scored: _Scorer, settings: dict[str, Any], idle: float | None, *, as_json: bool, fail_on_flag: bool
) -> None:
    """Print alarms as they are raised, until the log is idle or the command is interrupted."""
    from armorm.interruption import keep
    from armorm.monitoring.live import LogWatch, alarm_line, followed_rows, watch_rows

    watch = LogWatch(STANDARD_INPUT if log == "-" else log, **settings)
    rows = input_rows(log) if log == "-" else followed_rows(log, idle_seconds=idle)
    say(f"watching {log}: {'Ctrl-C ends it' if idle is None else f'ends after {idle:g} idle seconds'}")
    keep("alarms raised so far were printed")
    terminal = Terminal(highlight=False)
    for alarm in watch_rows(scored(rows), watch):
        if as_json:
            write_out(alarm_line(alarm))
        else:
            terminal.print(_shown(alarm, watch.watch.unit if watch.watch else "step"), soft_wrap=True)
        if fail_on_flag and alarm.warning:
            raise typer.Exit(1)
    say(watch.state)


def _shown(alarm: Alarm, unit: str) -> Text:
    mark = ("! ", "bold red") if alarm.warning else ("· ", "dim")
    return Text.assemble(mark, (f"{unit} {alarm.step:,.0f}: ", "dim"), (alarm.sentence, "red" if alarm.warning else ""))


class _Scorer:
    """Scores the rows of a log that hold only texts; the model is loaded at the first of them."""

    def __init__(self, model: str | None, dtype: str, device: str) -> None:
        self._model, self._dtype, self._device = model, dtype, device

    def __call__(self, rows: Iterable[Row | DataError]) -> Iterator[Row | DataError]:
        from armorm.data.rows import Row
        from armorm.monitoring.log import with_objects
        from armorm.monitoring.rescore import holds_text, rescored

        rows = (with_objects(row) if isinstance(row, Row) else row for row in rows)
        for row in rows:
            if self._model is not None and isinstance(row, Row) and holds_text(row):
                from armorm.reward_model import ArmoRM

                rm = ArmoRM.from_pretrained(self._model, dtype=self._dtype, device=self._device)
                yield from rescored(chain([row], rows), rm)
                return
            yield row


def _rows(log: str) -> Iterator[Row | DataError]:
    """Rows of a log: of a folder, those of its files by their names."""
    if log != "-" and Path(log).is_dir():
        return (row for source in find_sources([log]) for row in source.location.rows_or_faults())
    return input_rows(log)


def _lines(log: str) -> int:
    """Lines of a plain file; 0 if they cannot be counted before they are read."""
    path = Path(log)
    if log == "-" or path.suffix not in (".jsonl", ".ndjson") or not path.is_file():
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
