"""How many planted label errors `armorm inspect --labels` finds (`armorm.evaluation.audits.label_errors`).

In the training rows of a run (of the real sets: `armorm train recipes/small.yaml`), a share of the ratings of one
objective is replaced by wrong ones (a draw from the other ratings of the objective that differ from the right one; a
yes becomes a no), the head is fitted to them as in training (alpha by cross-validation over prompts), and the ratings
are ranked. The table has the share of the planted errors that is among the first as many ratings, by the size of

    residual           the error of the head that was fitted to the rating too
    out of fold        the error of the head that was fitted without the rating's fold of prompts
    without prompt     the error of the head that was fitted without all rows of the rating's prompt
    leave-one-out      the error of the head that was fitted without the rating
    in sd              the same in standard deviations: what the command ranks by

Means over seeds with 95% intervals (t), and that of the paired difference of the last and the first. By chance it is
the share itself. Errors that the sets have already count as misses.

    python benchmarks/label_errors.py RUN [--output benchmarks/results/label_errors.json]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from armorm.files import write_json
from armorm.heads.influence import FittedRidge
from armorm.heads.rated_record import RatedRun, sum_of_rows
from armorm.heads.regression import fit_regression

METHODS = ("residual", "out of fold", "without prompt", "leave-one-out", "in sd")


def planted(ratings: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ratings (n,) with errors, and the rows that have one."""
    rng = np.random.default_rng(seed)
    wrong, rows = ratings.copy(), rng.choice(len(ratings), max(round(share * len(ratings)), 1), replace=False)
    for row in rows:
        others = ratings[ratings != ratings[row]]
        wrong[row] = others[rng.integers(len(others))]
    return wrong, rows


def errors(
    features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, prompts: np.ndarray, intercept: bool
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Size of the error (n, s) of every rating (n, s) by each method, and the alphas that were chosen."""
    names = [str(seed) for seed in range(ratings.shape[1])]
    head = fit_regression(features, ratings, folds, names, intercept=intercept)
    alphas = np.array([report.alpha for report in head.reports])
    ridge = FittedRidge.of(sum_of_rows(features, ratings), alphas, intercept)
    rotated = ridge.rotated(features)
    leverage, residuals = ridge.leverage(rotated), ridge.residuals(features, ratings)
    without_prompt = np.empty_like(residuals)
    order = np.argsort(prompts, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1):
        for alpha in np.unique(alphas):
            columns = np.flatnonzero(alphas == alpha)
            kept = np.eye(len(rows)) - (rotated[rows] * ridge.inverse[:, columns[0]]) @ rotated[rows].T
            without_prompt[np.ix_(rows, columns)] = np.linalg.solve(kept, residuals[np.ix_(rows, columns)])
    found = (
        residuals,
        ratings - head.predict_out_of_fold(features, folds),
        without_prompt,
        residuals / (1 - leverage),
        residuals / np.sqrt(1 - leverage),
    )
    return {name: np.abs(values) for name, values in zip(METHODS, found, strict=True)}, alphas.tolist()


def interval(values: np.ndarray) -> dict[str, float]:
    """Mean and half-width of the 95% interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": float(values.mean()), "half_width": float(half)}


def measure(run: RatedRun, column: int, share: float, seeds: int) -> dict[str, Any]:
    """Share of the planted errors of one objective that each method finds."""
    record, start = run.record, time.process_time()
    parts = list(run.blocks([column]))
    rows, features, ratings = (np.concatenate([part[i] for part in parts]) for i in range(3))
    drawn = [planted(ratings[:, 0], share, seed) for seed in range(seeds)]
    wrong = np.column_stack([values for values, _ in drawn])
    sizes, alphas = errors(features, wrong, record.folds[rows], record.prompts[rows], record.intercept)
    found = {name: np.empty(seeds) for name in METHODS}
    for seed, (_, places) in enumerate(drawn):
        for name, values in sizes.items():
            first = np.argsort(-values[:, seed], kind="stable")[: len(places)]
            found[name][seed] = np.isin(places, first).mean()
    return {
        "objective": record.objectives.names[column],
        "ratings": len(rows),
        "prompts": len(np.unique(record.prompts[rows])),
        "levels": len(np.unique(ratings)),
        "planted": len(drawn[0][1]),
        "alphas": sorted(set(alphas)),
        "found": {name: interval(values) for name, values in found.items()},
        "gain": interval(found["in sd"] - found["residual"]),
        "seconds": time.process_time() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run, with its work folder")
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--least", type=int, default=400, help="fewest ratings of an objective")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/label_errors.json"))
    arguments = parser.parse_args()
    run, console = RatedRun.open(arguments.run), Console(soft_wrap=True)
    counts = (~np.isnan(run.record.ratings)).sum(0)
    used = [i for i, o in enumerate(run.record.objectives) if not o.compute and counts[i] >= arguments.least]
    table = Table("objective", "ratings", "prompts", "levels", *METHODS, "in sd - residual")
    results = []
    for column in used:
        entry = measure(run, column, arguments.share, arguments.seeds)
        results.append(entry)
        console.print(f"{entry['objective']}: {entry['seconds']:.0f} s", highlight=False)
        cells = [f"{part['mean']:.1%} ± {part['half_width']:.1%}" for part in (*entry["found"].values(), entry["gain"])]
        table.add_row(entry["objective"], *(f"{entry[name]:,}" for name in ("ratings", "prompts", "levels")), *cells)
    means = {name: float(np.mean([entry["found"][name]["mean"] for entry in results])) for name in METHODS}
    table.add_section()
    table.add_row("mean", "", "", "", *(f"{value:.1%}" for value in means.values()), "")
    Console(width=180).print(table)
    settings = {"share": arguments.share, "seeds": arguments.seeds}
    write_json(arguments.output, {**settings, "objectives": results, "mean": means})


if __name__ == "__main__":
    main()
