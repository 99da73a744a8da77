"""Recipes without ratings: measured objectives, and one that is fitted to the pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm import ArmoRM, train
from armorm.errors import RecipeError
from armorm.files import read_arrays
from armorm.training.dataset import read_training_data
from armorm.training.recipe import Recipe

PAIRS_ONLY = [
    "ratings=[{compute: response_length, name: verbosity}, {bradley_terry: [choices]}]",
    "debias.against=[verbosity]",
    "evaluation=[{benchmark: ratings}]",
    "gating.steps=20",
]


@pytest.fixture(scope="module")
def recipe(small_recipe) -> Recipe:
    return Recipe.from_text(small_recipe.to_yaml(), PAIRS_ONLY)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs-only")
    train(recipe, folder / "run", quiet=True)
    return folder / "run"


def test_pairs_alone_give_a_model_whose_contributions_sum_to_the_score(recipe, run):
    model = ArmoRM.from_pretrained(run, dtype="float32")
    assert model.objectives.names == ["verbosity", "preferred"]
    preferred = model.objectives[1]
    assert (preferred.source, preferred.compute, preferred.direction) == ("preferences", None, "higher")
    data = read_training_data(recipe)
    batch = model.score([pair.chosen for pair in data.test_pairs])
    np.testing.assert_allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)
    assert np.isfinite(batch.uncertainty).all()
    assert (batch.uncertainty[:, 1] > 0).all()
    assert -0.5 < batch.rewards[:, 1].mean() < 1.5


def test_the_reward_fitted_to_pairs_ranks_unseen_pairs(run):
    metrics = json.loads((run / "metrics.json").read_text())
    test = metrics["evaluation"]["pairs"]["choices (test)"]
    assert test["objectives"]["preferred"] > 0.6
    report = metrics["regression"][1]
    assert (report["objective"], report["ratings"]) == ("preferred", metrics["data"]["counts"]["pairs_train"])
    assert report["r2"] == pytest.approx(1 - min(report["validation_errors"]) / np.log(2))
    assert "| preferred |" in (run / "README.md").read_text()


def test_the_signal_of_an_objective_of_pairs_is_the_variance_that_explains_their_loss(run):
    preferred = ArmoRM.from_pretrained(run).objectives[1]
    report = json.loads((run / "metrics.json").read_text())["regression"][1]
    margin_variance = 8 * (np.log(2) - min(report["validation_errors"]))
    expected = margin_variance / 2 / (preferred.high - preferred.low) ** 2
    assert preferred.reliability.signal_variance == pytest.approx(expected)
    assert preferred.reliability.epistemic_variance > 0
    # To second order: margins of this variance, if they are calibrated, have about that loss.
    margins = np.random.default_rng(0).normal(size=200_000) * 0.3
    probability = 1 / (1 + np.exp(-margins))
    loss = (probability * np.logaddexp(0, -margins) + (1 - probability) * np.logaddexp(0, margins)).mean()
    assert np.log(2) - loss == pytest.approx(0.09 / 8, rel=0.05)


def test_rewards_of_a_fold_are_not_those_of_all_pairs(run):
    arrays = read_arrays(run / "work" / "preferences.safetensors")
    assert arrays["weight"].shape[0] == 2
    assert np.abs(arrays["fold_weight"][:, 1] - arrays["weight"][1]).max(1).min() > 0
    np.testing.assert_array_equal(arrays["bias"][0], 0)
    assert arrays["bias"][1] != 0


@pytest.mark.parametrize(
    ("ratings", "message"),
    [
        ("[{compute: response_length, name: v}]", "found no set of ratings; without one, expected a construct, or"),
        ("[{bradley_terry: [choices]}]", "found no set of ratings; without one, expected a construct, or"),
        (
            "[{compute: response_length, name: v}, {bradley_terry: [choiches]}]",
            r"ratings\.1\.bradley_terry: unknown preference set 'choiches' \(did you mean choices\?\)",
        ),
    ],
)
def test_a_recipe_without_ratings_needs_a_measure_and_pairs(small_recipe, ratings, message):
    changed = Recipe.from_text(small_recipe.to_yaml(), [f"ratings={ratings}", "debias=null"])
    with pytest.raises(RecipeError, match=message):
        read_training_data(changed)


def test_joint_training_and_an_objective_of_pairs_exclude_each_other(small_recipe):
    with pytest.raises(RecipeError, match="joint fits every objective to ratings and pairs"):
        Recipe.from_text(small_recipe.to_yaml(), [*PAIRS_ONLY, "joint={}"])
