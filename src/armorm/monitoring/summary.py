"""What was found in a run, as plain values: the one thing that terminal, page and JSON show.

In:  a `RunLog`; figures of the model's reference data, where a model is named.
Out: `MonitorOutcome`.

Where samples are from what the model knows is told by its uncertainty, if the log has it. If not, the distance of
mean rewards from the reference data's (or from those of the run's own first tenth, where no model is named) is
shown, under its own name: it says how far a policy went, not whether the model knows its way there, and raises no flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from armorm.monitoring.blocks import Blocks, in_blocks
from armorm.monitoring.detection import FALSE_ALARMS, Flag, flags, relative_uncertainty, usual_shares
from armorm.monitoring.log import RunLog

_FROM_REFERENCE, _FROM_START = "the model's reference data", "the run's own first tenth"
_EDGE = 0.1  # of the run: what "start" and "end" mean
_ABSENT = {
    "length": "the log has no lengths: growth through length is not judged",
    "uncertainty": "the log has no uncertainty: whether responses leave what the model knows is not judged",
    "rewards": "the log has neither uncertainty nor rewards: nothing says how far the policy went",
    "step": "the log has no steps: it is read in its order, and places in it are line numbers",
}


@dataclass(frozen=True)
class Drift:
    """One series of a run.

    Attributes:
        name: of the objective, or of the series.
        start, end: means over the first and the last tenth.
        change: end - start, in standard deviations of the scores inside a step (contributions, score), or plain.
        usual_share: what share of the score's growth plain selection by the score would give it; contributions only.
        series: block means.
    """

    name: str
    start: float
    end: float
    change: float
    usual_share: float | None
    series: list[float]


@dataclass(frozen=True)
class MonitorOutcome:
    """Everything about a run.

    Attributes:
        samples, first_step, last_step: of the log; `by_step` false where places are line numbers.
        blocks: first step of each block.
        spread: standard deviation of the scores inside a step.
        score: the mean score.
        objectives: contributions, the largest change first.
        length: mean length, None where the log has none.
        uncertainty: mean uncertainty relative to the start, or None likewise.
        distance: distance of mean rewards, only where there is no uncertainty; `distance_from` says from what.
        flags: in the order in which they began.
        false_alarms: most runs that get a flag of a kind without deserving it, as a share.
        notes: what is absent from the log, and what was left out.
    """

    samples: int
    first_step: float
    last_step: float
    by_step: bool
    blocks: list[float]
    spread: float
    score: Drift
    objectives: list[Drift]
    length: Drift | None
    uncertainty: Drift | None
    distance: Drift | None
    distance_from: str | None
    flags: list[Flag]
    false_alarms: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, each flag with its sentence."""
        values = asdict(self)
        for entry, flag in zip(values["flags"], self.flags, strict=True):
            entry["sentence"] = self.sentence(flag)
        return values

    def sentence(self, flag: Flag) -> str:
        """A flag in plain words."""
        since = self._since(flag)
        if flag.kind == "out_of_distribution":
            return (
                f"Since {since} the model knows less and less of what it scores: its uncertainty grew by "
                f"{flag.growth:.0%} until {self.place(flag.until)}."
            )
        grew = f"the score grew by {flag.growth:.1f} standard deviations until {self.place(flag.until)}"
        if flag.kind == "length":
            explained = f"longer responses explain {min(flag.share or 0, 1):.0%} of it"
            return f"Since {since} the score grows only through length: {grew}, and {explained}."
        return f"Since {since} the score grows only through {flag.objective}: {grew}, {flag.share:.0%} of it here."

    def place(self, step: float) -> str:
        """A step, or a line of the log."""
        return f"{'step' if self.by_step else 'row'} {step:,.0f}"

    @property
    def distance_title(self) -> str:
        """Name of the distance's series."""
        return f"distance from {'the reference' if self.distance_from == _FROM_REFERENCE else 'the start'}"

    @property
    def verdict(self) -> str:
        """One sentence for a run without flags."""
        change = self.score.change
        if abs(change) < 0.1:
            return "No flag: the score is about where it began."
        grown = [drift for drift in self.objectives if drift.change * change > 0]
        total = sum(drift.change for drift in grown)
        parts = ", ".join(f"{drift.name} {drift.change / total:.0%}" for drift in grown[:3])
        verb = "grew" if change > 0 else "fell"
        others = " and others" if len(grown) > 3 else ""
        return f"No flag: the score {verb} by {abs(change):.1f} standard deviations, through {parts}{others}."

    def _since(self, flag: Flag) -> str:
        if flag.latest <= self.blocks[1]:
            return "the start"
        place = self.place(flag.began)
        return place if flag.earliest == flag.latest else f"{place} ({flag.earliest:,.0f} to {flag.latest:,.0f})"


def examine(log: RunLog, reference: Mapping[str, Any] | None = None, *, rate: float = FALSE_ALARMS) -> MonitorOutcome:
    """Look at a run.

    Args:
        reference: `ArmoRMConfig.reference` of the model that scored it, with `names` of its objectives.
        rate: most runs that get a flag of a kind without deserving it, as a share.

    Raises:
        MonitorError: for a run too short to judge.
    """
    blocks = in_blocks(log)
    spread = blocks.spread or 1.0
    shares = usual_shares(blocks.covariance)
    objectives = [
        _drift(name, blocks.contributions[:, i], spread, float(shares[i])) for i, name in enumerate(log.names)
    ]
    relative = relative_uncertainty(blocks)
    distance, distance_from = (None, None) if relative is not None else _distance(blocks, log, reference)
    notes = [_ABSENT["step"]] if not log.by_step else []
    notes += [_ABSENT["length"]] if log.lengths is None else []
    if relative is None:
        notes.append(_ABSENT["uncertainty" if distance is not None else "rewards"])
    if log.skipped:
        row, reason = log.skipped[0]
        notes.append(f"left out {len(log.skipped):,} lines, the first of them row {row}: {reason}")
    return MonitorOutcome(
        samples=len(log),
        first_step=float(log.steps[0]),
        last_step=float(log.steps[-1]),
        by_step=log.by_step,
        blocks=blocks.first.tolist(),
        spread=blocks.spread,
        score=_drift("score", blocks.scores, spread),
        objectives=sorted(objectives, key=lambda drift: -abs(drift.change)),
        length=None if blocks.tokens is None else _drift("length", blocks.tokens),
        uncertainty=None if relative is None else _drift("uncertainty", relative),
        distance=distance,
        distance_from=distance_from,
        flags=flags(blocks, log.names, rate),
        false_alarms=rate,
        notes=notes,
    )


def _drift(name: str, series: np.ndarray, scale: float = 1.0, share: float | None = None) -> Drift:
    edge = max(1, round(len(series) * _EDGE))
    start, end = float(series[:edge].mean()), float(series[-edge:].mean())
    return Drift(name, start, end, (end - start) / scale, share, series.tolist())


def _distance(blocks: Blocks, log: RunLog, reference: Mapping[str, Any] | None) -> tuple[Drift | None, str | None]:
    """Root mean square over the objectives of how far mean rewards are from home, in standard deviations of rewards."""
    if blocks.rewards is None or log.rewards is None:
        return None, None
    edge = max(1, round(len(blocks) * _EDGE))
    deviation = log.rewards.std(0)
    deviation[deviation == 0] = 1.0
    home, source = blocks.rewards[:edge].mean(0), _FROM_START
    known = dict(zip((reference or {}).get("names", ()), (reference or {}).get("reward_means") or (), strict=False))
    if all(name in known for name in log.names):
        home, source = np.array([known[name] for name in log.names]), _FROM_REFERENCE
    series = np.sqrt((((blocks.rewards - home) / deviation) ** 2).mean(1))
    return _drift("distance", series), source
