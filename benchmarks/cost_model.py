"""The cost model against measured time, memory and disk use of small runs.

One extraction calibrates the share of the machine's peak FLOP/s that a forward pass reaches. With this share alone the
model predicts other extractions: other lengths, another width, another depth. Likewise, one fit calibrates the rate of
stage 1, and another one with other rows and width is predicted. The result is the largest relative error.

    python benchmarks/cost_model.py [--output benchmarks/results/cost_model.json]    # on an idle machine, 5 minutes
    python benchmarks/cost_model.py --backbone FOLDER --layers 6 12 18 24 30        # cost by the layer that is read

With `--backbone`, extractions of the same conversations at several layers alternate. The deepest layer calibrates the
share in each round, the others are predicted; a ratio is the median over the rounds. Seconds of the processor are given
too, because those of the wall clock depend on other work on the machine, whose load is stored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaModel

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.encoding import encode_rows
from armorm.features.extract import extract
from armorm.features.store import FeatureStore
from armorm.files import write_json
from armorm.heads.regression import fit_regression
from armorm.training.cost import Hardware, Shape, Workload, stages
from armorm.training.schema import GatingSection
from conversation_sets import conversation_sets
from peak import peak_bytes

ALLOWED = 0.25
ALLOWED_BY_LAYER = 0.15
FITS = 3  # of stage 1; the fastest counts
# Rows and features. Smaller fits take less than half a second, at a lower rate.
FIT_SIZES = {"reference": (32_000, 1024), "more and wider": (48_000, 1536)}
EXTRACTIONS = 2  # the fastest counts: the first one generates kernels for new shapes
# Name, (d, layers, heads, inner), conversations, shortest and longest length. The first calibrates the share.
RUNS = (
    ("reference", (512, 8, 8, 1408), 90, 100, 300),
    ("long", (512, 8, 8, 1408), 24, 600, 900),
    ("short", (512, 8, 8, 1408), 220, 40, 120),
    ("wide", (768, 6, 12, 2048), 66, 100, 300),
    ("deep", (384, 16, 6, 1024), 90, 100, 300),
)


def main() -> None:
    """Measure, predict, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--backbone", help="folder or hub id: measure its cost by layer instead")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 18, 24, 30])
    parser.add_argument("--rows", type=int, default=100, help="conversations at each layer")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results_folder = Path(__file__).parent / "results"
    if arguments.backbone:
        measured = by_layer(arguments.backbone, sorted(arguments.layers), arguments.rows, arguments.rounds)
        print_layers(measured)
        write_json(arguments.output or results_folder / "cost_layers.json", measured)
        return
    output = arguments.output or results_folder / "cost_model.json"
    peak = matmul_rate(torch.float32)
    shape, backbone = build(*RUNS[0][1])
    extraction(backbone, conversations(8, 100, 300, backbone))  # warm up
    share = None
    results: list[dict[str, Any]] = []
    for name, sizes, count, shortest, longest in RUNS:
        shape, backbone = build(*sizes)
        encoded = conversations(count, shortest, longest, backbone)
        seconds, disk = extraction(backbone, encoded)
        work = workload(encoded, rated=0)
        flops = stages(shape, work, Hardware("", 1, 0))[0].flops
        if share is None:
            share = flops / seconds / peak
        foreseen = stages(shape, work, Hardware("this machine", peak, 0), share=share, weight_bytes=4)[0]
        results.append(compared(f"features, {name}", seconds, foreseen.hours * 3600) | {"tokens": work.tokens})
        results.append(compared(f"disk, {name}", disk, foreseen.disk, "bytes"))
    rate = 1.0
    stage_1(4000, 256, rate)
    for name, (rows, hidden) in FIT_SIZES.items():
        seconds, foreseen_seconds = stage_1(rows, hidden, rate)
        if name == "reference":
            rate, foreseen_seconds = foreseen_seconds / seconds, seconds
        results.append(compared(f"stage 1, {name}", seconds, foreseen_seconds))
    worst = max(abs(entry["foreseen"] / entry["measured"] - 1) for entry in results)
    assert share is not None
    summary = {
        "peak_float32": peak,
        "rate_stage_1": rate,
        "threads": torch.get_num_threads(),
        "share": share,
        "worst": worst,
        "allowed": ALLOWED,
        "peak_memory": peak_bytes(),
        "runs": results,
    }
    print_table(summary)
    write_json(output, summary)


def matmul_rate(dtype: torch.dtype, size: int = 1536) -> float:
    """FLOP/s of a large matrix product on this machine: the best of six."""
    a, b = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def build(hidden: int, layers: int, heads: int, inner: int) -> tuple[Shape, Backbone]:
    """A randomly initialised Llama of a given shape with the embedded tokenizer."""
    torch.manual_seed(0)
    tokenizer = Backbone.load("armorm-tiny", dtype="float32", device="cpu").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        intermediate_size=inner,
        max_position_embeddings=2048,
    )
    return Shape.of_config(config), Backbone("random", LlamaModel(config).eval(), tokenizer)


def conversations(count: int, shortest: int, longest: int, backbone: Backbone) -> list[EncodedConversation]:
    """Conversations of random words with uniformly distributed lengths and distinct prompts."""
    from armorm.conversation import Conversation

    rng = np.random.default_rng(0)
    made = []
    for length in rng.integers(shortest, longest + 1, count):
        words = [f"w{number}" for number in rng.integers(0, 1000, int(length) // 3 - 3)]
        middle = max(1, len(words) // 3)
        made.append(Conversation.from_prompt(" ".join(words[:middle]), " ".join(words[middle:])))
    return backbone.template.encode(made)


def extraction(backbone: Backbone, encoded: list[EncodedConversation]) -> tuple[float, float]:
    """Seconds of the fastest of several extractions, and the bytes it writes."""
    seconds, disk = [], 0.0
    for _ in range(EXTRACTIONS):
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore.of(folder, backbone)
            start = time.perf_counter()
            extract(backbone, encoded, store)
            seconds.append(time.perf_counter() - start)
            disk = float(sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")))
    return min(seconds), disk


def workload(encoded: list[EncodedConversation], rated: int) -> Workload:
    """Workload of an extraction."""
    lengths = [len(conversation) for conversation in encoded]
    prompts = len({conversation.prompt_key for conversation in encoded})
    return Workload(len(encoded), prompts, sum(lengths), sum(n * n for n in lengths), rated, 1, 1, 0)


def stage_1(rows: int, d: int, rate: float, folds: int = 5) -> tuple[float, float]:
    """Measured and predicted seconds of a fit in which every row has all ratings."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((rows, d)).astype(np.float32)
    ratings = features[:, :3] + rng.standard_normal((rows, 3))
    numbers = rng.integers(0, folds, rows)
    seconds = float("inf")
    for _ in range(FITS):
        start = time.perf_counter()
        fit_regression(features, ratings, numbers, ["a", "b", "c"])
        seconds = min(seconds, time.perf_counter() - start)
    work = Workload(0, 0, 0, 0, rows, 1, 3, 0)
    shape = Shape(d, 1, 1, 1, 1, 1, 1)
    tiny = GatingSection(hidden_size=1, hidden_layers=1, steps=1, batch_size=1)
    foreseen = stages(shape, work, Hardware("", 1, 0), gate=tiny, folds=folds, host_rate=rate)[1]
    return seconds, foreseen.hours * 3600


def by_layer(name: str, layers: list[int], rows: int, rounds: int) -> dict[str, Any]:
    """Measured and predicted seconds of extractions whose features are read at several layers."""
    backbones = {layer: Backbone.load(name, layer=layer) for layer in layers}
    deepest = backbones[layers[-1]]
    drawn, source = conversation_sets(Path(os.environ.get("ARMORM_DATA", "../shared/data")))
    encoded = encode_rows(deepest.template, drawn["distinct"][:: len(drawn["distinct"]) // rows], 2048, "skip").encoded
    work = workload(encoded, rated=0)
    flops = {
        layer: stages(Shape.of_config(backbone.model.config), work, Hardware("", 1, 0))[0].flops
        for layer, backbone in backbones.items()
    }
    seconds: dict[str, dict[int, list[float]]] = {"wall": {}, "cpu": {}}
    load = []
    for number in range(-1, rounds):
        load.append(os.getloadavg()[0])
        for layer in layers[:: 1 if number % 2 == 0 else -1]:
            extraction_of = encoded if number >= 0 else encoded[:4]  # warm up, and test the model
            start, busy = time.perf_counter(), time.process_time()
            extract(backbones[layer], extraction_of, sharing=True)
            for clock, took in (("wall", time.perf_counter() - start), ("cpu", time.process_time() - busy)):
                if number >= 0:
                    seconds[clock].setdefault(layer, []).append(took)
    entries = []
    for layer in layers:
        entry: dict[str, Any] = {"layer": layer}
        for clock, measured in seconds.items():
            foreseen = [whole * flops[layer] / flops[layers[-1]] for whole in measured[layers[-1]]]
            pairs = zip(foreseen, measured[layer], strict=True)
            entry[clock] = {
                "measured": statistics.median(measured[layer]),
                "foreseen": statistics.median(foreseen),
                "ratio": statistics.median(expected / found for expected, found in pairs),
            }
        entries.append(entry)
    return {
        "backbone": Path(name).name,
        "dtype": str(deepest.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "conversations": len(encoded),
        "conversations_from": source,
        "tokens": work.tokens,
        "rounds": rounds,
        "load": {"median": statistics.median(load), "most": max(load), "cores": os.cpu_count()},
        "allowed": ALLOWED_BY_LAYER,
        "worst": {clock: max(abs(entry[clock]["ratio"] - 1) for entry in entries) for clock in seconds},
        "layers": entries,
    }


def print_layers(summary: dict[str, Any]) -> None:
    """The table of `by_layer`."""
    table = Table(box=None, header_style="bold")
    for head in ("layer", "seconds", "predicted", "ratio", "cpu seconds", "predicted", "ratio"):
        table.add_column(head, justify="right")
    for entry in summary["layers"]:
        cells = (f"{entry[clock][key]:.3g}" for clock in ("wall", "cpu") for key in ("measured", "foreseen", "ratio"))
        table.add_row(str(entry["layer"]), *cells)
    console = Console(highlight=False)
    console.print(table)
    worst = {clock: f"{value:.0%}" for clock, value in summary["worst"].items()}
    console.print(
        f"{summary['backbone']}, {summary['dtype']}, {summary['tokens']:,} tokens, "
        f"load {summary['load']['median']:.1f}; "
        f"largest error {worst['wall']} of seconds, {worst['cpu']} of processor seconds; {ALLOWED_BY_LAYER:.0%} allowed"
    )


def compared(name: str, measured: float, foreseen: float, unit: str = "seconds") -> dict[str, Any]:
    """One row of the table."""
    return {"name": name, "measured": measured, "foreseen": foreseen, "ratio": foreseen / measured, "unit": unit}


def print_table(summary: dict[str, Any]) -> None:
    """The table."""
    table = Table(box=None, header_style="bold")
    for head in ("", "measured", "predicted", "ratio"):
        table.add_column(head, justify="left" if not head else "right")
    for entry in summary["runs"]:
        table.add_row(entry["name"], *(f"{entry[key]:,.4g}" for key in ("measured", "foreseen", "ratio")))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"peak {summary['peak_float32'] / 1e9:.0f} GFLOP/s float32, share {summary['share']:.2f}, "
        f"largest error {summary['worst']:.0%} (allowed {summary['allowed']:.0%})"
    )
    print(json.dumps({"worst": summary["worst"], "within": summary["worst"] <= summary["allowed"]}))


if __name__ == "__main__":
    main()
