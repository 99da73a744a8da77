"""Preference pairs: two responses to one prompt and which one is preferred; read from rows, or made from ratings.

Layouts are those of TRL and the public sets: explicit `{prompt, chosen, rejected}` and implicit `{chosen, rejected}`,
each side a text or a list of messages, with an optional `margin`. If the sides are whole conversations (RLHFlow's
sets, or UltraFeedback's with a `prompt`), all but the last message is the prompt. An implicit side as text is a
transcript of `Human:` and `Assistant:` turns (Anthropic's).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.data.layout_detection import LAYOUTS
from armorm.data.ratings import RatingTable, sample_by_prompt, split_role
from armorm.data.rejections import Rejections, read_rows
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import ConversationError, shown

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_BLOCK = 256  # responses that are compared with all others of their prompt at a time


@dataclass(frozen=True)
class PreferencePair:
    """A preferred and a rejected response to the same prompt.

    Attributes:
        chosen, rejected: whole conversations with the same prompt.
        margin: how much better the chosen one is, None if the data does not say.
        source: name of the set.
        split: as `Row.split_role` gives it.
        subset, id: of a benchmark row, or ''.
        origin: file and row number.
        weight: of the pairs of its set, > 0.
        weak: whether its set is used only if the validation prompts of the other sets gain by it.
    """

    chosen: Conversation
    rejected: Conversation
    margin: float | None = None
    source: str = ""
    split: str = ""
    subset: str = ""
    id: str = ""
    origin: tuple[str, int] = field(default=("", 0))
    weight: float = 1.0
    weak: bool = False

    @property
    def is_tie(self) -> bool:
        """Whether both sides are the same response."""
        return self.chosen.key == self.rejected.key

    @property
    def prompt_key(self) -> str:
        """Content key of the prompt, which splits and caps use."""
        return self.chosen.prompt_key


def read_preferences(
    location: Location,
    source: str = "",
    limit: int | None = None,
    train_split: str = "train",
    rejections: Rejections | None = None,
) -> list[PreferencePair]:
    """Read every pair of a set.

    Args:
        train_split: value of the `split` column that marks training rows.
        limit: approximate number of pairs to keep (`sample_by_prompt`).
        rejections: rows that are left out are added to it; without it, the first one is an error.

    Raises:
        DataError: naming file, row and field; for a set without a row that can be read.
    """
    rejections = Rejections(strict=True) if rejections is None else rejections
    name = source or location.name
    pairs = list(read_rows(location, lambda row: preference_pair(row, name, train_split), rejections))
    return [pairs[i] for i in sample_by_prompt([pair.prompt_key for pair in pairs], limit)]


def preference_pair(row: Row, source: str = "", train_split: str = "train") -> PreferencePair:
    """The pair of one row of any layout.

    Raises:
        DataError: for an unknown layout, an empty response, or different prompts.
    """
    values = row.values
    if values.get("chosen") is None or values.get("rejected") is None:
        raise row.layout_error([LAYOUTS[3]])
    try:
        chosen, rejected = (
            _side(values.get("prompt"), values[name], name, row.tools) for name in ("chosen", "rejected")
        )
    except ConversationError as error:
        raise row.error(error.problem, error.field) from None
    if chosen.prompt != rejected.prompt:
        raise row.error(
            "chosen and rejected answer different prompts, expected the same turns before the last reply", "rejected"
        )
    margin = row.value("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) <= sys.float_info.max
    ):
        raise row.error(f"found {shown(margin)}, expected a finite number", "margin")
    return PreferencePair(
        chosen,
        rejected,
        None if margin is None else float(margin),
        source,
        row.split_role(train_split),
        str(values.get("subset") or ""),
        str(values.get("id") if values.get("id") is not None else ""),
        (row.file, row.number),
    )


def row_conversations(row: Row) -> list[Conversation]:
    """The chosen and the rejected side of a pair, or the conversation of another row.

    Raises:
        DataError: for an invalid row.
    """
    if row.kind != "pairs":
        return [row.conversation()]
    pair = preference_pair(row)
    return [pair.chosen, pair.rejected]


def pairs_from_ratings(
    table: RatingTable,
    objective: str,
    margin: float,
    *,
    most: int | None = None,
    seed: int = 0,
    test_share: float = 0.0,
    not_made: Counter[str] | None = None,
) -> list[PreferencePair]:
    """Pairs of responses to one prompt whose raw ratings of an objective differ by at least `margin`.

    Args:
        margin: in raw units, > 0.
        most: training pairs of a prompt, and test pairs, to make: those that `cap_pairs` keeps. Pairs of other roles
            are then only counted. By default all pairs are made.
        seed: of `cap_pairs`.
        test_share: of `split_role`, for prompts without a split.
        not_made: the number of pairs that are not made is added to it, by role.

    Raises:
        ObjectiveError: for an unknown objective.
    """
    column = table.objectives.position(objective)
    sign = -1.0 if table.objectives[column].direction == "lower" else 1.0
    by_prompt: dict[str, list[int]] = {}
    for row in np.flatnonzero(~np.isnan(table.ratings[:, column])).tolist():
        by_prompt.setdefault(table.conversations[row].prompt_key, []).append(row)
    generators = {role: np.random.default_rng(seed) for role in ("train", "test")}
    pairs = []
    for prompt, rows in by_prompt.items():
        values = sign * table.ratings[rows, column]
        codes = _codes([table.conversations[row].key for row in rows])
        by_role: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            role = "" if most is None else split_role(table.splits[row], prompt, test_share)
            by_role.setdefault(role, []).append(index)
        drawn = []
        for role, indices in by_role.items():
            kept = most if role in generators or most is None else 0
            found, total = _draw_pairs(values, codes, margin, np.array(indices), kept, generators.get(role))
            drawn.append(found)
            if not_made is not None:
                not_made[role] += total - len(found)
        index_pairs = np.concatenate(drawn)
        if len(drawn) > 1:
            index_pairs = index_pairs[np.lexsort(index_pairs.T[::-1])]
        for better, worse in zip(*index_pairs.T, strict=True):
            chosen, rejected = table.conversations[rows[better]], table.conversations[rows[worse]]
            difference = float(values[better] - values[worse])
            origin = table.origins[rows[better]] if table.origins else ("", 0)
            pairs.append(
                PreferencePair(chosen, rejected, difference, objective, table.splits[rows[better]], origin=origin)
            )
    return pairs


def _draw_pairs(
    values: np.ndarray,
    codes: np.ndarray,
    margin: float,
    better: np.ndarray,
    most: int | None,
    generator: np.random.Generator | None,
) -> tuple[np.ndarray, int]:
    """At most `most` random pairs (p, 2) of responses to a prompt, better first, in order; the number of all pairs.

    Args:
        values: (m,) ratings, larger is better.
        codes: (m,) the same number for the same response.
        better: which of the responses may be the better one.
        most: None for all.
    """

    def is_worse(block: np.ndarray) -> np.ndarray:
        # Means of raters are not exact: 2.3 - 1.8 is a difference of 0.5.
        return (values[block, None] - values >= margin - 1e-9) & (codes[block, None] != codes)

    def pairs_of(block: np.ndarray) -> np.ndarray:
        row, column = np.nonzero(is_worse(block))
        return np.column_stack([block[row], column])

    def draw(total: int) -> np.ndarray:
        if most is None or total <= most:
            return np.arange(total)
        return np.sort(generator.choice(total, most, replace=False)) if generator else np.arange(0)

    blocks = [better[start : start + _BLOCK] for start in range(0, len(better), _BLOCK)]
    if most is None or len(values) <= _BLOCK:
        pairs = np.concatenate([pairs_of(block) for block in blocks])
        return (pairs if most is None else pairs[draw(len(pairs))]), len(pairs)
    # Pairs are counted, and those that are drawn made again, so that memory does not grow with their number.
    counts = [int(np.count_nonzero(is_worse(block))) for block in blocks]
    drawn, end = draw(sum(counts)), 0
    found = [np.empty((0, 2), np.int64)]
    for block, count in zip(blocks, counts, strict=True):
        start, end = end, end + count
        first, last = np.searchsorted(drawn, (start, end))
        if first < last:
            found.append(pairs_of(block)[drawn[first:last] - start])
    return np.concatenate(found), end


def _codes(keys: Sequence[str]) -> np.ndarray:
    first: dict[str, int] = {}
    return np.array([first.setdefault(key, len(first)) for key in keys])


def cap_pairs(pairs: Sequence[PreferencePair], most: int | None, seed: int) -> list[PreferencePair]:
    """At most `most` random pairs of each prompt, in their original order."""
    if most is None:
        return list(pairs)
    by_prompt: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        by_prompt.setdefault(pair.prompt_key, []).append(index)
    generator = np.random.default_rng(seed)
    kept: list[int] = []
    for indices in by_prompt.values():
        drawn = indices if len(indices) <= most else generator.choice(indices, most, replace=False).tolist()
        kept.extend(drawn)
    return [pairs[i] for i in sorted(kept)]


def _side(prompt: Any, side: Any, name: str, tools: list[Any] | None) -> Conversation:
    if prompt is None:
        return _whole(side, name, tools)
    if not isinstance(side, Sequence) or isinstance(side, str) or len(side) < 2:
        return Conversation.from_prompt(prompt, side, name, tools)
    whole = _whole(side, name, tools)
    asked, expected = whole.prompt, Conversation.from_prompt(prompt, side[-1:], name).prompt
    if [(turn.role, turn.content) for turn in asked] != [(turn.role, turn.content) for turn in expected]:
        raise ConversationError(
            f"found {len(side)} messages that do not begin with the prompt, expected the reply alone", name
        )
    return whole


def _whole(side: Any, name: str, tools: list[Any] | None) -> Conversation:
    try:
        return Conversation.from_messages(_transcript(side) if isinstance(side, str) else side, tools)
    except ConversationError as error:
        place = error.field if error.field.startswith("tools") else name + error.field.removeprefix("messages")
        raise ConversationError(error.problem, place) from None


def _transcript(text: str) -> list[dict[str, str]]:
    parts = _TURN.split(text)
    if len(parts) < 5 or parts[0].strip():
        raise ConversationError(
            "found a text without a prompt, expected a 'prompt' column, messages, or a transcript of "
            "'Human:' and 'Assistant:' turns"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[speaker], "content": words.strip()} for speaker, words in turns]
