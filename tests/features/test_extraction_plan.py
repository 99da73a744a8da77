"""The plan: what is computed, in which order, and the figures that are printed."""

from __future__ import annotations

import numpy as np

from armorm.backbone.chat_template import EncodedConversation
from armorm.features import extraction_plan as planning
from armorm.features.extraction_plan import keys_of, lengths_of, plan_extraction, plan_figures, prompt_keys_of


def conversation(*ids: int, gate: int = 1) -> EncodedConversation:
    return EncodedConversation(np.array(ids, np.int32), gate, 1)


def test_figures_are_those_counted_by_hand():
    encoded = [
        conversation(1, 2, 3, 4),
        conversation(1, 2, 3, 5),  # shares three tokens
        conversation(1, 2, 3, 4),  # the same again
        conversation(7, 8, 9),
    ]
    plan = plan_extraction(encoded, [0, 1, 3])
    assert plan.rows.tolist() == [0, 1, 3]
    assert plan.shared.tolist() == [0, 3, 0]
    figures = plan_figures(keys_of(encoded), prompt_keys_of(encoded), lengths_of(encoded), plan)
    assert (figures.conversations, figures.unique, figures.stored, figures.prompts) == (4, 3, 0, 2)
    assert (figures.asked_tokens, figures.computed_tokens) == (15, 8)
    assert figures.saving == 15 / 8
    assert str(figures) == (
        "4 conversations (1 identical to another); 2 prompts (shared by 1 more responses); "
        "15 tokens asked for; 8 to compute, 1.88 times fewer"
    )


def test_shards_end_between_prompts_unless_one_prompt_alone_would_fill_two(monkeypatch):
    monkeypatch.setattr(planning, "SHARD_TOKENS", 10)
    few = [conversation(prompt, 1, 2, reply) for prompt in range(8) for reply in range(3)]
    plan = plan_extraction(few, range(24))
    first_of = {0, *plan.bounds[:-1]}
    assert len(plan.bounds) > 2
    assert all(start % 3 == 0 for start in first_of)  # every prompt has three replies
    many = [conversation(0, 1, 2, 100 + reply) for reply in range(50)]
    assert len(plan_extraction(many, range(50)).bounds) > 1


def test_the_plan_does_not_depend_on_the_order_in_which_conversations_come():
    rng = np.random.default_rng(0)
    encoded = [conversation(int(rng.integers(3)), 1, *rng.integers(0, 9, 4).tolist(), i) for i in range(50)]
    order = rng.permutation(50)
    first = plan_extraction(encoded, range(50))
    second = plan_extraction([encoded[i] for i in order], range(50))
    assert [encoded[i].key for i in first.rows] == [encoded[order[i]].key for i in second.rows]
    assert first.bounds == second.bounds
