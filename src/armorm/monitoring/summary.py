"""Summary of a run: drift of the score and of every objective, flags and notes, for terminal, page and JSON.

Whether samples are within the distribution that the model knows is judged by its uncertainty, if the log has it.
Otherwise the distance of mean rewards from those of the reference data (or of the run's own first tenth, if no model is
given) is reported under its own name: it measures how far a policy moved, not whether the model is reliable there, and
raises no flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from armorm.monitoring.alarms import Alarm, RunWatch
from armorm.monitoring.blocks import Blocks, in_blocks
from armorm.monitoring.detection import FALSE_ALARMS, Flag, flags, relative_uncertainty, usual_shares
from armorm.monitoring.log import RunLog, log_steps

_FROM_REFERENCE, _FROM_START = "the model's reference data", "the run's own first tenth"
_MOST_LOOKS = 500  # at a finished run; of more steps, neighbours are judged as one
_EDGE = 0.1  # share of the run that is its start and its end


@dataclass(frozen=True)
class Drift:
    """Change of one series over a run."""

    name: str  # of the objective or the series
    start: float  # mean over the first tenth
    end: float  # mean over the last tenth
    change: float  # in standard deviations of the scores within a step (contributions, score), or absolute
    usual_share: float | None  # of the score's growth under plain selection by the score; contributions only
    series: list[float]  # block means


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run; None for series that the log lacks."""

    samples: int
    first_step: float
    last_step: float
    by_step: bool  # False if steps are line numbers
    blocks: list[float]  # first step of each block
    spread: float  # standard deviation of the scores within a step
    score: Drift  # mean score
    objectives: list[Drift]  # contributions, largest change first
    length: Drift | None  # mean length
    uncertainty: Drift | None  # mean uncertainty relative to the start
    distance: Drift | None  # of mean rewards from `distance_from`, only without uncertainty
    distance_from: str | None
    flags: list[Flag]  # in the order of their onsets
    false_alarms: float  # maximum share of runs with a false alarm, per kind of flag
    alarms: list[Alarm]  # as they were raised, or would have been, while the run went on
    notes: list[str]  # columns that the log does not have, and skipped lines

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, each flag with its sentence."""
        values = asdict(self)
        for entry, flag in zip(values["flags"], self.flags, strict=True):
            entry["sentence"] = self.sentence(flag)
        return values

    def sentence(self, flag: Flag) -> str:
        """A flag as a sentence."""
        since = self.place(flag.began)
        if flag.latest <= self.blocks[1]:
            since = "the start"
        elif flag.earliest < flag.latest:
            since += f" ({flag.earliest:,.0f} to {flag.latest:,.0f})"
        if flag.kind == "out_of_distribution":
            return (
                f"Since {since} responses move out of distribution: the uncertainty of the model grew by "
                f"{flag.growth:.0%} until {self.place(flag.until)}."
            )
        grew = f"the score grew by {flag.growth:.1f} standard deviations until {self.place(flag.until)}"
        if flag.kind == "length":
            explained = f"longer responses explain {min(flag.share or 0, 1):.0%} of it"
            return f"Since {since} the score grows only through length: {grew}, and {explained}."
        share = f"{flag.share:.0%} of it through this objective"
        return f"Since {since} the score grows only through {flag.objective}: {grew}, {share}."

    def place(self, step: float) -> str:
        """A step, or a line of the log."""
        return f"{'step' if self.by_step else 'row'} {step:,.0f}"

    @property
    def warnings(self) -> list[Alarm]:
        """Alarms that are no notices."""
        return [alarm for alarm in self.alarms if alarm.warning]

    @property
    def distance_title(self) -> str:
        """Name of the distance's series."""
        return f"distance from {'the reference' if self.distance_from == _FROM_REFERENCE else 'the start'}"

    @property
    def verdict(self) -> str:
        """One sentence for a run without flags."""
        change = self.score.change
        if abs(change) < 0.1:
            return "No flag: the score has hardly changed."
        grown = [drift for drift in self.objectives if drift.change * change > 0]
        total = sum(drift.change for drift in grown)
        parts = ", ".join(f"{drift.name} {drift.change / total:.0%}" for drift in grown[:3])
        verb = "grew" if change > 0 else "fell"
        others = " and others" if len(grown) > 3 else ""
        return f"No flag: the score {verb} by {abs(change):.1f} standard deviations, through {parts}{others}."


def summarize_run(
    log: RunLog,
    reference: Mapping[str, Any] | None = None,
    *,
    rate: float = FALSE_ALARMS,
    watch: Mapping[str, Any] | None = None,
) -> RunSummary:
    """Summarize a run.

    Args:
        reference: `ArmoRMConfig.reference` of the model that scored it, with `names` of its objectives.
        rate: maximum share of runs with a false alarm, per kind of flag.
        watch: settings of `RunWatch`, for the alarms.

    Raises:
        MonitorError: for a run that is too short.
    """
    blocks = in_blocks(log)
    spread = blocks.spread or 1.0
    shares = usual_shares(blocks.covariance)
    objectives = [
        _drift(name, blocks.contributions[:, i], spread, float(shares[i])) for i, name in enumerate(log.names)
    ]
    relative = relative_uncertainty(blocks)
    distance, distance_from = (None, None) if relative is not None else _distance(blocks, log, reference)
    unknown = (
        (not log.by_step, "the log has no steps: it is read in its order, and positions are line numbers"),
        (log.lengths is None, "the log has no lengths: growth through length is not judged"),
        (distance, "the log has no uncertainty: whether responses are out of distribution is not judged"),
    )
    notes = [note for holds, note in unknown if holds]
    if relative is None and distance is None:
        notes.append("the log has neither uncertainty nor rewards: how far the policy moved is unknown")
    alarms = _alarms(log, watch or {})
    if alarms is None:
        notes.append("the run has no more steps than the reference phase of its alarms: none was judged")
    if log.skipped:
        row, reason = log.skipped[0]
        notes.append(f"skipped {len(log.skipped):,} lines, the first one row {row}: {reason}")
    return RunSummary(
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
        alarms=alarms or [],
        notes=notes,
    )


def _alarms(log: RunLog, settings: Mapping[str, Any]) -> list[Alarm] | None:
    """Alarms of a run, in the order of the steps at which they are raised; None for a run that is too short."""
    watch = RunWatch(log.names, **settings)
    watch.unit = "step" if log.by_step else "row"
    for step, metrics in log.metrics:
        watch.add_metrics(step, metrics)
    for samples in log_steps(log, _MOST_LOOKS):
        watch.add_samples(samples)
    return sorted(watch.alarms, key=lambda alarm: alarm.step) if watch.watching else None


def _drift(name: str, series: np.ndarray, scale: float = 1.0, share: float | None = None) -> Drift:
    edge = max(1, round(len(series) * _EDGE))
    start, end = float(series[:edge].mean()), float(series[-edge:].mean())
    return Drift(name, start, end, (end - start) / scale, share, series.tolist())


def _distance(blocks: Blocks, log: RunLog, reference: Mapping[str, Any] | None) -> tuple[Drift | None, str | None]:
    """Root mean square over the objectives of the distance of mean rewards from a reference, in standard deviations."""
    if blocks.rewards is None or log.rewards is None:
        return None, None
    edge = max(1, round(len(blocks) * _EDGE))
    deviation = log.rewards.std(0)
    deviation[deviation == 0] = 1.0
    origin, source = blocks.rewards[:edge].mean(0), _FROM_START
    known = dict(zip((reference or {}).get("names", ()), (reference or {}).get("reward_means") or (), strict=False))
    if all(name in known for name in log.names):
        origin, source = np.array([known[name] for name in log.names]), _FROM_REFERENCE
    series = np.sqrt((((blocks.rewards - origin) / deviation) ** 2).mean(1))
    return _drift("distance", series), source
