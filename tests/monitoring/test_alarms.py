"""Alarms hold however often they are read: e-processes keep their rate, planted faults are found, sentences say what."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, t

from armorm.monitoring.alarms import ALARM_RATE, KINDS, RunWatch
from armorm.monitoring.e_processes import SPACING, DriftTests, LimitTests
from armorm.monitoring.growth import _Means
from armorm.monitoring.log import StepSamples, log_steps
from tests.helpers.simulated_runs import plant, simulated_run


def watched(seed, what="", *, rate=ALARM_RATE, begins=60, **settings) -> RunWatch:
    log, metrics = plant(simulated_run(seed, begins=begins, **settings), seed, what, begins=begins)
    watch = RunWatch(log.names, rate=rate)
    for samples, values in zip(log_steps(log), metrics, strict=True):
        watch.add_samples(samples)
        watch.add_metrics(samples.step, values)
    return watch


def test_means_from_any_step_on_are_those_of_all_steps_since():
    rng = np.random.default_rng(0)
    values, weights, means = rng.normal(size=(700, 3)), rng.integers(1, 40, 700).astype(float), _Means(3)
    for row, weight in zip(values, weights, strict=True):
        means.add(row, weight)
    for start in (0, 1, 255, 256, 699):
        expected = np.average(values[start:], axis=0, weights=weights[start:])
        np.testing.assert_allclose(means.mean(start), expected, rtol=1e-10, atol=1e-12)
        assert means.weight(start) == weights[start:].sum()


def slow_bayes_factor(values, weights, start, slack):
    """Of a shift of positive half-normal size since `start`, by numerical integration over the shift."""
    values = values - slack * (np.arange(len(values)) >= start)
    after = (np.arange(len(values)) >= start).astype(float)

    def marginal(
        shift,
    ):  # of data with level and sigma integrated out under their right Haar prior, for b = shift sigma
        # Integrate over sigma numerically: sum over a grid of log sigma.
        logs = np.linspace(-4, 4, 4001)
        sigma = np.exp(logs)[:, None]
        rest = values - shift * after * sigma
        level = (weights * rest).sum(1, keepdims=True) / weights.sum()
        squares = (weights * (rest - level) ** 2).sum(1) / sigma[:, 0] ** 2
        log_density = -(len(values) - 1) * logs - squares / 2
        return np.exp(log_density).sum() * (logs[1] - logs[0])

    shifts = np.linspace(0, 4, 801)
    prior = 2 * np.exp(-0.5 * (shifts / 0.5) ** 2) / (0.5 * math.sqrt(2 * math.pi))
    mixed = np.trapezoid([marginal(b) * p for b, p in zip(shifts, prior, strict=True)], shifts)
    return mixed / marginal(0.0)


def test_the_e_process_is_the_weighted_mean_of_bayes_factors():
    generator = np.random.default_rng(0)
    weights = generator.integers(4, 9, 17).astype(float)
    values = generator.normal(size=17) / np.sqrt(weights)
    values[12:] += 0.6
    tests = DriftTests(values[:8, None], weights[:8], np.array([0.1]))
    for value, weight in zip(values[8:], weights[8:], strict=True):
        tests.add(np.array([value]), weight)
    starts = [8, 8 + SPACING, 8 + 2 * SPACING]
    priors = [1 / 2, 1 / 6, 1 / 12]
    expected = sum(
        prior * slow_bayes_factor(values, weights, start, 0.1) for prior, start in zip(priors, starts, strict=True)
    )
    assert tests.evidence[0] == pytest.approx(math.log(expected + 1 / 4), abs=2e-3)


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_an_e_process_exceeds_one_over_the_rate_in_at_most_that_share_of_streams(shift):
    generator, streams, rate = np.random.default_rng(1), 3000, 0.1
    values = generator.normal(size=(150, streams))
    values[20:] += shift  # drift up to the slack is none
    tests = DriftTests(values[:20], np.ones(20), np.full(streams, shift))
    highest = np.zeros(streams)
    for row in values[20:]:
        tests.add(row, 1.0)
        highest = np.maximum(highest, tests.evidence)
    crossed = int((highest >= math.log(1 / rate)).sum())
    assert 0 < crossed <= binom.ppf(0.999, streams, rate)


def test_a_t_test_that_is_read_at_every_step_does_not_keep_its_rate():
    """The reason for e-processes: the same streams, the same looks."""
    generator, rate = np.random.default_rng(1), 0.1
    values = generator.normal(size=(150, 300))
    crossed = np.zeros(300, bool)
    for end in range(22, 150, 4):
        one, other = values[:20], values[20:end]
        pooled = np.sqrt((19 * one.var(0, ddof=1) + (len(other) - 1) * other.var(0, ddof=1)) / (end - 2))
        statistic = (other.mean(0) - one.mean(0)) / (pooled * math.sqrt(1 / 20 + 1 / len(other)))
        crossed |= statistic > t.ppf(1 - rate, end - 2)
    assert crossed.mean() > 1.5 * rate


def test_shares_above_a_limit_are_found_and_those_at_the_limit_are_not():
    generator, rate = np.random.default_rng(2), 0.1
    at_limit = (generator.random((200, 2000)) < 0.5).astype(float)
    tests, highest = LimitTests(2000, 0.5), np.zeros(2000)
    for row in at_limit:
        tests.add(row)
        highest = np.maximum(highest, tests.evidence)
    assert 0 < (highest >= math.log(1 / rate)).sum() <= binom.ppf(0.999, 2000, rate)
    late = LimitTests(1, 0.5)
    for step in range(400):
        late.add(np.array([0.9 if step >= 300 else 0.0]))
    assert late.evidence[0] > math.log(1e4)
    found = late.drift(0)
    assert abs(found.since - 300) <= SPACING
    assert found.shift == pytest.approx(0.9, abs=0.05)


def test_candidates_that_are_dropped_only_lower_the_evidence():
    generator = np.random.default_rng(3)
    values = generator.normal(size=(1000, 2))
    tests = DriftTests(values[:20], np.ones(20), np.zeros(2))
    limits = LimitTests(2, 0.5)
    for row in values[20:]:
        tests.add(row, 1.0)
        limits.add((row > 0).astype(float))
    assert (tests.evidence < math.log(20)).all()
    assert (limits.evidence < math.log(20)).all()
    assert len(tests._starts) <= 161


def test_calm_runs_watched_at_every_step_raise_alarms_no_more_often_than_is_stated():
    rate, runs = 0.2, 25
    alarmed = sum(bool(watched(seed, rate=rate, k=4, samples=16).alarms) for seed in range(runs))
    assert alarmed <= binom.ppf(0.999, runs, rate)


@pytest.mark.parametrize(
    ("kind", "settings", "what", "words"),
    [
        ("one_objective", {"hack": "objective"}, "", "the score grows only through objective-3"),
        ("length", {"hack": "length"}, "", "the score grows only through length"),
        ("out_of_distribution", {"uncertainty_growth": 1.0}, "", "out of distribution"),
        ("score", {}, "score", "the score has fallen by"),
        ("objective", {}, "objective", "the contribution of objective-3 has fallen by"),
        ("alike", {}, "alike", "have samples that all score alike"),
        ("ceiling", {}, "ceiling", "objective-3 is at its ceiling for"),
        ("kl", {}, "kl", "the KL divergence from the reference policy is above 0.5"),
        ("entropy", {}, "entropy", "the entropy of the policy has fallen"),
    ],
)
def test_what_is_planted_is_found_after_it_began_and_said_in_one_sentence(kind, settings, what, words):
    watch = watched(5, what, **settings)
    alarm = next(alarm for alarm in watch.warnings if alarm.kind == kind)
    assert alarm.step > 60
    assert 52 <= alarm.since <= alarm.step
    assert words in alarm.sentence
    assert alarm.sentence.startswith(f"Since step {alarm.since:,.0f} ")
    assert alarm.sentence.endswith(".")
    assert watch.closeness[kind] == 1.0
    assert kind in KINDS
    calm = watched(5, "", **{name: value for name, value in settings.items() if name == "k"})
    assert calm.alarms == []
    assert calm.closeness.get(kind, 0.0) < 1.0


def test_honest_growth_is_a_notice_and_no_warning():
    watch = watched(7, honest=1.5)
    assert watch.warnings == []
    assert any(alarm.kind == "score" and "has risen" in alarm.sentence for alarm in watch.alarms)


def test_a_hack_after_honest_growth_is_found_against_later_steps():
    found = [watched(seed, hack="objective", honest=1.0, size=2.5, samples=64) for seed in range(3)]
    assert all(any(a.kind == "one_objective" and a.objective == "objective-3" for a in w.warnings) for w in found)


def test_nothing_is_judged_in_the_reference_phase_and_each_alarm_is_raised_once():
    log, _ = plant(simulated_run(3, hack="objective", begins=20), 3)
    watch = RunWatch(log.names)
    raised = [watch.add_samples(samples) for samples in log_steps(log)]
    assert not any(raised[:20])
    flat = [alarm for alarms in raised for alarm in alarms]
    assert flat == watch.alarms
    assert len({(alarm.kind, alarm.objective, alarm.size > 0) for alarm in flat}) == len(flat)


def test_a_run_whose_groups_are_alike_from_the_start_is_said_so_from_the_start():
    generator = np.random.default_rng(0)
    watch = RunWatch(["a", "b"], reference_steps=10)
    for step in range(40):
        contributions = np.repeat(generator.normal(size=(8, 2)), 4, axis=0)
        watch.add_samples(StepSamples(step, contributions, groups=np.repeat(np.arange(8), 4)))
    (alarm,) = watch.alarms
    assert (alarm.kind, alarm.since, alarm.size) == ("alike", 0, 1.0)


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.5}, {"reference_steps": 4}])
def test_settings_that_make_no_sense_are_errors(settings):
    with pytest.raises(ValueError, match="expected"):
        RunWatch(["a"], **settings)
