"""Calibration of finished models: the factor of their margins, and where it is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import expit

from armorm import ArmoRM
from armorm.errors import DataError
from armorm.evaluation.margin_calibration import calibrate, save_calibrated
from armorm.evaluation.scorers import ClassifierScorer
from tests.helpers.commands import run
from tests.helpers.conversations import chat
from tests.helpers.marked_scorer import marked
from tests.helpers.small_models import reward_model, small_classifier


def pairs_file(path, count: int, scale: float, prompts: int | None = None):
    """Pairs whose marks differ by m and whose labels are right with probability sigmoid(scale * m)."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 1, count)
    right = rng.random(count) < expit(scale * margins)
    rows = []
    for i, (margin, first) in enumerate(zip(margins, right, strict=True)):
        texts = (f"a <{margin:.4f}>", f"b{i} <0>")
        chosen, rejected = texts if first else texts[::-1]
        rows.append({"prompt": f"question {i % (prompts or count)}", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_factor_is_that_of_the_labels(tmp_path, scale):
    found, settings = calibrate(marked, pairs_file(tmp_path / "pairs.jsonl", 4000, scale))
    assert found.scale == pytest.approx(scale, rel=4 * found.scale_error)
    assert found.scale_error < 0.08
    assert found.accuracy == pytest.approx(found.expected_accuracy, abs=0.02)
    assert settings["margin_scale"] == found.scale
    assert settings["prompts"] == 4000


def test_many_pairs_of_few_prompts_are_no_calibration(tmp_path):
    with pytest.raises(DataError, match="scored pairs of 49 prompts, expected at least 50"):
        calibrate(marked, pairs_file(tmp_path / "pairs.jsonl", 4000, 1.0, prompts=49))


def test_a_reward_model_keeps_its_scores_and_gets_a_probability(tmp_path, capsys):
    pairs = pairs_file(tmp_path / "pairs.jsonl", 60, 1.0)
    reward_model().save_pretrained(tmp_path / "model")
    options = ("--output", tmp_path / "out", "--dtype", "float32")
    code, out, _ = run(capsys, "calibrate", tmp_path / "model", pairs, *options)
    assert code == 0
    assert "60 of 60 prompts" in out
    before, after = (ArmoRM.from_pretrained(tmp_path / name, dtype="float32") for name in ("model", "out"))
    sides = [chat("Hi", "Hello."), chat("Hi", "Go away.")]
    assert before.margin_scale is None
    np.testing.assert_array_equal(after.score(sides).scores, before.score(sides).scores)
    compared = after.compare(*sides)
    assert compared.probability_of_a == pytest.approx(expit(after.margin_scale * compared.margin))
    # The released layout keeps it, unless steering is folded into the weights.
    after.save_pretrained(tmp_path / "released", layout="released")
    assert ArmoRM.from_pretrained(tmp_path / "released").margin_scale == after.margin_scale
    after.steer({"code-style": 2.0}).save_pretrained(tmp_path / "steered", layout="released")
    assert ArmoRM.from_pretrained(tmp_path / "steered").margin_scale is None


def test_a_classifier_is_calibrated_too(tmp_path):
    small_classifier(tmp_path / "model")
    found, settings = calibrate(tmp_path / "model", pairs_file(tmp_path / "pairs.jsonl", 60, 1.0), dtype="float32")
    save_calibrated(str(tmp_path / "model"), settings, tmp_path / "out")
    assert ClassifierScorer.from_pretrained(str(tmp_path / "model")).margin_scale is None
    assert ClassifierScorer.from_pretrained(str(tmp_path / "out")).margin_scale == found.scale
