"""The tutorials in docs/tutorials run offline and print what they promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
pytestmark = pytest.mark.slow
SAID = {
    "explain_a_score": ["Contributions sum to the score", "against an average response", "kind - rude"],
    "add_your_own_objective": ["support-polite", "On questions that were held out", "Replies that it never saw"],
    "label_with_a_judge": ["Before anything is sent", "Agreement with people", "rule", "labels-polite"],
    "watch_a_run": ["warning, step", "the score grows only through", "the log is complete", "charts: "],
    "compare_two_models": ["95% interval", "shared pairs", "only the plain one"],
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_tutorial_runs_and_says_what_it_promises(path, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for part in SAID.get(path.stem, []):
        assert part in done.stdout
    assert len(done.stdout.splitlines()) >= 8


def test_every_tutorial_is_in_the_list_of_what_it_says_or_prints_enough():
    assert set(SAID) <= {path.stem for path in FOLDER.glob("*.py")}
