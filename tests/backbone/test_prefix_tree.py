"""Prefix trees: what conversations share stands once, and every token sees its own conversation and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.backbone.prefix_tree import build_tree, lexicographic_order, shared_with_previous, tree_batches


def some_sequences(seed: int, count: int = 40) -> list[np.ndarray]:
    """Distinct sequences of three ids that begin alike now and then, in lexicographic order."""
    rng = np.random.default_rng(seed)
    texts = {tuple(rng.integers(0, 3, rng.integers(2, 14)).tolist()) for _ in range(count)}
    return [np.array(text, np.int32) for text in sorted(texts)]


def tree_of(sequences, gates=None):
    gates = [0] * len(sequences) if gates is None else gates
    return build_tree(sequences, gates, shared_with_previous(sequences).tolist())


def test_the_example_of_the_module_is_laid_out_as_it_says():
    a, b, c, d, e, f, g, h = range(8)
    sequences = [np.array(s) for s in ([a, b, c, d, e], [a, b, c, f], [a, b, g, h])]
    tree = tree_of(sequences, [1, 2, 2])
    assert tree.ids.tolist() == [a, b, c, d, e, f, g, h]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 3, 2, 3]
    assert tree.ends.tolist() == [8, 8, 6, 5, 5, 6, 8, 8]
    assert tree.lasts.tolist() == [4, 5, 7]
    assert tree.gates.tolist() == [1, 2, 6]


@pytest.mark.parametrize("seed", range(5))
def test_the_path_to_a_last_token_is_its_conversation(seed):
    sequences = some_sequences(seed)
    gates = [len(sequence) // 2 for sequence in sequences]
    tree = tree_of(sequences, gates)
    for sequence, gate, place, last in zip(sequences, gates, tree.gates, tree.lasts, strict=True):
        path = [*tree.ancestors(last), last]
        assert tree.ids[path].tolist() == sequence.tolist()
        assert tree.positions[path].tolist() == list(range(len(sequence)))
        assert path[gate] == place


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_has_as_many_tokens_as_there_are_distinct_beginnings(seed):
    sequences = some_sequences(seed)
    beginnings = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(tree_of(sequences)) == len(beginnings)


def test_padding_sees_itself_alone():
    tree = tree_of(some_sequences(0)).padded(256)
    assert len(tree) == 256
    size = len(tree_of(some_sequences(0)))
    assert all(tree.ancestors(token).size == 0 for token in range(size, 256))
    assert (tree.ends[:size] <= size).all()


def test_batches_are_runs_within_the_budget_unless_one_conversation_is_longer():
    sequences = some_sequences(1, 200)
    lengths, shared = np.array([len(s) for s in sequences]), shared_with_previous(sequences)
    batches = tree_batches(lengths, shared, 11)
    assert [start for start, _ in batches] == [0, *(stop for _, stop in batches[:-1])]
    assert batches[-1][1] == len(sequences)
    for start, stop in batches:
        size = len(tree_of(sequences[start:stop]))
        assert size <= 11 or stop - start == 1
    # No batch could have taken the next conversation as well.
    for (start, stop), _ in zip(batches[:-1], batches[1:], strict=True):
        assert len(tree_of(sequences[start : stop + 1])) > 11
    assert tree_batches(np.array([], int), np.array([], int), 5) == []


@pytest.mark.parametrize("few", [0, 10, 1000])
@pytest.mark.parametrize("head", [200, 3])
def test_order_is_that_of_the_ids_however_many_are_compared_at_a_time(monkeypatch, head, few):
    monkeypatch.setattr("armorm.backbone.prefix_tree._HEAD", head)
    monkeypatch.setattr("armorm.backbone.prefix_tree._FEW", few)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 70_000 if i % 2 else 2, rng.integers(1, 9)).astype(np.int32) for i in range(300)]
    order = lexicographic_order(sequences)
    found = [tuple(sequences[i].tolist()) for i in order]
    assert found == sorted(tuple(s.tolist()) for s in sequences)
    assert lexicographic_order([]).tolist() == []
