"""Interface of everything that scores conversations; scorers and judges of pairs that are Python functions."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from armorm.attribution import deciding
from armorm.conversation import Conversation
from armorm.errors import ArmormError, shown

if TYPE_CHECKING:
    from typing_extensions import Self

    from armorm.objectives import ObjectiveSet
    from armorm.score_batch import ScoreBatch

# Errors that a user's function raises by mistake; anything rarer keeps its traceback.
_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NameError, OSError, RuntimeError, TypeError, ValueError),
)
_VERDICTS = {"A>B": 1.0, "B>A": -1.0, "A=B": 0.0, None: 0.0}
ScoreFunction = Callable[[list[Any]], Sequence[Any]]


class ScorerError(ArmormError, ValueError):
    """A scorer that does not exist, fails, or returns something other than scores."""


@dataclass(frozen=True)
class Scored:
    """Scores of n conversations; those of an interpretable model with everything they are made of.

    Attributes:
        scores: (n,) float64, NaN if unscored.
        unscored: reason by row.
        truncated: rows whose prompt was truncated.
        batch: (n, ...) float64 columns of an interpretable model, NaN in unscored rows, whose `prompt_index` is -1;
            None for other models, as are the next three.
        objectives: of the model.
        transform: (k, k) reward transform.
        prompt_features: (m, d) of the distinct prompts; `batch.prompt_index` holds rows of them.
        margin_scale: factor of margins from a calibration; None without.
        answers: number of answers of a judge, and of those without a verdict; None for other scorers.
    """

    scores: np.ndarray
    unscored: Mapping[int, str] = field(default_factory=dict)
    truncated: tuple[int, ...] = ()
    batch: ScoreBatch | None = None
    objectives: ObjectiveSet | None = None
    transform: np.ndarray | None = None
    prompt_features: np.ndarray | None = None
    margin_scale: float | None = None
    answers: tuple[int, int] | None = None

    @cached_property
    def debiased(self) -> np.ndarray:
        """(n, k) rewards after the transform."""
        assert self.batch is not None and self.transform is not None
        return self.batch.rewards @ self.transform

    @cached_property
    def _undebiased(self) -> np.ndarray:
        """(k, k) the transform without its penalties: the scale of each reward."""
        assert self.transform is not None
        diagonal = np.diagonal(self.transform)
        biases = (self.transform != np.diag(diagonal)).any(1) | (diagonal == 0)
        return np.diag(np.where(biases, 1.0, diagonal))

    @property
    def is_debiased(self) -> bool:
        """Whether the transform of an interpretable model has penalties."""
        return self.transform is not None and not np.array_equal(self.transform, self._undebiased)

    @property
    def before_debiasing(self) -> np.ndarray:
        """(n,) scores without the penalties, under the same gating weights."""
        assert self.batch is not None
        return (self.batch.gating_output * (self.batch.rewards @ self._undebiased)).sum(1)

    @cached_property
    def ratings(self) -> np.ndarray:
        """(n, k) predicted ratings on their raw scales."""
        assert self.batch is not None and self.objectives is not None
        return self.objectives.to_raw(self.batch.rewards)

    @property
    def prompts(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Features (m, d) of the distinct prompts and the row (n,) of each conversation; None for other models."""
        if self.batch is None or self.batch.prompt_index is None or self.prompt_features is None:
            return None
        return self.prompt_features, self.batch.prompt_index

    @property
    def prompt_rows(self) -> np.ndarray:
        """One scored row of each distinct prompt, of an interpretable model."""
        assert self.batch is not None and self.batch.prompt_index is not None
        known = np.flatnonzero(self.batch.prompt_index >= 0)
        return known[np.unique(self.batch.prompt_index[known], return_index=True)[1]]

    def take(self, rows: np.ndarray) -> Scored:
        """Some of the conversations, in the order of `rows` (m,) int64."""
        place = {int(row): i for i, row in enumerate(rows)}
        return replace(
            self,
            scores=self.scores[rows],
            unscored={place[row]: reason for row, reason in self.unscored.items() if row in place},
            truncated=tuple(place[row] for row in self.truncated if row in place),
            batch=None if self.batch is None else self.batch.take(rows),
        )


def spread(batch: ScoreBatch, prompt_index: np.ndarray, rows: np.ndarray, count: int) -> ScoreBatch:
    """The columns of a batch as (count, ...) float64 with its rows at `rows`, NaN elsewhere.

    Args:
        prompt_index: (n,) prompt of each row of the batch.
    """
    columns: dict[str, Any] = {}
    for item in fields(batch):
        values = getattr(batch, item.name)
        if isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.floating):
            columns[item.name] = np.full((count, *values.shape[1:]), np.nan)
            columns[item.name][rows] = values
    index = np.full(count, -1, np.int64)
    index[rows] = prompt_index
    return replace(batch, **columns, rows=np.arange(count), response_tokens=None, prompt_index=index)


def deciding_objectives(names: Sequence[str], difference: np.ndarray) -> list[tuple[str, float]]:
    """(objective, contribution to the margin) of those that decide a preference, largest first.

    Args:
        difference: (k,) contributions of one response minus those of the other.
    """
    columns = np.flatnonzero(deciding(difference)[0]).tolist()
    return [(names[i], float(difference[i])) for i in sorted(columns, key=lambda i: -abs(difference[i]))]


class Scorer(Protocol):
    """Scores conversations. One of an interpretable model has `objectives` (an `ObjectiveSet`) and returns
    `Scored.batch`; it is called once, with all conversations."""

    def describe(self) -> dict[str, Any]:
        """Name, kind and fingerprint, for the results."""
        ...

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Score conversations, each of which is given once."""
        ...


class CallableScorer:
    """A function from conversations (lists of messages) to numbers.

    Args:
        function: takes a list of conversations, returns one number each; None or NaN if it has no score.
        name: in the results.
    """

    kind = "function"

    def __init__(self, function: ScoreFunction, name: str = "") -> None:
        self.function = function
        self.name = name or str(getattr(function, "__qualname__", type(function).__name__))

    @classmethod
    def from_name(cls, name: str) -> Self:
        """A function by `module:function`; the working directory is on the path.

        Raises:
            ScorerError: if there is no such function.
        """
        module, colon, attribute = name.partition(":")
        if not (module and colon and attribute):
            raise ScorerError(f"scorer {name!r}: expected module:function")
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ScorerError(f"scorer {name!r}: {error}") from None
        if not callable(found) or inspect.isclass(found):
            raise ScorerError(f"scorer {name!r}: found {shown(found)}, expected a function")
        return cls(found, name)

    def describe(self) -> dict[str, Any]:
        """Name and kind."""
        return {"name": self.name, "kind": self.kind}

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Score conversations; a score of None or NaN leaves one unscored.

        Raises:
            ScorerError: if it does not return one number per conversation, or raises an error itself (with the line).
        """
        scores = np.full(len(conversations), np.nan)
        unscored: dict[int, str] = {}
        for row, value in enumerate(self._call([conversation.to_list() for conversation in conversations], "numbers")):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, np.number))):
                raise ScorerError(f"scorer {self.name}: returned {shown(value)}, expected a number")
            if value is None or not math.isfinite(value):
                unscored[row] = f"the scorer returned {value}"
            else:
                scores[row] = value
        return Scored(scores, unscored)

    def _call(self, given: list[Any], expected: str) -> Sequence[Any]:
        try:
            returned: Any = self.function(given)
        except _FAULTS as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise ScorerError(
                f"scorer {self.name}: raised {type(error).__name__}: {str(error) or 'no message'} "
                f"({frame.filename}, line {frame.lineno})"
            ) from error
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(given):
            found = f"{len(values)} values" if isinstance(values, Sequence) else shown(values)
            raise ScorerError(f"scorer {self.name}: returned {found}, expected {len(given)} {expected}")
        return values


class PairJudge(CallableScorer):
    """A function that compares two responses, such as a call of a language model.

    Each pair is judged in both orders, so that a preference for the first position cancels out.

    Args:
        function: takes a list of `{"prompt": messages, "A": text, "B": text}`, returns for each `"A>B"`, `"B>A"`,
            `"A=B"`, or None without a verdict.
        name: in the results.
    """

    kind = "judge of pairs"

    @classmethod
    def of(cls, function: Any) -> PairJudge:
        """A judge of a function, which may have been wrapped as a scorer.

        Raises:
            ScorerError: if it is none.
        """
        if isinstance(function, CallableScorer):
            return cls(function.function, function.name)
        if isinstance(function, str) or not callable(function):
            raise ScorerError(
                f"found {shown(function)}, expected a judge of pairs: a function (--scorer MODULE:FUNCTION) or "
                "judge:URL,mode=pairs"
            )
        return cls(function)

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Scores of pairs of conversations, one after the other; their difference is half the sum of both verdicts.

        Raises:
            ScorerError: if the function fails or returns anything else.
        """
        pairs = [
            {"prompt": first.to_list()[:-1], "A": first.response, "B": second.response}
            for pair in zip(conversations[::2], conversations[1::2], strict=True)
            for first, second in (pair, pair[::-1])
        ]
        verdicts = self._call(pairs, "verdicts")
        for verdict in verdicts:
            if verdict not in _VERDICTS:
                raise ScorerError(
                    f"scorer {self.name}: returned {shown(verdict)}, expected 'A>B', 'B>A', 'A=B' or None"
                )
        votes = np.array([_VERDICTS[verdict] for verdict in verdicts]).reshape(-1, 2)
        margins = (votes[:, 0] - votes[:, 1]) / 2
        return Scored(np.stack([margins / 2, -margins / 2], 1).reshape(-1))
