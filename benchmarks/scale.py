"""Stage 1 on more data than fits into memory: synthetic features, shard by shard, in one pass that keeps only sums.

Each shard is generated, added to the statistics and discarded. Ratings follow known weights with known noise, so the
results can be checked: R2 against its expected value, the weights against the true ones, and, on the first rows, the
whole against the plain normal equations in float64.

    python benchmarks/scale.py [--rows 10000000] [--hidden 1024] [--output benchmarks/results/scale.json]

10,000,000 rows take six minutes on two cores; --rows 200000 takes seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from armorm.files import write_json
from armorm.heads.accumulation import RatedBlock, accumulate
from armorm.heads.regression import fit_from_statistics
from armorm.progress import Advance, ignore, progress
from peak import peak_bytes

NAMES = ["helpful", "correct", "safe"]
NOISE = 0.5
FOLDS = 5
SHARD = 50_000
# Objectives that the source of a shard rates: two sources, so two patterns of missing ratings.
SOURCES = ((0, 1), (2,))
ALPHAS = (1e-2, 1.0, 1e2)


def truth(hidden: int) -> np.ndarray:
    """True weights (k, d) with unit norm."""
    weights = np.random.default_rng(1).standard_normal((len(NAMES), hidden))
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


def shards(rows: int, hidden: int, clock: dict[str, float], advance: Advance) -> Iterator[RatedBlock]:
    """Generate shards of rows; `clock` accumulates the time this takes."""
    weights = truth(hidden)
    for number, start in enumerate(range(0, rows, SHARD)):
        begin = time.perf_counter()
        count = min(SHARD, rows - start)
        rng = np.random.Generator(np.random.SFC64((2, number)))
        features = rng.standard_normal((count, hidden), dtype=np.float32)
        ratings = np.full((count, len(NAMES)), np.nan)
        rated = list(SOURCES[number % len(SOURCES)])
        ratings[:, rated] = features @ weights[rated].T.astype(np.float32) + NOISE * rng.standard_normal(
            (count, len(rated))
        )
        clock["draw"] += time.perf_counter() - begin
        yield RatedBlock(features, ratings, rng.integers(0, FOLDS, count))
        advance(count)


def main() -> None:
    """Generate, accumulate, solve, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    arguments = parser.parse_args()
    rows, hidden = arguments.rows, arguments.hidden
    clock = {"draw": 0.0}
    start = time.perf_counter()
    with progress("summing", rows, "rows") as advance:
        statistics = accumulate(shards(rows, hidden, clock, advance), NAMES, FOLDS, hidden)
    passed = time.perf_counter() - start
    begin = time.perf_counter()
    head = fit_from_statistics(statistics, alphas=ALPHAS)
    solved = time.perf_counter() - begin
    peak = peak_bytes()
    result = {
        "rows": rows,
        "hidden": hidden,
        "objectives": len(NAMES),
        "folds": FOLDS,
        "features_bytes": rows * hidden * 4,
        "seconds_drawing": clock["draw"],
        "seconds_summing": passed - clock["draw"],
        "seconds_solving": solved,
        "peak_memory_bytes": peak,
        "gram_flops": 2.0 * rows * hidden**2,
        "r2": [report.r2 for report in head.reports],
        "r2_expected": 1 / (1 + NOISE**2),
        "largest_weight_error": float(np.abs(head.weight - truth(hidden)).max()),
        "against_normal_equations": against_normal_equations(hidden),
    }
    write_json(arguments.output, result)
    console = Console(highlight=False)
    console.print(f"{rows:,} rows of {hidden}: {rows * hidden * 4 / 1e9:.1f} GB of features processed")
    for name in ("seconds_drawing", "seconds_summing", "seconds_solving"):
        console.print(f"  {name.replace('_', ' ')}: {result[name]:,.1f}")
    console.print(f"  peak memory: {peak / 1e9:.2f} GB")
    console.print(f"  R2 {', '.join(f'{value:.4f}' for value in result['r2'])} (expected {result['r2_expected']:.4f})")
    console.print(f"  largest weight error: {result['largest_weight_error']:.2e}")
    console.print(f"  largest difference from the normal equations: {result['against_normal_equations']:.2e}")


def against_normal_equations(hidden: int) -> float:
    """Largest weight difference from the normal equations in float64, on the rows of two shards."""
    parts = list(shards(2 * SHARD, hidden, {"draw": 0.0}, ignore))
    head = fit_from_statistics(accumulate(iter(parts), NAMES, FOLDS, hidden), alphas=(1.0,))
    worst = 0.0
    for block, rated in zip(parts, SOURCES, strict=True):
        features = block.features.astype(np.float64)
        gram = features.T @ features + np.eye(hidden)
        for objective in rated:
            direct = np.linalg.solve(gram, features.T @ block.ratings[:, objective])
            worst = max(worst, float(np.abs(head.weight[objective] - direct).max()))
    return worst


if __name__ == "__main__":
    main()
