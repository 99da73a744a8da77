"""Alarms of a live run: read after every step, false in at most a stated share of calm runs, however long they are.

The first `REFERENCE_STEPS` steps are the reference phase; later steps are compared with it (`e_processes.py`). Each
kind of alarm has an equal part of the rate, so the rate is that of a run with any alarm. A calm run is one whose means
stay within the slack of each kind:

- **score**, **objective**: the mean score, or an objective's contribution, moved by more than `LEAST_GROWTH` standard
  deviations of the samples of a step. A fall is a warning; a rise, which training is for, is a notice.
- **one_objective**, **length**: the score rose, more than two thirds of it through one objective, or explained by
  length (`growth.py`, by the rules of `detection.py`). Every further `REFERENCE_STEPS` steps are a reference phase too,
  so that honest growth before a hack does not hide it.
- **alike**: of more than `ALIKE_LIMIT` of the prompts, all samples score alike: no gradient for GRPO and its like.
- **ceiling**: most responses have an objective's reward at `CEILING` or above: it no longer tells them apart.
- **out_of_distribution**: the model's uncertainty is higher by more than a quarter.
- **kl**: in most steps the KL divergence from the reference policy is above a limit.
- **entropy**: the policy's entropy fell below half of that of the reference phase, or rose above its double.

An alarm is raised once. For the size and the onset of a growth in a finished run, `detection.py` is more precise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from armorm.monitoring.detection import LEAST_GROWTH, LEAST_UNCERTAINTY_GROWTH
from armorm.monitoring.e_processes import DriftTests, LimitTests
from armorm.monitoring.growth import GrowthWatch, NarrowGrowth, Reference
from armorm.monitoring.log import StepSamples

ALARM_RATE = 0.01  # of calm runs with any alarm
REFERENCE_STEPS = 20
FEWEST_REFERENCE_STEPS = 5
KL_LIMIT = 0.5  # nats per token
CEILING = 0.98  # mapped scale
ALIKE_LIMIT, CEILING_LIMIT, KL_STEPS_LIMIT = 1 / 3, 0.5, 0.5
_ALIKE = 0.05  # range of the scores of a group, in standard deviations of the scores of a step
_ENTROPY_FACTOR = 2.0
_MOST_PHASES = 7  # reference phases that growth is compared with: the first and the newest

Kind = Literal[
    "score", "objective", "one_objective", "length", "alike", "ceiling", "out_of_distribution", "kl", "entropy"
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Alarm:
    """One alarm of a run."""

    kind: Kind
    objective: str | None
    step: float  # at which it was raised
    since: float  # likeliest step of the onset
    size: float  # of what the sentence names first
    warning: bool  # False for a notice: a rise of the score or of an objective
    sentence: str
    evidence: float  # log10 of the e-process (of the last condition that was met)

    def to_dict(self) -> dict[str, Any]:
        """Its fields as plain values."""
        return asdict(self)


class RunWatch:
    """Watches a run step by step; `alarms` has all alarms so far.

    Args:
        names: of the k objectives.
        rate: share of calm runs that ever get an alarm, at most.
        reference_steps: steps with samples that others are compared with, at least `FEWEST_REFERENCE_STEPS`.
        kl_limit: of the KL divergence as the log has it, usually nats per token.
    """

    def __init__(
        self,
        names: list[str],
        *,
        rate: float = ALARM_RATE,
        reference_steps: int = REFERENCE_STEPS,
        kl_limit: float = KL_LIMIT,
    ) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate: found {rate}, expected a share between 0 and 1")
        if reference_steps < FEWEST_REFERENCE_STEPS:
            raise ValueError(f"reference_steps: found {reference_steps}, expected at least {FEWEST_REFERENCE_STEPS}")
        self.names, self.alarms = list(names), list[Alarm]()
        self.reference_steps, self.kl_limit, self.unit = reference_steps, kl_limit, "step"
        self._needed = math.log(len(KINDS) / rate)  # log of 1 / rate of one kind
        self._recent: list[StepSamples] = []  # the last steps: first the reference phase, then the next one
        self._steps: list[float] = []  # all, once the reference phase is complete
        self._growth: list[GrowthWatch] = []
        self._phases = 0
        self._uncertainty: DriftTests | None = None
        self._met: set[tuple[str, str | None]] = set()  # conditions and alarms that were met
        self._closeness: dict[str, float] = {}
        self._kl, self._kl_steps = LimitTests(1, KL_STEPS_LIMIT), list[float]()
        self._entropies: list[tuple[float, float]] = []
        self._entropy: DriftTests | None = None

    @property
    def closeness(self) -> dict[str, float]:
        """Evidence of each kind so far, as a share of what an alarm needs (logarithms; 0 none, 1 an alarm)."""
        return dict(self._closeness)

    @property
    def warnings(self) -> list[Alarm]:
        """Alarms that are no notices."""
        return [alarm for alarm in self.alarms if alarm.warning]

    @property
    def watching(self) -> bool:
        """Whether the reference phase is complete."""
        return bool(self._growth)

    def add_samples(self, samples: StepSamples) -> list[Alarm]:
        """Add the samples of a step; steps come in their order. Returns the new alarms."""
        before = len(self.alarms)
        if self.watching:
            self._watch(samples)
        else:
            self._recent.append(samples)
            if len(self._recent) == self.reference_steps:
                self._begin(self._recent)
        return self.alarms[before:]

    def add_metrics(self, step: float, metrics: Mapping[str, float]) -> list[Alarm]:
        """Add what a trainer logged of a step: `kl`, `entropy`; other names are ignored. Returns the new alarms."""
        before = len(self.alarms)
        if "kl" in metrics:
            self._kl_steps.append(step)
            self._kl.add(np.array([float(metrics["kl"] > self.kl_limit)]))
            if self._meets("kl", None, self._kl.evidence[0], 1):
                found = self._kl.drift(0)
                since = self._kl_steps[found.since]
                sentence = (
                    f"Since {self._place(since)} the KL divergence from the reference policy is above "
                    f"{self.kl_limit:g} in {found.shift:.0%} of steps ({metrics['kl']:.2g} at the last)."
                )
                self._raise("kl", None, step, since, float(metrics["kl"]), sentence, found.evidence)
        if metrics.get("entropy", 0.0) > 0:
            self._add_entropy(step, math.log(metrics["entropy"]))
        return self.alarms[before:]

    def _watch(self, samples: StepSamples) -> None:
        """Judge a step after the reference phase."""
        weight, step = float(len(samples)), samples.step
        self._recent = [*self._recent, samples][-self.reference_steps :]
        self._steps.append(step)
        self._level.add(self._levels(samples.contributions.mean(0) - self._reference.means), weight)
        self._judge_levels(step)
        for growth in self._growth:
            for narrow in growth.add(samples):
                self._raise_narrow(step, narrow)
            for kind, closeness in (("one_objective", growth.objective_closeness), ("length", growth.length_closeness)):
                self._closeness[kind] = max(self._closeness.get(kind, 0.0), closeness)
        if (len(self._steps) - self.reference_steps) % self.reference_steps == 0:
            self._begin_growth(Reference.of(self._recent))
        if self._uncertainty is not None and samples.uncertainty is not None:
            self._uncertainty.add(np.array([self._relative_uncertainty(samples)]), weight)
            self._judge_uncertainty(step, self._uncertainty)
        self._watch_limits(samples)

    def _begin(self, first: list[StepSamples]) -> None:
        """End the reference phase."""
        self._reference = Reference.of(first)
        levels = np.array([self._levels(row) for row in self._reference.growth])
        slack = LEAST_GROWTH * np.concatenate([[self._reference.spread], self._reference.deviations])
        self._level = DriftTests(levels, self._reference.weights, np.concatenate([slack, slack]))
        self._begin_growth(self._reference)
        uncertainties = [part.uncertainty.mean(0) for part in first if part.uncertainty is not None]
        if len(uncertainties) == len(first):
            self._uncertainty_scale = np.mean(uncertainties, axis=0)
            streams = np.array([[self._relative_uncertainty(part)] for part in first])
            slack = np.array([math.log1p(LEAST_UNCERTAINTY_GROWTH)])
            self._uncertainty = DriftTests(streams, self._reference.weights, slack)
        k = len(self.names)
        self._alike, self._ceiling = LimitTests(1, ALIKE_LIMIT), LimitTests(k, CEILING_LIMIT)
        for part in first:
            self._steps.append(part.step)
            self._watch_limits(part)
        self._recent = first

    def _begin_growth(self, reference: Reference) -> None:
        """Watch for narrow growth since a further reference phase; the i-th has 1 / (i (i + 1)) of the rate."""
        self._phases += 1
        i = self._phases
        if len(self._growth) >= _MOST_PHASES:
            del self._growth[1]
        self._growth.append(GrowthWatch(reference, self._needed + math.log(i * (i + 1))))

    def _levels(self, growth: np.ndarray) -> np.ndarray:
        """(2 + 2k,) growth of score and contributions, then the same with the other sign."""
        up = np.concatenate([[growth.sum()], growth])
        return np.concatenate([up, -up])

    def _relative_uncertainty(self, samples: StepSamples) -> float:
        """Log of the mean uncertainty relative to that of the reference phase."""
        assert samples.uncertainty is not None
        known = self._uncertainty_scale > 0
        ratio = (samples.uncertainty.mean(0)[known] / self._uncertainty_scale[known]).mean() if known.any() else 1.0
        return math.log(max(float(ratio), 1e-12))

    def _judge_levels(self, step: float) -> None:
        k, evidence = len(self.names), self._level.evidence
        for place, value in enumerate(evidence):
            falls, objective = divmod(place, 1 + k)
            name = None if objective == 0 else self.names[objective - 1]
            kind: Kind = "score" if name is None else "objective"
            if not self._meets(kind, f"{name or ''}{'-' if falls else '+'}", value, 2 if name is None else 2 * k):
                continue
            found = self._level.drift(place)
            unit = self._reference.spread if name is None else self._reference.deviations[objective - 1]
            size, since = abs(found.shift) / (unit or 1.0), self._steps[found.since]
            what = "the score" if name is None else f"the contribution of {name}"
            sentence = (
                f"Since {self._place(since)} {what} has {'fallen' if falls else 'risen'} by {size:.1f} standard "
                "deviations of the samples of a step."
            )
            self._raise(
                kind, name, step, since, -size if falls else size, sentence, found.evidence, warning=bool(falls)
            )

    def _raise_narrow(self, step: float, narrow: NarrowGrowth) -> None:
        """Raise the alarm of narrow growth, unless it was raised already."""
        name = None if narrow.objective is None else self.names[narrow.objective]
        kind: Kind = "length" if name is None else "one_objective"
        if (kind, name) in self._met:
            return
        self._met.add((kind, name))
        start = f"Since {self._place(narrow.since)} the score grows only through"
        if name is None:
            sentence = (
                f"{start} length: responses are {narrow.longer:.0%} longer, which explains {min(narrow.share, 1):.0%} "
                f"of its growth of {narrow.size:.1f} standard deviations."
            )
        else:
            amount = f"{narrow.size:.1f} standard deviations so far"
            sentence = f"{start} {name}: {narrow.share:.0%} of all growth, which is {amount}."
        self._raise(kind, name, step, narrow.since, narrow.share, sentence, narrow.evidence)

    def _judge_uncertainty(self, step: float, tests: DriftTests) -> None:
        if self._meets("out_of_distribution", None, tests.evidence[0], 1):
            found = tests.drift(0)
            since, size = self._steps[found.since], math.expm1(found.shift)
            sentence = (
                f"Since {self._place(since)} responses move out of distribution: the uncertainty of the reward model "
                f"is {size:.0%} higher than in the reference phase."
            )
            self._raise("out_of_distribution", None, step, since, size, sentence, found.evidence)

    def _watch_limits(self, samples: StepSamples) -> None:
        if samples.groups is not None:
            self._alike.add(np.array([_share_alike(samples, _ALIKE * self._reference.spread)]))
            if self._meets("alike", None, self._alike.evidence[0], 1):
                found = self._alike.drift(0)
                since = self._steps[found.since]
                sentence = (
                    f"Since {self._place(since)} {found.shift:.0%} of the prompts have samples that all score alike, "
                    "which gives GRPO no gradient."
                )
                self._raise("alike", None, samples.step, since, found.shift, sentence, found.evidence)
        if samples.rewards is not None:
            self._ceiling.add((samples.rewards >= CEILING).mean(0))
            for objective, value in enumerate(self._ceiling.evidence):
                name = self.names[objective]
                if self._meets("ceiling", name, value, len(self.names)):
                    found = self._ceiling.drift(objective)
                    since = self._steps[found.since]
                    sentence = (
                        f"Since {self._place(since)} {name} is at its ceiling for {found.shift:.0%} of the responses, "
                        "so it hardly tells them apart."
                    )
                    self._raise("ceiling", name, samples.step, since, found.shift, sentence, found.evidence)

    def _add_entropy(self, step: float, value: float) -> None:
        self._entropies.append((step, value))
        m = self.reference_steps
        if self._entropy is None:
            if len(self._entropies) == m:
                values = np.array([entropy for _, entropy in self._entropies])
                both = np.stack([values, -values], 1)
                self._entropy = DriftTests(both, np.ones(m), np.full(2, math.log(_ENTROPY_FACTOR)))
            return
        self._entropy.add(np.array([value, -value]), 1.0)
        for falls, evidence in enumerate(self._entropy.evidence):
            if self._meets("entropy", "-" if falls else "+", evidence, 2):
                found = self._entropy.drift(falls)
                since, factor = self._entropies[found.since][0], math.exp(found.shift)
                way = "has fallen to 1 /" if falls else "has risen to"
                sentence = (
                    f"Since {self._place(since)} the entropy of the policy {way} {factor:.1f} of that of the reference "
                    f"phase{': its samples become alike' if falls else ''}."
                )
                self._raise("entropy", None, step, since, 1 / factor if falls else factor, sentence, found.evidence)

    def _meets(self, kind: Kind, name: str | None, evidence: float, streams: int) -> bool:
        """Whether a test of one of `streams` streams of a kind reaches its limit for the first time."""
        needed = self._needed + math.log(streams)
        self._closeness[kind] = max(self._closeness.get(kind, 0.0), min(float(evidence) / needed, 1.0))
        if evidence < needed or (kind, name) in self._met:
            return False
        self._met.add((kind, name))
        return True

    def _raise(
        self,
        kind: Kind,
        objective: str | None,
        step: float,
        since: float,
        size: float,
        sentence: str,
        evidence: float,
        *,
        warning: bool = True,
    ) -> None:
        self.alarms.append(Alarm(kind, objective, step, since, size, warning, sentence, evidence / math.log(10)))

    def _place(self, step: float) -> str:
        return f"{self.unit} {step:,.0f}"


def _share_alike(samples: StepSamples, width: float) -> float:
    """Share of the groups of two or more samples whose scores lie within `width`; NaN without such groups."""
    assert samples.groups is not None
    scores = samples.contributions.sum(1)
    order = np.argsort(samples.groups, kind="stable")
    _, starts, sizes = np.unique(samples.groups[order], return_index=True, return_counts=True)
    ranges = np.maximum.reduceat(scores[order], starts) - np.minimum.reduceat(scores[order], starts)
    return float((ranges[sizes > 1] <= width).mean()) if (sizes > 1).any() else math.nan
