"""Where the time of extraction goes: seconds by kernel (GPU) or operator (CPU), of plain batches and of prefix trees.

The conversations are the generated sets of `conversation_sets.py`, the same on every machine. After a pass to warm up,
one run is recorded by torch's profiler. Shares are of the time a device computes; on a GPU, `idle` is the rest of the
time on the clock. Writes benchmarks/results/kernel_times.json (kernel_times_cuda.json on a GPU).

    python benchmarks/kernel_times.py --models armorm-small
    python benchmarks/kernel_times.py --models llama-3-8b --device cuda
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from armorm.backbone.decoder import Backbone
from armorm.backbone.encoding import encode_rows
from armorm.features.extract import extract
from armorm.files import DEFAULT_BACKBONE, write_json
from armorm.progress import progress
from conversation_sets import SIZES, conversation_sets
from extraction import BATCH_TOKENS, MAX_LENGTH, load_backbone

WAYS = {"plain": False, "tree": True}
# Names of kernels and operators by what they do; the first that is part of a name decides.
KINDS = {
    "attention": ("attention", "flash", "fmha", "flex"),
    "matrix products": ("gemm", "matmul", "addmm", "linear", "::mm", "::bmm", "cutlass", "nvjet", "sgemm", "mkldnn"),
    "norms": ("norm", "rsqrt", "mean", "pow"),
    "activations": ("silu", "gelu", "sigmoid"),
    "copies and casts": ("copy", "cat", "memcpy", "memset", "index", "gather", "scatter", "embedding"),
}
SHOWN = 12


def kind_of(name: str) -> str:
    """What a kernel does, by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "others")


def recorded(backbone: Backbone, encoded: list[Any], *, sharing: bool) -> dict[str, Any]:
    """Seconds by kernel of one extraction."""
    on_gpu = backbone.device.type == "cuda"
    run = lambda: extract(backbone, encoded, batch_tokens=BATCH_TOKENS, sharing=sharing, compiled=False)  # noqa: E731
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        busy = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if busy > 0:
            times[event.key] += busy / 1e6
    kinds: Counter[str] = Counter()
    for name, busy in times.items():
        kinds[kind_of(name)] += busy
    total = sum(times.values())
    return {
        "seconds": seconds,
        "busy_seconds": total,
        "idle_share": max(0.0, 1 - total / seconds) if on_gpu else None,
        "kinds": {kind: busy / total for kind, busy in kinds.most_common()},
        "kernels": [{"name": name, "seconds": busy, "share": busy / total} for name, busy in times.most_common(SHOWN)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[DEFAULT_BACKBONE])
    parser.add_argument("--sets", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--conversations", type=int, help="most conversations of a set (default: all)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    console, found = Console(highlight=False), dict[str, Any]()
    for model in arguments.models:
        backbone = load_backbone(model, arguments.device, arguments.dtype)
        on_gpu = backbone.device.type == "cuda"
        found["device"] = (
            torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a processor"
        )
        found["torch"] = torch.__version__
        sets, _ = conversation_sets(Path("nowhere"))
        with progress(f"kernels of {model}", len(arguments.sets) * len(WAYS), "runs") as advance:
            for name in arguments.sets:
                rows = sets[name][: arguments.conversations]
                encoded = encode_rows(backbone.template, rows, MAX_LENGTH, "truncate_prompt").encoded
                for way, sharing in WAYS.items():
                    result = recorded(backbone, encoded, sharing=sharing)
                    result["tokens"] = sum(len(row) for row in encoded)
                    found.setdefault(model, {}).setdefault(name, {})[way] = result
                    console.print(_table(f"{model}, {name}, {way}", result))
                    advance(1)
    output = arguments.output or Path("benchmarks/results") / (
        "kernel_times_cuda.json" if on_gpu else "kernel_times.json"
    )
    write_json(output, found)
    console.print(f"wrote {output}")


def _table(title: str, result: dict[str, Any]) -> Table:
    idle = "" if result["idle_share"] is None else f", the device idle {result['idle_share']:.0%}"
    table = Table("kernel", "seconds", "share", title=f"{title}: {result['seconds']:.2f} s{idle}", title_justify="left")
    for kind, share in result["kinds"].items():
        table.add_row(kind, "", f"{share:.1%}", style="bold")
    for kernel in result["kernels"]:
        table.add_row(kernel["name"][:70], f"{kernel['seconds']:.3f}", f"{kernel['share']:.1%}")
    return table


if __name__ == "__main__":
    main()
