"""Log-likelihoods of replies: against one token at a time, independent of batches, and kept by weights and ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from armorm.backbone.decoder import fast_bfloat16
from armorm.backbone.likelihood import (
    closing_tokens,
    load_language_model,
    reply_log_likelihoods,
    without_prompt,
)
from armorm.conversation import Conversation
from armorm.errors import BackboneError

REPLIES = ("Paris.", "I don't care, go look it up yourself.", "It is the city of Paris, on the river Seine.", "no")


@pytest.fixture(scope="module")
def language_model():
    return load_language_model("armorm-tiny", device="cpu")


def conversations() -> list[Conversation]:
    return [Conversation.from_prompt("What is the capital of France?", text) for text in REPLIES]


def test_auto_is_a_dtype_that_the_processor_multiplies_fast():
    loaded = load_language_model("armorm-tiny", dtype="auto", device="cpu")
    assert loaded.model.dtype == (torch.bfloat16 if fast_bfloat16() else torch.float32)


@torch.no_grad()
def test_a_replys_likelihood_is_that_of_its_tokens_one_at_a_time(language_model):
    given = conversations()[:2]
    found = reply_log_likelihoods(language_model, language_model.template.encode(given))
    for conversation, value in zip(given, found, strict=True):
        ids = language_model.template.encode([conversation])[0].ids.tolist()
        text = language_model.tokenizer.encode(conversation.response, add_special_tokens=False)
        first = next(i for i in range(len(ids)) if ids[i : i + len(text)] == text)
        total = 0.0
        for position in range(first, first + len(text)):
            logits = language_model.model(torch.tensor([ids[:position]])).logits[0, -1].double()
            total += float(logits.log_softmax(0)[ids[position]])
        assert value == pytest.approx(total, abs=1e-3)


def test_a_reply_alone_has_the_same_tokens_after_an_empty_turn(language_model):
    template, closing = language_model.template, closing_tokens(language_model.template)
    for conversation in conversations():
        tokens = [
            row.ids[len(row) - closing - row.response_tokens : len(row) - closing].tolist()
            for row in template.encode([conversation, without_prompt(conversation)])
        ]
        assert (
            tokens[0] == tokens[1] == language_model.tokenizer.encode(conversation.response, add_special_tokens=False)
        )
        assert without_prompt(conversation).prompt[0].content == ""


def test_values_do_not_depend_on_the_batch_or_the_cache(language_model, tmp_path, monkeypatch):
    encoded = language_model.template.encode(conversations())
    together = reply_log_likelihoods(language_model, encoded)
    alone = [reply_log_likelihoods(language_model, [row])[0] for row in encoded]
    np.testing.assert_allclose(together, alone, atol=1e-3)
    cache = tmp_path / "likelihoods.safetensors"
    reply_log_likelihoods(language_model, encoded[:3], cache)
    done: list[int] = []
    again = reply_log_likelihoods(language_model, [*encoded, encoded[0]], cache, done.append)
    np.testing.assert_allclose(again, [*together, together[0]], atol=1e-3)
    assert sum(done) == sum(map(len, encoded)) + len(encoded[0])
    # what is there is not computed again
    monkeypatch.setattr(language_model, "model", None)
    np.testing.assert_array_equal(reply_log_likelihoods(language_model, encoded, cache), again[:-1])


def test_values_of_other_weights_are_not_used(language_model, tmp_path):
    encoded, cache = language_model.template.encode(conversations()[:1]), tmp_path / "likelihoods.safetensors"
    [value] = reply_log_likelihoods(language_model, encoded, cache)
    other = load_language_model("armorm-tiny", device="cpu")
    with torch.no_grad():
        next(iter(other.model.parameters())).mul_(0.5)
    [changed] = reply_log_likelihoods(other, encoded, cache)
    assert changed != pytest.approx(value, abs=0.1)


def test_the_prompt_raises_the_likelihood_of_an_answer_more_than_of_a_dismissal(language_model):
    given = conversations()[:2]
    with_prompt, alone = (
        reply_log_likelihoods(language_model, language_model.template.encode(some))
        for some in (given, [without_prompt(conversation) for conversation in given])
    )
    relevance = with_prompt - alone
    assert relevance[0] > relevance[1]


def test_a_backbone_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BackboneError, match=str(tmp_path)):
        load_language_model(str(tmp_path))


@pytest.mark.slow
def test_relevance_by_armorm_small_tells_an_answer_from_a_dismissal(small_backbone_path):
    language_model = load_language_model("armorm-small", device="cpu")
    given = conversations()[:2]
    alone = [without_prompt(conversation) for conversation in given]
    found, base = (
        reply_log_likelihoods(language_model, language_model.template.encode(some)) for some in (given, alone)
    )
    answer, dismissal = found - base
    assert answer > 0 and answer > dismissal + 5
