"""How large a batch is, and which of its rows belong together.

In:  encoded conversations; whether a prompt that several rows have is computed once.
Out: tokens that go through the model, padding included.
"""

from __future__ import annotations

from armorm.backbone.chat_template import EncodedConversation


def group_of(row: EncodedConversation, shares: bool) -> bytes:
    """What rows that are computed together have in common."""
    return row.prompt_key if shares else row.key


class BatchSize:
    """Tokens of a batch with padding, as rows are added: a prompt counts once where it is shared."""

    def __init__(self, shares: bool) -> None:
        self._shares = shares
        self._groups: dict[bytes, tuple[int, int, int]] = {}  # rows, longest row, tokens of the prompt
        self._lone, self._longest, self._shared = 0, 0, 0

    def with_row(self, row: EncodedConversation) -> int:
        """The size with one row more."""
        key, start = group_of(row, self._shares), row.gate_position + 1
        rows, longest, _ = self._groups.get(key, (0, 0, start))
        self._groups[key] = rows + 1, max(longest, len(row)), start
        if rows == 0:
            self._lone += 1
            self._longest = max(self._longest, len(row))
        else:
            if rows == 1:
                self._lone -= 1
            else:
                self._shared -= start + rows * (longest - start)
            self._shared += start + (rows + 1) * (max(longest, len(row)) - start)
        return self._lone * self._longest + self._shared
