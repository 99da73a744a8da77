"""A run that is watched while its log grows: rows go in one by one, alarms come out.

The samples of a step are judged when a row of a later step arrives, or at the end. Rows of a step that was judged
already are skipped and counted: a trainer scores all samples of a step before it begins the next.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from armorm.data.rows import SUFFIXES, Row, line_rows
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.monitoring.alarms import Alarm, RunWatch
from armorm.monitoring.log import ROWS_OF_A_STEP, MonitorError, row_numbers, samples_of, step_metrics, table_of

POLL_SECONDS = 1.0


class LogWatch:
    """Watches the rows of a log.

    Args:
        file: its name, for messages.
        settings: of `RunWatch`.
    """

    def __init__(self, file: str, **settings: Any) -> None:
        self._file, self._settings = file, settings
        self.watch: RunWatch | None = None  # once the first sample named the objectives
        self.samples, self.late, self.skipped = 0, 0, list[tuple[int, str]]()
        self._step: float | None = None
        self._numbers = array("d")
        self._metrics: list[tuple[float, dict[str, float]]] = []  # before the first sample

    def add(self, row: Row | DataError) -> list[Alarm]:
        """Add a row, or the error of an invalid line. Returns the new alarms.

        Raises:
            MonitorError: for a sample with other objectives than the first, or for one without a step among others.
        """
        if isinstance(row, DataError):
            self.skipped.append((row.row or 0, row.problem))
            return []
        alarms = self._add_metrics(row)
        found = row.values.get("contributions")
        if not isinstance(found, Mapping) or not found:
            if step_metrics(row) is None:
                self.skipped.append((row.number, "contributions: found none, expected an object"))
            return alarms
        if self.watch is None:
            self.watch = RunWatch([str(name) for name in found], **self._settings)
            self.watch.unit = "step" if row.values.get("step") is not None else "row"
            for step, metrics in self._metrics:
                alarms += self.watch.add_metrics(step, metrics)
        names = self.watch.names
        if odd := sorted(set(found) ^ set(names)):
            raise MonitorError(
                f"{self._file}, row {row.number}: found other objectives than before ({', '.join(odd[:3])}), expected "
                "the scores of one model"
            )
        if (row.values.get("step") is None) != (self.watch.unit == "row"):
            raise MonitorError(f"{self._file}, row {row.number}: expected a step in every row or in none")
        try:
            numbers = row_numbers(row, names)
        except DataError as error:
            self.skipped.append((row.number, f"{error.field}: {error.problem}"))
            return alarms
        step = float(row.number) if self.watch.unit == "row" else numbers[1]
        if self._step is not None and step < self._step:
            self.late += 1
            return alarms
        full = len(self._numbers) >= ROWS_OF_A_STEP * len(numbers)
        if self._step is not None and (full if self.watch.unit == "row" else step > self._step):
            alarms += self.finish()
        if self._step is None or self.watch.unit == "step":
            self._step = step
        self._numbers.extend(numbers)
        self.samples += 1
        return alarms

    def finish(self) -> list[Alarm]:
        """Judge the step whose samples have arrived. Returns the new alarms."""
        if self.watch is None or self._step is None or not self._numbers:
            return []
        samples = samples_of(self._step, table_of(self._numbers, self.watch.names))
        self._numbers = array("d")
        if self.watch.unit == "row":
            self._step = None
        return self.watch.add_samples(samples)

    def _add_metrics(self, row: Row) -> list[Alarm]:
        found = step_metrics(row)
        if found is None:
            return []
        if self.watch is not None:
            return self.watch.add_metrics(*found)
        self._metrics.append(found)
        return []

    @property
    def state(self) -> str:
        """One line: what was read and what is going on."""
        watch = self.watch
        if watch is None:
            return f"{self._file}: no scored samples yet"
        parts = [f"{self.samples:,} samples"]
        if not watch.watching:
            parts.append(f"the reference phase of {watch.reference_steps} steps is not complete: nothing was judged")
        warnings, notices = len(watch.warnings), len(watch.alarms) - len(watch.warnings)
        parts.append(f"{warnings} warning{'s' * (warnings != 1)}, {notices} notice{'s' * (notices != 1)}")
        if self.late:
            parts.append(f"skipped {self.late:,} samples of steps that were judged already")
        if self.skipped:
            number, reason = self.skipped[0]
            parts.append(f"skipped {len(self.skipped):,} lines, the first one row {number}: {reason}")
        return "; ".join(parts)


def watch_rows(rows: Iterable[Row | DataError], watch: LogWatch) -> Iterator[Alarm]:
    """Alarms of rows, as they arise."""
    for row in rows:
        yield from watch.add(row)
    yield from watch.finish()


class GrowingFile:
    """The whole lines of a file that others append to, from its beginning; like `tail -F`.

    An unfinished line waits until its end is written. A file that was replaced (rotated) is read to its end before the
    new one; one that was truncated is read again from its beginning. A file that does not exist yet is waited for.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: IO[bytes] | None = None
        self._rest = b""

    def lines(self) -> Iterator[bytes]:
        """Whole lines that were written since the last call."""
        while True:
            if self._file is None:
                try:
                    self._file = self._path.open("rb")
                except FileNotFoundError:
                    return
            replaced = self._replaced()  # before the rest is read: what was written until then belongs to the old file
            if os.fstat(self._file.fileno()).st_size < self._file.tell():
                self._file.seek(0)
                self._rest = b""
            for piece in iter(lambda: self._file.read(1 << 20) if self._file else b"", b""):
                *whole, self._rest = (self._rest + piece).split(b"\n")
                yield from (line + b"\n" for line in whole)
            if not replaced:
                return
            if self._rest:  # the last line of the old file has no end
                yield self._rest
            self.close()

    def _replaced(self) -> bool:
        assert self._file is not None
        try:
            now, old = self._path.stat(), os.fstat(self._file.fileno())
        except FileNotFoundError:  # moved away; the new one is not there yet
            return False
        return (now.st_dev, now.st_ino) != (old.st_dev, old.st_ino)

    def close(self) -> None:
        """Close the file; the next call of `lines` opens it again."""
        if self._file is not None:
            self._file.close()
        self._file, self._rest = None, b""


def followed_lines(path: str | Path, *, idle_seconds: float | None = None) -> Iterator[bytes]:
    """Lines of a file as they are written, until nothing was written for `idle_seconds` (None: for ever)."""
    file, last = GrowingFile(path), time.monotonic()
    try:
        while True:
            for line in file.lines():
                last = time.monotonic()
                yield line
            if idle_seconds is not None and time.monotonic() - last >= idle_seconds:
                return
            time.sleep(POLL_SECONDS if idle_seconds is None else min(POLL_SECONDS, idle_seconds / 2))
    finally:
        file.close()


def followed_rows(path: str | Path, *, idle_seconds: float | None = None) -> Iterator[Row | DataError]:
    """Rows of a log as its lines are written (`followed_lines`); of a folder, those of its files as they appear."""
    if Path(path).is_dir():
        return _followed_files(Path(path), idle_seconds)
    return line_rows(followed_lines(path, idle_seconds=idle_seconds), str(path))


def _followed_files(folder: Path, idle_seconds: float | None) -> Iterator[Row | DataError]:
    """Rows of the files of a folder in the order of their names, each once it can be read as a whole."""
    seen, last = set[Path](), time.monotonic()
    while True:
        for path in sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file not in seen):
            try:
                rows = list(Location.find(str(path)).rows_or_faults())
            except DataError:  # is still being written
                break
            seen.add(path)
            last = time.monotonic()
            yield from rows
        if idle_seconds is not None and time.monotonic() - last >= idle_seconds:
            return
        time.sleep(POLL_SECONDS if idle_seconds is None else min(POLL_SECONDS, idle_seconds / 2))


def alarm_line(alarm: Alarm) -> str:
    """An alarm as a JSON line, with its newline."""
    return json.dumps(alarm.to_dict(), ensure_ascii=False) + "\n"
