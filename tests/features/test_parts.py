"""A shard that is being computed is saved as it goes, and is finished to the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.conversation import Conversation
from armorm.errors import OutputError
from armorm.features import engine as engines
from armorm.features.engine import Engine
from armorm.features.extract import fill_store
from armorm.features.store import FeatureStore
from armorm.features.workers import ExtractionSettings
from tests.helpers.conversations import chat


class Stopped(BaseException):
    """Stands for a kill."""


@pytest.fixture
def encoded(tiny_backbone):
    dialogues = [chat(f"Question {row % 6}?", f"{row} " + "word " * (9 + row % 11)) for row in range(24)]
    rows = tiny_backbone.template.encode([Conversation.from_messages(dialogue) for dialogue in dialogues])
    return sorted(rows, key=lambda row: row.ids.tolist())


@pytest.mark.parametrize("mechanism", ["plain", "tree"])
def test_a_shard_that_was_stopped_is_finished_with_the_same_features(
    tiny_backbone, encoded, tmp_path, monkeypatch, mechanism
):
    whole: list[int] = []
    expected = Engine(tiny_backbone, 64, mechanism).features(encoded, whole.append)
    assert len(whole) > 3
    monkeypatch.setattr(engines, "PART_SECONDS", 0.0)
    part, passes = tmp_path / "part.safetensors", []

    def stop_in_the_third(tokens: int) -> None:
        passes.append(tokens)
        if len(passes) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        Engine(tiny_backbone, 64, mechanism).features(encoded, stop_in_the_third, part)
    again: list[int] = []
    found = Engine(tiny_backbone, 64, mechanism).features(encoded, again.append, part)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)
    assert len(again) == 1 + len(whole) - 2  # the finished rows at once, then every other pass


def test_a_part_of_another_engine_or_a_damaged_one_is_not_used(tiny_backbone, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "PART_SECONDS", 0.0)
    part = tmp_path / "part.safetensors"
    whole: list[int] = []
    expected = Engine(tiny_backbone, 96).features(encoded, whole.append, part)

    def passes(budget: int, rows: list) -> int:
        counted: list[int] = []
        Engine(tiny_backbone, budget).features(rows, counted.append, part)
        return len(counted)

    content = part.read_bytes()
    assert passes(96, encoded) == 1
    assert passes(96, encoded[1:]) > 1
    part.write_bytes(content)
    assert passes(64, encoded) > 1
    damaged = bytearray(content)
    damaged[-5] ^= 1
    part.write_bytes(damaged)
    found = Engine(tiny_backbone, 96).features(encoded, lambda tokens: None, part)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_no_part_is_left_in_a_complete_store(tiny_backbone, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "PART_SECONDS", 0.0)
    store = FeatureStore.of(tmp_path, tiny_backbone)
    fill_store(tiny_backbone, encoded, store, ExtractionSettings(batch_tokens=96))
    assert not list(tmp_path.glob("part-*")) and list(tmp_path.glob("shard-*"))


def test_features_for_which_there_is_no_space_are_not_computed(tiny_backbone, encoded, tmp_path, monkeypatch):
    store = FeatureStore.of(tmp_path, tiny_backbone)
    monkeypatch.setattr(FeatureStore, "bytes_of", lambda *counts: 10**19)
    with pytest.raises(OutputError, match="the features to compute need"):
        fill_store(tiny_backbone, encoded, store)
    assert not list(tmp_path.glob("shard-*"))
