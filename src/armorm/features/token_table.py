"""Encoded conversations on disk, so that their number does not determine memory use.

Ids are concatenated in `ids.bin`, which is memory-mapped; values per conversation are in `index.safetensors` and in
memory (about 64 bytes each). The index is removed first and written last: a table without one is absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from armorm.backbone.chat_template import EncodedConversation
from armorm.errors import StoreError
from armorm.features.store import KEY
from armorm.files import read_arrays, write_arrays, write_whole

IDS, INDEX = "ids.bin", "index.safetensors"
_NUMBERS = ("lengths", "gate_position", "response_tokens", "truncated_tokens")


class TokenTable(Sequence[EncodedConversation]):
    """Encoded conversations in a folder.

    Attributes:
        keys, prompt_keys: (n,) of dtype `KEY`, of the response and prompt features.
        lengths: (n,) int64, tokens of each conversation.

    Raises:
        StoreError: for a folder without a complete table.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = read_arrays(folder / INDEX)
            size = (folder / IDS).stat().st_size
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{folder}: no token table: {error}") from None
        missing = [name for name in (*_NUMBERS, "keys", "prompt_keys") if name not in index]
        if missing:
            raise StoreError(f"{folder / INDEX}: found no {', '.join(missing)}")
        self.lengths = index["lengths"]
        self.keys = np.ascontiguousarray(index["keys"]).view(KEY).reshape(-1)
        self.prompt_keys = np.ascontiguousarray(index["prompt_keys"]).view(KEY).reshape(-1)
        self._numbers = [index[name] for name in _NUMBERS[1:]]
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        if size != 4 * self._offsets[-1]:
            raise StoreError(f"{folder / IDS}: found {size} bytes, expected {4 * self._offsets[-1]}")
        # (An empty file cannot be mapped.)
        self._ids = np.memmap(folder / IDS, np.int32, "r") if size else np.empty(0, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        row = int(place)
        if not -len(self) <= row < len(self):
            raise IndexError(f"found conversation {row}, expected less than {len(self)}")
        row %= len(self)
        ids = np.array(self._ids[self._offsets[row] : self._offsets[row + 1]])
        gate, response, truncated = (int(numbers[row]) for numbers in self._numbers)
        return EncodedConversation(ids, gate, response, truncated)

    @classmethod
    def write(cls, folder: Path, chunks: Iterable[Sequence[EncodedConversation]]) -> TokenTable:
        """Write or replace a table, with one chunk in memory at a time."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        numbers: list[np.ndarray] = [np.empty((0, 4), np.int64)]
        keys: dict[str, list[bytes]] = {"keys": [], "prompt_keys": []}

        def write_ids(path: Path) -> None:
            with open(path, "wb") as file:
                for chunk in chunks:
                    for c in chunk:
                        file.write(np.asarray(c.ids, np.int32).tobytes())
                    rows = [(len(c), c.gate_position, c.response_tokens, c.truncated_tokens) for c in chunk]
                    numbers.append(np.array(rows, np.int64).reshape(-1, 4))
                    keys["keys"].append(b"".join(c.key for c in chunk))
                    keys["prompt_keys"].append(b"".join(c.prompt_key for c in chunk))

        write_whole(folder / IDS, write_ids)
        columns = dict(zip(_NUMBERS, np.concatenate(numbers).T, strict=True))
        columns |= {name: np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 16) for name, parts in keys.items()}
        write_arrays(folder / INDEX, columns)
        return cls(folder)
