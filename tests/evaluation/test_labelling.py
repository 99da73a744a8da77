"""Requests to a judge: which replies are compared."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from armorm.conversation import Conversation
from armorm.data.rubric import PairQuestion, Rubric, RubricObjective
from armorm.evaluation.labelling import pair_requests
from tests.helpers.memory import peak_bytes

RUBRIC = Rubric((RubricObjective("clear", "Is it clear?", 1, 5),), pairs=PairQuestion("Which is clearer?"))


def first_pairs(conversations: list[Conversation]) -> list[tuple[int, ...]]:
    """The first three pairs of different replies to each prompt, in both orders."""
    found = []
    for prompt in dict.fromkeys(conversation.prompt_key for conversation in conversations):
        rows = [i for i, conversation in enumerate(conversations) if conversation.prompt_key == prompt]
        pairs = [
            (i, j)
            for i, j in combinations(rows, 2)
            if conversations[i].response.strip() != conversations[j].response.strip()
        ]
        found += [order for pair in pairs[:3] for order in (pair, pair[::-1])]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_first_three_pairs_of_different_replies_to_a_prompt_are_compared_in_both_orders(seed):
    draw = random.Random(seed)
    texts = draw.choice([["a", "a ", "b"], ["a", "a\n", " a"], ["a", "b", "c", "d"]])
    conversations = [Conversation.from_prompt(draw.choice("pqr"), draw.choice(texts)) for _ in range(12)]
    requests = pair_requests(RUBRIC, conversations, structured=False)
    assert [request.rows for request in requests] == first_pairs(conversations)
    assert pair_requests(Rubric(RUBRIC.objectives), conversations, structured=False) == []


def test_the_pairs_of_many_replies_to_a_prompt_are_not_listed():
    conversations = [Conversation.from_prompt("p", f"reply {row}") for row in range(1000)]
    requests = pair_requests(RUBRIC, conversations, structured=False)
    assert [request.rows for request in requests] == [(0, 1), (1, 0), (0, 2), (2, 0), (0, 3), (3, 0)]
    assert (
        peak_bytes(lambda: pair_requests(RUBRIC, conversations, structured=False)) < 2e6
    )  # a list of all 500,000 pairs takes 30 MB
