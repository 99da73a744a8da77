from __future__ import annotations

import numpy as np
import pytest
import torch

from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.conversation import Conversation
from armorm.training.finetune.collator import WIDTH_STEP, grow_trees, reads_trees, tree_batches, tree_tensors
from tests.helpers.backbones import backbone_of
from tests.helpers.small_models import llama, tokenizer

PROMPTS = ("How do I juggle?", "Why is the sky blue on most days of the year, and red at dusk?", "Name a fish.")
RESPONSES = ("Start with one ball.", "I do not know.", "Light is scattered, blue light most of all, by air.", "Cod")


@pytest.fixture(scope="module")
def encoded() -> list[EncodedConversation]:
    template = ChatTemplate(tokenizer())
    return template.encode(
        [
            Conversation.from_messages(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            )
            for prompt in PROMPTS
            for response in RESPONSES
        ]
    )


def alone(model: torch.nn.Module, conversation: EncodedConversation) -> torch.Tensor:
    return model(input_ids=torch.from_numpy(conversation.ids[None].astype(np.int64))).last_hidden_state[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("budget", [0, 500])
@pytest.mark.parametrize("share", [True, False])
def test_a_branch_has_the_features_of_its_conversation_read_alone(encoded, share, budget):
    model = llama()
    trees = grow_trees(encoded, [(i,) for i in range(len(encoded))], 1000, share=share)
    batch = tree_tensors(encoded, trees, share=share, budget=budget)
    hidden = model(**batch.inputs).last_hidden_state[batch.leaf_rows, batch.leaf_columns]
    assert sorted(batch.rows.tolist()) == list(range(12))
    for row, state in zip(batch.rows, hidden, strict=True):
        torch.testing.assert_close(state, alone(model, encoded[row]), atol=1e-5, rtol=1e-5)


def test_trees_share_the_prompt_and_keep_to_the_limit(encoded):
    items = [(i,) for i in range(len(encoded))]
    whole = grow_trees(encoded, items, 1000)
    assert [tree.rows for tree in whole] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    prompt = encoded[0].gate_position + 1
    assert whole[0].tokens == prompt + sum(len(encoded[i]) - prompt for i in range(4))
    longest = max(len(row) for row in encoded)
    cut = grow_trees(encoded, items, longest)
    assert len(cut) > 3
    assert max(tree.tokens for tree in cut) <= longest
    assert sorted(row for tree in cut for row in tree.rows) == list(range(12))
    assert all(len(tree.rows) == 1 for tree in grow_trees(encoded, items, 1))


def test_batches_are_filled_up_to_few_shapes(encoded):
    trees = grow_trees(encoded, [(i,) for i in range(12)], 1)
    shapes = set()
    for batch in tree_batches(trees, 300, seed=0, step=WIDTH_STEP):
        rows, width = tree_tensors(encoded, batch, budget=300).inputs["input_ids"].shape
        assert rows == 300 // width
        assert width % WIDTH_STEP == 0
        shapes.add((rows, width))
    assert len(shapes) <= -(-max(len(row) for row in encoded) // WIDTH_STEP)


def test_the_sides_of_a_pair_stay_in_one_tree(encoded):
    pairs = [(0, 1), (1, 2), (3, 0), (5, 6)]
    for limit in (1, 40, 1000):
        found = [(tree.rows[a], tree.rows[b]) for tree in grow_trees(encoded, pairs, limit) for a, b in tree.items]
        assert found == pairs
    with pytest.raises(ValueError, match="2 prompts"):
        grow_trees(encoded, [(0, 5)], 1000)


def test_items_of_a_batch_point_at_their_conversations(encoded):
    pairs = [(0, 1), (5, 6), (7, 5)]
    for share in (True, False):
        batch = tree_tensors(encoded, grow_trees(encoded, pairs, 1000, share=share), share=share)
        assert [tuple(batch.rows[pair].tolist()) for pair in batch.pairs] == pairs


def test_batches_hold_every_tree_once_within_the_budget(encoded):
    trees = grow_trees(encoded, [(i,) for i in range(12)], 1)
    batches = tree_batches(trees, 60, seed=3)
    assert sorted(tree.rows for batch in batches for tree in batch) == [(i,) for i in range(12)]
    assert all(max(tree.tokens for tree in batch) * len(batch) <= 60 or len(batch) == 1 for batch in batches)
    assert max(map(len, batches)) > 1
    assert tree_batches(trees, 60, seed=3) == batches


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", True), ("gpt_neox", True), ("gpt2", True), ("mamba", False), ("bloom", False)]
)
def test_decoders_that_cannot_read_trees_are_found_out(encoded, family, expected):
    trees = grow_trees(encoded, [(i,) for i in range(12)], 1000)
    assert reads_trees(backbone_of(family), encoded, trees[1:]) is expected


def test_a_window_narrower_than_a_conversation_is_no_place_for_a_tree(encoded):
    trees = grow_trees(encoded, [(i,) for i in range(12)], 1000)
    assert max(len(row) for row in encoded) > 16
    assert not reads_trees(backbone_of("mistral"), encoded, trees)
