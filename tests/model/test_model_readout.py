"""Reward models that read a lower layer and means over tokens: scores, files, remote code, what the released layout says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from armorm import ArmoRM
from armorm.backbone import readout as backbone_readout
from armorm.backbone.readout import Readout, cut_layers
from armorm.conversation import Conversation
from armorm.errors import CheckpointError
from armorm.model import remote_code
from tests.helpers.conversations import chat
from tests.helpers.small_models import llama, reward_model

CONVERSATIONS = [
    chat("Hi", "Hello there."),
    chat("Why is the sky blue?", "Because of scattering, which is stronger for short waves."),
    chat("Hi", "Hello."),
    chat("And you?", "I am well, thank you.", "Good.", "Yes."),
]
READOUTS = [Readout("last+mean", "mean", 1, 2), Readout("mean"), Readout(layer=1, layers=2)]


def model(readout: Readout) -> ArmoRM:
    backbone = llama()
    if readout.layer is not None:
        cut_layers(backbone, readout.layer)
    return reward_model(backbone=backbone, readout=readout)


@pytest.mark.parametrize("readout", READOUTS, ids=str)
def test_scores_are_the_same_from_ids_from_files_and_from_remote_code(readout, tmp_path):
    rm = model(readout)
    assert rm.model.regression_layer.in_features == rm.backbone.response_size == 32 * readout.parts
    batch = rm.score(CONVERSATIONS)
    np.testing.assert_allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)
    encoded = rm.backbone.template.encode([Conversation.from_messages(messages) for messages in CONVERSATIONS])
    rm.save_pretrained(tmp_path, self_contained=True)
    remote = remote_code.ArmoRMForSequenceClassification.from_pretrained(tmp_path)
    for row, score in zip(encoded, batch.scores, strict=True):
        ids = torch.from_numpy(row.ids.astype(np.int64))[None]
        padded = torch.cat([ids.new_zeros(1, 3), ids], 1)
        mask = torch.cat([ids.new_zeros(1, 3), torch.ones_like(ids)], 1)
        for one in (rm.model, remote):
            with torch.no_grad():
                assert float(one(ids).score) == pytest.approx(float(score), abs=1e-5)
                assert float(one(padded, attention_mask=mask).score) == pytest.approx(float(score), abs=1e-5)
    read = ArmoRM.from_pretrained(tmp_path, dtype="float32")
    assert read.backbone.readout == readout
    np.testing.assert_allclose(read.score(CONVERSATIONS).scores, batch.scores, atol=1e-6)
    names = [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("model.layers.")]
    layers = {name.split(".")[2] for name in names}
    assert len(layers) == (readout.layer or 2)


@pytest.mark.parametrize("readout", READOUTS, ids=str)
def test_the_released_layout_says_that_it_has_no_other_readout(readout, tmp_path):
    with pytest.raises(CheckpointError, match="reads another layer, or means over tokens"):
        model(readout).save_pretrained(tmp_path, layout="released")


def test_the_remote_code_drops_the_same_norms():
    assert remote_code.FINAL_NORMS == backbone_readout.FINAL_NORMS
