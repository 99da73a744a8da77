"""How the heads of stage 1 improve with the number of ratings, on the features and ratings that a finished run has.

For each objective that people or programs rated (not measured, not constructed), one fold of prompts is held out, and
stage 1 is fitted, as in training but with three folds for the penalty, to a sample of the ratings of other prompts. The
figure is the Spearman correlation with the held-out ratings, a mean over three folds. Samples are drawn in two ways:

    whole    all ratings of randomly ordered prompts, until there are enough
    spread   as many prompts as possible: one rating of each prompt first, then a second one, ... (only for sets with
             two or more ratings a prompt)

Samples of one fold are nested: a larger one contains the smaller ones. Fewer than `d` rows are first rotated onto the
space that they span, which leaves ridge regression unchanged and makes it cheap.

    python benchmarks/learning_curve.py RUN [--output benchmarks/results/learning_curve.json]

RUN is the folder of `armorm train recipes/small.yaml`, with its work folder. Also draws docs/images/learning-curve.svg
(`--picture`); docs/how-many-ratings.md has the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm.correlation import spearman
from armorm.errors import FitError
from armorm.files import write_json
from armorm.heads.rated_record import RatedRun
from armorm.heads.regression import fit_regression
from armorm.progress import progress, say

SIZES = (50, 100, 200, 400, 800, 1600, 3200, 6400)
ALPHAS = tuple(10.0**e for e in range(1, 6))
INNER_FOLDS = 3
HELD_OUT = 3  # folds, of the five of the run


def whole(prompts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rows (n,) in an order that takes all rows of one prompt after another."""
    rank = _random_rank(prompts, generator)
    return np.argsort(rank, kind="stable")


def spread(prompts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rows (n,) in an order that takes one row of each prompt, then a second one of each, and so on."""
    rank, within = _random_rank(prompts, generator), np.empty(len(prompts), np.int64)
    order = generator.permutation(len(prompts))
    order = order[np.argsort(prompts[order], kind="stable")]
    starts = np.flatnonzero(np.diff(prompts[order], prepend=-1))
    within[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return np.lexsort((rank, within))


def _random_rank(prompts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    _, index = np.unique(prompts, return_inverse=True)
    return generator.permutation(index.max() + 1)[index]


def correlations(
    train: tuple[np.ndarray, np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], names: Sequence[str]
) -> np.ndarray:
    """Spearman correlation (j,) with the test ratings of heads that are fitted to features (n, d), ratings (n, j) of
    prompts (n,); NaN where nothing can be fitted."""
    features, ratings, prompts = train
    unseen, truth = test
    _, index = np.unique(prompts, return_inverse=True)
    if len(features) < features.shape[1]:
        axes = np.linalg.qr(features.T.astype(np.float64))[0]  # (d, n)
        features, unseen = features @ axes, unseen @ axes
    try:
        head = fit_regression(features, ratings, index % INNER_FOLDS, names, alphas=ALPHAS)
    except FitError:
        return np.full(len(names), np.nan)
    predicted = unseen @ head.weight.T + head.bias
    return np.array([spearman(predicted[:, i], truth[:, i]) for i in range(len(names))])


def measure(run: RatedRun, columns: Sequence[int]) -> list[dict[str, Any]]:
    """The curves of objectives that are rated on the same rows."""
    record, start = run.record, time.process_time()
    parts = list(run.blocks(columns))
    rows, features, ratings = (np.concatenate([part[i] for part in parts]) for i in range(3))
    prompts, folds = record.prompts[rows], record.folds[rows]
    names = [record.objectives.names[column] for column in columns]
    orders = {"whole": whole} | ({"spread": spread} if len(rows) >= 2 * len(np.unique(prompts)) else {})
    tested = np.unique(folds)[:HELD_OUT]
    most = min(int((folds != fold).sum()) for fold in tested)
    sizes = [size for size in SIZES if size < 0.8 * most] + [most]
    found = {name: np.full((len(tested), len(sizes), len(columns)), np.nan) for name in orders}
    for place, fold in enumerate(tested):
        others, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        for name, order in orders.items():
            ordered = others[order(prompts[others], np.random.default_rng(int(fold)))]
            for step, size in enumerate(sizes):
                here = ordered[:size]
                if size == most and name == "spread":
                    found[name][place, step] = found["whole"][place, step]
                    continue
                found[name][place, step] = correlations(
                    (features[here], ratings[here], prompts[here]), (features[held_out], ratings[held_out]), names
                )
                say(f"{names[0]}: {name}, fold {fold}, {size:,} ratings")
    curves = {name: (values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))) for name, values in found.items()}
    seconds = (time.process_time() - start) / len(columns)
    return [
        {
            "objective": name,
            "ratings": len(rows),
            "prompts": len(np.unique(prompts)),
            "sizes": sizes,
            "seconds": seconds,
            **{
                key: {"spearman": _listed(mean[:, i]), "standard_error": _listed(error[:, i])}
                for key, (mean, error) in curves.items()
            },
        }
        for i, name in enumerate(names)
    ]


def _listed(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line an objective, over the number of ratings."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "armorm"
    from matplotlib import pyplot

    shown = [entry for entry in results if entry["ratings"] >= 600]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4))
    for entry, colour in zip(shown, pyplot.get_cmap("tab20")(np.arange(20)), strict=False):
        values = [np.nan if value is None else value for value in entry["whole"]["spearman"]]
        axes.plot(entry["sizes"], values, marker="o", markersize=3, color=colour, label=entry["objective"])
    axes.set(xscale="log", xlabel="ratings in training", ylabel="Spearman with held-out ratings")
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run, with its work folder")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/learning_curve.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/learning-curve.svg"))
    arguments = parser.parse_args()
    run = RatedRun.open(arguments.run)
    rated = [i for i, o in enumerate(run.record.objectives) if o.source not in ("constructed", "computed")]
    results: list[dict[str, Any]] = []
    sets = sorted(run.row_sets(rated), key=lambda columns: len(run.rated(columns)))
    with progress("fitting", len(sets), "sets of rows") as advance:
        for columns in sets:
            results += measure(run, columns)
            write_json(arguments.output, {"sizes": SIZES, "alphas": ALPHAS, "objectives": results})
            advance(1)
    table = Table("objective", "ratings", "prompts", "sample", *(f"{size:,}" for size in SIZES), "all")
    for entry in results:
        for sample in (name for name in ("whole", "spread") if name in entry):
            curve = entry[sample]["spearman"]
            by_size = dict(zip(entry["sizes"][:-1], curve[:-1], strict=True))
            cells = [_cell(by_size.get(size)) for size in SIZES]
            counts = (f"{entry['ratings']:,}", f"{entry['prompts']:,}")
            table.add_row(entry["objective"], *counts, sample, *cells, _cell(curve[-1]))
    Console(width=160).print(table)
    draw(results, arguments.picture)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
