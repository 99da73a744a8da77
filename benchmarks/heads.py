"""Speed, accuracy and memory of stage 1 and gate training, against the published implementation.

Uses generated rows and, for `exactness`, real ratings (docs/data.md) on the embedded backbone. Prints a table with the
target of each value and writes benchmarks/results/heads.json (heads_cuda.json on a GPU).

    python benchmarks/heads.py                       # every part
    python benchmarks/heads.py --part gram --part gate
    python benchmarks/heads.py --device cuda         # gram and gate

Parts:
    gram       accumulation of the statistics against the machine's own float32 matrix product
    solvers    Cholesky for nine alphas against one eigendecomposition
    stage1     all of stage 1 against scikit-learn's Ridge for every objective and alpha, all rows in memory
    exactness  float32 products against float64: alphas and held-out predictions on real features, weights on generated
    memory     peak memory of a process that streams 50, 200 and 800 thousand rows
    gate       a training step against the published step: both sides' prompts through the gate, rewards in every step
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import Ridge
from torch import nn

from armorm.files import plain, write_json
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.gate_training import GateSettings, PairTensors, RewardPairs
from armorm.heads.regression import ALPHAS, RidgePath, fit_regression
from armorm.heads.statistics import Moments
from armorm.model.remote_code import GatingNetwork
from peak import environment

D = 1024
SOURCES = (5, 5, 1, 1, 1, 1, 4, 1)  # objectives per source: nineteen in eight sources
OBJECTIVES = [f"source{s}-objective{i}" for s, count in enumerate(SOURCES) for i in range(count)]
FOLDS = 5


def best(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of several runs, after a warm-up."""
    work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def wait(device: str) -> None:
    """Wait for all queued work on the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def rated_rows(n: int, d: int, seed: int = 0, order: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 features with non-zero mean, noisy ratings of one source per row (sorted by source if `order`), folds."""
    rng = np.random.default_rng(seed)
    source = np.arange(n) * len(SOURCES) // n if order else rng.integers(0, len(SOURCES), n)
    features = rng.standard_normal((n, d), np.float32) + rng.standard_normal(d, np.float32)
    truth = rng.standard_normal((d, len(OBJECTIVES))) / np.sqrt(d)
    ratings = np.full((n, len(OBJECTIVES)), np.nan)
    first = np.cumsum((0, *SOURCES))
    for number, count in enumerate(SOURCES):
        rows = np.flatnonzero(source == number)
        columns = np.arange(first[number], first[number] + count)
        ratings[np.ix_(rows, columns)] = features[rows] @ truth[:, columns] + rng.standard_normal((len(rows), count))
    return features, ratings, rng.integers(0, FOLDS, n)


def measure_gram(device: str) -> dict[str, Any]:
    """FLOP/s of accumulating X^T X, against a float32 matrix product of that shape on the device.

    Symmetry saves half of the counted operations, so a share may exceed 1. On an accelerator the rows come from host
    memory, as in a run, while the operands of the product are on the device.
    """
    features, ratings, folds = rated_rows(100_000, D)  # the size of `stage1`
    block = features[:2048]
    other = np.array(block)
    torch_block, torch_other = (torch.from_numpy(rows).to(device) for rows in (block, other))
    operations = 2 * len(block) * D * D

    def torch_product() -> None:
        torch_block.T @ torch_other
        wait(device)

    product = operations / best(torch_product)
    if device == "cpu":
        product = max(product, operations / best(lambda: block.T @ other))
    seconds = best(lambda: accumulate(blocks_of(features, ratings, folds), OBJECTIVES, FOLDS, D, device=device), 3)
    rate = 2 * len(features) * D * D / seconds
    return {"product_gflops": product / 1e9, "accumulation_gflops": rate / 1e9, "share": rate / product, "target": 0.7}


def measure_solvers() -> dict[str, Any]:
    """Milliseconds for nine alphas and three objectives: one Cholesky factor per alpha, or one eigendecomposition."""
    found = {}
    for d in (256, 1024):
        x = np.random.default_rng(0).standard_normal((3 * d, d))
        r = x[:, :3]
        moments = Moments(len(x), x.T @ x, x.sum(0), x.T @ r, r.sum(0), r.T @ r)
        milliseconds = {}
        for solver in ("cholesky", "eigen"):

            def solve(moments: Moments = moments, solver: Any = solver) -> None:
                path = RidgePath(moments, False, solver)
                for alpha in ALPHAS:
                    path.solve(np.full(3, alpha))

            milliseconds[f"{solver}_ms"] = best(solve, 5) * 1e3
        found[str(d)] = milliseconds
    return found


def published_stage1(features: np.ndarray, ratings: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """As published: for every objective and alpha a Ridge on four fifths of the rows, selected on the last fifth."""
    weights = np.zeros((ratings.shape[1], features.shape[1]))
    for column in range(ratings.shape[1]):
        rated = ~np.isnan(ratings[:, column])
        train, test = rated & ~held_out, rated & held_out
        losses = []
        for alpha in ALPHAS:
            ridge = Ridge(alpha=alpha, fit_intercept=False).fit(
                features[train], ratings[train, column].astype(np.float32)
            )
            losses.append((np.mean((ridge.predict(features[test]) - ratings[test, column]) ** 2), ridge.coef_))
        weights[column] = min(losses, key=lambda entry: entry[0])[1]
    return weights


def measure_stage1(rows: int) -> dict[str, Any]:
    """Seconds of stage 1; `split` selects alpha on one split as published, `folds` on five folds as recipes do."""
    features, ratings, folds = rated_rows(rows, D)
    start = time.perf_counter()
    split = fit_regression(features, ratings, folds, OBJECTIVES, validation_folds=(0,))
    split_seconds = time.perf_counter() - start
    start = time.perf_counter()
    fit_regression(features, ratings, folds, OBJECTIVES)
    folds_seconds = time.perf_counter() - start
    start = time.perf_counter()
    published_stage1(features, ratings, folds == 0)
    published = time.perf_counter() - start
    return {
        "rows": rows, "published_s": published, "split_s": split_seconds, "folds_s": folds_seconds,
        "split_times": published / split_seconds, "folds_times": published / folds_seconds, "target": 10,
        "largest_alpha": max(report.alpha for report in split.reports),
    }  # fmt: skip


def measure_exactness(data_root: Path, store: Path, limit: int) -> dict[str, Any]:
    """Largest difference of out-of-fold predictions, in standard deviations of the rating, and agreement of alphas.

    The reference is scikit-learn's Ridge in float64 on the rows, for every fold and alpha.
    """
    features, ratings, folds, names = real_rows(data_root, store, limit)
    head = fit_regression(features, ratings, folds, names)
    predicted = head.predict_out_of_fold(features, folds)
    wide = features.astype(np.float64)
    largest, same = 0.0, 0
    for column, report in enumerate(head.reports):
        rated = ~np.isnan(ratings[:, column])
        errors = np.zeros(len(ALPHAS))
        out_of_fold = np.zeros((len(ALPHAS), len(ratings)))
        for fold in np.unique(folds[rated]):
            train, test = rated & (folds != fold), rated & (folds == fold)
            for index, alpha in enumerate(ALPHAS):
                ridge = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky")
                ridge.fit(wide[train], ratings[train, column])
                out_of_fold[index, test] = ridge.predict(wide[test])
                errors[index] += ((out_of_fold[index, test] - ratings[test, column]) ** 2).sum()
        chosen = int(errors.argmin())
        same += ALPHAS[chosen] == report.alpha
        difference = np.abs(predicted[rated, column] - out_of_fold[chosen, rated])
        largest = max(largest, float(difference.max() / np.std(ratings[rated, column])))
    generated = rated_rows(20_000, 256, seed=1)
    narrow, exact = (
        fit_regression(*generated, OBJECTIVES, precision=precision) for precision in ("float32", "float64")
    )
    weights = np.abs(narrow.weight - exact.weight).max() / np.abs(exact.weight).max()
    return {
        "rows": len(features), "objectives": len(names), "same_alphas": int(same), "largest_difference": largest,
        "target": 1e-3, "generated_weights": float(weights), "weights_target": 1e-4,
    }  # fmt: skip


def real_rows(data_root: Path, store: Path, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Training rows of `recipes/real-small.yaml` on the embedded backbone; features are cached in the store."""
    from armorm.backbone.decoder import Backbone
    from armorm.backbone.encoding import encode_rows
    from armorm.features.extract import extract
    from armorm.features.store import FeatureStore
    from armorm.heads.regression import fold_of
    from armorm.training.dataset import read_training_data
    from armorm.training.recipe import Recipe

    recipe = Recipe.from_yaml("recipes/real-small.yaml", [f"data_root={data_root}", f"limit={limit}"])
    data = read_training_data(recipe)
    table = data.table.take(data.train_rows)
    backbone = Backbone.load("armorm-tiny", dtype="float32")
    encoded = encode_rows(backbone.template, table.conversations, 2048, "truncate_prompt").encoded
    features = extract(backbone, encoded, FeatureStore.of(store, backbone))
    folds = np.array([fold_of(conversation.prompt_key, FOLDS) for conversation in table.conversations])
    learnable = (~np.isnan(table.ratings)).sum(0) >= 100
    names = [name for name, kept in zip(table.objectives.names, learnable, strict=True) if kept]
    return features.response, table.objectives.to_reward(table.ratings)[:, learnable], folds, names


# Streams generated rows through `accumulate` and fits; a separate process, because peak memory never falls.
_STREAM = """
import json, sys
import numpy as np
from peak import peak_bytes
from armorm.heads.accumulation import RatedBlock, accumulate
from armorm.heads.regression import fit_from_statistics
from heads import D, FOLDS, OBJECTIVES, SOURCES

rows = int(sys.argv[1])
first = np.cumsum((0, *SOURCES))
rng = np.random.default_rng(0)

def blocks():
    for _ in range(rows // 4000):
        features = rng.standard_normal((4000, D), np.float32)
        ratings = np.full((4000, len(OBJECTIVES)), np.nan)
        source = rng.integers(0, len(SOURCES), 4000)
        for number, count in enumerate(SOURCES):
            at = np.flatnonzero(source == number)
            ratings[np.ix_(at, np.arange(first[number], first[number] + count))] = rng.random((len(at), count))
        yield RatedBlock(features, ratings, rng.integers(0, FOLDS, 4000))

statistics = accumulate(blocks(), OBJECTIVES, FOLDS, D)
assert statistics.counts().sum() > 0
peak = peak_bytes()
fit_from_statistics(statistics, alphas=(1.0,), validation_folds=(0,))
print(json.dumps({"accumulated": peak, "fitted": peak_bytes()}))
"""


def measure_memory(counts: tuple[int, ...]) -> dict[str, Any]:
    """Peak bytes of a process by number of streamed rows; `growth` is the largest peak over the smallest."""
    peaks = {}
    for count in counts:
        done = subprocess.run(
            [sys.executable, "-c", _STREAM, str(count)],
            check=True,
            capture_output=True,
            text=True,
            env=environment(),
        )
        peaks[str(count)] = json.loads(done.stdout.splitlines()[-1])
    fitted = [entry["fitted"] for entry in peaks.values()]
    return {"peak_bytes": peaks, "growth": max(fitted) / min(fitted), "target": 1.2}


def measure_gate(device: str, d: int = 4096, batch: int = 1024, k: int = 19, times: int = 8) -> dict[str, Any]:
    """Median seconds of a float32 training step, alternating both kinds; every pair has its own prompt."""
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal((batch, d), np.float32)
    responses = torch.from_numpy(rng.standard_normal((batch, 2, d), np.float32)).to(device)
    regression = torch.from_numpy(rng.standard_normal((d, k), np.float32)).to(device)
    transform = torch.eye(k, device=device)
    index = np.arange(batch)
    chosen, rejected = rng.standard_normal((2, batch, k), np.float32)
    pairs = RewardPairs(chosen, rejected, index, index, held_out=np.zeros(batch, bool))
    settings = GateSettings(dtype="float32")
    data = PairTensors(prompts, pairs, index, torch.device(device))
    both = torch.from_numpy(prompts).to(device)[:, None].expand(-1, 2, -1).contiguous()

    def network() -> tuple[GatingNetwork, torch.optim.Optimizer]:
        torch.manual_seed(0)
        gate = GatingNetwork(d, k, dropout=0.2).to(device).train()
        return gate, torch.optim.AdamW(gate.parameters(), lr=1e-3)

    ours, ours_optimiser = network()
    theirs, theirs_optimiser = network()

    def our_step() -> None:
        loss = data.training_loss(ours, ours.logit_scale.exp(), index, settings)
        ours_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        ours_optimiser.step()

    def their_step() -> None:
        rewards = responses @ regression @ transform
        scores = (theirs(both) * rewards).sum(-1)
        loss = nn.functional.softplus(scores[:, 1] - scores[:, 0]).mean()
        theirs_optimiser.zero_grad(set_to_none=True)
        loss.backward()
        theirs_optimiser.step()

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(times + 1):
        for name, step in (("ours", our_step), ("theirs", their_step)):
            start = time.perf_counter()
            step()
            wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ours_s, theirs_s = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    return {"step_s": ours_s, "published_step_s": theirs_s, "times": theirs_s / ours_s, "target": 1.7}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = ("gram", "solvers", "stage1", "exactness", "memory", "gate")
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of stage1")
    parser.add_argument("--limit", type=int, default=1500, help="approximate real rows per set, for exactness")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ARMORM_DATA", "../shared/data")))
    parser.add_argument("--features", type=Path, default=Path("runs/heads-features"))
    parser.add_argument("--device", default="cpu", help="device of gram and gate, the only parts that run on cuda")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    output = arguments.output or Path("benchmarks/results") / (
        "heads.json" if arguments.device == "cpu" else "heads_cuda.json"
    )
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "gram": lambda: measure_gram(arguments.device),
        "solvers": measure_solvers,
        "stage1": lambda: measure_stage1(arguments.rows),
        "exactness": lambda: measure_exactness(arguments.data, arguments.features, arguments.limit),
        "memory": lambda: measure_memory((50_000, 200_000, 800_000)),
        "gate": lambda: measure_gate(arguments.device),
    }
    console = Console(highlight=False)
    found = json.loads(output.read_text()) if output.exists() else {}
    if arguments.device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    for part in arguments.part or (parts if arguments.device == "cpu" else ("gram", "gate")):
        if part == "exactness" and not (arguments.data / "ratings").is_dir():
            console.print(f"exactness: skipped, no real data at {arguments.data}")
            continue
        found[part] = work[part]()
        write_json(output, plain(found))
        table = Table("metric", "value", box=None, pad_edge=False, title=part, title_justify="left", show_header=False)
        for name, value in _flat(found[part]):
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        console.print(table, "")
    console.print(f"wrote {output}")


def _flat(figures: dict[str, Any], place: str = "") -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    for name, value in figures.items():
        rows += _flat(value, f"{place}{name} ") if isinstance(value, dict) else [(f"{place}{name}", value)]
    return rows


if __name__ == "__main__":
    main()
