"""Rubric of a judge: the questions that a language model answers about replies, each with its scale, in YAML.

    about: replies of a bicycle shop's support desk
    objectives:
      - name: polite
        question: How polite is the reply?
        range: [1, 5]
        anchors: {1: insults the customer, 3: neutral, 5: friendly throughout}
      - {name: rude_words, question: "How many rude words does the reply have?", range: [0, 3], direction: lower}
    pairs: {question: "Which reply helps the customer more?", objective: polite}

`about`, `anchors`, `direction` (`higher`) and `pairs` may be left out. `column` names the column of the data with your
own ratings of an objective, by default its name. `explain: true` lets the judge give a sentence of reasons first.
`pairs` asks for a comparison of two replies to a prompt, in both orders; `objective` is the one whose own ratings say
which is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from armorm.errors import DataError, nearest, read_fault, shown
from armorm.files import read_text, read_yaml
from armorm.objectives import DIRECTIONS, Direction

MOST_LEVELS = 21  # of a scale of whole numbers whose levels are listed
_KEYS = ("about", "explain", "objectives", "pairs")
_OBJECTIVE_KEYS = ("name", "question", "range", "direction", "anchors", "column")
_PAIRS_KEYS = ("question", "objective")


@dataclass(frozen=True)
class RubricObjective:
    """One question with its scale.

    Attributes:
        name: column of the ratings.
        low, high: of the scale, low < high.
        anchors: (rating, what it stands for), ascending.
        column: of the user's own ratings.
    """

    name: str
    question: str
    low: float
    high: float
    direction: Direction = "higher"
    anchors: tuple[tuple[float, str], ...] = ()
    column: str = ""

    @property
    def levels(self) -> list[int]:
        """The ratings of a scale of a few whole numbers; empty for others."""
        whole = float(self.low).is_integer() and float(self.high).is_integer()
        return list(range(int(self.low), int(self.high) + 1)) if whole and self.high - self.low < MOST_LEVELS else []

    @property
    def scale(self) -> str:
        """The scale as `armorm extend --objective` takes it: `polite=1:5`."""
        direction = "" if self.direction == "higher" else f":{self.direction}"
        return f"{self.name}={self.low:g}:{self.high:g}{direction}"


@dataclass(frozen=True)
class PairQuestion:
    """Which of two replies is better; `objective` is the name of the one that own ratings are taken from, or empty."""

    question: str
    objective: str = ""


@dataclass(frozen=True)
class Rubric:
    """Questions about replies, in order.

    Attributes:
        about: what the replies are, a line for the judge; empty for none.
        explain: the judge gives a reason before its rating.
        pairs: None asks for no comparisons.
    """

    objectives: tuple[RubricObjective, ...]
    about: str = ""
    explain: bool = False
    pairs: PairQuestion | None = None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Rubric:
        """Read a rubric.

        Raises:
            DataError: naming the file and the field (`objectives.0.range`), what was found and what was expected.
        """
        try:
            values = read_yaml(read_text(Path(path)))
        except (OSError, UnicodeError) as error:
            raise DataError(read_fault(path, error), file=path) from None
        except yaml.YAMLError as error:
            raise DataError(f"not valid YAML: {error}", file=path) from None
        return cls.from_dict(values, name=str(path))

    @classmethod
    def from_dict(cls, values: Any, *, name: str = "rubric") -> Rubric:
        """A rubric from the values of its file; see `from_yaml`."""
        checked = _Fields(values, name, "", _KEYS)
        entries = checked.values.get("objectives")
        if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
            raise checked.error("objectives", f"found {shown(entries)}, expected a list of objectives")
        objectives = tuple(_objective(entry, name, f"objectives.{place}") for place, entry in enumerate(entries))
        names = [objective.name for objective in objectives]
        doubled = next((place for place, each in enumerate(names) if each in names[:place]), None)
        if doubled is not None:
            raise checked.error(
                f"objectives.{doubled}.name", f"found {names[doubled]!r} twice, expected each name once"
            )
        explain = checked.values.get("explain", False)
        if not isinstance(explain, bool):
            raise checked.error("explain", f"found {shown(explain)}, expected true or false")
        pairs = None
        if checked.values.get("pairs") is not None:
            own = _Fields(checked.values["pairs"], name, "pairs", _PAIRS_KEYS)
            pairs = PairQuestion(own.text("question"), own.text("objective", default=""))
            if pairs.objective and pairs.objective not in names:
                hint = nearest(pairs.objective, names)
                raise own.error("objective", f"found {pairs.objective!r}{hint}, expected one of {', '.join(names)}")
        return cls(objectives, checked.text("about", default=""), explain, pairs)


@dataclass(frozen=True)
class _Fields:
    """The keys of an object in the file, and errors that name them."""

    values: Any
    file: str
    place: str
    known: Sequence[str]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise self.error("", f"found {shown(self.values)}, expected keys and values")
        unknown = next((str(key) for key in self.values if key not in self.known), None)
        if unknown is not None:
            hint = nearest(unknown, self.known)
            raise self.error(unknown, f"unknown key{hint}, expected one of {', '.join(self.known)}")

    def error(self, key: str, problem: str) -> DataError:
        return DataError(problem, file=self.file, field=".".join(filter(None, (self.place, key))))

    def text(self, key: str, default: str | None = None) -> str:
        found = self.values.get(key, default)
        if not isinstance(found, str) or (default is None and not found.strip()):
            raise self.error(key, "missing" if found is None else f"found {shown(found)}, expected text")
        return found.strip()


def _objective(entry: Any, file: str, place: str) -> RubricObjective:
    fields = _Fields(entry, file, place, _OBJECTIVE_KEYS)
    name, question = fields.text("name"), fields.text("question")
    ends = fields.values.get("range")
    if not (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)) and ends[0] < ends[1]):
        raise fields.error("range", f"found {shown(ends)}, expected [LOW, HIGH] with LOW < HIGH")
    low, high = map(float, ends)
    direction = fields.text("direction", default="higher")
    if direction not in DIRECTIONS:
        raise fields.error("direction", f"found {direction!r}, expected higher, lower or neutral")
    anchors = fields.values.get("anchors") or {}
    if not isinstance(anchors, Mapping):
        raise fields.error("anchors", f"found {shown(anchors)}, expected a text for some ratings")
    for rating, text in anchors.items():
        if not _is_number(rating) or not low <= rating <= high or not isinstance(text, str):
            found = f"found {shown(rating)}: {shown(text)}"
            raise fields.error("anchors", f"{found}, expected a rating from {low:g} to {high:g} with a text")
    return RubricObjective(
        name, question, low, high, direction, tuple(sorted(anchors.items())), fields.text("column", default=name)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
