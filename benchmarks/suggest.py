"""Learning curves of stage 1 when the next ratings are chosen by `armorm suggest`, at random, or by uncertainty alone.

For each set, on features of armorm-tiny: a share of the prompts is held out; 40 ratings of random prompts are the
start, and each step doubles the ratings from the rest. The penalty is chosen by cross-validation on what is rated so
far, as in training, and the next ratings by that fit:

    random       any replies
    spread       random replies of as many prompts as possible
    uncertainty  the largest leverage, which is the largest variance, in one go
    any prompt   the greedy choice of `armorm.heads.optimal_design`, without turns
    suggest      the same with prompts taken in turns, as `armorm suggest` does

The figure is the Spearman correlation with held-out ratings, a mean over splits; differences from `random` are paired
by split, with the standard error over splits.

    python benchmarks/suggest.py [--data ../shared/data/ratings] [--output benchmarks/results/suggest.json]

Also draws docs/images/suggest.svg (`--picture`). Features are computed once and kept in `--features`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm.backbone.decoder import Backbone
from armorm.backbone.score_input import read_score_input
from armorm.correlation import spearman
from armorm.data.ratings import sample_by_prompt
from armorm.data.sources import Location
from armorm.features.extract import extract
from armorm.features.store import FeatureStore
from armorm.files import write_json
from armorm.heads.optimal_design import RidgePosterior, greedy_design
from armorm.heads.rated_record import sum_of_rows
from armorm.heads.regression import fit_regression
from armorm.progress import progress, say

SETS = (
    "justeval-helpfulness",
    "truthfulqa-informative",
    "dstc9-overall",
    "diasafety-is_safe",
    "gptfuzz-refuses_harmful",
)
ROWS = 1500  # of each set, at most
SIZES = (40, 80, 160, 320)
SPLITS = 10
HELD_OUT = 0.3
FOLDS = 3
ALPHAS = tuple(10.0**e for e in range(-2, 5))
Choose = Callable[[RidgePosterior, np.ndarray, np.ndarray, int, np.random.Generator], np.ndarray]


def at_random(
    posterior: RidgePosterior, x: np.ndarray, prompts: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    return generator.permutation(len(x))[:count]


def spread(
    posterior: RidgePosterior, x: np.ndarray, prompts: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    order = generator.permutation(len(x))
    within = np.empty(len(x), np.int64)
    seen: dict[int, int] = {}
    for row in order:
        within[row] = seen[prompts[row]] = seen.get(prompts[row], -1) + 1
    return order[np.argsort(within[order], kind="stable")][:count]


def uncertainty(
    posterior: RidgePosterior, x: np.ndarray, prompts: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    return np.argsort(-posterior.leverage(x), kind="stable")[:count]


def any_prompt(
    posterior: RidgePosterior, x: np.ndarray, prompts: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    return greedy_design(posterior, x, count).chosen


def suggest(
    posterior: RidgePosterior, x: np.ndarray, prompts: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    return greedy_design(posterior, x, count, prompts).chosen


STRATEGIES: Mapping[str, Choose] = {
    "random": at_random,
    "spread": spread,
    "uncertainty": uncertainty,
    "any prompt": any_prompt,
    "suggest": suggest,
}


def read(path: Path, column: str, backbone: Backbone, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (n, d), ratings (n,) and prompts (n,) of a set, or of some of its prompts."""
    rows = [(row.conversation(), row.value(column)) for row in Location.find(str(path)).rows()]
    rated = [(conversation, float(value)) for conversation, value in rows if value is not None]
    chosen = [rated[i] for i in sample_by_prompt([conversation.prompt_key for conversation, _ in rated], ROWS)]
    limits = {"max_length": 1024, "overflow": "skip"}
    given = read_score_input(backbone.template, [conversation for conversation, _ in chosen], limits, "skip")
    features = extract(backbone, given.encoded.encoded, FeatureStore.of(folder, backbone))
    kept = given.of_kept(given.indices)
    ratings = np.array([chosen[i][1] for i in kept])
    _, prompts = np.unique([chosen[i][0].prompt_key for i in kept], return_inverse=True)
    return features.response.astype(np.float64), ratings, prompts


def fitted(x: np.ndarray, ratings: np.ndarray, prompts: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (d,) and penalty of ratings mapped to mean 0 (all strategies alike)."""
    _, group = np.unique(prompts, return_inverse=True)
    centred = (ratings - ratings.mean())[:, None]
    head = fit_regression(x, centred, group % FOLDS, ["objective"], alphas=ALPHAS, precision="float64")
    return head.weight[0], head.reports[0].alpha


def curve(
    choose: Choose, x: np.ndarray, ratings: np.ndarray, prompts: np.ndarray, seed: int, sizes: Sequence[int]
) -> list[float]:
    """Spearman correlation with held-out ratings at each size."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(int(prompts.max()) + 1)
    held_out = np.isin(prompts, order[: int(HELD_OUT * len(order))])
    test, pool = np.flatnonzero(held_out), np.flatnonzero(~held_out)
    center = x[pool].mean(0)
    x = x - center
    pool = generator.permutation(pool)
    rated, left = pool[: sizes[0]], pool[sizes[0] :]
    found = []
    for size in sizes:
        if size > len(rated):
            weight, alpha = fitted(x[rated], ratings[rated], prompts[rated])
            moments = sum_of_rows(x[rated], np.zeros((len(rated), 1)))
            posterior = RidgePosterior.of_moments(moments, alpha, intercept=False)
            picked = choose(posterior, x[left], prompts[left], size - len(rated), generator)
            rated, left = np.concatenate([rated, left[picked]]), np.delete(left, picked)
        weight, _ = fitted(x[rated], ratings[rated], prompts[rated])
        found.append(spearman(x[test] @ weight, ratings[test]))
    return found


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The mean over sets of the difference from random choice, one line a strategy."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "armorm"
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(2.6 * len(results), 2.9), sharex=True)
    for axes, (name, entry) in zip(np.atleast_1d(panels), results.items(), strict=True):
        for strategy, style in (("random", "-"), ("uncertainty", "--"), ("suggest", "-")):
            axes.plot(entry["sizes"], entry["spearman"][strategy], style, marker="o", markersize=3, label=strategy)
        axes.set(xscale="log", title=name, xlabel="ratings")
        axes.title.set_fontsize(8)
        axes.set_xticks(entry["sizes"], [str(size) for size in entry["sizes"]])
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("Spearman, held-out prompts")
    np.atleast_1d(panels)[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ratings"))
    parser.add_argument("--features", type=Path, default=Path("runs/suggest-features"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/suggest.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/suggest.svg"))
    arguments = parser.parse_args()
    backbone = Backbone.load("armorm-tiny", device="cpu", dtype="float32")
    results: dict[str, Any] = {}
    table = Table("objective", "choice", *(f"{size}" for size in SIZES))
    for name in SETS:
        path = arguments.data / f"{name.partition('-')[0]}.jsonl.gz"
        x, ratings, prompts = read(path, name, backbone, arguments.features)
        sizes = [size for size in SIZES if size <= 0.6 * (1 - HELD_OUT) * len(x)]
        curves = {}
        with progress(name, len(STRATEGIES) * SPLITS, "curves") as advance:
            for strategy, choose in STRATEGIES.items():
                values = []
                for seed in range(SPLITS):
                    values.append(curve(choose, x, ratings, prompts, seed, sizes))
                    advance(1)
                curves[strategy] = np.array(values)
        results[name] = {
            "ratings": len(x),
            "prompts": int(prompts.max()) + 1,
            "sizes": sizes,
            "spearman": {key: np.round(values.mean(0), 4).tolist() for key, values in curves.items()},
            "gain": {key: _paired(values - curves["random"]) for key, values in curves.items() if key != "random"},
        }
        for strategy, values in results[name]["spearman"].items():
            gains = results[name]["gain"].get(strategy)
            cells = [f"{value:.3f}" for value in values]
            if gains:
                cells = [f"{v:.3f} ({g:+.3f} ± {e:.3f})" for v, g, e in zip(values, *gains.values(), strict=True)]
            table.add_row(name if strategy == "random" else "", strategy, *cells)
        say(f"{name}: done")
        write_json(arguments.output, {"splits": SPLITS, "rows": ROWS, "alphas": ALPHAS, "objectives": results})
    Console(width=170).print(table)
    draw(results, arguments.picture)


def _paired(differences: np.ndarray) -> dict[str, list[float]]:
    error = differences.std(0, ddof=1) / np.sqrt(len(differences))
    return {"mean": np.round(differences.mean(0), 4).tolist(), "standard_error": np.round(error, 4).tolist()}


if __name__ == "__main__":
    main()
