"""Training on another layer and pooling: the whole run, its model and its extension."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from armorm import ArmoRM, Recipe, train
from armorm.errors import RecipeError
from armorm.training.extend import extend
from tests.helpers.small_models import sets_to_add
from tests.training.test_recipe import MINIMAL

CONVERSATIONS = [
    [{"role": "user", "content": "How do I learn to juggle?"}, {"role": "assistant", "content": text}]
    for text in ("Start with one ball.", "No idea. " * 9)
]


@pytest.mark.slow
def test_a_run_on_the_embeddings_means(small_recipe, tmp_path):
    values = small_recipe.model_dump(mode="json", exclude_none=True)
    values["backbone"] |= {"layer": 0, "pooling": "last+mean", "prompt_pooling": "mean"}
    values |= {"joint": {"pair_weights": [1.0], "r2_price": 10.0}}
    train(Recipe.from_dict(values), tmp_path / "run", quiet=True)
    rm = ArmoRM.from_pretrained(tmp_path / "run", dtype="float32")
    assert rm.backbone.readout.settings() == {
        "pooling": "last+mean", "prompt": "mean", "layer": 0, "layers": 1, "normed": False,
    }  # fmt: skip
    batch = rm.score(CONVERSATIONS)
    np.testing.assert_allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)
    assert batch.uncertainty is not None and np.isfinite(batch.uncertainty).all()
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not any(name.startswith("model.layers.") for name in weights)
    assert weights["regression_layer.weight"].shape[1] == 2 * rm.backbone.hidden_size
    rows = [
        {"prompt": f"Question {i}?", "response": f"{'word ' * (i % 7)}end", "length": float(1 + i % 7)}
        for i in range(60)
    ]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extend(tmp_path / "run", sets_to_add(tmp_path / "run", path, "length=1:7"), tmp_path / "more", quiet=True)
    more = ArmoRM.from_pretrained(tmp_path / "more", dtype="float32")
    assert more.backbone.readout == rm.backbone.readout
    new = [more.objectives.names.index(name) for name in rm.objectives.names]
    np.testing.assert_allclose(more.score(CONVERSATIONS).rewards[:, new], batch.rewards, atol=1e-5)
    # A finished run started again, on another layer, computes its own features.
    values["backbone"]["layer"] = 1
    with pytest.raises(Exception, match="contains features of another backbone"):
        train(Recipe.from_dict(values), tmp_path / "other", features=tmp_path / "run" / "work" / "features", quiet=True)


def test_layers_that_no_backbone_has_are_rejected():
    for value in ("-1", "1.5", "half"):
        with pytest.raises(RecipeError, match=r"backbone\.layer"):
            Recipe.from_text(MINIMAL, [f"backbone.layer={value}"])
