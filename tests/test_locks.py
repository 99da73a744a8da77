"""Two runs never write into one folder at once; a kill releases the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from armorm.errors import OutputError
from armorm.locks import locked

HOLD = "import sys, time\nfrom pathlib import Path\nfrom armorm.locks import locked\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(float(sys.argv[2]))"


def holder(folder: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def test_the_second_process_is_rejected_by_name_until_the_first_is_killed(tmp_path):
    process = holder(tmp_path / "run", 60)
    with (
        pytest.raises(OutputError, match=f"{tmp_path}/run: process {process.pid} is writing here"),
        locked(tmp_path / "run"),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path / "run") as waited:
        assert not waited


def test_the_second_process_waits_if_it_may(tmp_path):
    process = holder(tmp_path, 0.5)
    with locked(tmp_path, wait=True) as waited:
        assert waited
    process.wait()


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    old, new, other = (tmp_path / name for name in (".a.12.tmp", ".b.13.tmp", "c.tmp"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    with locked(tmp_path):
        assert not old.exists() and new.exists() and other.exists()
