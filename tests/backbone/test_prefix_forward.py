"""Sharing: features from a tree are those of each conversation alone, or the model is found out and left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from armorm.backbone import prefix_forward as sharing
from armorm.backbone import tree_blocks
from armorm.backbone.decoder import Backbone
from armorm.backbone.prefix_forward import SharedForward, flops_per_token, sample, why_not_shared
from armorm.backbone.prefix_tree import build_tree, lexicographic_order, shared_with_previous
from armorm.backbone.tree_attention import TreeAttention
from armorm.conversation import Conversation
from armorm.files import EMBEDDED_BACKBONE, embedded_path
from tests.helpers.backbones import FAMILIES, MULTIMODAL, STATEFUL, WINDOWED, backbone_of, config_of, families
from tests.helpers.conversations import chat

SHARED = (*FAMILIES, *MULTIMODAL, "gpt2")
WORDS = ["sun", "rain", "wind", "snow", "fog", "hail", "frost", "heat"]
# Prompts that begin alike, replies that begin alike, some of them beyond a window of 16, and one of 150 tokens.
DIALOGUES = [
    chat(
        f"Tell me about the {WORDS[prompt]}, please.", f"The {WORDS[prompt]} is " + f"{WORDS[reply]} " * (1 + 5 * reply)
    )
    for prompt in range(3)
    for reply in range(4)
] + [chat("Tell me about the sun, please.", "It shines. " * 60)]


def wrapped(family: str, **changes) -> Backbone:
    config = config_of(family)
    for name, value in changes.items():
        setattr(config, name, value)
    return Backbone(
        family, backbone_of(family, config=config), AutoTokenizer.from_pretrained(embedded_path(EMBEDDED_BACKBONE))
    )


def in_order(backbone: Backbone):
    encoded = backbone.template.encode([Conversation.from_messages(messages) for messages in DIALOGUES])
    return [encoded[i] for i in lexicographic_order([e.ids for e in encoded])]


def tree_of(encoded):
    ids = [e.ids for e in encoded]
    return build_tree(ids, [e.gate_position for e in encoded], shared_with_previous(ids).tolist())


def alone(backbone: Backbone, encoded):
    pairs = [backbone.features([one]) for one in encoded]
    return np.concatenate([p for p, _ in pairs]), np.concatenate([r for _, r in pairs])


def distance(found, expected) -> float:
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize("family", families(*SHARED))
def test_features_from_a_tree_are_those_of_each_conversation_alone(family):
    backbone = wrapped(family)
    encoded = in_order(backbone)
    tree = tree_of(encoded)
    assert len(tree) < 0.7 * sum(map(len, encoded))
    if family in WINDOWED:
        assert max(map(len, encoded)) > 3 * 16
    for found, expected in zip(SharedForward(backbone).features(tree), alone(backbone, encoded), strict=True):
        assert distance(found, expected) < 1e-5
    assert why_not_shared(backbone, encoded) == ""


@pytest.mark.parametrize("size", tree_blocks.BLOCK_SIZES)
def test_every_size_of_block_gives_the_same(monkeypatch, size):
    monkeypatch.setattr(tree_blocks, "BLOCK_SIZES", (size,))
    for family in ("gemma2", "qwen3"):
        backbone = wrapped(family)
        encoded = in_order(backbone)
        for found, expected in zip(
            SharedForward(backbone).features(tree_of(encoded)), alone(backbone, encoded), strict=True
        ):
            assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("asked", [None, 40])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_is_what_the_tree_says_for_long_runs_and_short_ones(asked, kv_heads):
    rng = np.random.default_rng(0)
    stem = rng.integers(0, 9, 300)
    # Nothing before a run, little before it, more than half of it, and replies too short for a square.
    texts = [np.concatenate([stem[:c], rng.integers(9, 99, n)]) for c, n in ((0, 200), (20, 150), (20, 90), (280, 100))]
    texts += [np.concatenate([stem, [100 + n] * (3 + 9 * n)]) for n in range(6)]
    texts = [texts[i] for i in lexicographic_order(texts)]
    tree = build_tree(texts, [0] * len(texts), shared_with_previous(texts).tolist())
    tree = tree.padded(-(-len(tree) // 128) * 128)
    attention = TreeAttention(tree)
    squares = attention.plan.squares()[0]
    assert {square.before for square in squares} >= {0, 20} and len(squares) < len(texts)
    t = len(tree)
    query, key, value = (torch.from_numpy(rng.normal(size=(1, h, t, 8)).astype(np.float32)) for h in (4, kv_heads, kv_heads))  # fmt: skip
    rows = np.arange(t)
    if asked:
        rows = np.sort(rng.choice(t, asked, replace=False))
        attention.only = rows
    found = attention.attend(query, key, value, 0.3, None, None)[0]
    place = np.arange(t)
    visible = torch.from_numpy((place[None, :] <= place[:, None]) & (place[:, None] < tree.ends[None, :]))
    wide, given = (part[0].double().repeat_interleave(4 // kv_heads, 0) for part in (key, value))
    scores = (query[0].double() @ wide.mT * 0.3).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ given).transpose(0, 1)
    np.testing.assert_allclose(found[rows], expected[rows], atol=1e-5)


@pytest.mark.parametrize("family", families(*STATEFUL, "bloom"))
def test_a_model_that_keeps_a_state_or_adds_positions_is_found_out(family):
    backbone = wrapped(family)
    assert why_not_shared(backbone, in_order(backbone))


def test_a_mask_that_leaks_is_found_out(monkeypatch):
    backbone = wrapped("llama")
    encoded = in_order(backbone)
    honest = sharing.build_tree

    def leaking(*arguments):
        tree = honest(*arguments)
        return type(tree)(tree.ids, tree.positions, np.full_like(tree.ends, len(tree)), tree.gates, tree.lasts)

    monkeypatch.setattr(sharing, "build_tree", leaking)
    assert "differ by" in why_not_shared(backbone, encoded)


def test_the_models_own_attention_is_back_after_a_pass():
    backbone = wrapped("llama")
    encoded = in_order(backbone)
    before = backbone.features(encoded[:3])
    layers = list(backbone.model.layers)
    SharedForward(backbone).features(tree_of(encoded))
    assert all(a is b for a, b in zip(layers, backbone.model.layers, strict=True))
    assert np.array_equal(backbone.features(encoded[:3])[1], before[1])


def test_blocks_of_the_gpu_mask_cover_exactly_what_is_visible():
    encoded = in_order(wrapped("llama")) * 1
    tree = tree_of(encoded).padded(512)
    mask = TreeAttention(tree).block_mask(None, torch.device("cpu"))
    size = 128
    visible = np.array([[p <= q < tree.ends[p] for p in range(512)] for q in range(512)])
    blocks = visible.reshape(4, size, 4, size).transpose(0, 2, 1, 3)
    dense = mask.to_dense()[0, 0].numpy().astype(bool)
    assert np.array_equal(dense, blocks.any((2, 3)))
    full = np.zeros((4, 4), bool)
    for row in range(4):
        full[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].numpy()] = True
    assert not (full & ~blocks.all((2, 3))).any()


@pytest.mark.parametrize("family", families("llama", "gemma2", "mistral"))
def test_flex_attention_under_that_mask_gives_the_same(monkeypatch, family):
    backbone = wrapped(family)
    encoded = in_order(backbone)
    monkeypatch.setattr(TreeAttention, "attend", TreeAttention._flex)
    found = SharedForward(backbone).features(tree_of(encoded))
    monkeypatch.undo()
    for features, expected in zip(found, alone(backbone, encoded), strict=True):
        assert distance(features, expected) < 1e-5


@pytest.mark.slow
def test_compiled_layers_give_the_same():
    if not sharing.can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    backbone = wrapped("llama")
    encoded = in_order(backbone)
    shared = SharedForward(backbone, compiled=True, length=500)
    assert shared.length == 512
    for found, expected in zip(shared.features(tree_of(encoded)), alone(backbone, encoded), strict=True):
        assert distance(found, expected) < 1e-5


def test_a_sample_holds_what_shares_most_and_something_beyond_the_window():
    encoded = in_order(wrapped("llama"))
    shared = shared_with_previous([e.ids for e in encoded])
    rows = sample(encoded, shared, window=100)
    assert rows == sorted(set(rows))
    assert int(shared.argmax()) in rows
    assert max(len(encoded[i]) for i in rows) > 100


def test_operations_are_two_for_each_weight_that_is_multiplied_with():
    model = backbone_of("llama")
    d, f, layers, kv = 32, 48, 2, 2 * 8
    assert flops_per_token(model) == 2 * layers * (2 * d * d + 2 * d * kv + 3 * d * f)
