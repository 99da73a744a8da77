"""The scoring functions of the rewardbench package, in an environment of its own, on the same per-example results."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from armorm.evaluation.benchmarks.rewardbench import SECTIONS, WEIGHTS
from armorm.evaluation.benchmarks.rewardbench2 import TIES
from armorm.evaluation.results import Results
from armorm.evaluation.runner import evaluate
from tests.helpers.environments import environment
from tests.helpers.marked_scorer import evaluated, values

pytestmark = pytest.mark.slow


def package_scores(first: Results, second: Results, folder: Path) -> dict:
    """What the package makes of the examples of a RewardBench and of a RewardBench 2 result."""
    best_of = [entry["scores"] for entry in second.examples if entry["subset"] != TIES]
    ties = [
        {"id": entry["id"], "scores": entry["scores"], "num_correct": int(sum(entry["labels"]))}
        for entry in second.examples
        if entry["subset"] == TIES
    ]
    pairs = [{"subset": e["subset"], "chosen": e["scores"][0], "rejected": e["scores"][1]} for e in first.examples]
    given, found = folder / "task.json", folder / "found.json"
    given.write_text(json.dumps({"pairs": pairs, "best_of": best_of, "ties": ties}))
    program = Path(__file__).with_name("rewardbench_scores.py")
    done = subprocess.run(
        [str(environment("rewardbench") / "bin" / "python"), str(program), str(given), str(found)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(found.read_text())


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_rows(rng) -> list[dict]:
    """Rows of every subset but two, of small whole scores, so that many are ties."""
    return [
        {
            "prompt": f"{subset} {number}",
            "chosen": f"a <{rng.integers(0, 4)}>",
            "rejected": f"b <{rng.integers(0, 4)}>",
            "subset": subset,
            "id": f"{subset} {number}",
        }
        for subset in WEIGHTS
        if subset not in ("mt-bench-hard", "math-prm")
        for number in range(int(rng.integers(3, 12)))
    ]


def best_of_rows(rng) -> list[dict]:
    """Best of four with ties, and numbers of Ties with and without a partner, whose scores are never equal."""
    rows = [
        {
            "id": f"{subset} {number}",
            "prompt": f"{subset} {number}",
            "chosen": [f"a <{rng.integers(0, 3)}>"],
            "rejected": [f"{letter} <{rng.integers(0, 3)}>" for letter in "bcd"],
            "num_correct": 1,
            "subset": subset,
        }
        for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
        for number in range(8)
    ]
    for number in range(25):
        # (The package gives 0.6 to a right ref row without a partner, so every ref row has one here.)
        for kind, correct, wrong in (("ref", 1, 3), ("tied", int(rng.integers(2, 5)), 4)):
            scores = [*(rng.normal(1.5, 0.4, correct)), *rng.normal(0, 0.6, wrong)]
            texts = [f"{index} <{score:.6f}>" for index, score in enumerate(scores)]
            rows.append(
                {
                    "id": f"{kind}:{number}",
                    "prompt": f"{kind} {number}",
                    "chosen": texts[:correct],
                    "rejected": texts[correct:],
                    "num_correct": correct,
                    "subset": "Ties",
                }
            )
    return rows


def test_the_package_gives_the_same_scores_on_the_same_results(tmp_path):
    rng = np.random.default_rng(0)
    first = evaluated("rewardbench", write(tmp_path / "one.jsonl", pair_rows(rng)))
    second = evaluated("rewardbench2", write(tmp_path / "two.jsonl", best_of_rows(rng)))
    package = package_scores(first, second, tmp_path)
    assert package["counts"] == dict(WEIGHTS)
    assert {name: tuple(subsets) for name, subsets in package["mapping"].items()} == dict(SECTIONS)
    assert values(first, "sections") == pytest.approx(package["sections"], abs=1e-12)
    credit: dict[str, list[float]] = {}
    rest = [entry["subset"] for entry in second.examples if entry["subset"] != TIES]
    for subset, value in zip(rest, package["credit"], strict=True):
        credit.setdefault(subset, []).append(value)
    subsets = values(second, "subsets")
    assert {name: subsets[name] for name in credit} == pytest.approx({n: np.mean(c) for n, c in credit.items()})
    assert len(set(package["credit"])) > 3  # ties of two, three and four among them
    assert subsets[TIES] == pytest.approx(package["ties"], abs=1e-12)


@pytest.mark.data
def test_the_package_gives_the_same_sections_on_the_real_sets(data_root, tmp_path):
    def by_content(conversations):
        return [sum(map(ord, messages[-1]["content"])) % 97 for messages in conversations]

    places = [data_root / "benchmarks" / f"{name}.jsonl.gz" for name in ("llmbar", "humanevalpack")]
    results = evaluate("rewardbench", by_content, places, quiet=True)
    package = package_scores(results, evaluated("rewardbench2", "rewardbench2.jsonl"), tmp_path)
    found = values(results, "sections")
    assert set(found) == {"Chat Hard", "Reasoning"}
    # The package says 0 for a section without rows; here it has no value.
    assert found == pytest.approx({name: package["sections"][name] for name in found}, abs=1e-12)
    assert {name for name, score in package["sections"].items() if score == 0} == {"Chat", "Safety"}
