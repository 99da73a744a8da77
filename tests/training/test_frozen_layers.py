"""Fine-tuning of some layers: frozen ones computed once, any layer and pooling, ratings and pairs together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from armorm import ArmoRM, Recipe, train
from armorm.backbone.adapters import Adapters
from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.errors import BackboneError, FitError, RecipeError
from armorm.training.cost import resolve_frozen
from armorm.training.dataset import read_training_data
from armorm.training.finetune import run as stage
from armorm.training.finetune.collator import TokenIndex, grow_trees
from armorm.training.finetune.record import Finetuned
from armorm.training.finetune.state_cache import cached_states
from armorm.training.finetune.trainer import BatchLayout, Learner, TreeBatches, features_of
from armorm.training.finetune.validation import BestState, ValidationSets
from armorm.training.schema import FinetuneSection
from tests.helpers.backbones import config_of, save
from tests.training.test_recipe import MINIMAL

QUIET = Console(quiet=True)
TEXTS = ("Start with one ball.", "I do not know.", "Light is scattered, blue light most of all, by air.", "Cod")
PROMPTS = ("How do I juggle?", "Why is the sky blue on most days of the year, and red at dusk?", "Name a fish.")


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory) -> Path:
    """A random Llama of three layers."""
    from transformers import AutoModelForCausalLM

    config = config_of("llama")
    config.num_hidden_layers = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save(AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp("three"))


def loaded(folder: Path, **options) -> Backbone:
    return Backbone.load(folder, dtype="float32", device="cpu", **options)


@pytest.fixture(scope="module")
def encoded(three_layers) -> list[EncodedConversation]:
    template = loaded(three_layers).template
    return template.encode([Conversation.from_prompt(prompt, text) for prompt in PROMPTS for text in TEXTS])


def layout_of(backbone, encoded, folder, share, **options) -> BatchLayout:
    cache = cached_states(backbone, encoded, 1, folder, share=share, tree_tokens=200, batch_tokens=100, **options)
    return BatchLayout(1000, share, header=backbone.header_tokens, cache=cache)


def step(learner: Learner, batches: TreeBatches) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all batches."""
    total = 0.0
    for index in range(len(batches)):
        loss = learner(**batches[index])["loss"]
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("pooling", ["last", "last+mean"])
@pytest.mark.parametrize("share", [True, False])
def test_training_on_cached_states_has_the_loss_and_gradients_of_training_without(
    three_layers, encoded, tmp_path, method, pooling, share
):
    """To 1e-5 in float32, over ratings and pairs in the same batches."""
    rng = np.random.default_rng(0)
    ratings = rng.uniform(size=(len(encoded), 2)).astype(np.float32)
    ratings[::3, 1] = np.nan
    items = [*((row,) for row in range(len(encoded))), (0, 1), (5, 6)]
    weight = rng.normal(size=(2, 32 * (2 if pooling == "last+mean" else 1)))
    results = []
    for cached in (True, False):
        backbone = loaded(three_layers, layer=2, pooling=pooling)
        layout = BatchLayout(1000, share, header=backbone.header_tokens)
        if cached:
            layout = layout_of(backbone, encoded, tmp_path, share, dtype=torch.float32)
        torch.manual_seed(0)
        section = FinetuneSection(method=method, frozen_layers=1, lora_rank=4)
        learner = Learner(backbone, section, np.array([1.0, 2.0]), 1, states_given=cached)
        learner.start_from(weight, weight[0], 1.0)
        trees = grow_trees(encoded, items, 500, share=share)
        results.append(step(learner, TreeBatches(encoded, trees, layout, 0, ratings, 0.5)))
    (loss, gradients), (plain_loss, plain) = results
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert gradients.keys() == plain.keys()
    assert {name.split(".")[2] for name in gradients if name.startswith("decoder.layers")} == {"1"}
    for name, gradient in gradients.items():
        far = float((gradient - plain[name]).norm() / plain[name].norm().clamp(min=1e-9))
        assert far < 1e-5, name


@pytest.mark.parametrize(("layer", "pooling"), [(2, "last"), (2, "mean"), (None, "last+mean"), (1, "last+mean")])
def test_heads_in_training_read_what_extraction_reads(three_layers, encoded, layer, pooling):
    backbone = loaded(three_layers, layer=layer, pooling=pooling)
    expected = backbone.features(encoded)[1]
    rows = np.arange(len(encoded))
    trees = grow_trees(encoded, [(row,) for row in rows], 500)
    layout = BatchLayout(1000, True, header=backbone.header_tokens)
    learner = Learner(backbone, FinetuneSection(), np.ones(1))
    found, rate = features_of(learner, TreeBatches(encoded, trees, layout), rows, autocast=False)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert rate > 0


def test_cached_states_are_resumed_and_belong_to_one_key(three_layers, encoded, tmp_path, monkeypatch):
    backbone = loaded(three_layers)
    index = TokenIndex.of(encoded)
    assert index.size == sum(len(row) - row.gate_position - 1 for row in encoded) + sum(
        encoded[i].gate_position + 1 for i in (0, 4, 8)
    )
    first = layout_of(backbone, encoded, tmp_path, True).cache
    assert first is not None and first.states.dtype == torch.bfloat16
    whole = first.states.clone()
    (folder,) = tmp_path.iterdir()
    progress = folder / "progress.json"
    batches = json.loads(progress.read_text())["batches"]
    assert batches > 1
    first.states[:] = 0
    progress.write_text('{"batches": 1}')
    again = layout_of(backbone, encoded, tmp_path, True).cache
    assert again is not None
    lost = (again.states == 0).all(1)
    assert 0 < int(lost.sum()) < len(lost), "the first batch was kept, the others computed"
    assert torch.equal(again.states[~lost], whole[~lost])
    layout_of(loaded(three_layers, layer=2), encoded, tmp_path, True)
    assert folder not in list(tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(FitError, match=r"states of .* tokens after layer 1 need .* found 10 B free"):
        layout_of(backbone, encoded, tmp_path, False)


def test_states_of_padding_are_zero_and_others_those_of_the_model(three_layers, encoded, tmp_path):
    backbone = loaded(three_layers)
    cache = layout_of(backbone, encoded, tmp_path, True, dtype=torch.float32).cache
    assert cache is not None
    row = encoded[6]
    prompt = row.gate_position + 1
    tokens = np.full((1, len(row) + 3), -1)
    tokens[0, :prompt] = cache.index.prompts[6] + np.arange(prompt)
    tokens[0, prompt : len(row)] = cache.index.responses[6] + np.arange(len(row) - prompt)
    found = cache.take(torch.from_numpy(tokens))
    with torch.no_grad():
        ids = torch.from_numpy(row.ids[None].astype(np.int64))
        expected = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found[:, : len(row)], expected, atol=1e-5, rtol=1e-5)
    assert not found[:, len(row) :].any()


def test_frozen_layers_are_a_number_or_a_fraction_of_all_layers():
    assert [resolve_frozen(frozen, 3, 3) for frozen in (0, 2, 0.34, 0.67)] == [0, 2, 1, 2]
    assert resolve_frozen(0.34, 2, 3) == 1
    with pytest.raises(
        BackboneError, match=r"found 2, the backbone has 2 layers below the one that is read \(3 in all\)"
    ):
        resolve_frozen(0.67, 2, 3)
    with pytest.raises(RecipeError, match=r"expected backbone\.layer above 0"):
        Recipe.from_text(MINIMAL, ["finetune={}", "backbone.layer=0"])


def test_validation_is_a_mean_over_sets_of_rank_correlation_and_pair_accuracy():
    rng = np.random.default_rng(0)
    ratings = rng.uniform(size=(40, 2))
    ratings[:20, 1] = ratings[20:, 0] = np.nan
    ratings[38:] = np.nan
    sources = ["a"] * 20 + ["b"] * 18 + ["few"] * 2
    rated = np.arange(100, 140)
    pairs = {"c": [(100 + i, 101 + i) for i in range(12)], "none": [(100, 101)]}
    sets = ValidationSets.select(rated, ratings, sources, pairs)
    assert list(sets.ratings) == ["a", "b"] and list(sets.pairs) == ["c"] and len(sets) == 3
    rewards = np.where(np.isnan(ratings), 0.0, ratings)[sets.rows - 100]
    rewards[:, 1] *= -1
    scores = -sets.rows.astype(float)
    metrics = sets.measure(rewards, scores)
    assert metrics == pytest.approx({"a": 1.0, "b": -1.0, "c (pairs)": 1.0, "mean": 1 / 3})


def test_the_best_state_survives_and_a_resumed_run_forgets_later_validations(tmp_path):
    best = BestState(tmp_path, patience=2)
    for number, mean in enumerate([0.1, 0.5, 0.4, 0.3]):
        assert not best.is_over
        best.add(number * 10, {"mean": mean}, {"w": torch.tensor([float(number)])})
    assert best.is_over and best.best_step == 10
    assert best.state()["w"].tolist() == [1.0]
    resumed = BestState(tmp_path, patience=2)
    resumed.resume(20)
    assert [entry["step"] for entry in resumed.history] == [0, 10, 20] and not resumed.is_over
    assert resumed.has(20) and not resumed.has(30)


@pytest.fixture(scope="module")
def recipe(small_recipe, three_layers) -> Recipe:
    settings = [
        f"backbone.model={three_layers}", "limit=90", "backbone.layer=2", "backbone.pooling=last+mean", "finetune.method=lora",
        "finetune.share=0.6", "finetune.epochs=0.7", "finetune.learning_rate=0.003", "finetune.lora_rank=4",
        "finetune.batch_tokens=1024", "finetune.save_steps=6", "finetune.frozen_layers=1", "finetune.dropout=0.1",
        "finetune.preference_weight=0.5",
    ]  # fmt: skip
    return Recipe.from_text(small_recipe.to_yaml(), settings)


def tuned(recipe: Recipe, work: Path) -> Path:
    return stage.finetune(recipe, read_training_data(recipe), work, QUIET)


def test_a_tuned_backbone_is_whole_and_equals_the_original_with_its_adapters(recipe, three_layers, tmp_path, capsys):
    folder = tuned(recipe, tmp_path)
    before = {name.removeprefix("model."): t for name, t in load_file(three_layers / "model.safetensors").items()}
    after = load_file(folder / "model.safetensors")
    changed = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert changed and all(name.startswith("layers.1.") and "proj" in name for name in changed)
    assert {name for name in after if name.startswith("layers.2.")}, "layers above the one that is read are kept"
    adapters = Adapters.read(folder)
    assert adapters.backbone == Backbone.load(three_layers, dtype="weights", device="cpu").fingerprint_parts["weights"]
    readout = {"layer": 2, "pooling": "last+mean"}
    template = loaded(three_layers).template
    rows = template.encode([Conversation.from_prompt(PROMPTS[0], text) for text in TEXTS])
    merged = loaded(three_layers, adapters=folder, **readout).features(rows)[1]
    np.testing.assert_array_equal(merged, loaded(folder, **readout).features(rows)[1])
    original = loaded(three_layers, **readout).features(rows)[1]
    assert np.linalg.norm(merged - original) > 1e-3 * np.linalg.norm(original)
    curves = json.loads((folder / "training_curve.json").read_text())
    assert curves["cached_states"] is True and curves["frozen_layers"] == 1
    assert "validation" not in curves
    assert (tmp_path / "states").is_dir()
    record = Finetuned.read(folder)
    assert record is not None and record.facts["pairs"] > 0 and record.weight.shape[1] == 64
    assert record.facts["readout"]["layer"] == 2
    data = read_training_data(recipe)
    assert record.start(data.table.objectives, loaded(folder, layer=1, pooling="last+mean").readout) is None
    assert record.start(data.table.objectives, loaded(folder, **readout).readout) is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_on_another_layer_keeps_its_meaning(recipe, method, tmp_path):
    changed = Recipe.from_text(
        recipe.to_yaml(), [f"finetune.method={method}", "limit=400", "backbone.prompt_pooling=mean"]
    )
    rm = train(changed, tmp_path, quiet=True)
    read = ArmoRM.from_pretrained(tmp_path, dtype="float32")
    assert read.backbone.readout.settings() == {
        "pooling": "last+mean", "prompt": "mean", "layer": 2, "layers": 3, "normed": False,
    }  # fmt: skip
    folder = tmp_path / "work" / "backbone"
    cut = loaded(folder, layer=2, pooling="last+mean")
    rows = cut.template.encode([Conversation.from_prompt(PROMPTS[0], text) for text in TEXTS])
    np.testing.assert_allclose(read.backbone.features(rows)[1], cut.features(rows)[1], atol=1e-5)
    conversations = [
        [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": text}] for text in TEXTS
    ]
    np.testing.assert_allclose(read.score(conversations).scores, rm.score(conversations).scores, atol=1e-5)
    assert (folder / "adapters.safetensors").exists() == (method == "lora")


@pytest.mark.slow
def test_frozen_layers_computed_in_every_step_end_with_nearly_the_same_weights(recipe, tmp_path):
    """Up to the rounding of cached states to bfloat16."""
    short = Recipe.from_text(recipe.to_yaml(), ["finetune.epochs=1", "finetune.dropout=0"])
    cached = load_file(tuned(short, tmp_path / "a") / "adapters.safetensors")
    plain_recipe = Recipe.from_text(short.to_yaml(), ["finetune.cache_states=false"])
    plain = load_file(tuned(plain_recipe, tmp_path / "b") / "adapters.safetensors")
    for name, tensor in plain.items():
        assert float((cached[name] - tensor).norm() / tensor.norm()) < 0.2, name


VALIDATED = ["limit=300", "finetune.epochs=4", "finetune.validation_share=0.25", "finetune.eval_steps=4", "finetune.patience=50"]  # fmt: skip
_SCRIPT = """
import sys; from pathlib import Path; from rich.console import Console; from armorm import Recipe
from armorm.training.cost import resolve_frozen
from armorm.training.dataset import read_training_data; from armorm.training.finetune.run import finetune
recipe = Recipe.from_yaml(sys.argv[1])
finetune(recipe, read_training_data(recipe), Path(sys.argv[2]), Console(quiet=True))
"""


@pytest.mark.slow
def test_killed_training_on_cached_states_ends_with_the_same_adapters(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_text(recipe.to_yaml(), VALIDATED).to_yaml())

    def start(folder: Path) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(path), str(folder)], env=environment)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait(timeout=600) == 0
    process = start(broken)
    deadline = time.monotonic() + 120
    while not list(broken.glob("finetune/*/ratings/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "backbone").exists()
    assert start(broken).wait(timeout=600) == 0
    for name in ("adapters.safetensors", "finetuned.safetensors"):
        first, second = (load_file(folder / "backbone" / name) for folder in (whole, broken))
        assert all(second[key].equal(tensor) for key, tensor in first.items())
    curves = [json.loads((folder / "backbone" / "training_curve.json").read_text()) for folder in (whole, broken)]
    assert curves[0]["validation"] == curves[1]["validation"]
    history = curves[0]["validation"]
    assert [entry["step"] for entry in history][:3] == [0, 4, 8]
    pairs = {name for name in history[0] if name.endswith("(pairs)")}
    assert pairs and all(history[0][name] for name in pairs)  # the score is fitted before training
    assert curves[0]["best"]["mean"] == max(entry["mean"] for entry in history)


def test_a_validation_share_without_enough_rows_is_named(recipe, tmp_path):
    tiny = Recipe.from_text(recipe.to_yaml(), ["finetune.validation_share=0.001"])
    data = read_training_data(tiny)
    with pytest.raises(FitError, match=r"validation_share 0\.001: no set has 10"):
        stage.finetune(tiny, data, tmp_path, QUIET)
