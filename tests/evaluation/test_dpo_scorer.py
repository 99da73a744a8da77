"""Implicit rewards of DPO: against transformers, one conversation at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from armorm import evaluate
from armorm.conversation import Conversation
from armorm.evaluation.scorer import ScorerError
from armorm.evaluation.scorers import load_scorer
from tests.helpers.marked_scorer import FIXTURES
from tests.helpers.small_models import tokenizer


def language_model(folder, seed, **settings):
    """A random language model with the embedded tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=128, initializer_range=0.2, **sizes, **settings)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    return [language_model(folder / name, seed) for seed, name in enumerate(("policy", "reference"))]


def log_likelihood(folder, prompt, response):
    """Sum over the tokens of the response's text, one after the other."""
    model, tokens = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer()
    start = tokens.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    reply = tokens(response, add_special_tokens=False)["input_ids"]
    total = 0.0
    for place, token in enumerate(reply):
        with torch.no_grad():
            logits = model(torch.tensor([start + reply[:place]])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    return total


def test_rewards_are_beta_times_the_log_ratio_over_the_response(models):
    policy, reference = models
    pairs = [("Name a fruit.", "A plum is a fruit."), ("How much is 2+2?", "4"), ("Name a fruit.", "Oak.")]
    scorer = load_scorer(f"dpo:{policy},reference={reference},beta=0.25")
    found = scorer.score([Conversation.from_prompt(*pair) for pair in pairs])
    expected = [0.25 * (log_likelihood(policy, *pair) - log_likelihood(reference, *pair)) for pair in pairs]
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)
    assert scorer.describe()["beta"] == 0.25
    same = load_scorer(f"dpo:{policy},reference={policy}").score([Conversation.from_prompt(*pairs[0])])
    assert same.scores.tolist() == [0.0]


def test_beta_scales_margins_and_changes_no_decision(models):
    policy, reference = models
    results = [
        evaluate("pairs", f"dpo:{policy},reference={reference},beta={beta}", FIXTURES / "pairs.jsonl", quiet=True)
        for beta in (0.1, 0.5)
    ]
    first, second = (
        np.array([e["margin"] for e in found.examples if e.get("margin") is not None]) for found in results
    )
    np.testing.assert_allclose(5 * first, second, rtol=1e-6)
    assert results[0].model["kind"] == "DPO policy"
    assert results[0].model["reference"]["fingerprint"] != results[0].model["backbone"]["fingerprint"]


def test_a_conversation_over_the_length_limit_is_unscored(models):
    policy, reference = models
    long = Conversation.from_prompt("Count.", " ".join(map(str, range(300))))
    scorer = load_scorer(f"dpo:{policy},reference={reference}")
    found = scorer.score([Conversation.from_prompt("Count.", "One."), long])
    assert np.isfinite(found.scores[0])
    assert "expected at most 128" in found.unscored[1]


def test_a_reference_with_another_tokenizer_is_refused(models, tmp_path):
    policy, _ = models
    other = language_model(tmp_path / "other", 2)
    tokens = tokenizer()
    kept = tokens.chat_template
    try:
        tokens.chat_template = kept.replace("'<|end|>'", "' <|end|>'")
        assert tokens.chat_template != kept
        tokens.save_pretrained(other)
    finally:
        tokens.chat_template = kept
    with pytest.raises(ScorerError, match="as different tokens"):
        load_scorer(f"dpo:{policy},reference={other}").score([Conversation.from_prompt("a", "b")])
    with pytest.raises(ScorerError, match="beta: found 0"):
        load_scorer(f"dpo:{policy},reference={policy},beta=0")
