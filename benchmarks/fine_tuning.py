"""Speed of fine-tuning upper layers on cached states: training steps against forward passes of the same layers.

    python benchmarks/fine_tuning.py BACKBONE [--frozen 12] [--layer 18] [--rows 64] [--threads 2]

For LoRA and full tuning, in float32 and bfloat16, prints tokens per second of wall-clock and of processor time, and the
rate of training as a share of the forward rate. Forward passes and steps alternate, so that other load on the machine
acts on both; medians of rounds. Writes benchmarks/results/fine_tuning.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from armorm.backbone.decoder import Backbone
from armorm.data.rows import Row, file_rows
from armorm.files import write_json
from armorm.progress import say
from armorm.training.finetune.collator import grow_trees
from armorm.training.finetune.state_cache import cached_states
from armorm.training.finetune.trainer import BatchLayout, Learner, TreeBatches, features_of
from armorm.training.schema import FinetuneSection

RESULTS = Path(__file__).parent / "results" / "fine_tuning.json"
CASES = (("lora", "bfloat16"), ("lora", "float32"), ("full", "bfloat16 autocast"), ("full", "float32"))


def measure(
    name: str, rows: list[Any], method: str, dtype: str, frozen: int, layer: int, rounds: int, batch_tokens: int
) -> dict[str, Any]:
    """Tokens per second of both, and the share, for one method and dtype."""
    load = dtype if method == "lora" else "float32"
    backbone = Backbone.load(name, dtype=load, device="cpu", layer=layer, pooling="last+mean")
    autocast = dtype == "bfloat16 autocast"
    few_shapes = dtype != "float32"
    encoded = backbone.template.encode(rows)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"share": True, "few_shapes": few_shapes, "tree_tokens": 512, "autocast": autocast}
        cache = cached_states(backbone, encoded, frozen, Path(folder), batch_tokens=batch_tokens, **options)
        layout = BatchLayout(batch_tokens, True, few_shapes, backbone.header_tokens, cache)
        section = FinetuneSection(method=method, frozen_layers=frozen, lora_rank=16)
        learner = Learner(backbone, section, np.ones(1), frozen, states_given=True)
        trees = grow_trees(encoded, [(row,) for row in range(len(encoded))], 512)
        ratings = np.random.default_rng(0).uniform(size=(len(encoded), 1)).astype(np.float32)
        batches = TreeBatches(encoded, trees, layout, ratings=ratings)
        size = learner.rewards.in_features
        learner.start_from(np.full((1, size), 1e-3), np.zeros(size), 1.0)
        optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=1e-5)

        def forward() -> None:
            features_of(learner, batches, np.arange(1), autocast=autocast)

        def train() -> None:
            learner.train()
            for index in range(len(batches)):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = learner(**batches[index])["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        tokens = sum(batches.tokens)
        times = np.array([[*timed(forward), *timed(train)] for _ in range(rounds + 1)])[1:]
    wall_forward, cpu_forward, wall, cpu = np.median(times, axis=0)
    return {
        "method": method, "dtype": dtype, "tokens": tokens, "batches": len(batches),
        "parameters": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "forward_per_second": tokens / wall_forward, "train_per_second": tokens / wall,
        "forward_per_cpu_second": tokens / cpu_forward, "train_per_cpu_second": tokens / cpu,
        "share": float(np.median(times[:, 1] / times[:, 3])),
    }  # fmt: skip


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall-clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--data", default="../shared/data/ratings/truthfulqa.jsonl.gz", help="rows with messages")
    parser.add_argument("--frozen", type=int, default=12)
    parser.add_argument("--layer", type=int, default=18)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = itertools.islice(file_rows(Path(arguments.data)), arguments.rows)
    rows = [row.conversation() for row in found if isinstance(row, Row)]
    a, b, c, d = arguments.frozen, arguments.layer, arguments.rounds, arguments.batch_tokens
    results = []
    for method, dtype in CASES:
        results.append(measure(arguments.backbone, rows, method, dtype, a, b, c, d))
        write_json(RESULTS, {"settings": vars(arguments), "results": results})
        say(f"{method} {dtype}: {results[-1]['share']:.2f} of the forward rate")
    table = Table(
        "method", "dtype", "trained", "forward tok/s", "training tok/s", "per CPU second", "share of CPU time"
    )
    for r in results:
        table.add_row(
            r["method"], r["dtype"], f"{r['parameters']:,}", f"{r['forward_per_second']:,.0f}",
            f"{r['train_per_second']:,.0f}", f"{r['forward_per_cpu_second']:,.0f} / {r['train_per_cpu_second']:,.0f}",
            f"{r['share']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
