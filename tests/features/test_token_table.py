"""Token tables: what is written is read again, and a table is whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from armorm.backbone.chat_template import EncodedConversation
from armorm.errors import StoreError
from armorm.features.engine import Rows, keys_of, lengths_of, prompt_keys_of
from armorm.features.token_table import IDS, TokenTable


def _conversations(count: int = 7) -> list[EncodedConversation]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 30, count)
    return [EncodedConversation(rng.integers(0, 99, n, np.int32), int(n) // 2, i, i % 2) for i, n in enumerate(lengths)]


def test_a_table_gives_back_what_was_written_in_chunks(tmp_path: Path) -> None:
    rows = _conversations()
    table = TokenTable.write(tmp_path, [rows[:3], [], rows[3:]])
    for found in (table, TokenTable(tmp_path)):
        assert len(found) == len(rows)
        for row, wanted in zip(found, rows, strict=True):
            assert row.ids.tolist() == wanted.ids.tolist() and row.ids.dtype == np.int32
            assert (row.gate_position, row.response_tokens, row.truncated_tokens) == (
                wanted.gate_position, wanted.response_tokens, wanted.truncated_tokens,
            )  # fmt: skip
        assert isinstance(found.keys, np.ndarray) and isinstance(found.prompt_keys, np.ndarray)
        assert (keys_of(found) == keys_of(rows)).all()
        assert (prompt_keys_of(found) == prompt_keys_of(rows)).all()
        assert (lengths_of(found) == lengths_of(rows)).all()
    assert Rows(table, np.array([5, 1]))[0].key == rows[5].key
    assert table[-1].key == rows[-1].key
    assert [c.key for c in table[2:4]] == [c.key for c in rows[2:4]]


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    assert len(TokenTable.write(tmp_path, [])) == 0


def test_a_table_whose_writing_breaks_off_is_absent(tmp_path: Path) -> None:
    rows = _conversations()
    TokenTable.write(tmp_path, [rows])

    def broken() -> Iterator[list[EncodedConversation]]:
        yield rows[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenTable.write(tmp_path, broken())
    with pytest.raises(StoreError, match="no token table"):
        TokenTable(tmp_path)


def test_ids_that_were_cut_short_are_refused(tmp_path: Path) -> None:
    TokenTable.write(tmp_path, [_conversations()])
    (tmp_path / IDS).write_bytes((tmp_path / IDS).read_bytes()[:-4])
    with pytest.raises(StoreError, match="bytes, expected"):
        TokenTable(tmp_path)
