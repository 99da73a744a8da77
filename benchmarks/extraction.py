"""Extraction: prefix trees and packed batches against the plain loop of the published scripts.

    python benchmarks/extraction.py                                   # armorm-tiny and a random Llama of about 100M
    python benchmarks/extraction.py --models llama-3-8b --device cuda # that model's shape at random, on a GPU
    python benchmarks/extraction.py --memory                          # peak memory at 5K and 50K conversations

The loop runs one conversation per forward pass and reuses nothing. All methods use the same model, dtype, machine and
conversations: all distinct ones of randomly drawn prompts of each set. Runs alternate; results are medians over the
rounds, as is the rate of this machine's matrix products at the model's own shapes, measured between the runs. `share`
is the model's matrix operations for the computed tokens relative to that rate; attention and the saving in the last
layer are not counted. The features of all methods are compared with those of the loop.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import armorm
from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, length_sorted_batches, resolve_device, resolve_dtype
from armorm.backbone.encoding import encode_rows
from armorm.backbone.prefix_forward import flops_per_token
from armorm.conversation import Conversation
from armorm.data.sources import Location
from armorm.data.synthetic import generate
from armorm.features.engine import Engine, plan_extraction
from armorm.files import EMBEDDED_BACKBONE, write_json
from armorm.progress import ignore, progress
from peak import environment

SETS = {
    "truthfulqa": "ratings/truthfulqa.jsonl.gz",
    "diasafety": "ratings/diasafety.jsonl.gz",
    "hh_harmless": "preferences/hh_harmless.jsonl.gz",
    "alpacaeval": "preferences/alpacaeval.jsonl.gz",
    "humaneval": "ratings/humaneval.jsonl.gz",
}
SHAPES = {
    "llama-100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
MAX_LENGTH = 2048


def load_backbone(model: str, device: str, dtype: str) -> Backbone:
    """An embedded or local backbone, or a randomly initialised one of a known shape with the embedded tokenizer."""
    if model not in SHAPES:
        return Backbone.load(model, device=device, dtype=dtype)
    from transformers import LlamaConfig, LlamaModel

    tokenizer = Backbone.load(EMBEDDED_BACKBONE, device="cpu").tokenizer
    place = resolve_device(device)
    resolved = resolve_dtype(dtype, place)
    torch.manual_seed(0)
    with torch.device(place):
        before = torch.get_default_dtype()
        torch.set_default_dtype(resolved if isinstance(resolved, torch.dtype) else torch.float32)
        network = LlamaModel(LlamaConfig(vocab_size=8192, max_position_embeddings=MAX_LENGTH, **SHAPES[model]))
        torch.set_default_dtype(before)
    return Backbone(model, network.eval(), tokenizer)


def load_set(path: Path) -> list[Conversation]:
    """Every conversation of a set: the rated ones, or both sides of each pair."""
    found = []
    for row in Location.find(path).rows():
        values = row.values
        if "messages" in values:
            texts = [values["messages"]]
        else:
            texts = [values["prompt"] + values[side] for side in ("chosen", "rejected")]
        found += [Conversation.from_messages(messages) for messages in texts]
    return found


def some_prompts(conversations: list[Conversation], count: int, seed: int) -> list[Conversation]:
    """All conversations of randomly drawn prompts, at least `count` of them."""
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(conversation.prompt_key, []).append(conversation)
    chosen: list[Conversation] = []
    for key in np.random.default_rng(seed).permutation(sorted(groups)):
        chosen += groups[key]
        if len(chosen) >= count:
            break
    return chosen


def matrix_rate(backbone: Backbone, tokens: int) -> float:
    """FLOP/s of this machine at the shapes of the model's own matrices, with `tokens` rows at a time."""
    layer = next(m for m in backbone.model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    weights = [p.detach() for p in layer.parameters() if p.dim() == 2]
    inputs = [torch.randn(tokens, w.shape[1], dtype=w.dtype, device=w.device) for w in weights]
    operations = sum(2 * tokens * w.numel() for w in weights)
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            for x, w in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(x, w)
            _wait(backbone)
            seconds.append(time.perf_counter() - start)
    return operations / min(seconds[1:])


def _wait(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()


def timed(backbone: Backbone, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds taken, and the result."""
    _wait(backbone)
    start = time.perf_counter()
    found = work()
    _wait(backbone)
    return time.perf_counter() - start, found


def loop(backbone: Backbone, encoded: list[EncodedConversation]) -> tuple[np.ndarray, np.ndarray]:
    """One conversation at a time, as in the published scripts."""
    pairs = [backbone.features([one]) for one in encoded]
    return np.concatenate([p for p, _ in pairs]), np.concatenate([r for _, r in pairs])


def padding_share(lengths: Sequence[int] | np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of computed tokens that are padding, 0 to 1."""
    lengths = np.asarray(lengths, np.int64)
    computed = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1.0 - float(lengths.sum()) / computed if computed else 0.0


def measure_set(
    backbone: Backbone, conversations: list[Conversation], whole: list[Conversation], arguments: argparse.Namespace
) -> dict[str, Any]:
    rows = encode_rows(backbone.template, conversations, MAX_LENGTH, "skip").encoded
    unique = list({row.key: row for row in rows}.values())
    plan = plan_extraction(unique, range(len(unique)))
    encoded = [unique[i] for i in plan.rows]
    lengths, budget = plan.lengths, arguments.batch_tokens
    asked = int(lengths.sum())
    ways: dict[str, Callable[[], Any]] = {
        "loop": lambda: loop(backbone, encoded),
        "packed": lambda: Engine(backbone, budget).features(encoded, ignore),
        "shared": lambda: tree.features(encoded, ignore),
    }
    tree = Engine(backbone, budget, "tree", arguments.compiled)
    tree.features(encoded, ignore)  # warm up, and compile
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates, found = [], {}
    for _ in range(arguments.rounds):
        rates.append(matrix_rate(backbone, min(budget, 4096)))
        for name, way in ways.items():
            took, found[name] = timed(backbone, way)
            seconds[name].append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = statistics.median(rates)
    operations = flops_per_token(backbone.model)
    computed = {"loop": asked, "packed": asked, "shared": plan.tree_tokens}
    scale = np.linalg.norm(found["loop"][1], axis=1)
    return {
        "conversations": len(encoded),
        "prompts": len({row.prompt_key for row in encoded}),
        "mean_tokens": asked / len(encoded),
        "tokens_asked": asked,
        "tokens_computed": plan.tree_tokens,
        "sharing": asked / plan.tree_tokens,
        "deduplication": len(whole) / len({c.key for c in whole}),
        "padding_packed": padding_share(lengths, length_sorted_batches(lengths, budget)),
        "matrix_rate_gflops": rate / 1e9,
        "seconds": median,
        "tokens_per_second": {name: asked / median[name] for name in ways},
        "times_the_loop": {name: median["loop"] / median[name] for name in ways},
        "share_of_rate": {name: computed[name] * operations / median[name] / rate for name in ways},
        "largest_difference": {
            name: float((np.linalg.norm(found[name][1] - found["loop"][1], axis=1) / scale).max())
            for name in ("packed", "shared")
        },
    }


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    backbone = load_backbone(model, arguments.device, arguments.dtype)
    count = arguments.rows or (240 if flops_per_token(backbone.model) < 1e8 else 24)
    root = Path(os.environ.get("ARMORM_DATA", "../shared/data"))
    sets: dict[str, Any] = {}
    with progress(model, len(arguments.sets), "sets") as advance:
        for name in arguments.sets:
            path = root / SETS[name]
            if not path.exists():
                raise SystemExit(f"{path}: no such file; set ARMORM_DATA to the folder of the real data sets")
            whole = load_set(path)
            sets[name] = measure_set(backbone, some_prompts(whole, count, arguments.seed), whole, arguments)
            advance(1)

    def mean(key: str, way: str) -> float:
        return float(np.exp(np.mean([np.log(entry[key][way]) for entry in sets.values()])))

    return {
        "parameters": backbone.model.num_parameters(),
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "batch_tokens": arguments.batch_tokens,
        "compiled": arguments.compiled,
        "rounds": arguments.rounds,
        "sets": sets,
        "geometric_means": {
            way: {"times_the_loop": mean("times_the_loop", way), "share_of_rate": mean("share_of_rate", way)}
            for way in ("loop", "packed", "shared")
        },
    }


def print_table(model: str, results: dict[str, Any], console: Console) -> None:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title=f"{model}, {results['dtype']}", title_justify="left"
    )
    for name in (
        "",
        "rows",
        "tokens",
        "repeats",
        "sharing",
        "packed",
        "shared",
        "loop",
        "packed",
        "shared",
        "max diff",
    ):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("", "", "mean", "x", "x", "x loop", "x loop", "% rate", "% rate", "% rate", "", style="dim")
    for name, entry in results["sets"].items():
        times, share = entry["times_the_loop"], entry["share_of_rate"]
        table.add_row(
            name,
            f"{entry['conversations']:,}",
            f"{entry['mean_tokens']:.0f}",
            f"{entry['deduplication']:.2f}",
            f"{entry['sharing']:.2f}",
            f"{times['packed']:.2f}",
            f"{times['shared']:.2f}",
            *(f"{share[way]:.0%}" for way in ("loop", "packed", "shared")),
            f"{entry['largest_difference']['shared']:.0e}",
        )
    means = results["geometric_means"]
    table.add_row(
        "geometric mean", "", "", "", "",
        *(f"{means[way]['times_the_loop']:.2f}" for way in ("packed", "shared")),
        *(f"{means[way]['share_of_rate']:.0%}" for way in ("loop", "packed", "shared")),
        style="bold",
    )  # fmt: skip
    console.print(table)


# Runs the command and writes the peak memory of its process to a file at exit.
_EMBED = """
import atexit, pathlib, sys
from peak import peak_bytes

atexit.register(lambda path=sys.argv.pop(1): pathlib.Path(path).write_text(str(peak_bytes())))
from armorm.cli.app import main
main()
"""


def peak_memory(conversations: int) -> dict[str, Any]:
    """Peak memory of `armorm embed` on generated conversations with few prompts, in a separate process."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "conversations.jsonl"
        base = [row.messages for row in generate(0)][:500]
        with path.open("w", encoding="utf-8") as file:
            for i in range(conversations):
                messages = [dict(m) for m in base[i % len(base)]]
                messages[-1]["content"] = f"{i} {messages[-1]['content'][:80]}"
                file.write(json.dumps({"messages": messages}) + "\n")
        peak_file = Path(name) / "peak"
        command = [sys.executable, "-c", _EMBED, str(peak_file), "embed", str(path), "--backbone", EMBEDDED_BACKBONE]
        start = time.perf_counter()
        subprocess.run([*command, "--output", str(Path(name) / "features")], check=True, env=environment())
        seconds = time.perf_counter() - start
        peak = int(peak_file.read_text()) / 2**20
    return {"conversations": conversations, "seconds": seconds, "peak_megabytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description="Extraction against the plain loop of the published scripts.")
    parser.add_argument("--models", nargs="+", default=[EMBEDDED_BACKBONE, "llama-100m"])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument(
        "--rows", type=int, default=None, help="approximate conversations per set (default: by model size)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="measure only peak memory, at 5K and 50K conversations")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    console = Console(width=110, highlight=False)
    suffix = "_memory" if arguments.memory else "_cuda" if resolve_device(arguments.device).type == "cuda" else ""
    output = arguments.output or Path(f"benchmarks/results/extraction{suffix}.json")
    results: dict[str, Any] = {"armorm_version": armorm.__version__, "torch": torch.__version__}
    if arguments.memory:
        results["memory"] = [peak_memory(count) for count in (5_000, 50_000)]
        for entry in results["memory"]:
            peak, seconds = entry["peak_megabytes"], entry["seconds"]
            console.print(f"{entry['conversations']:,} conversations: peak {peak:,.0f} MB, {seconds:.0f} s")
    else:
        results["models"] = {}
        for model in arguments.models:
            results["models"][model] = measure(model, arguments)
            print_table(model, results["models"][model], console)
    write_json(output, results)
    console.print(f"wrote {output}")


if __name__ == "__main__":
    main()
