"""The cost model: its FLOPs are those that torch counts, its bytes those that a store takes; the dry run needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Gemma2Config, LlamaConfig, Qwen3Config

from armorm import Recipe
from armorm.errors import BackboneError, RecipeError
from armorm.training.cost import (
    DEVICES,
    KNOWN_SHAPES,
    TRAINING_PASSES,
    Hardware,
    Shape,
    Stage,
    Workload,
    fine_tuning,
    fleets,
    stage_1_memory,
    stages,
)
from armorm.training.dry_run import dry_run
from armorm.training.schema import FinetuneSection, GatingSection
from tests.helpers.commands import run

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160, "vocab_size": 100}  # fmt: skip


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SMALL), Qwen3Config(**SMALL, head_dim=32), Gemma2Config(**SMALL, head_dim=32)]
)
def test_forward_flops_are_those_that_torch_counts(config):
    config._attn_implementation = "eager"
    model, shape, length = AutoModel.from_config(config), Shape.of_config(config), 40
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.zeros((2, length), dtype=torch.long))
    # Eager attention computes the whole square, of which the half above the diagonal is not needed.
    square = 2 * shape.layers * shape.heads * shape.head_size * 2 * length**2
    rotary = counter.get_total_flops() - shape.forward_flops(2 * length, 2 * length**2) - square
    assert 0 <= rotary < 0.002 * counter.get_total_flops()
    assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.01)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layer", [1, 2])
def test_extraction_flops_are_those_that_torch_counts_at_every_layer(layer, pooling):
    from armorm.backbone.decoder import Backbone
    from armorm.backbone.prefix_forward import SharedForward
    from armorm.backbone.prefix_tree import build_tree

    backbone = Backbone.load("armorm-tiny", dtype="float32", device="cpu", layer=layer, pooling=pooling)
    ids, gate = np.arange(64) + 5, 20
    tree = build_tree([ids, ids + 1], [gate, gate], [0, 0], backbone.header)
    with FlopCounterMode(display=False) as counter:
        SharedForward(backbone).features(tree)
    counted = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in counted.items() if "attention" not in str(name))
    read = 4 if pooling == "last" else 2 * (1 + 64 - gate - backbone.header_tokens)
    expected = Shape.of_config(backbone.model.config).extraction_flops(128, 0, read)
    assert products == pytest.approx(expected, rel=0.002)


def test_known_shapes_have_the_sizes_in_their_names():
    sizes = {
        "LLaMA3-RM": 7.5,
        "Llama3-8B": 7.5,
        "3.1-8B": 7.5,
        "Qwen3-8B": 7.6,
        "Qwen3-4B": 4.0,
        "0.6B": 0.6,
        "9b": 9.2,
        "7B": 7.1,
    }
    for name, shape in KNOWN_SHAPES.items():
        expected = next(size for part, size in sizes.items() if part in name)
        assert shape.parameters / 1e9 == pytest.approx(expected, rel=0.02), name


def test_costs_scale_as_they_must():
    shape, work = KNOWN_SHAPES["Qwen/Qwen3-8B"], Workload(1000, 500, 1e6, 1e9, 900, 2, 7, 100)
    one, eight, cluster = (stages(shape, work, fleet) for _, fleet in fleets(Hardware("x", 1e15, 80e9, price=2.0)))
    assert one[0].hours == pytest.approx(8 * eight[0].hours) == pytest.approx(32 * cluster[0].hours)
    assert one[0].money == pytest.approx(eight[0].money) == pytest.approx(2.0 * one[0].hours)
    assert one[0].hours == pytest.approx(one[0].flops / 4e14 / 3600)
    assert one[0].disk == 1500 * 4096 * 4
    assert one[0].fits
    assert not stages(shape, work, Hardware("y", 1e15, 8e9))[0].fits
    big = Workload(1e9, 1e9, 1e12, 1e15, 1e9, 2, 7, 1e6)
    assert stages(shape, big, DEVICES["h100"])[1].memory == stage_1_memory(shape, big) < 3e9  # however many rows
    assert stages(shape, work, DEVICES["h100"], gate=GatingSection(steps=10))[2].flops < one[2].flops


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    assert Recipe.from_yaml(path).name == path.stem


def test_the_published_run_has_its_nineteen_objectives_in_order_with_the_released_maps():
    from armorm.data.presets import rating_preset
    from armorm.objectives import RELEASED_OBJECTIVES

    recipe = Recipe.from_yaml(Path(__file__).parents[2] / "recipes" / "armorm-llama3-8b.yaml")
    (rated,) = recipe.ratings
    made = list(rating_preset(rated.preset).objectives("armorm", rated.map).values())
    assert [o.name for o in made] == RELEASED_OBJECTIVES.names
    assert [(o.scale, o.offset) for o in made] == [(o.scale, o.offset) for o in RELEASED_OBJECTIVES]
    gating = recipe.gating
    assert (gating.hidden_size, gating.hidden_layers, gating.temperature, gating.dropout) == (1024, 3, 10, 0.2)
    assert (gating.learning_rate, gating.weight_decay, gating.steps, gating.batch_size) == (1e-3, 0, 2000, 1024)
    assert not recipe.regression.intercept
    assert [entry.benchmark for entry in recipe.evaluation] == ["rewardbench"]


def test_four_domains_hold_twenty_three_objectives_of_their_own():
    recipe = Recipe.from_yaml(Path(__file__).parents[2] / "recipes" / "four-domains.yaml")
    rated = [entry for entry in recipe.ratings if entry.data]
    assert [entry.data.split(".")[0] for entry in rated] == ["coherence", "commonsense", "empathy", "multicultural"]
    assert sum(len(entry.objectives) for entry in rated) == 23


def test_the_dry_run_of_the_published_run_asks_nothing_of_the_network(capsys, tmp_path, monkeypatch):
    import socket
    import urllib.request

    def refused(*_args, **_kwargs):
        raise AssertionError("the dry run asked the network")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(urllib.request, "urlopen", refused)
    recipe = Path(__file__).parents[2] / "recipes" / "armorm-llama3-8b.yaml"
    code, out, _ = run(capsys, "train", recipe, "--dry-run", "--json", "--set", f"data_root={tmp_path}", "--price", 2)
    assert code == 0
    shown = json.loads(out)
    assert shown["work"]["objectives"] == 19
    assert shown["work"]["conversations"] == 600_000 + 2 * 800_000 + 2 * 340_000
    here, *fleets = shown["costs"]
    assert here.startswith("this machine")
    assert fleets == ["1 x NVIDIA H100 SXM", "8 x NVIDIA H100 SXM", "Ray, 4 machines of 8"]
    one = shown["costs"]["1 x NVIDIA H100 SXM"]
    assert [stage["name"] for stage in one] == ["features", "stage 1", "stage 2"]
    assert one[0]["money"] == pytest.approx(2 * one[0]["hours"])
    assert any("RLHFlow/pair_data_v2_80K_wsafety" in name for name in shown["missing"])
    assert any("allenai/reward-bench" in name for name in shown["missing"])


def test_the_dry_run_counts_tokens_of_available_sets(small_recipe):
    from armorm.backbone.decoder import Backbone
    from armorm.training.dataset import read_training_data
    from armorm.training.dry_run import Lengths, workload_of

    found = dry_run(small_recipe, DEVICES["l4"])
    assert not found.missing
    assert found.tokens_from.endswith("without shared prompts; counted by the backbone's tokenizer")
    data = read_training_data(small_recipe)
    unique = data.conversations()
    encoded = Backbone.load("armorm-tiny", dtype="float32", device="cpu").template.encode(unique)
    lengths = {c.key: Lengths(len(row), row.gate_position + 1) for c, row in zip(unique, encoded, strict=True)}
    assert found.work == workload_of(data, lengths)
    prompts = {row.prompt_key: row.gate_position + 1 for row in encoded}
    responses = sum(len(row) - row.gate_position - 1 for row in encoded)
    assert found.work.tokens == pytest.approx(sum(prompts.values()) + responses)
    assert found.tokens_from.startswith(f"{sum(map(len, encoded)):,} ")


def test_unknown_hardware_is_refused_with_what_there_is(small_recipe, tmp_path):
    from armorm.training.dry_run import require_known_device

    with pytest.raises(RecipeError, match="unknown hardware 'h1000', expected one of h100, h200"):
        require_known_device("h1000", list(DEVICES))


def test_fine_tuning_costs_what_its_layers_and_passes_cost():
    shape, work = KNOWN_SHAPES["Qwen/Qwen3-8B"].read(18, "last"), Workload(1000, 500, 1e6, 1e9, 900, 2, 7, 100)
    assert (shape.layers, shape.all_layers) == (18, 36)
    device = Hardware("x", 1e15, 80e9, price=2.0)
    forward = shape.forward_flops(0.5 * work.tokens, 0.5 * work.squares)

    def cost(**settings: Any) -> Stage:
        return fine_tuning(shape, work, device, FinetuneSection(share=0.5, epochs=4, **settings))

    assert cost().flops == pytest.approx(4 * TRAINING_PASSES["full"] * forward)
    frozen = cost(frozen_layers=0.25, method="lora")
    assert frozen.flops == pytest.approx(forward / 2 * (1 + 4 * TRAINING_PASSES["lora"]))
    assert frozen.disk == pytest.approx(0.5 * work.tokens * shape.hidden * 2)
    again = cost(frozen_layers=0.25, method="lora", cache_states=False)
    assert again.flops == pytest.approx(forward / 2 * (4 + 4 * TRAINING_PASSES["lora"])) and again.disk == 0
    assert frozen.memory < cost(method="lora").memory < cost().memory
    assert frozen.money == pytest.approx(2.0 * frozen.hours)
    with pytest.raises(BackboneError, match=r"found 18, the backbone has 18 layers below"):
        cost(frozen_layers=0.5)


def test_a_dry_run_shows_the_fine_tuning(small_recipe):
    tuned = Recipe.from_text(small_recipe.to_yaml(), ["finetune={method: lora}"])
    found = dry_run(tuned, DEVICES["h100"])
    assert [stage.name for stage in found.fleets[0][1]] == ["features", "stage 1", "stage 2", "fine-tuning"]
    assert len({parts[-1].hours for _, parts in found.fleets[1:]}) == 1, "it runs on one device"
    assert found.fleets[0][1][-1].hours != found.fleets[1][1][-1].hours
