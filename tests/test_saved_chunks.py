"""Finished chunks are used again exactly if they would be computed to the same result."""

from __future__ import annotations

import math

import pytest

from armorm.saved_chunks import SavedChunks, partial_folder, work_folder


def test_a_chunk_is_computed_again_only_if_what_decides_it_differs(tmp_path):
    computed = []

    def get(content: list[str], identity: str) -> object:
        return SavedChunks(tmp_path, identity).get(content, lambda: computed.append(content) or [math.nan, identity])

    assert get(["a", "b"], "model") == [None, "model"]
    assert get(["a", "b"], "model") == [None, "model"]
    assert computed == [["a", "b"]]
    for content, identity in ((["a"], "model"), (["ab"], "model"), (["b", "a"], "model"), (["a", "b"], "other")):
        assert get(content, identity) == [None, identity]
    assert len(computed) == 5


def test_the_folder_is_kept_after_an_error_and_removed_at_the_end(tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="x"), work_folder(output) as folder:
        SavedChunks(folder, "model").get(["a"], lambda: 1)
        raise ValueError("x")
    assert list(partial_folder(output).glob("chunk-*"))
    with work_folder(output) as folder:
        assert SavedChunks(folder, "model").get(["a"], lambda: 2) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_before_the_first_chunk_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="x"), work_folder(tmp_path / "out"):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []
