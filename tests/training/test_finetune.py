from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from armorm import ArmoRM, Recipe, train
from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.data.decontamination import prompt_groups
from armorm.data.seen_prompts import SeenPrompts
from armorm.errors import BackboneError, FitError, MissingExtraError, RecipeError
from armorm.heads.regression import MIN_RATINGS, fit_regression
from armorm.training.dataset import read_training_data
from armorm.training.finetune import run as stage
from armorm.training.finetune.record import Finetuned, residuals, with_start, without_finetuned
from armorm.training.finetune.trainer import last_whole_checkpoint, masked_squared_error
from tests.helpers.shared_folders import shared_folder

pytest.importorskip("accelerate")
QUIET = Console(quiet=True)
SETTINGS = [
    "finetune.share=0.6", "finetune.epochs=3", "finetune.learning_rate=0.0005",
    "finetune.batch_tokens=1024", "finetune.save_steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(small_recipe, llama_folder) -> Recipe:
    return Recipe.from_text(small_recipe.to_yaml(), [*SETTINGS, f"backbone.model={llama_folder}"])


@pytest.fixture(scope="module")
def finetuned_run(recipe, tmp_path_factory) -> Path:
    return shared_folder(tmp_path_factory, "finetuned", lambda folder: train(recipe, folder, quiet=True))


def changed(recipe: Recipe, *settings: str) -> Recipe:
    return Recipe.from_text(recipe.to_yaml(), settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def first_and_last_quarter(curve: list[dict[str, float]]) -> tuple[float, float]:
    """Mean loss of the first and of the last quarter of the steps."""
    losses = [entry["loss"] for entry in curve]
    return float(np.mean(losses[: len(losses) // 4])), float(np.mean(losses[-(len(losses) // 4) :]))


def test_the_masked_error_is_the_papers_sum():
    rng = np.random.default_rng(0)
    rewards, ratings = rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    ratings[rng.uniform(size=ratings.shape) < 0.4] = np.nan
    v = np.array([1.0, 0.5, 2.0], np.float32)
    expected = sum(
        v[j] * (rewards[i, j] - ratings[i, j]) ** 2 for i in range(7) for j in range(3) if not np.isnan(ratings[i, j])
    )
    predicted = torch.from_numpy(rewards).requires_grad_()
    loss = masked_squared_error(predicted, torch.from_numpy(ratings), torch.from_numpy(v))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert predicted.grad is not None and bool(predicted.grad.isfinite().all())
    assert bool((predicted.grad[torch.from_numpy(np.isnan(ratings))] == 0).all())


def test_balanced_weights_hear_small_sets_and_make_the_mean_cost_one():
    rng = np.random.default_rng(0)
    ratings = np.full((1000, 3), np.nan)
    ratings[:, 0] = rng.normal(0, 1, 1000)
    ratings[:40, 1] = rng.normal(0, 0.1, 40)
    ratings[:40, 2] = 0.5
    v = stage.rating_weights(ratings, "balanced")
    count, variance = np.array([1000, 40]), np.nanvar(ratings[:, :2], axis=0)
    share = v[:2] * count * variance
    assert share[0] / share[1] == pytest.approx((1000 / 40) ** 0.5)
    assert share.sum() == pytest.approx(1040)
    assert v[2] == 0
    equal = stage.rating_weights(ratings, "equal")
    assert equal[0] == equal[1]


def test_the_run_fine_tunes_its_backbone_and_reads_it(recipe, llama_folder, finetuned_run):
    folder = finetuned_run / "work" / "backbone"
    before, after = weights(llama_folder), weights(folder)
    moved = [name for name, tensor in after.items() if not tensor.equal(before[f"model.{name}"])]
    assert len(moved) == len(after)
    served = weights(finetuned_run)
    assert all(served[f"model.{name}"].equal(tensor) for name, tensor in after.items())
    curve = json.loads((folder / "training_curve.json").read_text())
    assert curve["shared_prompts"] is True
    first, last = first_and_last_quarter(curve["ratings"])
    assert first < 1, "no worse than the ratings' mean from the start"
    assert last < 0.8 * first
    assert not (finetuned_run / "work" / "finetune").exists()
    facts = json.loads((finetuned_run / "metrics.json").read_text())["backbone"]["finetuned"]
    assert facts["settings"]["share"] == 0.6 and facts["from"] == str(llama_folder)


def test_heads_never_meet_a_prompt_that_the_backbone_was_fine_tuned_on(recipe, finetuned_run):
    data, record = read_training_data(recipe), Finetuned.read(finetuned_run / "work" / "backbone")
    assert record is not None
    left = without_finetuned(data, record)
    prompts = {data.table.conversations[i].prompt_key: data.table.conversations[i] for i in data.train_rows}
    keys = set(prompts)
    used = {key for key, known in zip(prompts, record.seen.find([*prompts.values()]), strict=True) if known}
    assert 0.4 < len(used) / len(keys) < 0.8
    assert used == {key for key in keys if stage.is_chosen(key, 0.6)}
    assert {left.table.conversations[i].prompt_key for i in left.train_rows} == keys - used
    assert not record.seen.find([pair.chosen for pair in left.pairs]).any()
    assert len(left.train_rows) + left.left_out[
        "rated training rows whose prompt the backbone was fine-tuned on"
    ] == len(data.train_rows)
    metrics = json.loads((finetuned_run / "metrics.json").read_text())
    assert metrics["data"]["left_out"] == left.left_out
    assert metrics["data"]["counts"]["rated_train"] == len(left.train_rows)


@pytest.mark.slow
def test_a_later_run_on_the_fine_tuned_backbone_leaves_its_prompts_out_too(recipe, finetuned_run, tmp_path):
    later = changed(recipe, f"backbone.model={finetuned_run / 'work' / 'backbone'}").model_copy(
        update={"finetune": None}
    )
    train(later, tmp_path, features=finetuned_run / "work" / "features", quiet=True)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (finetuned_run, tmp_path)]
    assert metrics[1]["data"] == metrics[0]["data"]
    assert metrics[1]["regression"] == metrics[0]["regression"]


@pytest.mark.slow
def test_joint_heads_start_from_those_that_stage_1_found_around_the_fine_tuned_ones(recipe, finetuned_run, tmp_path):
    later = changed(
        recipe, f"backbone.model={finetuned_run / 'work' / 'backbone'}", "joint={pair_weights: [0, 0.3], r2_price: 1}"
    ).model_copy(update={"finetune": None})
    train(later, tmp_path, features=finetuned_run / "work" / "features", quiet=True)
    joint = json.loads((tmp_path / "metrics.json").read_text())["joint"]
    stage_1 = json.loads((finetuned_run / "metrics.json").read_text())["regression"]
    np.testing.assert_allclose(joint["r2_before"], [report["r2"] for report in stage_1], atol=1e-6)
    assert joint["pair_weight"] == 0.3 and joint["losses"][1] < joint["losses"][0]
    moved = weights(tmp_path)["regression_layer.weight"] - weights(finetuned_run)["regression_layer.weight"]
    assert 0 < float(moved.norm()) < float(weights(finetuned_run)["regression_layer.weight"].norm())


def test_all_prompts_known_to_the_backbone_leave_nothing_for_the_heads(recipe, finetuned_run):
    data, record = read_training_data(recipe), Finetuned.read(finetuned_run / "work" / "backbone")
    assert record is not None
    groups = prompt_groups(data.table.conversations)
    everything = SeenPrompts.of({"fine-tuning": data.table.conversations}, groups)
    with pytest.raises(FitError, match=r"all .* rated training rows"):
        without_finetuned(data, replace(record, seen=everything))


def test_the_record_of_fine_tuning_survives_its_file(tmp_path):
    prompts = [Conversation.from_prompt(text, "yes") for text in ("one", "two", "three")]
    seen = SeenPrompts.of({"fine-tuning": prompts[:2]}, prompt_groups(prompts))
    record = Finetuned(seen, [{"name": "a"}], np.ones((1, 4), np.float32), {"from": "x"}, "key")
    record.write(tmp_path)
    read = Finetuned.read(tmp_path)
    assert read is not None and read.facts == record.facts and read.key == "key"
    np.testing.assert_array_equal(read.weight, record.weight)
    assert read.seen.find(prompts).tolist() == [4, 4, 0]
    assert Finetuned.read(tmp_path / "elsewhere") is None


def test_stage_1_from_given_weights_is_ridge_towards_them():
    rng = np.random.default_rng(1)
    x, start = rng.normal(size=(200, 5)), rng.normal(size=(2, 5))
    ratings = x @ (start + 0.1).T + rng.normal(0, 0.3, (200, 2))
    ratings[::3, 1] = np.nan
    folds = np.arange(200) % 4

    def fit(*arrays):
        return fit_regression(*arrays, alphas=[50.0], precision="float64")

    head = with_start(fit(x, residuals(start, x, ratings), folds, ["a", "b"]), start, ratings)
    for j in range(2):
        rated = ~np.isnan(ratings[:, j])
        gram = x[rated].T @ x[rated] + 50 * np.eye(5)
        expected = np.linalg.solve(gram, x[rated].T @ ratings[rated, j] + 50 * start[j])
        np.testing.assert_allclose(head.weight[j], expected, rtol=1e-8)
        fold = rated & (folds != 2)
        gram = x[fold].T @ x[fold] + 50 * np.eye(5)
        np.testing.assert_allclose(
            head.fold_weight[2, j], np.linalg.solve(gram, x[fold].T @ ratings[fold, j] + 50 * start[j]), rtol=1e-8
        )
        held = np.mean([(ratings[i, j] - x[i] @ head.fold_weight[folds[i], j]) ** 2 for i in np.flatnonzero(rated)])
        assert head.reports[j].r2 == pytest.approx(1 - held / np.nanvar(ratings[:, j]), rel=1e-6)
    assert head.reports[0].r2 > fit(x, ratings, folds, ["a", "b"]).reports[0].r2


@pytest.mark.slow
def test_lora_trains_adapters_and_leaves_an_ordinary_model(recipe, llama_folder, tmp_path):
    lora = changed(
        recipe, "finetune.method=lora", "finetune.lora_rank=4", "finetune.epochs=4", "finetune.learning_rate=0.001"
    )
    folder = stage.finetune(lora, read_training_data(lora), tmp_path, QUIET)
    before, after = weights(llama_folder), weights(folder)
    assert {f"model.{name}" for name in after} == {name for name in before if name.startswith("model.")}
    moved = {name for name, tensor in after.items() if not tensor.equal(before[f"model.{name}"])}
    assert moved and all("proj" in name for name in moved)
    assert Backbone.load(folder).hidden_size == 32
    first, last = first_and_last_quarter(json.loads((folder / "training_curve.json").read_text())["ratings"])
    assert last < 0.9 * first


@pytest.mark.slow
def test_frozen_layers_and_embeddings_stay(recipe, llama_folder, tmp_path):
    frozen = changed(recipe, "finetune.frozen_layers=1", "finetune.epochs=0.3")
    folder = stage.finetune(frozen, read_training_data(frozen), tmp_path, QUIET)
    before, after = weights(llama_folder), weights(folder)
    still = {name for name, tensor in after.items() if tensor.equal(before[f"model.{name}"])}
    assert still == {name for name in after if name.startswith(("embed_tokens", "layers.0."))}
    with pytest.raises(BackboneError, match="found 2, the backbone has 2 layers"):
        stage.finetune(
            changed(recipe, "finetune.frozen_layers=2"), read_training_data(recipe), tmp_path / "none", QUIET
        )


@pytest.mark.slow
def test_a_bradley_terry_stage_comes_first_on_request(recipe, tmp_path):
    pairs_first = changed(
        recipe, "finetune.preference_epochs=8", "finetune.epochs=0.3", "finetune.head_learning_rate=0.02"
    )
    data = read_training_data(pairs_first)
    folder = stage.finetune(pairs_first, data, tmp_path, QUIET)
    curves = json.loads((folder / "training_curve.json").read_text())
    assert curves["preferences"][0]["loss"] < np.log(2) - 0.1  # it starts from a fit on the frozen features
    assert curves["preferences"][-1]["loss"] < 0.75 * curves["preferences"][0]["loss"]
    record = Finetuned.read(folder)
    assert record is not None and record.facts["pairs"] > 0
    chosen = [pair.chosen for pair in data.pairs if stage.is_chosen(pair.prompt_key, 0.6)]
    assert record.seen.find(chosen).all()


@pytest.mark.slow
def test_other_settings_do_not_reuse_the_backbone_of_these(recipe, finetuned_run, tmp_path):
    short = changed(recipe, "finetune.epochs=0.2")
    folder = stage.finetune(short, read_training_data(short), tmp_path, QUIET)
    first = weights(folder)
    stage.finetune(short, read_training_data(short), tmp_path, QUIET)
    assert all(tensor.equal(first[name]) for name, tensor in weights(folder).items())
    other = changed(short, "finetune.learning_rate=0.001")
    stage.finetune(other, read_training_data(other), tmp_path, QUIET)
    assert not all(tensor.equal(first[name]) for name, tensor in weights(folder).items())


def test_a_checkpoint_cut_short_is_not_resumed_from(tmp_path):
    for step, text in ((3, '{"global_step": 3}'), (20, '{"global_'), (6, '{"global_step": 6}')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-40").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert last_whole_checkpoint(tmp_path / "none") is None


def test_a_missing_extra_is_named(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"finetune needs accelerate: pip install 'armorm\[finetune\]'"):
        stage.finetune(recipe, read_training_data(recipe), tmp_path, QUIET)


def test_faults_of_the_section_are_named(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"finetune.shar: unknown key \(did you mean share\?\)"):
        changed(recipe, "finetune.shar=0.5")
    with pytest.raises(RecipeError, match=r"finetune.share"):
        changed(recipe, "finetune.share=1")
    wrong = changed(recipe, "finetune.source_shares.nowhere=0.5")
    with pytest.raises(FitError, match="unknown set 'nowhere'"):
        stage.finetune(wrong, read_training_data(wrong), tmp_path, QUIET)


_SCRIPT = "import sys; from armorm import Recipe, train; train(Recipe.from_yaml(sys.argv[1]), sys.argv[2])"


@pytest.mark.slow
def test_fine_tuning_killed_and_started_again_ends_with_the_same_weights(recipe, finetuned_run, tmp_path):
    """kill -9 after a checkpoint of each stage."""
    both = changed(recipe, "finetune.preference_epochs=2")
    path = tmp_path / "recipe.yaml"
    path.write_text(both.to_yaml())

    def start(folder: Path) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(path), str(folder)], env=environment)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=900) == 0
    for kind in ("preferences", "ratings"):
        process = start(broken)
        deadline = time.monotonic() + 120
        while not list(broken.glob(f"work/finetune/*/{kind}/checkpoint-*/trainer_state.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (broken / "work" / "backbone").exists()
    assert start(broken).wait(timeout=900) == 0
    assert weights(broken).keys() == weights(whole).keys()
    assert all(tensor.equal(weights(broken)[name]) for name, tensor in weights(whole).items())
    assert ArmoRM.from_pretrained(broken).score(
        [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    )


def test_rewards_start_from_weights_that_hold_for_other_prompts():
    """300 rows of 150 features that say nothing but the mean: fitted closely, other rows are predicted far worse."""
    rng = np.random.default_rng(0)
    x, ratings = rng.normal(size=(2, 300, 150)), 0.5 + 0.3 * rng.normal(size=(2, 300))
    x[:, :, 0] = 10

    def error(weight: np.ndarray) -> float:
        return float(((x[1] @ weight - ratings[1]) ** 2).mean() / ratings[1].var())

    close = np.linalg.solve(x[0].T @ x[0] + 0.3 * np.eye(150), x[0].T @ ratings[0])
    assert error(close) > 1.8
    folds = np.arange(300) % stage.START_FOLDS
    assert error(stage._ridge(x[0], ratings[0], folds)) < 1.4
    few = np.where(np.arange(300) < MIN_RATINGS - 1, ratings[0], np.nan)
    assert np.abs(stage._ridge(x[0], few, folds)).max() < 0.2
    assert not stage._ridge(x[0], np.full(300, np.nan), folds).any()
