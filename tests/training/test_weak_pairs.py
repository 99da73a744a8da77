"""Weak preference sets are used only if validation prompts of the judged sets gain by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from armorm import Recipe, train
from armorm.files import read_arrays
from armorm.training.dataset import HELD_OUT_PAIRS, held_out_prompts, read_training_data


def rows_of(recipe: Recipe) -> list[dict]:
    path = Path(recipe.data_root) / "choices.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def swapped(row: dict) -> dict:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gate_of(recipe: Recipe, folder: Path, features: Path, sets: str) -> tuple[dict, dict]:
    """Gate report and tensors of a run on these preference sets."""
    changed = Recipe.from_text(recipe.to_yaml(), [f"preferences={sets}", "evaluation=[]"])
    train(changed, folder, features=features, quiet=True)
    return json.loads((folder / "metrics.json").read_text())["gate"], read_arrays(folder / "work" / "gate.safetensors")


def test_a_weak_set_with_wrong_labels_changes_nothing_and_both_losses_are_stated(
    small_recipe, small_features, tmp_path
):
    weak = write(tmp_path / "by_model.jsonl", [swapped(row) for row in rows_of(small_recipe)])
    sets = f"[{{data: choices.jsonl}}, {{data: {weak}, weak: true, weight: 3}}]"
    report, arrays = gate_of(small_recipe, tmp_path / "weak", small_features, sets)
    _, alone = gate_of(small_recipe, tmp_path / "alone", small_features, "[{data: choices.jsonl}]")
    assert not report["weak"]["used"]
    assert report["weak"]["sets"] == ["by_model"]
    assert report["weak"]["loss_with"] > report["weak"]["loss_without"] == report["stopping_loss"]
    for name, array in alone.items():
        np.testing.assert_array_equal(arrays[name], array)
    card = (tmp_path / "weak" / "README.md").read_text()
    assert "of by_model) are not used: on the validation prompts of the other sets the loss is" in card


def test_a_weak_set_is_used_if_validation_prompts_gain(small_recipe, small_features, tmp_path):
    """The judged labels are wrong except on validation prompts, the weak ones right."""
    train_rows = [row for row in rows_of(small_recipe) if row["split"] == "train"]
    pairs = read_training_data(small_recipe).pairs
    held = held_out_prompts([pair.prompt_key for pair in pairs], HELD_OUT_PAIRS)
    assert len(held) == len(train_rows)
    judged = [row if out else swapped(row) for row, out in zip(train_rows, held, strict=True)]
    paths = write(tmp_path / "judged.jsonl", judged), write(tmp_path / "weak.jsonl", train_rows)
    sets = f"[{{data: {paths[0]}}}, {{data: {paths[1]}, weak: true, weight: 20}}]"
    report, _ = gate_of(small_recipe, tmp_path / "run", small_features, sets)
    assert report["weak"]["used"]
    assert report["stopping_loss"] == report["weak"]["loss_with"] < report["weak"]["loss_without"]
    assert report["weak"]["pairs"] == int((~held).sum())
    assert report["pairs"] == 2 * report["weak"]["pairs"]
