"""Tab completion as a shell asks for it: values of the right kind, without loading what commands load."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from armorm.cli import completion
from armorm.evaluation.benchmarks import BENCHMARKS

PROGRAM = """
import sys
sys.argv = ["armorm"]
from armorm.cli.app import main
try:
    main()
finally:
    print(*sorted({"torch", "numpy", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


def completed(folder, *words: str) -> list[str]:
    """What bash is offered for the last word."""
    asked = {"_ARMORM_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        check=True,
        env={**os.environ, **asked},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert found.stderr.split() in ([], ["numpy"]), "completion loads neither torch nor transformers"
    return found.stdout.split()


@pytest.fixture
def folder(tmp_path):
    for name in ("recipe.yaml", "rows.jsonl.gz", "rows.txt", ".hidden.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    config = {"objectives": [{"name": "clear"}, {"name": "kind"}]}
    (tmp_path / "runs" / "mine" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("armorm", "train", "r"), ["recipe.yaml", "runs/"]),
        (("armorm", "score", "r"), ["rows.jsonl.gz", "runs/"]),
        (("armorm", "compare", "ro"), ["rows.jsonl.gz"]),
        (("armorm", "report", "runs/"), ["runs/mine/"]),
        (("armorm", "report", "armorm-t"), ["armorm-tiny-rm"]),
        (("armorm", "explain", "--model", "runs/mine", "--objective", "c"), ["clear"]),
        (("armorm", "explain", "--objective", "gs"), ["gsm8k-is_correct"]),
        (("armorm", "explain", "--model", "no-such-model", "--objective", "c"), []),
        (("armorm", "steer", "runs/mine", "--multiply", "k"), ["kind="]),
        (("armorm", "evaluate", "judge"), ["judgebench", "judgebench-double"]),
        (("armorm", "init", "nvidia/HelpSteer2"), ["nvidia/HelpSteer2"]),
        (("armorm", "score", "--dtype", "b"), ["bfloat16"]),
    ],
)
def test_values_are_completed(folder, words, expected):
    found = completed(folder, *words)
    assert [value for value in found if not value.startswith("nvidia/HelpSteer3")] == expected


def test_the_benchmarks_that_are_offered_are_those_that_exist():
    assert set(completion.BENCHMARKS) == set(BENCHMARKS)
