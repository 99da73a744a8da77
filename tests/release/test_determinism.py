"""The same recipe and data give the same files, to the bit."""

from __future__ import annotations

import hashlib
import json

import pytest

from armorm import train


@pytest.mark.slow
def test_training_twice_gives_the_same_weights_and_figures_to_the_bit(small_recipe, small_run, tmp_path):
    train(small_recipe, tmp_path / "again", quiet=True)
    for name in ("model.safetensors", "config.json", "recipe.yaml", "README.md"):
        first, second = ((folder / name).read_bytes() for folder in (small_run, tmp_path / "again"))
        assert hashlib.sha256(first).hexdigest() == hashlib.sha256(second).hexdigest(), name
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (small_run, tmp_path / "again")]
    assert figures[0] == figures[1]
