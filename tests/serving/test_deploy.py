"""What lies in deploy/ is accepted by the programs that read it, where those are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"no {name} here")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=60)


def test_the_dockerfile_passes_hadolint(tmp_path):
    linter = program("hadolint")
    done = run(linter, "--no-color", DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text(
        (DEPLOY / "Dockerfile").read_text().replace("FROM python:3.12-slim", "FROM python")
    )
    assert run(linter, "--no-color", tmp_path / "Dockerfile").returncode != 0, (
        "the linter should find an image without a version"
    )


def test_systemd_reads_the_unit_without_a_complaint(tmp_path):
    analyze = program("systemd-analyze")
    text = (DEPLOY / "armorm@.service").read_text()
    assert "ExecStart=/opt/armorm/bin/armorm serve" in text
    unit = tmp_path / "armorm@.service"
    unit.write_text(text.replace("/opt/armorm/bin/armorm", sys.executable))  # systemd asks whether the program is there
    done = run(analyze, "verify", unit)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "", "")
    unit.write_text(unit.read_text().replace("NoNewPrivileges=yes", "NoNewPrivilege=yes"))
    assert "NoNewPrivilege" in run(analyze, "verify", unit).stderr
