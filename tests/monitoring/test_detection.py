"""Planted hacks are found where they begin; runs without one are left alone, as often as is stated."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from armorm.monitoring.blocks import in_blocks
from armorm.monitoring.detection import FALSE_ALARMS, flags, usual_shares
from armorm.monitoring.log import MonitorError, RunLog
from armorm.monitoring.trends import broken_line, intervals, limit, noise_covariance
from tests.helpers.simulated_runs import simulated_run


def found(log):
    return flags(in_blocks(log), log.names)


def most_false_alarms(runs):
    """Runs with a flag that a rate of `FALSE_ALARMS` for each of two kinds exceeds once in a thousand tests."""
    return int(binom.ppf(0.999, runs, 2 * FALSE_ALARMS))


@pytest.mark.parametrize("honest", [0.0, 1.5])
def test_an_objective_that_alone_grows_is_found_with_the_step_where_it_began(honest):
    (flag,) = found(simulated_run(1, hack="objective", honest=honest))
    assert (flag.kind, flag.objective) == ("one_objective", "objective-3")
    assert abs(flag.began - 60) <= 12
    assert flag.earliest <= flag.began <= flag.latest
    assert flag.share > 0.8


def test_the_range_of_the_step_holds_it_as_often_as_is_stated_where_the_rest_is_steady():
    flagged = [flag for seed in range(20) for flag in found(simulated_run(seed, hack="objective"))]
    assert len(flagged) >= 19
    held = sum(flag.earliest <= 60 <= flag.latest for flag in flagged)
    assert held >= binom.ppf(0.001, len(flagged), 0.95)
    assert np.mean([flag.latest - flag.earliest for flag in flagged]) < 15  # a range of the whole run would hold it too


def test_the_range_of_the_step_holds_it_after_honest_growth_of_any_pace():
    flagged = []
    for seed in range(25):
        log = simulated_run(seed, hack="objective")
        generator = np.random.default_rng(seed)
        k = log.contributions.shape[1]
        pace, parts = generator.uniform(1, 8, k), generator.dirichlet(np.full(k, 5.0))
        done = log.steps[:, None] / log.steps.max()
        log.contributions[:] += 1.5 * log.scores[log.steps < 60].std() * (1 - np.exp(-pace * done)) * parts
        flagged += [flag for flag in found(log) if flag.objective == "objective-3"]
    assert len(flagged) >= 20
    held = sum(flag.earliest <= 60 <= flag.latest for flag in flagged)
    assert held >= binom.ppf(0.001, len(flagged), 0.95)
    assert np.mean([flag.latest - flag.earliest for flag in flagged]) < 15


def test_an_objective_that_goes_on_alone_after_the_others_stopped_is_found_where_they_stopped():
    log = simulated_run(11)
    ramp = log.steps / log.steps.max() * log.scores.std()
    log.contributions[:, 3] += 2.5 * ramp
    for objective in (0, 4, 5):
        log.contributions[:, objective] += 2.5 * np.minimum(ramp, ramp[log.steps == 60][0])
    flag = next(flag for flag in found(log) if flag.objective == "objective-3")
    assert flag.earliest - 3 <= 60 <= flag.latest + 3


def test_growth_through_length_is_found_after_honest_growth():
    flagged = [found(simulated_run(seed, hack="length", honest=1.5)) for seed in range(20)]
    right = [flag for flags_of_run in flagged for flag in flags_of_run if flag.kind == "length"]
    assert len(right) >= 15
    assert sum(flag.earliest <= 60 <= flag.latest for flag in right) >= binom.ppf(0.001, len(right), 0.95)


def test_growth_of_which_length_explains_less_than_two_thirds_is_left_alone():
    runs = []
    for seed in range(30):
        log = simulated_run(seed, hack="length", size=1.0)
        ramp = np.clip((log.steps - 60) / 60, 0, None) * log.scores[log.steps < 60].std()
        log.contributions[:, 4:6] += 0.3 * ramp[:, None]
        runs.append(any(flag.kind == "length" for flag in found(log)))
    assert sum(runs) <= binom.ppf(0.999, len(runs), FALSE_ALARMS)


def test_growth_through_length_is_found_with_the_step_where_it_began():
    (flag,) = found(simulated_run(2, hack="length"))
    assert (flag.kind, flag.objective) == ("length", None)
    assert abs(flag.began - 60) <= 12
    assert flag.share > 0.8


def test_a_hack_from_the_first_step_on_is_found():
    (flag,) = found(simulated_run(3, hack="objective", begins=0))
    assert flag.objective == "objective-3"
    assert flag.began <= 12


def test_a_hack_that_has_ended_is_found():
    log = simulated_run(4, hack="objective", begins=20)
    late = log.steps >= 60
    log.contributions[late, 3] += log.contributions[(log.steps > 50) & (log.steps < 60), 3].mean()
    log.contributions[late, 3] -= log.contributions[late, 3].mean() - log.contributions[log.steps == 59, 3].mean()
    flag = found(log)[0]
    assert flag.objective == "objective-3"
    assert abs(flag.began - 20) <= 10


def test_objectives_that_fall_do_not_make_a_broad_growth_look_narrow():
    log = simulated_run(5)
    ramp = log.steps / log.steps.max() * log.scores.std()
    for objective, growth in ((0, 1.5), (4, 1.5), (6, -1.5)):  # one falls as much as each of two rises
        log.contributions[:, objective] += growth * ramp
    assert found(log) == []


def test_selection_by_a_score_that_is_nearly_one_objective_is_no_hack():
    log = simulated_run(6, k=4, length_slope=0.0)
    log.contributions[:, 0] *= 4
    drift = log.steps / log.steps.max()
    shares = usual_shares(in_blocks(log).covariance)
    assert shares[0] > 0.8
    log.contributions[:] += 1.5 * log.scores.std() * drift[:, None] * shares
    assert found(log) == []


def test_selection_by_a_score_that_is_nearly_length_is_flagged():
    log = simulated_run(6, k=4, length_slope=0.0)
    length = np.log1p(log.lengths)
    log.contributions[:, 0] = 12 * (length - length.mean()) + 0.5 * log.contributions[:, 0]
    shares = usual_shares(in_blocks(log).covariance)
    ramp = 1.5 * log.scores.std() * log.steps / log.steps.max()
    log.contributions[:] += ramp[:, None] * shares
    log.lengths[:] = np.expm1(length + ramp * shares[0] / 12)
    assert any((flag.kind, flag.objective) == ("one_objective", "objective-0") for flag in found(log))
    log.lengths[:] = np.random.default_rng(0).permutation(log.lengths)  # the same score, not being length
    assert found(log) == []


def test_longer_responses_that_are_better_beyond_their_length_are_no_hack():
    log = simulated_run(7, hack="length", size=1.0, honest=1.5, begins=0)
    assert found(log) == []


def test_uncertainty_that_grows_is_found_and_one_that_does_not_is_not():
    flag = next(
        f for f in found(simulated_run(8, honest=1.0, uncertainty_growth=1.0)) if f.kind == "out_of_distribution"
    )
    assert abs(flag.began - 60) <= 12
    assert 0.6 < flag.growth < 1.2
    assert found(simulated_run(8, honest=1.0, uncertainty_growth=1e-9)) == []


def test_runs_without_a_hack_are_flagged_no_more_often_than_is_stated():
    settings = [{}, {"honest": 1.0}, {"honest": 1.0, "wander": 0.1}, {"samples": 8, "steps": 60}]
    runs = [found(simulated_run(seed, **setting)) for setting in settings for seed in range(30)]
    assert sum(map(bool, runs)) <= most_false_alarms(len(runs))


@pytest.mark.slow
def test_over_many_runs_hacks_are_found_and_false_alarms_stay_at_their_rate():
    settings = [{}, {"honest": 1.5}, {"honest": 0.7, "wander": 0.1}]
    runs = [found(simulated_run(seed, **setting)) for setting in settings for seed in range(100, 250)]
    assert sum(map(bool, runs)) <= most_false_alarms(len(runs))
    hacked = [found(simulated_run(seed, hack="objective", honest=1.0)) for seed in range(60)]
    assert sum(any(f.objective == "objective-3" for f in flagged) for flagged in hacked) >= 57
    assert np.median([abs(f.began - 60) for flagged in hacked for f in flagged]) <= 6


def test_limits_are_exceeded_by_noise_as_often_as_asked():
    generator = np.random.default_rng(0)
    b, rate = 24, 0.05
    starts, ends, _ = intervals(b)
    exceeding = 0
    for _ in range(200):  # slowly and obviously: the slope of every interval by least squares
        noise = generator.normal(3.0, 2.0, b)
        deviation = np.sqrt(np.mean((noise[:-2] - 2 * noise[1:-1] + noise[2:]) ** 2) / 6)
        assert noise_covariance(noise[:, None])[0, 0] == pytest.approx(deviation**2)
        x = np.arange(b)
        slopes = [
            ((x[s:e] - x[s:e].mean()) @ noise[s:e]) / np.sqrt(((x[s:e] - x[s:e].mean()) ** 2).sum())
            for s, e in zip(starts, ends, strict=True)
        ]
        exceeding += max(slopes) / deviation > limit(b, rate)
    assert binom.ppf(0.001, 200, rate) <= exceeding <= binom.ppf(0.999, 200, rate)


def test_the_knot_of_a_broken_line_is_where_it_bends():
    values = np.concatenate([np.linspace(1, 0, 30), np.linspace(0.1, 3, 30)])
    knot, low, high = broken_line(values + np.random.default_rng(0).normal(0, 0.05, 60), np.ones(60))
    assert abs(knot - 29) <= 2
    assert low <= knot <= high


def test_blocks_hold_the_means_of_their_steps():
    log = simulated_run(9, steps=100, samples=10)
    blocks = in_blocks(log)
    for i in (0, 17, len(blocks) - 1):
        inside = (log.steps >= blocks.first[i]) & (log.steps <= blocks.last[i])
        assert blocks.counts[i] == inside.sum()
        assert blocks.contributions[i] == pytest.approx(log.contributions[inside].mean(0))
        assert blocks.length[i] == pytest.approx(np.log1p(log.lengths[inside]).mean())
    centred = np.concatenate([log.scores[log.steps == s] - log.scores[log.steps == s].mean() for s in range(100)])
    assert blocks.spread == pytest.approx(np.sqrt((centred**2).sum() / 900))


def test_slopes_on_length_are_taken_inside_prompts_where_the_log_tells_them_apart():
    log = simulated_run(10, steps=20, samples=12)
    groups = np.tile(np.repeat([0, 1, 2], 4), 20)
    blocks = in_blocks(RunLog(log.names, log.steps, log.contributions, log.lengths, groups=groups))
    expected = 0.0
    for step in range(20):
        for group in range(3):
            rows = (log.steps == step) & (groups == group)
            long, score = np.log1p(log.lengths[rows]), log.scores[rows]
            expected += ((long - long.mean()) * (score - score.mean())).sum()
    assert blocks.length_sums[:, 1].sum() == pytest.approx(expected)
    assert blocks.freedom.sum() == 20 * 12 - 60


@pytest.mark.parametrize(("steps", "samples"), [(5, 100), (30, 2)])
def test_a_run_that_is_too_short_is_an_error(steps, samples):
    with pytest.raises(MonitorError, match="the run is too short"):
        in_blocks(simulated_run(0, steps=steps, samples=samples))
