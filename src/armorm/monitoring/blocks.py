"""A run as some dozens of blocks of steps: block means, spread within steps, and sums for slopes on length.

A block consists of whole steps, and blocks hold about equally many samples, so that their means are about equally
precise, nearly normal, and nearly independent even if neighbouring steps are not. Variation within a step (between
samples of one policy) is kept apart from variation between steps (the policy).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from armorm.monitoring.log import MonitorError, RunLog

MOST_BLOCKS, FEWEST_BLOCKS = 48, 12
_FEWEST_SAMPLES = 8  # per block on average


@dataclass(frozen=True)
class Blocks:
    """A run in b blocks; all arrays float64, None for columns that the log lacks."""

    first: np.ndarray  # (b,) first step of each block
    last: np.ndarray  # (b,) last step
    counts: np.ndarray  # (b,) samples
    contributions: np.ndarray  # (b, k) means
    length: np.ndarray | None  # (b,) mean of log1p of the length
    tokens: np.ndarray | None  # (b,) mean length
    rewards: np.ndarray | None  # (b, k) means
    uncertainty: np.ndarray | None  # (b, k) means
    covariance: np.ndarray  # (k, k) of contributions within steps, over the whole run
    length_variance: float  # of log1p of the length within steps, 0 without lengths
    length_sums: np.ndarray  # (b, 3) squares and products of length and score within prompts (or steps): LL, LS, SS
    freedom: np.ndarray  # (b,) degrees of freedom of these sums
    length_correlations: np.ndarray  # (k,) of contributions with log1p of the length within prompts, 0 without lengths
    step_of: np.ndarray  # (m,) the distinct steps of the run
    step_contributions: np.ndarray  # (m, k) means of each step
    step_length: np.ndarray | None  # (m,) means
    step_counts: np.ndarray  # (m,) samples

    def __len__(self) -> int:
        return len(self.first)

    @property
    def scores(self) -> np.ndarray:
        """(b,) mean scores."""
        return self.contributions.sum(1)

    @property
    def spread(self) -> float:
        """Standard deviation of the score within steps."""
        return float(np.sqrt(max(self.covariance.sum(), 0.0)))


def in_blocks(log: RunLog) -> Blocks:
    """Divide a run into blocks; a `MonitorError` for a run with too few samples or steps."""
    steps, step_index, step_counts = np.unique(log.steps, return_inverse=True, return_counts=True)
    most = min(MOST_BLOCKS, len(log) // _FEWEST_SAMPLES, len(steps))
    if most < FEWEST_BLOCKS:
        what = f"{len(log):,} samples of {len(steps):,} steps" if log.by_step else f"{len(log):,} samples"
        wanted = f"{FEWEST_BLOCKS} steps and {FEWEST_BLOCKS * _FEWEST_SAMPLES} samples"
        raise MonitorError(f"found {what}, expected at least {wanted}: the run is too short")
    middles = np.cumsum(step_counts) - step_counts / 2
    _, block_of_step = np.unique((middles * most / len(log)).astype(np.int64), return_inverse=True)
    block = block_of_step[step_index]
    b = int(block_of_step[-1]) + 1
    if b < FEWEST_BLOCKS:
        raise MonitorError(
            f"found most of {len(log):,} samples in few of {len(steps):,} steps, expected them spread over the run"
        )
    if not log.by_step:  # without steps, neighbouring rows are treated as samples of one policy
        step_index, steps, step_counts = block, np.arange(b, dtype=np.float64), np.bincount(block)
    length = None if log.lengths is None else np.log1p(log.lengths)
    within = centred(log.contributions, step_index)
    freedom = max(len(log) - len(step_counts), 1)
    group = step_index
    if log.groups is not None:  # one index for each prompt of each step
        group = np.unique(np.stack([step_index, log.groups], 1), axis=0, return_inverse=True)[1].reshape(-1)
    sums, degrees, length_variance = np.zeros((b, 3)), np.zeros(b), 0.0
    correlations = np.zeros(log.contributions.shape[1])
    if length is not None:
        length_variance = float((centred(length, step_index) ** 2).sum() / freedom)
        long, score = centred(length, group), centred(log.scores, group)
        _, correlations = within_slope(length, log.contributions, group)
        for column, product in enumerate((long * long, long * score, score * score)):
            sums[:, column] = np.bincount(block, product, b)
        _, starts = np.unique(group, return_index=True)
        degrees = (np.bincount(block, minlength=b) - np.bincount(block[starts], minlength=b)).astype(np.float64)
    ends = np.flatnonzero(np.diff(block, append=b))
    first = log.steps[np.concatenate([[0], ends[:-1] + 1])]
    return Blocks(
        first=first,
        last=log.steps[ends],
        counts=np.bincount(block, minlength=b).astype(np.float64),
        contributions=means(log.contributions, block),
        length=None if length is None else means(length, block),
        tokens=None if log.lengths is None else means(log.lengths, block),
        rewards=None if log.rewards is None else means(log.rewards, block),
        uncertainty=None if log.uncertainty is None else means(log.uncertainty, block),
        covariance=within.T @ within / freedom,
        length_variance=length_variance,
        length_sums=sums,
        freedom=degrees,
        length_correlations=correlations,
        step_of=steps if log.by_step else first,
        step_contributions=means(log.contributions, step_index),
        step_length=None if length is None else means(length, step_index),
        step_counts=step_counts.astype(np.float64),
    )


def means(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Means of the rows (n,) or (n, c) with the same index; indices are 0, 1, ... without gaps."""
    sums = np.array([np.bincount(index, column) for column in np.reshape(values.T, (-1, len(values)))])
    return (sums / np.bincount(index)).T.reshape(-1, *values.shape[1:])


def within_slope(length: np.ndarray, contributions: np.ndarray, group: np.ndarray) -> tuple[float, np.ndarray]:
    """Slope of the score on log length (n,) within groups, and correlations (k,) of contributions with it; 0 for none.

    Args:
        group: (n,) index of the prompt or step of each sample, 0, 1, ... without gaps.
    """
    long, shares = centred(length, group), centred(contributions, group)
    square = float((long * long).sum())
    sizes = np.sqrt(square * (shares * shares).sum(0))
    products = long @ shares
    correlations = np.divide(products, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    return (float(products.sum()) / square if square > 0 else 0.0), correlations


def centred(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Values (n,) or (n, c) less the mean of the rows with the same index."""
    return values - means(values, index)[index]
