"""Objectives: what is rated, on which scale, and the affine map between raw ratings and rewards.

raw = scale * reward + offset, where reward 0 is the worst and 1 the best rating. `min_max` maps the ends of the range
to 0 and 1. `bin_centre` maps the m levels of an integer scale to the centres of m equal bins, as the released
checkpoint does: 0..4 to 0.1, 0.3, ... 0.9. The map of an objective of direction `lower` (less is better) is flipped,
because gating weights are never negative; `neutral` (verbosity) is not flipped and does not claim that more is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, overload

import numpy as np

from armorm.errors import ArmormError, nearest, shown
from armorm.notebook import MOST_ROWS, html_table

Direction = Literal["higher", "lower", "neutral"]
ScaleMap = Literal["min_max", "bin_centre"]
DIRECTIONS: tuple[Direction, ...] = ("higher", "lower", "neutral")
SCALE_MAPS: tuple[ScaleMap, ...] = ("min_max", "bin_centre")


class ObjectiveError(ArmormError, ValueError):
    """An invalid objective: an empty range, an unknown name, the same name twice."""


@dataclass(frozen=True)
class Reliability:
    """How far the predicted rewards of an objective are known.

    Attributes:
        r2: share of the ratings' variance that is predicted on held-out folds; below 0 if worse than the mean.
        signal_variance: that share, at least 0, times the variance of the ratings, mapped scale; of an objective fitted
            to pairs, the variance of rewards that lowers the pairs' loss from log 2 to that on held-out folds.
        epistemic_variance: of predicted rewards, due to few ratings, mean over the training prompts, mapped scale; None
            for a head without uncertainty.
    """

    r2: float
    signal_variance: float
    epistemic_variance: float | None

    @property
    def value(self) -> float:
        """The reliability, 0 to 1: signal / (signal + epistemic variance), as of a psychological test; without
        uncertainty r2, at least 0."""
        if self.epistemic_variance is None or self.signal_variance <= 0:
            return max(self.r2, 0.0) if self.epistemic_variance is None else 0.0
        return self.signal_variance / (self.signal_variance + self.epistemic_variance)


@dataclass(frozen=True)
class Objective:
    """One human-readable objective.

    Attributes:
        name: unique in its model, by convention `source-attribute`.
        source: the data set whose raters and rubric it comes from; `computed` for measured objectives, `constructed`
            for those whose labels a rule makes from edited replies.
        low, high: valid raw range, inclusive.
        scale, offset: raw = scale * reward + offset.
        direction: `higher`, `lower` or `neutral`.
        compute: name of the measure of a measured objective, None for a rated one.
        reliability: of its predicted rewards, None if it was not measured; two objectives are equal whatever it is.
    """

    name: str
    source: str
    low: float
    high: float
    scale: float
    offset: float
    direction: Direction = "higher"
    compute: str | None = None
    reliability: Reliability | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.name:
            raise ObjectiveError("an objective has no name")
        if self.direction not in DIRECTIONS:
            raise ObjectiveError(
                f"objective {self.name}: direction {shown(self.direction)}, expected higher, lower or neutral"
            )
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ObjectiveError(f"objective {self.name}: range {self.low}..{self.high}, expected low < high")
        if not np.isfinite([self.scale, self.offset]).all() or self.scale == 0:
            raise ObjectiveError(
                f"objective {self.name}: scale {self.scale}, offset {self.offset}, expected a finite map"
            )

    @classmethod
    def rated(
        cls,
        name: str,
        low: float,
        high: float,
        *,
        source: str = "",
        direction: Direction = "higher",
        scale_map: ScaleMap = "min_max",
    ) -> Objective:
        """An objective with its map derived from the raw range.

        Args:
            scale_map: `min_max`, or `bin_centre` for integer levels low..high.

        Raises:
            ObjectiveError: for an empty range, or one without integer ends for `bin_centre`.
        """
        if scale_map not in SCALE_MAPS:
            raise ObjectiveError(f"objective {name}: map {shown(scale_map)}, expected min_max or bin_centre")
        if scale_map == "bin_centre":
            if not (float(low).is_integer() and float(high).is_integer()):
                raise ObjectiveError(f"objective {name}: range {low}..{high}, expected whole numbers for bin_centre")
            scale, offset = high - low + 1.0, low - 0.5
        else:
            scale, offset = high - low, low
        if direction == "lower":
            scale, offset = -scale, offset + scale
        return cls(
            name, source or name.partition("-")[0], float(low), float(high), float(scale), float(offset), direction
        )

    def to_reward(self, raw: np.ndarray | float) -> np.ndarray:
        """Rewards of raw ratings, any shape; NaN (missing) stays NaN."""
        return (np.asarray(raw, np.float64) - self.offset) / self.scale

    def to_raw(self, reward: np.ndarray | float) -> np.ndarray:
        """Raw ratings of rewards, any shape."""
        return np.asarray(reward, np.float64) * self.scale + self.offset


def parse_scale(text: str) -> tuple[str, tuple[float, float, Direction | None]]:
    """A column and its scale from `COLUMN=LOW:HIGH`, optionally followed by `:lower` or `:neutral`.

    Returns:
        the column; its lowest and highest rating, and the direction (None if the text gives none).

    Raises:
        ObjectiveError: for any other text.
    """
    column, _, scale = text.rpartition("=")
    low, _, rest = scale.partition(":")
    high, _, direction = rest.partition(":")
    try:
        ends = (float(low), float(high))
    except ValueError:
        ends = (0.0, 0.0)
    if not column or not ends[0] < ends[1] or direction not in ("", *DIRECTIONS):
        raise ObjectiveError(f"found {text!r}, expected COLUMN=LOW:HIGH with LOW < HIGH, then :lower or :neutral")
    return column, (*ends, direction or None)  # type: ignore[return-value]


class ObjectiveSet(Sequence[Objective]):
    """The k objectives of a model, in the order of its columns.

    Attributes:
        names: (k,).
        scales, offsets: (k,) float64, raw = scale * reward + offset.
    """

    def __init__(self, objectives: Iterable[Objective]) -> None:
        self._objectives = tuple(objectives)
        self.names = [objective.name for objective in self._objectives]
        doubled = sorted({name for name in self.names if self.names.count(name) > 1})
        if doubled:
            raise ObjectiveError(f"objectives named twice: {', '.join(doubled)}")
        self.scales = np.array([objective.scale for objective in self._objectives], np.float64)
        self.offsets = np.array([objective.offset for objective in self._objectives], np.float64)

    @overload
    def __getitem__(self, index: int) -> Objective: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Objective]: ...
    def __getitem__(self, index: int | slice) -> Objective | Sequence[Objective]:
        return self._objectives[index]

    def __len__(self) -> int:
        return len(self._objectives)

    def __iter__(self) -> Iterator[Objective]:
        return iter(self._objectives)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectiveSet) and self._objectives == other._objectives

    def __hash__(self) -> int:
        return hash(self._objectives)

    def __repr__(self) -> str:
        return f"ObjectiveSet({', '.join(self.names)})"

    def _repr_html_(self) -> str:
        return self.html(f"{len(self)} objectives")

    def html(self, title: str, note: str = "", weights: Sequence[float] | None = None) -> str:
        """A table for notebooks, of at most twelve objectives.

        Args:
            weights: mean gating weights (k,); the objectives with the largest come first.
        """
        order = range(len(self)) if weights is None else sorted(range(len(self)), key=lambda i: -weights[i])
        columns = ["objective", "scale", "better", "reliability", *([] if weights is None else ["mean weight"])]
        rows = []
        for i in order[:MOST_ROWS]:
            each, known = self[i], self.reliability[i]
            better = "" if each.direction == "neutral" else each.direction
            row = [each.name, f"{each.low:.3g}..{each.high:.3g}", better, "" if np.isnan(known) else f"{known:.2f}"]
            rows.append(row + ([] if weights is None else [f"{weights[i]:.1%}"]))
        more = len(self) - len(rows)
        return html_table(title, columns, rows, "; ".join(filter(None, [f"and {more} more" if more else "", note])))

    def position(self, name: str) -> int:
        """Column of an objective; an `ObjectiveError` with the nearest name for an unknown one."""
        if name not in self.names:
            raise ObjectiveError(
                f"unknown objective {name!r}{nearest(name, self.names)}; there are {', '.join(self.names)}"
            )
        return self.names.index(name)

    def to_raw(self, rewards: Any) -> np.ndarray:
        """Raw ratings of rewards (..., k)."""
        return np.asarray(rewards, np.float64) * self.scales + self.offsets

    def to_reward(self, ratings: Any) -> np.ndarray:
        """Rewards of raw ratings (..., k); NaN (missing) stays NaN."""
        return (np.asarray(ratings, np.float64) - self.offsets) / self.scales

    @property
    def reliability(self) -> np.ndarray:
        """(k,) reliability of each objective, 0 to 1; NaN where it was not measured."""
        return np.array(
            [np.nan if o.reliability is None else o.reliability.value for o in self._objectives], np.float64
        )

    def with_reliability(self, found: Mapping[str, Reliability]) -> ObjectiveSet:
        """The same objectives with the reliability found for some, by name."""
        return ObjectiveSet(replace(o, reliability=found.get(o.name, o.reliability)) for o in self._objectives)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain dictionaries, for a config file; `reliability` only where it was measured."""
        entries = [asdict(objective) for objective in self._objectives]
        return [{k: v for k, v in entry.items() if k != "reliability" or v is not None} for entry in entries]

    @classmethod
    def from_dicts(cls, entries: Iterable[Mapping[str, Any]]) -> ObjectiveSet:
        """Inverse of `to_dicts`.

        Raises:
            ObjectiveError: for an invalid entry.
        """
        try:
            return cls(Objective(**_with_reliability(entry)) for entry in entries)
        except TypeError as error:
            raise ObjectiveError(f"invalid objectives: {error}") from None


def _with_reliability(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = {**entry}
    if values.get("reliability") is not None:
        values["reliability"] = Reliability(**values["reliability"])
    return values


# Outputs of RLHFlow/ArmoRM-Llama3-8B-v0.1 in order: source, raw range, attributes. Its card gives the order and the map
# (integer ratings at bin centres, 0..4 -> (x + 0.5) / 5; booleans at 0 and 1). The scale of judge_lm is inferred: its
# ratings run from 1 to 10.
RELEASED_OBJECTIVES = ObjectiveSet(
    Objective.rated(
        f"{source}-{attribute}",
        low,
        high,
        direction="neutral" if attribute == "verbosity" else "higher",
        scale_map="min_max" if (low, high) == (0, 1) else "bin_centre",
    )
    for source, low, high, attributes in (
        ("helpsteer", 0, 4, "helpfulness correctness coherence complexity verbosity"),
        ("ultrafeedback", 1, 10, "overall_score"),
        ("ultrafeedback", 1, 5, "instruction_following truthfulness honesty helpfulness"),
        ("beavertails", 0, 1, "is_safe"),
        ("prometheus", 1, 5, "score"),
        ("argilla", 1, 5, "overall_quality"),
        ("argilla", 1, 10, "judge_lm"),
        ("code", 1, 5, "complexity style explanation instruction-following readability"),
    )
    for attribute in attributes.split()
)
