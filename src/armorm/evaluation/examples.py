"""Examples: one question of a benchmark with its responses, in the same form for every benchmark.

Of two responses to one prompt the one with the higher label is the better. A response that is not a valid conversation
(an empty reply) is recorded with its reason, and its example stays. An item is identified by its content, so results
on the same data pair up whatever the order of rows; its `prompt` is the cluster that is drawn together in a bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import ConversationError


@dataclass(frozen=True)
class Item:
    """One question of a benchmark, as it is stored in results: without its text.

    Attributes:
        key: 16 hex digits of prompt, responses, labels and subset; repeated questions are numbered.
        id: the benchmark's own identifier, '' if none.
        subset: part of the benchmark.
        prompt: cluster that is drawn together in a bootstrap, usually the content key of the prompt.
        labels: one per response, higher is better; of rated rows one per objective.
        facts: further values that its scoring rule needs.
    """

    key: str
    id: str
    subset: str
    prompt: str
    labels: tuple[float, ...]
    facts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the results file."""
        entry: dict[str, Any] = {"key": self.key, "id": self.id, "subset": self.subset, "prompt": self.prompt}
        entry["labels"] = list(self.labels)
        return entry | ({"facts": dict(self.facts)} if self.facts else {})

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Item:
        """Inverse of `to_dict`; a label of null is NaN."""
        labels = tuple(float("nan") if label is None else float(label) for label in entry["labels"])
        return cls(entry["key"], entry["id"], entry["subset"], entry["prompt"], labels, entry.get("facts", {}))


@dataclass(frozen=True)
class Example:
    """An item with the conversations to score.

    Attributes:
        item: the question.
        conversations: one per response, None if invalid.
        faults: (position, reason) of invalid responses.
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
    """An example whose conversations are built one by one; an invalid one becomes a fault.

    Args:
        builds: builder of the conversation of each response.
        labels: one per response (or objective).
        cluster: bootstrap cluster; the prompt by default.
        prompt_of: builder of some conversation with the prompt, used if every response is invalid.
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
    prompt = cluster or (known.prompt_key if known else f"refused {key}")
    if cluster is None and known is None and prompt_of is not None:
        with suppress(ConversationError):  # the prompt may be invalid as well
            prompt = prompt_of().prompt_key
    item = Item(key, name, subset, prompt, tuple(float(label) for label in labels), dict(facts or {}))
    return Example(item, tuple(conversations), tuple(faults), origin)


def numbered(examples: Sequence[Example]) -> list[Example]:
    """The same examples with unique keys: repetitions of one are numbered."""
    seen: dict[str, int] = {}
    result = []
    for example in examples:
        count = seen[example.item.key] = seen.get(example.item.key, 0) + 1
        key = example.item.key if count == 1 else f"{example.item.key}-{count}"
        result.append(replace(example, item=replace(example.item, key=key)))
    return result


def fingerprint(items: Sequence[Item]) -> str:
    """16 hex digits of a set of items, independent of their order."""
    return _digest("\x1f".join(sorted(item.key for item in items)))


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of responses to one prompt of which the first has the higher label.

    Attributes:
        better, worse: (p,) int64, rows of the scored conversations; -1 for an invalid response.
        item: (p,) int64.
        weight: (p,) float64, summing to 1 over each item.
        items: total number of items.
    """

    better: np.ndarray
    worse: np.ndarray
    item: np.ndarray
    weight: np.ndarray
    items: int

    @classmethod
    def of(cls, items: Sequence[Item], rows: Sequence[np.ndarray]) -> LabelledPairs:
        """All pairs of items.

        Args:
            rows: of each item, the row of each response.
        """
        better, worse, item, weight = [], [], [], []
        for place, (entry, at) in enumerate(zip(items, rows, strict=True)):
            labels = np.asarray(entry.labels)
            if len(labels) != len(at):
                continue  # a rated row, whose labels are of objectives
            first, second = np.nonzero(labels[:, None] > labels[None, :])
            better.append(at[first])
            worse.append(at[second])
            item.append(np.full(len(first), place))
            weight.append(np.full(len(first), 1.0 / max(len(first), 1)))
        first, second, number = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in (better, worse, item))
        return cls(first, second, number, np.concatenate([np.empty(0), *weight]), len(items))

    def __len__(self) -> int:
        return len(self.item)

    def take(self, chosen: np.ndarray) -> LabelledPairs:
        """Some of the pairs, by mask or index; weights stay as they are."""
        return LabelledPairs(
            self.better[chosen], self.worse[chosen], self.item[chosen], self.weight[chosen], self.items
        )

    def difference(self, values: np.ndarray) -> np.ndarray:
        """Better minus worse (p, ...) of values (n, ...); NaN if one is unscored."""
        padded = np.concatenate([values, np.full((1, *values.shape[1:]), np.nan)])  # row -1 is the last row
        return padded[self.better] - padded[self.worse]

    def accuracy(self, values: np.ndarray, tie: float = 0.0) -> float:
        """Weighted share of pairs whose better response has the higher value; a tie counts `tie`. NaN without pairs."""
        total, difference = self.weight.sum(), self.difference(values)
        right = (difference > 0) + tie * (difference == 0)
        return float((self.weight * right).sum() / total) if total else float("nan")

    def ties(self, values: np.ndarray) -> float:
        """Weighted share of pairs with equal values; NaN without pairs."""
        total = self.weight.sum()
        return float(self.weight[self.difference(values) == 0].sum() / total) if total else float("nan")

    def item_accuracy(self, values: np.ndarray) -> np.ndarray:
        """Accuracy of each item (items,); NaN for one without pairs."""
        right = np.bincount(self.item, self.weight * (self.difference(values) > 0), self.items)
        total = np.bincount(self.item, self.weight, self.items)
        return np.divide(right, total, out=np.full(self.items, np.nan), where=total > 0)

    def closest(self, scores: np.ndarray) -> LabelledPairs:
        """The pair with the smallest margin of each item: its lowest better and highest worse scored response."""
        margins = self.difference(scores)
        known = np.flatnonzero(~np.isnan(margins))
        order = known[np.lexsort((margins[known], self.item[known]))]
        first = np.unique(self.item[order], return_index=True)[1] if len(order) else np.empty(0, np.int64)
        return replace(self.take(order[first]), weight=np.ones(len(first)))
