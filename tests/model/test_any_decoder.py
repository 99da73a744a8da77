"""Any decoder carries a reward model: assembled, saved, loaded and scored, for each family; others are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from armorm import ArmoRM
from armorm.backbone.decoder import Backbone
from armorm.errors import BackboneError
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from tests.helpers.backbones import (
    FAMILIES,
    MULTIMODAL,
    OTHER_POSITIONS,
    STATEFUL,
    WINDOWED,
    backbone_of,
    config_of,
    families,
    save,
)
from tests.helpers.conversations import chat
from tests.helpers.small_models import OBJECTIVES, reward_model

EVERY_FAMILY = FAMILIES + STATEFUL + OTHER_POSITIONS + MULTIMODAL
CONVERSATIONS = [  # of 11 to 70 tokens: longer and shorter than a window of 16
    chat("Hi", "Hello."),
    chat("Why is the sky blue?", "Sunlight is scattered by the air; blue light more than red. " * 3),
    chat("One", "two", "three " * 12, "four"),
    chat("Name a river.", "The Seine."),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives the folder of a family's reward model, and the model that was saved there."""
    made: dict[str, tuple] = {}

    def folder(family: str):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            backbone = Backbone.load(save(backbone_of(family), path / "backbone"), dtype="float32", device="cpu")
            rm = reward_model(backbone=backbone.model)
            rm.save_pretrained(path / "rm")
            made[family] = path / "rm", rm
        return made[family]

    return folder


def loaded(folder) -> ArmoRM:
    return ArmoRM.from_pretrained(folder, dtype="float32", device="cpu")


@torch.no_grad()
def scored_as_text(rm: ArmoRM, conversations, side: str | None) -> torch.Tensor:
    """The habit of trainers: text, tokenizer, model; `side` of the padding, or None for one row at a time."""
    texts = rm.tokenizer.apply_chat_template(conversations, tokenize=False)
    if side is None:
        return torch.cat([scored_as_text(rm, [conversation], "right") for conversation in conversations])
    batch = rm.tokenizer(texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
    return rm.model(**batch).score


@torch.no_grad()
def rounding(rm: ArmoRM) -> float:
    """How far the last bit of every embedding moves a score: some families of random weights carry it far."""
    embeddings = rm.model.model.get_input_embeddings().weight
    before, scores, found = embeddings.clone(), rm.score(CONVERSATIONS).scores, 0.0
    for seed in range(5):
        signs = torch.rand(before.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        embeddings.copy_(before * (1 + signs * 2**-24))
        found = max(found, float(np.abs(rm.score(CONVERSATIONS).scores - scores).max()))
    embeddings.copy_(before)
    return found


@pytest.mark.parametrize("family", families(*EVERY_FAMILY))
def test_scores_depend_neither_on_company_nor_on_the_side_of_padding(folders, family):
    rm = folders(family)[1]
    scores = rm.score(CONVERSATIONS).scores
    assert scores.std() > 0.03, "scores should differ for the comparisons below to mean something"
    close = max(1e-5, 2 * rounding(rm))
    assert close < 2e-4
    np.testing.assert_allclose([rm.score([c]).scores[0] for c in CONVERSATIONS], scores, atol=close)
    np.testing.assert_allclose(rm.score(CONVERSATIONS[::-1]).scores[::-1], scores, atol=close)
    for side in (None, "right", "left"):
        np.testing.assert_allclose(scored_as_text(rm, CONVERSATIONS, side), scores, atol=close, err_msg=str(side))


@pytest.mark.parametrize("family", families(*EVERY_FAMILY))
def test_a_model_survives_its_files(folders, family):
    folder, rm = folders(family)
    read = loaded(folder)
    before, after = rm.model.state_dict(), read.model.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    buffers = dict(read.model.named_buffers())  # those too that no file holds
    for name, buffer in rm.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    np.testing.assert_allclose(read.score(CONVERSATIONS).scores, rm.score(CONVERSATIONS).scores, atol=1e-6)
    auto = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(auto.model) is type(rm.model.model)
    assert auto.model.config.model_type == family


@pytest.mark.parametrize("family", families(*EVERY_FAMILY))
def test_contributions_sum_to_the_score(folders, family):
    rm = folders(family)[1]
    for conversation in CONVERSATIONS[:2]:
        score = float(rm.score([conversation]).scores[0])
        assert sum(share.contribution for share in rm.explain(conversation).shares) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("family", families(*WINDOWED))
def test_a_window_narrower_than_the_conversations_acts(family):
    wide = config_of(family)
    wide.sliding_window = 400
    narrow, wide = (reward_model(backbone=backbone_of(family, config=config)) for config in (config_of(family), wide))
    short, long = ([chat("Hi", "Yes.")], CONVERSATIONS[1:2])
    np.testing.assert_allclose(narrow.score(short).scores, wide.score(short).scores, atol=1e-6)
    assert abs(narrow.score(long).scores[0] - wide.score(long).scores[0]) > 1e-3


def test_soft_capping_acts():
    plain = config_of("gemma2")
    plain.attn_logit_softcapping = None
    capped, plain = (reward_model(backbone=backbone_of("gemma2", config=config)) for config in (None, plain))
    assert np.abs(capped.score(CONVERSATIONS).scores - plain.score(CONVERSATIONS).scores).max() > 1e-4


@pytest.mark.parametrize("family", families(*MULTIMODAL))
def test_of_a_multimodal_model_the_language_model_scores(folders, family):
    """The wrapper is kept as it is, its vision tower along with it."""
    rm = folders(family)[1]
    assert any("vision" in name for name in rm.model.state_dict())
    assert rm.model.config.hidden_size == rm.backbone.hidden_size == 32
    text_only = reward_model(backbone=rm.model.model.language_model)
    text_only.model.load_state_dict(heads(rm.model), strict=False)
    np.testing.assert_allclose(text_only.score(CONVERSATIONS).scores, rm.score(CONVERSATIONS).scores, atol=1e-6)


def heads(model: ArmoRMForSequenceClassification) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.")}


@pytest.mark.parametrize(("family", "reason"), [("bert", "bert looks ahead"), ("t5", "t5 is an encoder-decoder")])
def test_what_is_no_decoder_is_refused_by_name(tmp_path, family, reason):
    model = backbone_of(family)
    with pytest.raises(BackboneError, match=reason):
        Backbone.load(save(model, tmp_path), dtype="float32", device="cpu")
    config = ArmoRMConfig(backbone_config=model.config, objectives=OBJECTIVES.to_dicts())
    with pytest.raises(BackboneError, match=reason):
        ArmoRMForSequenceClassification.assemble(model, config)


def test_a_backbone_whose_states_are_no_numbers_is_refused():
    model = backbone_of("llama")
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0] = torch.inf
    config = ArmoRMConfig(backbone_config=model.config, objectives=OBJECTIVES.to_dicts())
    with pytest.raises(BackboneError, match="llama returns hidden states that are not finite in float32"):
        ArmoRMForSequenceClassification.assemble(model, config)
