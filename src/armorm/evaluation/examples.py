"""Examples: what a benchmark asks of a reward model, in one form for every benchmark.

In:  rows of a benchmark, one prompt with several responses each.
Out: `Example`: an `Item` (what of it stays in a result: no text) and the conversations to be scored.

Labels say what is right: of two responses to one prompt the one with the higher label is the better.
A response that is no conversation (an empty reply) is refused with its reason; its example keeps its
place. An item is addressed by content, so results on the same data pair up whatever the order of rows,
and `prompt` says which items stand or fall together when figures are resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import ConversationError


@dataclass(frozen=True)
class Item:
    """One question of a benchmark, without its text.

    Attributes:
        key: 16 hex digits of prompt, responses, labels and subset; doubled questions are numbered.
        id: the benchmark's own name for it, '' where it has none.
        subset: part of the benchmark it belongs to.
        prompt: cluster of items that are resampled together: the prompt's content key, as a rule.
        labels: one a response; the higher, the better. (Of rated rows: one an objective.)
        facts: what else its scoring rule needs.
    """

    key: str
    id: str
    subset: str
    prompt: str
    labels: tuple[float, ...]
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def comparisons(self) -> list[tuple[int, int]]:
        """(better, worse) positions of every two responses with different labels."""
        return [(i, j) for i, a in enumerate(self.labels) for j, b in enumerate(self.labels) if a > b]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a result."""
        entry: dict[str, Any] = {"key": self.key, "id": self.id, "subset": self.subset, "prompt": self.prompt}
        entry["labels"] = list(self.labels)
        return entry | ({"facts": dict(self.facts)} if self.facts else {})

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Item:
        """Inverse of `to_dict`; a missing label (null) is NaN."""
        labels = tuple(float("nan") if label is None else float(label) for label in entry["labels"])
        return cls(entry["key"], entry["id"], entry["subset"], entry["prompt"], labels, entry.get("facts", {}))


@dataclass(frozen=True)
class Example:
    """An item with what is to be scored.

    Attributes:
        item: the question.
        conversations: one a response, None where it was refused.
        faults: (position, reason) of refused responses.
        origin: file and row number.
    """

    item: Item
    conversations: tuple[Conversation | None, ...]
    faults: tuple[tuple[int, str], ...] = ()
    origin: tuple[str, int] = ("", 0)


def make_example(
    builds: Sequence[Callable[[], Conversation]],
    labels: Sequence[float],
    *,
    id: object = "",
    subset: str = "",
    facts: Mapping[str, Any] | None = None,
    cluster: str | None = None,
    prompt_of: Callable[[], Conversation] | None = None,
    origin: tuple[str, int] = ("", 0),
) -> Example:
    """An example whose conversations are built one by one; those that cannot be are refused, with the reason.

    Args:
        builds: makes the conversation of each response.
        labels: one a response (or an objective).
        cluster: what it is resampled with; the prompt by default.
        prompt_of: makes any conversation with the prompt, for an example of which every response is refused.
    """
    conversations: list[Conversation | None] = []
    faults: list[tuple[int, str]] = []
    for position, build in enumerate(builds):
        try:
            conversations.append(build())
        except ConversationError as error:
            conversations.append(None)
            faults.append((position, str(error)))
    name = "" if id is None else str(id)
    known = next((conversation for conversation in conversations if conversation is not None), None)
    content = [conversation.key if conversation else "refused" for conversation in conversations]
    parts = [subset, *content, *(repr(float(label)) for label in labels)]
    parts += [] if known else [name, *map(str, origin)]
    key = _digest("\x1f".join(parts))
    prompt = cluster or (known.prompt_key if known else _prompt_key(prompt_of) or f"refused {key}")
    item = Item(key, name, subset, prompt, tuple(float(label) for label in labels), dict(facts or {}))
    return Example(item, tuple(conversations), tuple(faults), origin)


def numbered(examples: Sequence[Example]) -> list[Example]:
    """The same examples, each with a key of its own: repetitions of one are numbered."""
    seen: dict[str, int] = {}
    result = []
    for example in examples:
        count = seen[example.item.key] = seen.get(example.item.key, 0) + 1
        key = example.item.key if count == 1 else f"{example.item.key}-{count}"
        result.append(replace(example, item=replace(example.item, key=key)))
    return result


def fingerprint(items: Sequence[Item]) -> str:
    """16 hex digits of a set of items, whatever their order."""
    return _digest("\x1f".join(sorted(item.key for item in items)))


def _prompt_key(prompt_of: Callable[[], Conversation] | None) -> str | None:
    """The prompt's key, or None where the prompt is refused as well."""
    if prompt_of is None:
        return None
    try:
        return prompt_of().prompt_key
    except ConversationError:
        return None


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Comparisons:
    """Pairs of scored responses of which the label prefers the first.

    Attributes:
        better, worse: (p,) int64, rows of the scored conversations; -1 for a response that is no conversation.
        item: (p,) int64.
        weight: (p,) float64, summing to 1 over each item.
        items: number of items in all.
    """

    better: np.ndarray
    worse: np.ndarray
    item: np.ndarray
    weight: np.ndarray
    items: int

    @classmethod
    def of(cls, items: Sequence[Item], rows: Sequence[np.ndarray]) -> Comparisons:
        """All comparisons of items.

        Args:
            rows: of each item, the row of each response.
        """
        better, worse, item, weight = [], [], [], []
        for place, (entry, at) in enumerate(zip(items, rows, strict=True)):
            labels = np.asarray(entry.labels)
            if len(labels) != len(at):
                continue  # a rated row: its labels are objectives
            first, second = np.nonzero(labels[:, None] > labels[None, :])
            better.append(at[first])
            worse.append(at[second])
            item.append(np.full(len(first), place))
            weight.append(np.full(len(first), 1.0 / max(len(first), 1)))
        first, second, number = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (better, worse, item))
        return cls(first, second, number, np.concatenate([np.empty(0), *weight]), len(items))

    def __len__(self) -> int:
        return len(self.item)

    def take(self, chosen: np.ndarray) -> Comparisons:
        """Some of them, by mask or index, with their weights as they are."""
        return Comparisons(self.better[chosen], self.worse[chosen], self.item[chosen], self.weight[chosen], self.items)

    def difference(self, values: np.ndarray) -> np.ndarray:
        """Better minus worse (p, ...) of values (n, ...); NaN where one was refused."""
        padded = np.concatenate([values, np.full((1, *values.shape[1:]), np.nan)])  # row -1 is the last one
        return padded[self.better] - padded[self.worse]

    def accuracy(self, values: np.ndarray) -> float:
        """Weighted share in which the better one has strictly more; NaN without comparisons."""
        total = self.weight.sum()
        return float((self.weight * (self.difference(values) > 0)).sum() / total) if total else float("nan")

    def item_accuracy(self, values: np.ndarray) -> np.ndarray:
        """The same of each item, (items,); NaN for one without comparisons."""
        right = np.bincount(self.item, self.weight * (self.difference(values) > 0), self.items)
        total = np.bincount(self.item, self.weight, self.items)
        return np.divide(right, total, out=np.full(self.items, np.nan), where=total > 0)

    def closest(self, scores: np.ndarray) -> Comparisons:
        """Of each item the lowest better against the highest worse response, where both are scored."""
        margins = self.difference(scores)
        known = np.flatnonzero(~np.isnan(margins))
        order = known[np.lexsort((margins[known], self.item[known]))]
        first = np.unique(self.item[order], return_index=True)[1] if len(order) else np.empty(0, np.int64)
        chosen = self.take(order[first])
        return Comparisons(chosen.better, chosen.worse, chosen.item, np.ones(len(chosen)), self.items)
