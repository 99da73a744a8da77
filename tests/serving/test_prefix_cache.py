"""Prompts are computed once, and the scores do not show it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel, LlamaConfig, MistralConfig

from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.serving.batcher import BatchSize
from armorm.serving.prefix_cache import CachedForward
from tests.helpers.forward_passes import before_each_pass
from tests.helpers.servers import served
from tests.helpers.small_models import llama, reward_model, tokenizer

LONG = "Here is a passage about rivers, bridges and the towns beside them, and a question about it."


@pytest.fixture(scope="module")
def backbone():
    return reward_model(seed=4).backbone


def group(backbone, prompt, replies):
    return backbone.template.encode([Conversation.from_prompt(prompt, reply) for reply in replies])


def replies(count, start=0):
    return [" ".join(["word"] * (1 + number % 7)) + f" {number}" for number in range(start, start + count)]


def assert_same(found, backbone, rows):
    alone = [backbone.features([row]) for row in rows]
    for values, expected in zip(found, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(values, np.concatenate(expected), atol=1e-5)


def test_features_of_groups_lone_rows_and_kept_prompts_are_those_of_each_row_alone(backbone):
    forward = CachedForward(backbone, max_bytes=1 << 24)
    rows = (
        group(backbone, LONG, replies(5))
        + group(backbone, "Another. " + LONG, replies(3))
        + group(backbone, "Hi", ["Yes."])
    )
    mixed = [rows[place] for place in (8, 3, 5, 0, 7, 1, 6, 2, 4)]
    assert_same(forward.features(mixed, 1000), backbone, mixed)
    assert forward.fault == ""
    assert forward.cached[0] == 2
    before = forward.computed
    again = group(backbone, LONG, ["Once more."])
    assert_same(forward.features(again, 1000), backbone, again)
    assert forward.computed - before == len(again[0]) - again[0].gate_position - 1


def test_a_group_costs_its_prompt_once_and_its_passes_keep_the_budget(backbone):
    rows = group(backbone, LONG, replies(12))
    forward, passes = CachedForward(backbone), []
    forward.test_sharing(rows[:2])
    handle = backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        forward.features(rows, budget=3 * max(map(len, rows)))
    finally:
        handle.remove()
    start = rows[0].gate_position + 1
    assert passes[0] == (1, start)
    assert max(n for n, _ in passes) == 3 and sum(n for n, _ in passes[1:]) == 12
    assert forward.computed == start + sum(len(row) - start for row in rows)


def test_a_prompt_is_kept_from_its_second_coming_on_and_the_oldest_gives_way(backbone):
    first, second = (group(backbone, text + LONG, replies(4)) for text in ("One. ", "Two. "))
    forward = CachedForward(backbone, max_bytes=1 << 24)
    forward.features(first[:1], 1000)
    assert forward.cached == (0, 0)
    forward.features(first[1:2], 1000)
    count, size = forward.cached
    assert count == 1
    small = CachedForward(backbone, max_bytes=size * 3 // 2)
    for rows in (first, second):
        small.features(rows, 1000)
        assert small.cached[0] == 1 and small.cached[1] <= size * 3 // 2
    assert second[0].prompt_key in small._cache
    assert small.clear() and small.cached == (0, 0) and not small.clear()


@pytest.mark.parametrize("window", [24, None])
def test_rows_beyond_a_sliding_window_go_whole(window):
    config = MistralConfig(**{**SMALL, "sliding_window": window})
    other = Backbone("mistral", random(AutoModel.from_config(config)), tokenizer())
    rows = group(other, LONG, replies(4))
    forward = CachedForward(other)
    assert_same(forward.features(rows, 1000), other, rows)
    assert (forward.saved == 0) == (window == 24)


def test_a_model_that_shares_wrongly_is_found_out_and_gets_whole_rows():
    wrong = Backbone("wrong", llama(seed=5), tokenizer())
    forward = wrong.model.forward

    def shifted(*args, position_ids=None, **kwargs):
        return forward(*args, position_ids=None if position_ids is None else position_ids * 0, **kwargs)

    wrong.model.forward = shifted
    rows = group(wrong, LONG, replies(4))
    shared = CachedForward(wrong)
    assert_same(shared.features(rows, 1000), wrong, rows)
    assert "differ" in shared.fault and shared.saved == 0


def test_rotations_that_change_with_the_length_are_not_shared():
    config = LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    other = Backbone("dynamic", random(AutoModel.from_config(config)), tokenizer())
    assert "rotary embedding" in CachedForward(other).fault


def test_many_clients_of_one_prompt_are_computed_together_and_each_gets_its_score():
    rm = reward_model(seed=6)
    conversations = [
        [{"role": "user", "content": LONG}, {"role": "assistant", "content": reply}] for reply in replies(24)
    ]
    expected = rm.score(conversations).scores
    seen = []
    with before_each_pass(rm.backbone.model, lambda ids: seen.append(ids.numel())), served(rm) as server:
        answers = server.together(
            [lambda c=c: server.post("/v1/reward", conversations=[c], include=[]) for c in conversations]
        )
        assert server.engine.forwards[0].saved > 0
    found = [answer.json()["results"][0]["score"] for answer in answers]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_memory_that_kept_prompts_hold_is_given_back_before_a_row_is_given_up():
    rm = reward_model(seed=7)
    with served(rm) as server:
        ask = lambda number: server.post("/v1/reward", prompt=LONG, responses=[f"Reply {number}."], include=[]).json()  # noqa: E731
        for number in range(3):
            ask(number)
        forward = server.engine.forwards[0]
        assert forward.cached[0] == 1

        def full(ids):
            if forward.cached[0]:
                raise MemoryError

        with before_each_pass(rm.backbone.model, full):
            assert "score" in ask(3)["results"][0]
        assert server.engine.batcher.budget == server.engine.settings.batch_tokens


def test_a_batch_counts_a_shared_prompt_once(backbone):
    rows = group(backbone, LONG, replies(6)) + group(backbone, "Hi", ["Yes.", "No, not at all."])
    start, short = rows[0].gate_position + 1, rows[6].gate_position + 1
    longest = [max(len(row) for row in rows[:6]) - start, max(len(row) for row in rows[6:]) - short]
    size = BatchSize(True)
    assert [size.with_row(row) for row in rows][-1] == start + 6 * longest[0] + short + 2 * longest[1]
    whole = BatchSize(False)
    assert [whole.with_row(row) for row in rows][-1] == 8 * max(map(len, rows))


SMALL = {
    "vocab_size": 8192, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip


def random(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model.eval()
