"""Progress: silent for short work, a line in a log, a bar on a terminal, never on standard output."""

from __future__ import annotations

import os
import pty
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest

from armorm import progress as module
from armorm.progress import ERASE, STARTING, ignore, progress, say, starting


@pytest.fixture
def at_once(monkeypatch):
    """No waiting before something is shown, so that tests are quick."""
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)


def read(master: int) -> bytes:
    """What is left on a terminal that nobody writes to any more; nothing at its end."""
    try:
        return os.read(master, 1 << 16)
    except OSError:
        return b""


@contextmanager
def terminal(monkeypatch) -> Iterator[list[str]]:
    """Standard error on a real pseudo-terminal; what was shown is in the list when the block has ended."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    shown: list[str] = []
    try:
        with os.fdopen(slave, "w") as stream, redirect_stderr(stream):
            yield shown
        shown.append(b"".join(iter(lambda: read(master), b"")).decode())
    finally:
        os.close(master)


def test_short_work_is_silent(capsys):
    with progress("reading", 100) as advance:
        advance(50)
        advance(50)
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_plain_lines_with_count_rate_and_time_left(at_once, capsys):
    with progress("reading", 2000, "rows") as advance:
        advance(500)
        advance(1500)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert re.fullmatch(r"reading: 500 of 2,000 rows, [\d,]+/s, [\d,]+ s left", first)
    assert re.fullmatch(r"reading: 2,000 rows in \d+\.\d s", last)


def test_lines_of_a_log_keep_their_distance(monkeypatch, capsys):
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.0)
    with progress("reading", 100) as advance:
        for _ in range(10):
            advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 1  # the last one; the first is ten seconds away


def test_a_line_is_not_broken_and_brackets_are_kept(at_once, capsys):
    description = "reading [/very/long/" + "x" * 100 + "] preferences[0]"
    with progress(description, 10) as advance:
        advance(5)
    assert [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()] == [description, description]


def test_work_that_fails_says_how_far_it_came_and_lets_the_error_out(at_once, capsys):
    with pytest.raises(ValueError, match="stop"), progress("reading", 10) as advance:
        advance(3)
        raise ValueError("stop")
    assert capsys.readouterr().err.splitlines()[-1].startswith("reading: 3 rows in")


def test_a_terminal_shows_a_bar_that_is_gone_in_the_end(at_once, monkeypatch):
    with terminal(monkeypatch) as shown, progress("reading [x]", 100, "rows") as advance:
        advance(25)
        advance(75)
    text = shown[0]
    assert "reading [x]" in text[: text.index("rows/s")]
    assert "100/100" in text
    assert "\x1b[?25h" in text  # the cursor is back
    assert re.search(r"\x1b\[2Kreading \[x\]: 100 rows in \d+\.\d s\r\n$", text)  # on the line the bar stood in


def test_short_work_is_silent_on_a_terminal_too(monkeypatch):
    with terminal(monkeypatch) as shown:
        with progress("reading", 100) as advance:
            advance(100)
        sys.stderr.write("end")
    assert shown == ["end"]


def test_ignore_is_an_advance_that_shows_nothing(capsys):
    assert ignore(5) is None
    assert capsys.readouterr() == ("", "")


def wait_for_the_note() -> None:
    end = time.monotonic() + 10
    while not module._note._shown and time.monotonic() < end:
        time.sleep(0.001)


def test_a_silent_start_is_named_on_a_terminal_until_something_is_printed(at_once, monkeypatch):
    with terminal(monkeypatch) as shown:
        with starting():
            wait_for_the_note()
            say("a line")
            say("another")
        with starting():
            wait_for_the_note()
        sys.stderr.write("end")
    note = STARTING + ERASE
    assert shown == [f"{note}a line\r\nanother\r\n{note}end"]


def test_a_quick_start_and_one_into_a_log_are_silent(monkeypatch, capsys):
    with terminal(monkeypatch) as shown:
        with starting():
            say("at once")
        sys.stderr.write("end")
    assert shown == ["at once\r\nend"]
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.0)
    with starting():
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")
