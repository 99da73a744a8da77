"""What a benchmark is (`Benchmark`), and helpers to read its rows as examples.

A fault of the layout (columns, labels, subsets) is an error that names file, row and field. A response that is not a
valid conversation (an empty reply) is not: its example is kept, and the response counts as wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from armorm.conversation import Conversation
from armorm.data.rejections import Rejections, read_rows
from armorm.data.rows import Row
from armorm.data.sources import HubSet, Source
from armorm.errors import ArmormError, DataError, shown
from armorm.evaluation.examples import Example, Item, make_example
from armorm.evaluation.metrics import GroupValues, Measurements, Metric

CHANCE = "chance, "  # before the name of a quantity


class BenchmarkError(ArmormError, ValueError):
    """An unknown benchmark, or one whose data was not given."""


@dataclass
class Loaded:
    """Examples of a benchmark.

    Attributes:
        examples: in the order of the rows.
        skipped: number of rows that were not read as examples, by reason.
        names: (k,) objectives of rated rows.
        raw: whether scores of rated rows are raw ratings.
        rejections: rows and cells of users' data that were left out.
    """

    examples: list[Example] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    raw: bool = False
    rejections: Rejections = field(default_factory=Rejections)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count rows that are not examples."""
        self.skipped[reason] = self.skipped.get(reason, 0) + count

    def checked(self, sources: Sequence[Source]) -> Loaded:
        """Itself.

        Raises:
            DataError: if there is no example, or no response of any example can be scored.
        """
        name = sources[0].location.name if sources else ""
        if not self.examples:
            if self.rejections.errors:
                raise self.rejections.errors[0]
            reasons = f" ({self.skipped})" if self.skipped else ""
            raise DataError(f"found no rows to evaluate on{reasons}", file=name)
        if all(len(example.faults) == len(example.conversations) for example in self.examples):
            first = self.examples[0]
            raise DataError(f"no row can be scored; the first: {first.faults[0][1]}", file=name, row=first.origin[1])
        return self


def even_chance(equal: Measurements) -> Measurements:
    """A random order wins half of the comparisons."""
    return {group: GroupValues(found.rows, np.full(len(found.rows), 0.5)) for group, found in equal.items()}


def with_chance(measurements: Measurements, chances: Sequence[float]) -> Measurements:
    """The measurements, and next to each the values that a random order is expected to have, for `random_order`.

    Args:
        chances: expected value of each item.
    """
    expected = np.asarray(chances, np.float64)
    chance = {
        (name, CHANCE + quantity): GroupValues(found.rows, expected[found.rows])
        for (name, quantity), found in measurements.items()
    }
    return measurements | chance


def random_order(equal: Measurements) -> Measurements:
    """The values that `with_chance` has put next to the measurements, in their place."""
    return {
        (name, quantity.removeprefix(CHANCE)): found
        for (name, quantity), found in equal.items()
        if quantity.startswith(CHANCE)
    }


def first_is_best(scores: Sequence[np.ndarray]) -> np.ndarray:
    """1.0 where the first of an item's scores is strictly above all others, else 0.0 (also with a NaN), of n items."""
    return np.array([float(values[0] > np.max(values[1:])) for values in scores], np.float64)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its rows are read and how it scores.

    Attributes:
        name: on the command line.
        title: in tables.
        read: from sources (of rated rows also the model's objectives, or None) to examples.
        measure: from items and the scores of their responses (NaN if unscored) to measurements.
        metrics: the metrics that the available measurements allow.
        chance: from the measurements of a scorer that gives every response the same score to those expected of a
            random order; None if that is meaningless.
        published: its sets on the hub; empty if the user supplies the data.
        also: further sets that may be given, with the splits to evaluate.
        rule: how ties and unscored responses count, in one line.
        rated: whether labels are ratings of objectives, so that reading them needs the model.
        judged: whether it is for judges that see both responses (`PairJudge`), not for scores.
    """

    name: str
    title: str
    read: Callable[..., Loaded]
    measure: Callable[..., Measurements]
    metrics: Callable[[Measurements], list[Metric]]
    chance: Callable[[Measurements], Measurements] | None = even_chance
    published: tuple[HubSet, ...] = ()
    also: tuple[HubSet, ...] = ()
    rule: str = "a tie counts as wrong, and so does a response that cannot be scored"
    rated: bool = False
    judged: bool = False

    def of_objectives(self, names: Sequence[str], raw: bool) -> Benchmark:
        """The same for items rated on these objectives; itself if its items are not rated.

        Args:
            raw: whether scores are raw ratings, so that their error can be measured.
        """
        return replace(self, measure=partial(self.measure, names=tuple(names), raw=raw)) if self.rated else self


def equal_scores(items: Sequence[Item]) -> list[np.ndarray]:
    """The same score for every response."""
    return [np.zeros(len(item.labels)) for item in items]


def missing_rows(name: str, found: int, expected: int | None) -> tuple[str, ...]:
    """What is missing of a part of a published benchmark; empty if it is complete."""
    if found == 0:
        return (name,)
    return () if expected in (None, found) else (f"{name} ({found} of {expected} rows)",)


def rows_of(sources: Sequence[Source]) -> Iterator[tuple[Source, Row]]:
    """Every row with its source, as it is published."""
    for source in sources:
        for row in source.rows():
            yield source, row


def is_held_out(row: Row) -> bool:
    """Whether a row belongs to the test split, or names no split."""
    return row.split_role() in ("", "test")


def held_out_rows(sources: Sequence[Source], loaded: Loaded) -> Iterator[tuple[Source, Row]]:
    """Users' rows of the test split, or without a split, in any layout; others are counted, broken ones rejected."""
    for source in sources:
        for row, held_out in read_rows(source.location, lambda row: (row, is_held_out(row)), loaded.rejections):
            if held_out:
                yield source, row
            else:
                loaded.skip("rows of other splits than test")


def replies(row: Row, column: str, responses: Sequence[str]) -> list[Callable[[], Conversation]]:
    """Builders of the conversations of one prompt with each response."""
    prompt = row.values.get(column)
    if prompt is None:
        raise row.error("found nothing, expected text or messages", column)
    return [partial(Conversation.from_prompt, prompt, response) for response in responses]


def chosen_and_rejected(
    row: Row, chosen: list[str], rejected: list[str], subset: str, cluster: str | None = None
) -> Example:
    """An example of several equally good and several equally bad responses."""
    return make_example(
        replies(row, "prompt", [*chosen, *rejected]),
        [1.0] * len(chosen) + [0.0] * len(rejected),
        id=row.values.get("id"),
        subset=subset,
        cluster=cluster,
        origin=(row.file, row.number),
    )


def texts(row: Row, column: str) -> list[str]:
    """The list of texts in a column."""
    value = row.values.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise row.error(f"found {shown(value)}, expected a list of texts", column)
    return list(value)


def text(row: Row, column: str) -> str:
    """The text in a column."""
    value = row.values.get(column)
    if not isinstance(value, str):
        raise row.error(f"found {shown(value)}, expected text", column)
    return value
