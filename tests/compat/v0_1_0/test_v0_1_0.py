"""Files that version 0.1.0 wrote load, and give what that version computed from them (see generate.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, dynamic_module_utils

from armorm import ArmoRM, Recipe
from armorm.conversation import Conversation
from armorm.data.sources import Location
from armorm.evaluation.model_comparison import compare_models
from armorm.evaluation.results import Results
from armorm.features.store import FeatureStore
from armorm.heads.regression import fit_from_statistics
from armorm.heads.statistics import RatingStatistics
from armorm.monitoring.log import read_log
from armorm.monitoring.summary import summarize_run

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
CONVERSATIONS = EXPECTED["conversations"]


@pytest.fixture(autouse=True)
def in_this_folder(monkeypatch):
    """Paths in the files are relative to it."""
    monkeypatch.chdir(HERE)


def load(name: str) -> ArmoRM:
    return ArmoRM.from_pretrained(name, dtype="float32", device="cpu")


def assert_holds(found: Any, expected: Any, path: str = "") -> None:
    """Everything that 0.1.0 wrote is there, numbers to 1e-5; later versions may add keys."""
    if isinstance(expected, dict):
        assert set(expected) <= set(found), f"{path}: lacks {set(expected) - set(found)}"
        for key, value in expected.items():
            assert_holds(found[key], value, f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, value in enumerate(expected):
            assert_holds(found[i], value, f"{path}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5, nan_ok=True), path
    elif isinstance(expected, str) and " " in expected:
        assert isinstance(found, str), path  # prose may be worded better
    else:
        assert found == expected, path


@pytest.mark.parametrize("name", ["run", "steered", "released"])
def test_a_saved_model_computes_the_same_values(name):
    rm, expected = load(name), EXPECTED[name]
    batch = rm.score(CONVERSATIONS)
    assert batch.names == expected["names"]
    for field in set(expected) - {"names", "normalized", "raw"}:
        values = np.array(expected[field], float)
        np.testing.assert_allclose(getattr(batch, field), values, atol=1e-5, rtol=1e-5, err_msg=field)
    normalized = rm.score(CONVERSATIONS, normalize=True).scores
    np.testing.assert_allclose(normalized, expected["normalized"], atol=1e-4)
    np.testing.assert_allclose(rm.objectives.to_raw(batch.rewards), expected["raw"], atol=1e-4)


def test_intervals_and_explanations_are_the_same():
    rm = load("run")
    intervals = np.nan_to_num(rm.intervals(rm.score(CONVERSATIONS)), nan=-99.0)
    np.testing.assert_allclose(intervals, EXPECTED["intervals"], atol=1e-4)
    assert_holds(rm.explain(CONVERSATIONS[0]).to_dict(), EXPECTED["explanation"])


def test_remote_code_beside_a_model_scores_without_armorm_too(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained("./steered", trust_remote_code=True).eval()
    rm = load("steered")
    for messages, score in zip(CONVERSATIONS, EXPECTED["steered"]["scores"], strict=True):
        ids = rm.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        assert model(**ids).logits.item() == pytest.approx(score, abs=1e-5)


def test_a_feature_store_is_read_and_lacks_nothing():
    rm = load("run")
    store = FeatureStore.of("run/work/features", rm.backbone)
    rows = [row.values["messages"] for row in Location.find("data/workshop.jsonl").rows()]
    encoded = rm.backbone.template.encode([Conversation.from_messages(messages) for messages in rows])
    keys = [row.key for row in encoded]
    assert store.missing(keys) == []
    computed = rm.backbone.features(encoded[:4])[1]
    np.testing.assert_allclose(store.responses(keys[:4]), computed, atol=1e-4)
    assert store.verify(keys, []) == []


def test_the_heads_of_a_run_are_fitted_again_from_its_statistics():
    recipe = Recipe.from_yaml("run/recipe.yaml")
    statistics = RatingStatistics.load(Path("run/work/statistics.safetensors"))
    head = fit_from_statistics(statistics, alphas=recipe.regression.alphas)
    stored = load("run").model.regression_layer.weight.detach().numpy()
    np.testing.assert_allclose(head.weight, stored, atol=1e-5)


def test_results_of_an_evaluation_are_read_and_compared():
    stored = json.loads(Path("results.json").read_text())
    results = Results.load("results.json")
    assert_holds(json.loads(json.dumps(results.to_dict())), stored)
    assert compare_models(results, results)


def test_a_score_log_is_read_and_judged_the_same():
    log = read_log(Location.find("log.jsonl").rows_or_faults(), "log")
    found = summarize_run(log, load("run").reference).to_dict()
    assert_holds(json.loads(json.dumps(found)), EXPECTED["monitor"])
