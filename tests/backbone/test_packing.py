"""Batches hold every conversation once, keep to their budget, and waste little on padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armorm.backbone.decoder import length_sorted_batches, padding_share

_lengths = st.lists(st.integers(0, 300), max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(lengths=_lengths, budget=st.integers(1, 1000))
def test_every_conversation_is_in_one_batch_and_batches_keep_to_their_budget(lengths, budget):
    batches = length_sorted_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(lengths=_lengths, budget=st.integers(1, 1000))
def test_longer_conversations_come_first_and_no_batch_could_take_another(lengths, budget):
    batches = length_sorted_batches(lengths, budget)
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * max(1, lengths[batch[0]]) > budget


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(lengths=_lengths.filter(bool), budget=st.integers(1, 1000))
def test_padding_share_is_the_share_of_computed_tokens_that_are_padding(lengths, budget):
    batches = length_sorted_batches(lengths, budget)
    computed = padding = 0
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        computed += longest * len(batch)
        padding += sum(longest - lengths[index] for index in batch)
    assert padding_share(lengths, batches) == pytest.approx(padding / computed if computed else 0.0)


def test_sorting_leaves_little_padding_on_lengths_as_they_are_in_real_data():
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, 5000).astype(int) + 10
    by_length = padding_share(lengths, length_sorted_batches(lengths, 8192))
    as_they_come = padding_share(lengths, [np.arange(start, start + 40) for start in range(0, 5000, 40)])
    assert by_length < 0.05 < as_they_come


def test_nothing_makes_no_batches():
    assert length_sorted_batches([], 100) == []
    assert padding_share([], []) == 0.0
