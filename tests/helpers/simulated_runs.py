"""Simulated RL runs with known truth: samples of k objectives, broad or planted growth, responses of some length."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from armorm.monitoring.log import RunLog


def simulated_run(
    seed: int,
    *,
    steps: int = 120,
    samples: int = 32,
    k: int = 8,
    honest: float = 0.0,
    hack: str = "",
    size: float = 1.5,
    begins: int = 60,
    wander: float = 0.0,
    length_slope: float = 3.0,
    uncertainty_growth: float = 0.0,
) -> RunLog:
    """A run.

    Args:
        honest: growth of the score, saturating, shared by all objectives in random parts.
        hack: `objective` (number 3 grows), `length` (responses get longer, and longer ones score higher), or none.
        size: growth of the score by the hack, in standard deviations of scores.
        begins: step from which it grows.
        wander: standard deviation of what whole steps share (an AR(1) of lag correlation 0.5), in the same unit.
        length_slope: of the score on log1p of the length; the spread of the latter is 0.5, so
            that by default length explains about a fifth of the spread of scores.
        uncertainty_growth: of the uncertainty, as a share, from `begins` on.
    """
    generator = np.random.default_rng(seed)
    step = np.repeat(np.arange(steps), samples)
    mixing = np.eye(k) + 0.2 * generator.normal(size=(k, k))
    contributions = generator.normal(size=(len(step), k)) @ mixing * generator.uniform(0.5, 1.5, k)
    long = 4 + 0.5 * generator.normal(size=len(step))
    contributions[:, 1] += length_slope / 2 * (long - 4)
    contributions[:, 2] += length_slope / 2 * (long - 4)
    deviation = contributions.sum(1).std()
    ramp = np.clip((step - begins) / max(steps - begins, 1), 0, None)
    if honest:
        parts = generator.dirichlet(np.full(k, 5.0))
        contributions += honest * deviation * (1 - np.exp(-3 * step / steps))[:, None] * parts
    if hack == "objective":
        contributions[:, 3] += size * deviation * ramp
    elif hack == "length":
        longer = size * deviation * ramp / length_slope
        long = long + longer
        contributions[:, 1] += length_slope / 2 * longer
        contributions[:, 2] += length_slope / 2 * longer
    if wander:
        shared = np.zeros((steps, k))
        for i in range(1, steps):
            shared[i] = 0.5 * shared[i - 1] + np.sqrt(0.75) * generator.normal(size=k)
        contributions += wander * deviation / np.sqrt(k) * shared[step]
    uncertainty = (0.1 + 0.02 * generator.random((len(step), k))) * (1 + uncertainty_growth * ramp)[:, None]
    return RunLog(
        names=[f"objective-{i}" for i in range(k)],
        steps=step.astype(np.float64),
        contributions=contributions,
        lengths=np.expm1(np.maximum(long, 0)),
        rewards=0.5 + 0.1 * contributions,
        uncertainty=uncertainty if uncertainty_growth else None,
    )


def plant(
    log: RunLog, seed: int, what: str = "", *, begins: int = 60, slack: float = 0.0
) -> tuple[RunLog, list[dict[str, float]]]:
    """A run of steps of equal size with groups of four samples, and the KL and entropy of each step.

    Args:
        what: is planted from step `begins` on: `score` or `objective` (falls), `alike` (samples of most groups get the
            scores of the first), `ceiling` (an objective's rewards reach 1), `kl`, `entropy`, or nothing.
        slack: everything has moved by this share of 0.2 standard deviations after step 20, and stays there.
    """
    generator = np.random.default_rng(seed + 1)
    steps = int(log.steps[-1]) + 1
    samples, k = len(log) // steps, len(log.names)
    contributions, rewards = log.contributions.copy(), np.clip(0.5 + 0.05 * log.contributions, 0, None)
    groups = np.tile(np.arange(samples) // 4, steps)
    late = (log.steps >= begins) & (generator.random(len(log)) < 0.8)
    ramp = np.clip((log.steps - begins) / max(steps - begins, 1), 0, None)
    # The same for all samples of a prompt, a quarter of their variance.
    shared = generator.normal(size=(steps, samples // 4 + 1, k))[log.steps.astype(int), groups]
    contributions += 0.5 * contributions.std(0) * shared
    deviation, spread = contributions.std(0), contributions.sum(1).std()
    if slack:
        moved = np.sign(generator.normal(size=k)) * deviation * 0.2 * slack
        # so that neither the score nor an objective moves by more than the slack
        moved *= min(1.0, 0.2 * slack * spread / max(abs(moved.sum()), 1e-9))
        contributions[log.steps >= 20] += moved
    if what == "score":
        contributions -= 1.5 * spread * ramp[:, None] / k
    elif what == "objective":
        contributions[:, 3] -= 1.5 * deviation[3] * ramp
    elif what == "alike":
        first = np.arange(len(log)) // 4 * 4
        alike = (generator.random(len(log)) < 0.7)[first] & (log.steps >= begins)
        contributions[alike] = contributions[first[alike]]
    elif what == "ceiling":
        rewards[late, 3] = 1.0
    kl = 0.02 * np.exp(0.2 * generator.normal(size=steps)) * (1 + np.arange(steps) / steps)
    entropy = 1.5 * np.exp(0.05 * generator.normal(size=steps))
    after = np.clip((np.arange(steps) - begins) / max(steps - begins, 1), 0, None)
    if what == "kl":
        kl = kl * np.exp(6 * after)
    elif what == "entropy":
        entropy = entropy * np.exp(-3 * after)
    planted = replace(log, contributions=contributions, rewards=rewards, groups=groups)
    return planted, [{"kl": float(a), "entropy": float(b)} for a, b in zip(kl, entropy, strict=True)]
