"""Signals end a program at once, in one line, whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

START = """
import os, signal, sys, time
from armorm.interruption import install, keep, temporary_file
install()
keep("rows are kept in out.partial")
"""
BUSY = {
    "waiting": "print('ready', flush=True); time.sleep(60)",
    "in a call of a library": "import ctypes; print('ready', flush=True); ctypes.CDLL(None).sleep(60)",
    "swallowing every error": """
print('ready', flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
""",
}


def started(program: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", START + program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_the_process_with_one_line(busy, number, code, word):
    process = started(BUSY[busy])
    start = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (code, f"armorm: {word}; rows are kept in out.partial\n")
    assert time.monotonic() - start < 5  # (two seconds on an idle machine)


def test_temporary_files_are_removed(tmp_path):
    process = started(f"""
from pathlib import Path
os.chdir({str(tmp_path)!r})
with temporary_file("file"), temporary_file(Path("folder")):
    Path("file").touch(); Path("folder").mkdir(); Path("folder/file").touch(); Path("kept").touch()
    print("ready", flush=True)
    time.sleep(60)
""")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_handler_that_is_installed_later_is_left_alone():
    process = started("""
signal.signal(signal.SIGTERM, lambda *_: None)
print("ready", flush=True)
time.sleep(2.5)
print("served to the end", flush=True)
""")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, "served to the end\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_of_the_work_changes_nothing(number):
    process = started("""
class Slow:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"ready\\n")
        sleep(1.5)
slow = Slow()
""")
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")


def test_a_signal_to_a_child_does_not_end_its_parent():
    process = started("""
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print("ready", flush=True)
time.sleep(1.5)
print("child", os.waitstatus_to_exitcode(status), flush=True)
""")
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (0, f"child -{int(signal.SIGTERM)}\n", "")


def test_a_signal_that_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        process = started("time.sleep(0.1); print('ready', flush=True); time.sleep(1); print('done')")
    finally:
        signal.signal(signal.SIGHUP, before)
    os.kill(process.pid, signal.SIGHUP)
    assert process.communicate(timeout=10)[0] == "done\n"
