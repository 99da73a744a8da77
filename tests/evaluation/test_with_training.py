"""A finished run's own figures, found again by `evaluate` from the features that the run left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from armorm.evaluation.runner import evaluate
from armorm.reward_model import ArmoRM


@pytest.fixture(scope="module")
def trained(small_run, small_recipe):
    """The model, its metrics, its store and the folder of its data."""
    rm = ArmoRM.from_pretrained(small_run, dtype="float32")
    metrics = json.loads((small_run / "metrics.json").read_text())
    return rm, metrics["evaluation"], small_run / "work" / "features", Path(small_recipe.data_root)


@pytest.fixture(autouse=True)
def _nothing_is_computed_again(trained, monkeypatch):
    def forward(*_):
        raise AssertionError("a feature that the training run left behind was computed again")

    monkeypatch.setattr(type(trained[0].backbone), "features", forward)


def test_held_out_ratings_have_the_figures_of_the_run(trained):
    rm, metrics, store, data = trained
    files = [data / f"{name}.jsonl" for name in ("workshop", "harbour", "market")]
    results = evaluate("ratings", rm, files, features=store, quiet=True)
    figures = results.level("subsets")
    rated = {name: found for name, found in metrics["ratings"].items() if found["n"]}
    assert set(results.objectives) == set(rated)
    for name, expected in rated.items():
        spearman = figures[f"{name}: Spearman"]
        assert spearman.value == pytest.approx(expected["spearman"], abs=1e-6)
        assert (spearman.examples, spearman.prompts) == (expected["n"], expected["prompts"])
        assert figures[f"{name}: error"].value == pytest.approx(expected["mae"], abs=1e-5)
        if expected["within_prompt_pairs"]:
            assert figures[f"{name}: within prompts"].value == pytest.approx(expected["within_prompt"], abs=1e-6)


def test_held_out_pairs_have_the_figures_of_the_run(trained):
    rm, metrics, store, data = trained
    results = evaluate("pairs", rm, data / "choices.jsonl", features=store, quiet=True)
    (expected,) = metrics["pairs"].values()
    overall = results.level("overall")["accuracy"]
    assert (overall.examples, overall.prompts) == (expected["pairs"], expected["prompts"])
    assert overall.value == pytest.approx(expected["accuracy"])
    assert results.counts["ties"] == expected["ties"]
    assert results.audits["gate"]["all"]["uniform"] == pytest.approx(expected["baselines"]["uniform_weights"])
    for name, accuracy in expected["objectives"].items():
        assert results.audits["objectives"][name]["debiased"] == pytest.approx(accuracy)
