"""Coverage of the intervals that armorm prints: simulated data with a known truth.

python benchmarks/coverage.py [--runs 100]    # about ten minutes on one core

A stated 95% should hold the truth in 93 to 98% of runs, averaged over accuracies, from 50 prompts on. `percentile` is
the percentile bootstrap within subsets, on the same data.

Rewards: coverage of conformal intervals on new rows; the root mean square of (reward - noiseless rating) / epistemic
deviation, which should be 1; the share of new rows above the "99th percentile" of leverage. Calibration: how often the
scale is within 1.96 standard errors, and the mean error of the probabilities.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm.evaluation.benchmarks import rewardbench
from armorm.evaluation.bootstrap import Clusters, differences, intervals
from armorm.evaluation.metrics import GroupSums, Measurements, Metric, by_group, cluster_sums, nan_mean
from armorm.files import write_json
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.calibration import fit_scale
from armorm.heads.regression import fit_from_statistics
from armorm.heads.uncertainty import fit_uncertainty
from armorm.progress import progress

ACCURACIES = (0.5, 0.65, 0.8, 0.9, 0.95)
RESAMPLES = 300
ROWS = ((600, 64, 0.0), (2000, 128, 0.0), (2000, 128, 0.5), (2000, 128, 0.8), (3000, 512, 0.5), (600, 1024, 0.5))
Case = tuple[list[str], list[str], list[np.ndarray], Callable[[Measurements], list[Metric]]]


def mean_of_subsets(names: Sequence[str]) -> list[Metric]:
    """The plain mean of the accuracies of some subsets."""
    groups = [(name, "right") for name in dict.fromkeys(names)]
    return [Metric("overall", "mean", tuple(groups), lambda sums: nan_mean([sums.mean(group) for group in groups]))]


def _fixed(metrics: list[Metric], measurements: Measurements) -> list[Metric]:
    return metrics


def four_sections(measurements: Measurements) -> list[Metric]:
    """RewardBench's mean of four sections."""
    return [metric for metric in rewardbench.metrics(measurements) if metric.name == "mean of four sections"]


def cases(generator: np.random.Generator) -> dict[str, Case]:
    """By name: subset and prompt of each item, true accuracies of the items in each setting, and the metric."""
    found: dict[str, Case] = {}
    for prompts, sizes in {50: (50, 2, 1), 120: (120, 60, 4, 2, 1), 500: (500, 4)}.items():
        for size in sizes:
            names = [f"s{i // size:03d}" for i in range(prompts)]
            found[f"{prompts} prompts, subsets of {size}"] = (
                names, [str(i) for i in range(prompts)], [np.full(prompts, p) for p in ACCURACIES],
                partial(_fixed, mean_of_subsets(names)),
            )  # fmt: skip
    found["50 prompts of 20 pairs"] = (
        ["a"] * 1000, [str(i // 20) for i in range(1000)], [np.full(1000, p) for p in ACCURACIES],
        partial(_fixed, mean_of_subsets(["a"])),
    )  # fmt: skip
    rows = [name for name, count in rewardbench.ROWS.items() for _ in range(count)]
    for limit in (100, 300, 1000):
        names = [rows[i] for i in np.sort(generator.choice(len(rows), limit, replace=False))]
        settings = [{name: generator.beta(6, 2) for name in rewardbench.ROWS} for _ in ACCURACIES]
        truths = [np.array([setting[name] for name in names]) for setting in settings]
        found[f"RewardBench, --limit {limit}"] = (names, [str(i) for i in range(limit)], truths, four_sections)
    return found


def simulate(case: Case, runs: int, generator: np.random.Generator) -> dict[str, float | None]:
    """Share of runs with an interval, its coverage and mean width, and the coverage of the percentile bootstrap."""
    names, prompts, settings, metrics = case
    where = Clusters.of_items(prompts, names)
    held, widths, plain = [], [], []
    for accuracies in settings:
        expected = by_group(names, "right", accuracies)
        truth = metrics(expected)[0].on(expected)
        for _ in range(runs):
            values = (generator.random(len(names)) < accuracies).astype(float)
            measured = by_group(names, "right", values)
            (interval,) = intervals(metrics(measured), measured, where, resamples=RESAMPLES)
            low, high = percentile_bootstrap(metrics(measured)[0], measured, where, generator)
            plain.append(low <= truth <= high)
            if interval is not None:
                held.append(interval[0] <= truth <= interval[1])
                widths.append(interval[1] - interval[0])
    shown = len(held) / (runs * len(settings))
    return {"shown": shown, "coverage": mean(held), "width": mean(widths), "percentile": mean(plain)}


def percentile_bootstrap(
    metric: Metric, measured: Measurements, where: Clusters, generator: np.random.Generator
) -> tuple[float, float]:
    """The middle 95% of a metric over resamples of prompts within each subset."""
    index = {group: column for column, group in enumerate(measured)}
    sums, counts = cluster_sums(measured, index, where.of, len(where.strata))
    order = np.argsort(where.strata, kind="stable")
    sizes = np.bincount(where.strata)
    start, size = (np.repeat(values, sizes) for values in (np.cumsum(sizes) - sizes, sizes))
    drawn = order[start + (generator.random((RESAMPLES, len(order))) * size).astype(np.int64)]
    weights = np.zeros((RESAMPLES, len(order)))
    np.add.at(weights, (np.arange(RESAMPLES)[:, None], drawn), 1.0)
    low, high = np.percentile(metric.value(GroupSums(index, weights @ sums, weights @ counts)), (2.5, 97.5))
    return float(low), float(high)


def simulate_difference(prompts: int, runs: int, generator: np.random.Generator) -> dict[str, float | None]:
    """The same for the difference of two models that agree on most prompts."""
    names, where = ["a"] * prompts, Clusters.of_items([str(i) for i in range(prompts)], ["a"] * prompts)
    held, widths = [], []
    for _ in range(runs):
        first = (generator.random(prompts) < 0.8).astype(float)
        second = np.where(generator.random(prompts) < 0.2, (generator.random(prompts) < 0.6).astype(float), first)
        measured = (by_group(names, "right", first), by_group(names, "right", second))
        (found,) = differences(mean_of_subsets(names), *measured, where, resamples=RESAMPLES, permutations=50)
        if found.interval is not None:
            held.append(found.interval[0] <= 0.2 * (0.8 - 0.6) <= found.interval[1])
            widths.append(found.interval[1] - found.interval[0])
    return {"shown": len(held) / runs, "coverage": mean(held), "width": mean(widths), "percentile": None}


def rated_rows(n: int, d: int, shared: float, generator: np.random.Generator, weight: np.ndarray) -> list[np.ndarray]:
    """Features, noiseless ratings, ratings and folds of n responses, four to a prompt.

    Half of the variance of the features, and the share `shared` of that of the noise, belongs to the prompt.
    """
    prompt = np.arange(n) // 4
    spread = np.arange(1, d + 1) ** -0.5
    features = np.sqrt(0.5) * spread * (generator.normal(size=(n // 4, d))[prompt] + generator.normal(size=(n, d)))
    truth = features @ weight / np.linalg.norm(weight * spread)
    noise = np.sqrt(shared) * generator.normal(size=n // 4)[prompt] + np.sqrt(1 - shared) * generator.normal(size=n)
    return [features.astype(np.float32), truth, truth + 0.5 * noise, prompt % 5]


def simulate_rewards(
    n: int, d: int, shared: float, runs: int, generator: np.random.Generator
) -> dict[str, float | None]:
    """Means over runs, each with a head of its own and 2,000 new rows."""
    found: dict[str, list[float]] = {"0.5": [], "0.8": [], "0.95": [], "z": [], "unusual": []}
    for _ in range(runs):
        weight = generator.normal(size=d)
        features, _, ratings, folds = rated_rows(n, d, shared, generator, weight)
        statistics = accumulate(blocks_of(features, ratings[:, None], folds), ["a"], 5, d)
        head = fit_from_statistics(statistics)
        uncertainty = fit_uncertainty(statistics, head, blocks_of(features, ratings[:, None], folds), np.array([True]))
        new, truth, given, _ = rated_rows(2000, d, shared, generator, weight)
        leverage, reward = uncertainty.leverage(new), head.predict(new)[:, 0]
        for level, factor in uncertainty.conformal.items():
            half = factor[0] * uncertainty.predictive_std(leverage)[:, 0]
            found[str(level)].append(float((np.abs(given - reward) <= half).mean()))
        squares = ((reward - truth) / uncertainty.epistemic_std(leverage)[:, 0]) ** 2
        found["z"].append(float(squares.mean()))
        found["unusual"].append(float((leverage > uncertainty.usual_leverage).mean()))
    return {name: mean(values) for name, values in found.items()} | {"z": float(np.sqrt(np.mean(found["z"])))}


def simulate_scale(pairs: int, runs: int, generator: np.random.Generator) -> dict[str, float | None]:
    """Calibration on pairs whose margins have a standard deviation of 1 and a true scale of 2."""
    held, errors = [], []
    for _ in range(runs):
        margins = generator.normal(size=pairs)
        margins *= np.where(generator.random(pairs) < 1 / (1 + np.exp(-2 * margins)), 1, -1)
        found = fit_scale(margins)
        held.append(abs(np.log(found.scale / 2)) <= 1.96 * found.scale_error)
        grid = np.abs(generator.normal(size=1000))
        errors.append(np.abs(1 / (1 + np.exp(-found.scale * grid)) - 1 / (1 + np.exp(-2 * grid))).mean())
    return {"within": mean(held), "error": mean(errors)}


def mean(values: Sequence[float]) -> float | None:
    """Mean, or None of nothing."""
    return float(np.mean(values)) if len(values) else None


def main() -> None:
    """Simulate, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="Runs per case and accuracy.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "coverage.json")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    simulated = cases(generator)
    results: dict[str, dict[str, float | None]] = {}
    with progress("coverage", len(simulated) + 2, "cases") as advance:
        for name, case in simulated.items():
            results[name] = simulate(case, arguments.runs, generator)
            advance(1)
        for prompts in (50, 200):
            name = f"difference of two models, {prompts} prompts"
            results[name] = simulate_difference(prompts, arguments.runs * len(ACCURACIES), generator)
            advance(1)
    runs = arguments.runs * len(ACCURACIES)
    rewards, scales = {}, {}
    with progress("rewards and calibration", len(ROWS) + 3, "cases") as advance:
        for n, d, shared in ROWS:
            name = f"{n:,} rows, d = {d:,}, shared noise {shared:g}"
            rewards[name] = simulate_rewards(n, d, shared, max(arguments.runs // 20, 1), generator)
            advance(1)
        for pairs in (20, 50, 500):
            scales[f"{pairs} pairs"] = simulate_scale(pairs, runs, generator)
            advance(1)
    show(f"Coverage of 95% intervals, {runs} runs a row", ("", "shown", "coverage", "width", "percentile"), results)
    heads = ("", "50%", "80%", "95%", "z rms", "unusual")
    show(f"Rewards, {max(arguments.runs // 20, 1)} heads a row", heads, rewards)
    show(f"Calibration, {runs} fits a row", ("", "within 1.96 errors", "error of probabilities"), scales)
    write_json(arguments.output, {"runs": runs, "cases": results, "rewards": rewards, "calibration": scales})


def show(title: str, heads: Sequence[str], rows: dict[str, dict[str, float | None]]) -> None:
    """Print one table."""
    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="right" if head else "left")
    for name, entry in rows.items():
        table.add_row(name, *("" if value is None else f"{value:.3f}" for value in entry.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
