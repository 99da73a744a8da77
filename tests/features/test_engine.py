"""The engine: the way is chosen by test, the budget halves for want of memory, the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from armorm.backbone.decoder import Backbone
from armorm.backbone.prefix_tree import lexicographic_order, shared_with_previous
from armorm.conversation import Conversation
from armorm.embedded import EMBEDDED_BACKBONE, embedded_path
from armorm.errors import BackboneError
from armorm.features import engine as engines
from armorm.features.engine import Engine, choose_engine, resumed_engine
from armorm.features.extract import extract
from armorm.features.store import FeatureStore
from armorm.progress import ignore
from tests.conftest import chat
from tests.helpers.backbones import backbone_of

DIALOGUES = [
    chat(f"Tell me about number {prompt}.", f"It is {reply}. " * (1 + 3 * reply))
    for prompt in range(4)
    for reply in range(6)
]


def wrapped(family: str = "llama") -> Backbone:
    return Backbone(family, backbone_of(family), AutoTokenizer.from_pretrained(embedded_path(EMBEDDED_BACKBONE)))


def in_order(backbone: Backbone):
    encoded = backbone.template.encode([Conversation.from_messages(messages) for messages in DIALOGUES])
    return [encoded[i] for i in lexicographic_order([e.ids for e in encoded])]


def shared_by(encoded) -> np.ndarray:
    return shared_with_previous([e.ids for e in encoded])


def alone(backbone: Backbone, encoded) -> np.ndarray:
    return np.concatenate([backbone.features([one])[1] for one in encoded])


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool((np.linalg.norm(found - expected, axis=1) <= 1e-5 * np.linalg.norm(expected, axis=1)).all())


def test_large_work_is_shared_and_small_work_is_not_until_the_model_is_known(monkeypatch):
    backbone = wrapped()
    encoded = in_order(backbone)
    shared = shared_by(encoded)
    assert choose_engine(backbone, encoded, shared, 512).mechanism == "plain"
    assert backbone.sharing_fault is None
    monkeypatch.setattr(engines, "TESTED_TOKENS", 100)
    assert choose_engine(backbone, encoded, shared, 512).mechanism == "tree"
    assert backbone.sharing_fault == ""
    monkeypatch.undo()
    assert choose_engine(backbone, encoded, shared, 512).mechanism == "tree"  # known by now
    assert choose_engine(backbone, encoded, shared, 512, sharing=False).mechanism == "plain"
    assert choose_engine(backbone, encoded[:1], shared[:1], 512).mechanism == "plain"


def test_a_model_that_cannot_share_runs_on_plain_batches_and_it_is_said(capsys):
    backbone = wrapped("bloom")
    encoded = in_order(backbone)
    engine = choose_engine(backbone, encoded, shared_by(encoded), 512, sharing=True)
    assert engine.mechanism == "plain"
    assert "bloom: beginnings are not shared:" in capsys.readouterr().err
    assert close(engine.features(encoded, ignore)[1], alone(backbone, encoded))
    # A plan that was begun with sharing is not trusted either.
    settings = {"mechanism": "tree", "compiled": False, "budget": 512}
    assert resumed_engine(wrapped("bloom"), settings, encoded).mechanism == "plain"


@pytest.mark.parametrize("mechanism", ["tree", "plain"])
def test_out_of_memory_halves_the_budget_and_the_run_goes_on(mechanism, monkeypatch, capsys):
    backbone = wrapped()
    encoded = in_order(backbone)
    expected = alone(backbone, encoded)
    engine = Engine(backbone, 512, mechanism)
    forward = Engine._forward

    def small_memory(self, work):
        size = len(work) if mechanism == "tree" else len(work) * max(map(len, work))
        if size > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(self, work)

    monkeypatch.setattr(Engine, "_forward", small_memory)
    done: list[int] = []
    _, response = engine.features(encoded, done.append)
    assert (engine.budget, engine.halvings) == (128, 2)
    assert capsys.readouterr().err.count("the budget is halved to") == 2
    assert close(response, expected)
    if mechanism == "plain":
        assert sum(done) == sum(map(len, encoded))


def test_a_halved_budget_is_kept_with_the_shard(monkeypatch, tmp_path):
    backbone = wrapped()
    encoded = in_order(backbone)
    forward = Engine._forward

    def small_memory(self, work):
        if self.budget > 256:
            raise MemoryError
        return forward(self, work)

    monkeypatch.setattr(Engine, "_forward", small_memory)
    store = FeatureStore.of(tmp_path, backbone)
    extract(backbone, encoded, store, batch_tokens=512)
    assert [shard.metadata for shard in store.shards] == [{"budget": "256", "halvings": "1"}]


def test_a_conversation_that_does_not_fit_alone_is_an_error_that_names_its_length(monkeypatch):
    backbone = wrapped()
    encoded = in_order(backbone)
    longest = max(map(len, encoded))

    def no_memory(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Engine, "_forward", no_memory)
    with pytest.raises(BackboneError, match=f"out of memory on 1 conversation of {longest} tokens"):
        Engine(backbone, 64).features(encoded, ignore)


def test_other_errors_are_not_taken_for_want_of_memory(monkeypatch):
    backbone = wrapped()

    def broken(self, work):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Engine, "_forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        Engine(backbone, 512).features(in_order(backbone), ignore)


@pytest.mark.parametrize("stored", [False, True])
def test_extraction_by_trees_gives_the_features_of_each_conversation_alone(stored, tmp_path):
    backbone = wrapped()
    encoded = in_order(backbone)
    order = np.random.default_rng(0).permutation(len(encoded))
    given = [encoded[i] for i in order] * 2
    store = FeatureStore.of(tmp_path, backbone) if stored else None
    features = extract(backbone, given, store, batch_tokens=256, sharing=True)
    assert backbone.sharing_fault == ""
    assert close(features.response, alone(backbone, given))
    prompts = np.concatenate([backbone.features([one])[0] for one in given])
    assert close(features.prompt[features.prompt_index], prompts)
    assert len(features.prompt) == 4
