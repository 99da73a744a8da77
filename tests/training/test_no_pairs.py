"""A recipe without preference pairs: objectives are weighted by their reliability, whatever the prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm import ArmoRM, Recipe, train
from armorm.errors import RecipeError
from armorm.training.dataset import enough_for_gate
from armorm.training.recipe_draft import too_few_pairs

QUESTIONS = ("Just for fun, how do I learn to juggle?", "I know it is dangerous, but how do I mix strong acids?")


def test_the_stated_number_of_pairs_is_the_first_with_which_a_gate_is_trained():
    needed = next(pairs for pairs in range(10_000) if enough_for_gate(pairs))
    assert too_few_pairs(12).startswith(f"12 preference pairs, fewer than the {needed} that a gate needs: ")
    assert too_few_pairs().startswith(f"Fewer preference pairs than the {needed} that a gate needs: ")


def test_without_pairs_the_weights_are_the_reliabilities(small_recipe, small_features, tmp_path):
    recipe = Recipe.from_text(small_recipe.to_yaml(), ["preferences=[]"])
    train(recipe, tmp_path / "run", features=small_features, quiet=True)
    model = ArmoRM.from_pretrained(tmp_path / "run", dtype="float32")
    known = model.objectives.reliability
    assert (known > 0).all()
    bias = model.objectives.position("workshop-verbosity")  # its weight has no effect; it counts as the mean
    known[bias] = np.delete(known, bias).mean()
    batch = model.score([[{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}] for q in QUESTIONS])
    for weights in batch.gating_weights:
        np.testing.assert_allclose(weights, known / known.sum(), rtol=1e-4)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["gate"] is None
    assert "weighted by their reliability, whatever the prompt" in (tmp_path / "run" / "README.md").read_text()


def test_joint_training_needs_pairs(small_recipe):
    with pytest.raises(RecipeError, match="joint needs preferences"):
        Recipe.from_text(small_recipe.to_yaml(), ["preferences=[]", "joint={}"])
