"""Features of any layer and pooling: those of `output_hidden_states`, alone, in batches, in trees and behind a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from armorm.backbone.chat_template import ChatTemplate
from armorm.backbone.decoder import Backbone
from armorm.backbone.prefix_forward import SharedForward
from armorm.backbone.prefix_tree import build_tree, lexicographic_order, shared_with_previous
from armorm.backbone.readout import Readout, resolve_layer
from armorm.conversation import Conversation
from armorm.errors import BackboneError
from armorm.features.store import FeatureStore
from armorm.serving.prefix_cache import CachedForward
from tests.helpers.backbones import backbone_of, config_of, save
from tests.helpers.conversations import chat
from tests.helpers.tokenizers import STYLES

DIALOGUES = [
    chat(f"Tell me about the {thing}.", f"The {thing} is {words}")
    for thing in ("sun", "rain")
    for words in ("hot.", "hot and bright.", "hot and bright, and far away from here, they say.", "wet")
] + [chat("Tell me about the sun.", "The sun is hot.", "And the moon?", "The moon is cold and grey.")]
FAMILIES = ("llama", "qwen3", "gemma3_text", "gemma2", "gpt2", "gpt_neox", "olmo2")
CASES = [("llama", layer, pooling, "gate") for layer in (0, 1, 4) for pooling in ("last", "mean")] + [
    (family, layer, "last+mean", "mean") for family in FAMILIES for layer in (0, 3)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """By family: the folder of a random backbone of four layers."""
    root, saved = tmp_path_factory.mktemp("backbones"), {}

    def find(family: str):
        if family not in saved:
            config = config_of(family)
            config.update({"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
            if vars(config).get("layer_types"):
                config.layer_types = [("sliding_attention", "full_attention")[i % 2] for i in range(4)]
            saved[family] = save(backbone_of(family, config=config), root / family)
        return saved[family]

    return find


def in_order(backbone: Backbone):
    encoded = backbone.template.encode([Conversation.from_messages(messages) for messages in DIALOGUES])
    return [encoded[i] for i in lexicographic_order([e.ids for e in encoded])]


@torch.inference_mode()
def slow_features(whole: Backbone, layer, pooling, prompt, encoded):
    """One by one, with all layers, from `output_hidden_states`."""
    prompts, responses = [], []
    header = len(whole.template.gate_pattern())
    for row in encoded:
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        states = whole.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0].double().numpy()
        mean = states[row.gate_position + header :].mean(0)
        last = states[-1]
        responses.append({"last": last, "mean": mean, "last+mean": np.concatenate([last, mean])}[pooling])
        gate = row.gate_position
        prompts.append(states[gate] if prompt == "gate" else states[1 : gate + 1].mean(0))
    return np.array(prompts), np.array(responses)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32 and one.shape == other.shape
        assert (np.linalg.norm(one - other, axis=1) <= 1e-5 * np.linalg.norm(other, axis=1)).all()


@pytest.mark.parametrize(("family", "layer", "pooling", "prompt"), CASES)
def test_features_are_those_of_the_hidden_states(folder, family, layer, pooling, prompt):
    whole = Backbone.load(folder(family), dtype="float32", device="cpu")
    backbone = Backbone.load(
        folder(family), dtype="float32", device="cpu", layer=layer, pooling=pooling, prompt_pooling=prompt
    )
    encoded = in_order(backbone)
    expected = slow_features(whole, layer, pooling, prompt, encoded)
    close(backbone.features(encoded), expected)
    if layer == 0:
        return
    ids = [row.ids for row in encoded]
    tree = build_tree(ids, [row.gate_position for row in encoded], shared_with_previous(ids).tolist(), backbone.header)
    close(SharedForward(backbone).features(tree), expected)
    cache = CachedForward(backbone, 10**8)
    for _ in range(3):
        close(cache.features(encoded, 10_000), expected)
    assert cache.hits or family != "llama", "the prompts must have been behind the cache"


def test_the_forward_pass_stops_at_the_layer(folder):
    whole, half = (Backbone.load(folder("llama"), dtype="float32", device="cpu", layer=layer) for layer in (None, 0.5))
    assert half.readout == Readout(layer=2, layers=4)
    assert half.readout.settings()["normed"] is False and whole.readout.settings() == {}
    assert len(half.model.layers) == half.model.config.num_hidden_layers == 2
    one = sum(p.numel() for p in whole.model.layers[0].parameters())
    sizes = [sum(p.numel() for p in b.model.parameters()) for b in (whole, half)]
    assert sizes[0] - sizes[1] == 2 * one + whole.hidden_size  # and the final norm


def test_layers_are_counted_as_in_hidden_states():
    assert [resolve_layer(layer, 30) for layer in (None, 30, 1.0, 0, 18, 0.5, 0.6)] == [None, None, None, 0, 18, 15, 18]
    for layer in (31, -1, 1.5, -0.1):
        with pytest.raises(BackboneError, match=r"expected 0 to 30, or a fraction from 0\.0 to 1\.0"):
            resolve_layer(layer, 30)


def test_features_of_two_readouts_are_never_mixed(folder, tmp_path):
    load = lambda **options: Backbone.load(folder("llama"), dtype="float32", device="cpu", **options)  # noqa: E731
    backbones = [load(), load(layer=2), load(layer=3), load(pooling="mean"), load(prompt_pooling="mean")]
    assert len({backbone.fingerprint for backbone in backbones}) == len(backbones)
    assert load(layer=4).fingerprint == backbones[0].fingerprint
    store = FeatureStore.of(tmp_path, load(pooling="last+mean"))
    assert (store.hidden_size, store.response_size) == (32, 64)
    assert FeatureStore.existing(tmp_path).response_size == 64
    with pytest.raises(Exception, match="readout differ"):
        FeatureStore.of(tmp_path, backbones[0])


def test_a_model_whose_layers_cannot_be_cut_is_refused(folder):
    with pytest.raises(BackboneError, match="MambaModel: cut after layer 3 its states differ by"):
        Backbone.load(folder("mamba"), dtype="float32", device="cpu", layer=3)


@pytest.mark.parametrize("style", [style for style in STYLES if not style.forgeable], ids=repr)
def test_the_tokens_of_a_response_are_its_text_and_the_end_of_its_turn(style):
    tokenizer = style.build()
    template = ChatTemplate(tokenizer)
    pattern = template.gate_pattern()
    (row,) = template.encode([Conversation.from_messages(chat("Why is the sky blue?", "Sunlight is scattered."))])
    assert row.ids[row.gate_position :][: len(pattern)].tolist() == pattern
    tokens = row.ids[row.gate_position + len(pattern) :]
    before, reply, after = (
        part.replace(" ", "") for part in tokenizer.decode(tokens).partition("Sunlight is scattered.")
    )
    assert reply, "the whole reply is in it"
    assert before.strip() in ("", "</think>"), "the end of an empty block that the template opens"
    for marker in template.markers:
        after = after.replace(marker, "")
    assert not after.strip(), "nothing follows but tokens that end the turn and the text"
