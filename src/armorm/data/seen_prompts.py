"""The record of the prompts that a model was trained on, so that nothing measured on them is called held out.

`seen_prompts.safetensors`, in the folder of a reward model, has of each prompt its sketch (decontamination.py; no
text), what it was used for, and the number that its fold is derived from: 77 bytes. A fine-tuned backbone keeps the
same tables in its own record (training/finetune/record.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.data.decontamination import SKETCH, nearest, prompt_groups, sketches
from armorm.errors import CheckpointError
from armorm.files import embedded_path, read_arrays, write_arrays

FILE = "seen_prompts.safetensors"
ROLES = ("ratings", "pairs", "fine-tuning")  # bits of `roles`
_FOLD_DIGITS = 8  # of the key of a group: folds are derived from them
_KEY_BYTES = 8  # of the content key of a prompt


@dataclass(frozen=True)
class SeenPrompts:
    """The prompts that a model was trained on, in the order of their sketches.

    Attributes:
        sketches: (m, `SKETCH`) uint8, distinct.
        roles: (m,) uint8, bits of what each prompt was used for (`ROLES`).
        groups: (m,) uint32, the first digits of the key of each prompt's group of near-duplicates.
        prompts: (j, 8) uint8, the first bytes of the content keys of further prompts, used for fine-tuning; records of
            version 0.1 have these only.
        partial: whether there are or may be other prompts, as for a model without a record.
    """

    sketches: np.ndarray = field(default_factory=lambda: np.empty((0, SKETCH), np.uint8))
    roles: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    groups: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    prompts: np.ndarray = field(default_factory=lambda: np.empty((0, _KEY_BYTES), np.uint8))
    partial: bool = False

    def __len__(self) -> int:
        return len(self.sketches) + len(self.prompts)

    @classmethod
    def of(cls, used: Mapping[str, Sequence[Conversation]], groups: Mapping[str, str]) -> SeenPrompts:
        """The record of conversations by role; `groups` has the group of each prompt by its content key."""
        found = cls()
        for role, conversations in used.items():
            firsts = [int(groups[conversation.prompt_key][:_FOLD_DIGITS], 16) for conversation in conversations]
            roles = np.full(len(firsts), 1 << ROLES.index(role), np.uint8)
            found += cls(sketches(conversations), roles, np.array(firsts, np.uint32))
        return found

    def __add__(self, other: SeenPrompts) -> SeenPrompts:
        """The prompts of both."""
        table, roles, groups, prompts = (
            np.concatenate([getattr(self, name), getattr(other, name)])
            for name in ("sketches", "roles", "groups", "prompts")
        )
        distinct, first, index = np.unique(table, axis=0, return_index=True, return_inverse=True)
        combined = np.zeros(len(distinct), np.uint8)
        np.bitwise_or.at(combined, index.ravel(), roles)
        return SeenPrompts(distinct, combined, groups[first], np.unique(prompts, axis=0), self.partial or other.partial)

    def find(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Bits (n,) uint8 of what each prompt, or a near-duplicate of it, was used for; 0 for an unseen one."""
        found = np.append(self.roles, np.uint8(0))[nearest(self.sketches, sketches(conversations))]
        if len(self.prompts):
            known = {prompt.tobytes() for prompt in self.prompts}
            exact = [bytes.fromhex(c.prompt_key)[:_KEY_BYTES] in known for c in conversations]
            found[exact] |= np.uint8(1 << ROLES.index("fine-tuning"))
        return found

    def prompt_groups(self, conversations: Sequence[Conversation]) -> dict[str, str]:
        """`decontamination.prompt_groups`; near-duplicates of seen prompts are in the folds of these."""
        prompts = {conversation.prompt_key: conversation for conversation in conversations}
        rows = nearest(self.sketches, sketches([*prompts.values()]))
        seen = [(key, row) for key, row in zip(prompts, rows.tolist(), strict=True) if row >= 0]
        earlier = {key: f"{int(self.groups[row]):0{_FOLD_DIGITS}x}{key[_FOLD_DIGITS:]}" for key, row in seen}
        return prompt_groups(conversations, earlier)

    def count(self) -> dict[str, int]:
        """Number of prompts, in total (`prompts`) and by role."""
        found = {role: int((self.roles >> bit & 1).sum()) for bit, role in enumerate(ROLES)}
        found["fine-tuning"] += len(self.prompts)
        return {"prompts": len(self), **found}

    def arrays(self) -> dict[str, np.ndarray]:
        """The tables as they are written."""
        return {**vars(self), "partial": np.array([self.partial])}

    @classmethod
    def of_arrays(cls, found: Mapping[str, np.ndarray]) -> SeenPrompts:
        """Inverse of `arrays`.

        Raises:
            ValueError: for tables that do not fit together.
        """
        tables: dict[str, Any] = {name: found[name] for name in vars(cls()) if name in found}
        record = cls(**tables | {"partial": bool(np.any(tables.get("partial", False)))})
        shapes = {record.roles.shape, record.groups.shape}
        if shapes != {(len(record.sketches),)} or record.sketches.shape[1:] != (SKETCH,):
            raise ValueError(f"found tables of shapes {record.sketches.shape} and {shapes}")
        return record

    def save(self, folder: Path) -> None:
        """Write the record of a reward model, if there is one; an earlier one is replaced."""
        if self.partial and not len(self):
            (folder / FILE).unlink(missing_ok=True)
        else:
            write_arrays(folder / FILE, self.arrays())

    @classmethod
    def load(cls, model: str, **options: Any) -> SeenPrompts:
        """The record of a reward model: a folder, a hub id or an embedded name; empty and partial without a file.

        Raises:
            CheckpointError: for a damaged file.
        """
        from safetensors import SafetensorError
        from transformers.utils import cached_file

        missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        path = cached_file(str(embedded_path(model) or model), FILE, **missing, **options)
        if path is None:
            return cls(partial=True)
        try:
            return cls.of_arrays(read_arrays(Path(path)))
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged record of the prompts seen in training ({error})") from None
