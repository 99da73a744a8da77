"""Evaluation of preference pairs: `armorm evaluate` against a plain loop that scores one response at a time.

Both score the same pairs with the same model. The loop applies the chat template and runs the model for each side of
each pair separately. Prints seconds, pairs per second, the ratio, the largest difference of a margin and the number of
decisions that differ. With `--loop N` the loop scores only the first N pairs.

Pairs come from `preferences/alpacaeval.jsonl.gz` of the real data sets (docs/data.md), from `--data`, or else from the
generated corpus. The speed-up depends on how often responses and prompts repeat.

    python benchmarks/evaluation.py --pairs 5000 --model armorm-tiny-rm
    python benchmarks/evaluation.py --loop 300 --dtype float32 --output benchmarks/results/evaluation_float32.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import armorm
from armorm.data.sources import Location, find_sources
from armorm.data.synthetic import generate, write_corpus
from armorm.evaluation.benchmarks.pairs import read as read_pairs
from armorm.evaluation.runner import evaluate
from armorm.files import DEFAULT_REWARD_MODEL, write_json
from armorm.progress import progress
from armorm.reward_model import ArmoRM


def pairs_file(folder: Path, count: int, data: Path | None = None) -> tuple[Path, str]:
    """Write the first pairs of a file, of alpacaeval, or of the generated corpus, and name the source."""
    root = Path(os.environ.get("ARMORM_DATA", "../shared/data"))
    real = root / "preferences" / "alpacaeval.jsonl.gz"
    if data is not None or real.exists():
        source = data or real
    else:
        write_corpus(folder, generate(0), seed=0)
        source = folder / "choices.jsonl"
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for written, row in enumerate(Location.find(source).rows()):
            if written == count:
                break
            kept = {name: row.values[name] for name in ("prompt", "chosen", "rejected") if name in row.values}
            file.write(json.dumps(kept) + "\n")
    return path, source.name


def loop_margins(rm: ArmoRM, path: Path, count: int) -> tuple[np.ndarray, float]:
    """Margins of the first pairs, scored one response at a time (NaN if rejected), and the seconds taken."""
    examples = read_pairs(find_sources([path])).examples[:count]
    margins = np.full(len(examples), np.nan)
    longest = rm.model.config.limits.get("max_length") or np.inf

    def score(messages: list[dict[str, Any]]) -> float:
        ids = rm.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        return float(rm.model(input_ids=ids.to(rm.model.device)).score[0]) if ids.shape[1] <= longest else np.nan

    start = time.perf_counter()
    with progress("loop", len(examples), "pairs") as advance, torch.inference_mode():
        for place, example in enumerate(examples):
            sides = [side.to_list() for side in example.conversations if side is not None]
            if len(sides) == 2:
                margins[place] = score(sides[0]) - score(sides[1])
            advance(1)
    return margins, time.perf_counter() - start


def measure(model: str, count: int, loop: int, dtype: str, data: Path | None = None) -> dict[str, Any]:
    rm = ArmoRM.from_pretrained(model, dtype=dtype)
    with tempfile.TemporaryDirectory() as name:
        path, source = pairs_file(Path(name), count, data)
        evaluate("pairs", rm, path, limit=16, resamples=10, include_seen=True, quiet=True)  # warm up
        start = time.perf_counter()
        results = evaluate("pairs", rm, path, include_seen=True, quiet=True)
        seconds = time.perf_counter() - start
        expected, loop_seconds = loop_margins(rm, path, loop)
    found = np.array([entry.get("margin", np.nan) for entry in results.examples[: len(expected)]], np.float64)
    both = ~(np.isnan(found) | np.isnan(expected))
    rates = {"armorm": len(results.examples) / seconds, "loop": len(expected) / loop_seconds}
    return {
        "model": results.model,
        "data": source,
        "pairs": len(results.examples),
        "conversations": results.counts["conversations"],
        "seconds": seconds,
        "pairs_per_second": rates["armorm"],
        "loop_pairs": len(expected),
        "loop_seconds": loop_seconds,
        "loop_pairs_per_second": rates["loop"],
        "ratio": rates["armorm"] / rates["loop"],
        "largest_margin_difference": float(np.abs(found - expected)[both].max(initial=0.0)),
        "decisions_that_differ": int(((found > 0) != (expected > 0))[both].sum()),
        "refused_alike": bool((np.isnan(found) == np.isnan(expected)).all()),
        "machine": {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "armorm_version": armorm.__version__,
    }


def print_table(results: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "pairs", "seconds", "pairs/s"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row(
        "armorm evaluate (with metrics and audits)",
        f"{results['pairs']:,}",
        f"{results['seconds']:.1f}",
        f"{results['pairs_per_second']:.1f}",
    )
    table.add_row(
        "one response at a time",
        f"{results['loop_pairs']:,}",
        f"{results['loop_seconds']:.1f}",
        f"{results['loop_pairs_per_second']:.1f}",
    )
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(
        f"{results['conversations']:,} distinct conversations; {results['ratio']:.1f} times faster than the loop;\n"
        f"largest margin difference {results['largest_margin_difference']:.2g}, "
        f"{results['decisions_that_differ']} decisions differ"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluation of pairs against a plain one-by-one loop.")
    parser.add_argument("--model", default=DEFAULT_REWARD_MODEL)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--loop", type=int, default=None, help="number of pairs that the loop scores (default: all)")
    parser.add_argument("--data", type=Path, default=None, help="file of pairs (default: alpacaeval)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evaluation.json"))
    arguments = parser.parse_args()
    results = measure(
        arguments.model, arguments.pairs, arguments.loop or arguments.pairs, arguments.dtype, arguments.data
    )
    print_table(results)
    write_json(arguments.output, results)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
