"""Throughput and latency of the server for clients that send one sample at a time.

Requests are texts of the generated corpus in ChatML as OpenRLHF sends them: `POST /get_reward` with one query, its
prompt and its label, on a new connection per call. Samples come in groups of 16 responses to one prompt, as in GRPO.
Two loads: `long prompts` (a passage and a question about it, short replies) and `short prompts`.

Measured are throughput and latency (median, 99th percentile) with 1, 16, 64 and 256 clients, for `armorm serve` and for
a server that runs each request alone (below: FastAPI, a lock around the model, `score` of one conversation), with the
embedded model and a randomly initialised one of 100 million parameters. Then a minute of ten times the capacity of
`armorm serve`: the outcome of every request, the server's memory over time, and how soon it accepts requests again.
Last, fairness: one client with small requests, alone and next to 100 large requests that were sent before.

    python benchmarks/serving.py                        # everything
    python benchmarks/serving.py --models random-100m --parts crowds --clients 64 --servers serve --seconds 60
    python benchmarks/serving.py --models armorm-tiny-rm --parts overload --overload-seconds 60
    python benchmarks/serving.py --models armorm-tiny-rm --parts fairness
    python benchmarks/serving.py --models armorm-tiny-rm --parts crowds --quick          # a quick look, writes no file

New measurements replace those in the results file for the same model, load, server and number of clients. With
`--seconds`, nothing new is sent after that time, and calls in progress are awaited. Clients and server share the
processors of the machine; the table also shows the server's own processor time per sample, which other programs
affect less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, LlamaConfig

from armorm import ArmoRM
from armorm.backbone.rendered_text import RenderedReader
from armorm.data.synthetic import generate
from armorm.files import EMBEDDED_REWARD_MODEL, write_json
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification

CLIENTS = (1, 16, 64, 256)
GROUP = 16  # responses to one prompt
RANDOM = "random-100m"
# Words of a passage before the question, words of a reply, by load and model.
LOADS = {
    EMBEDDED_REWARD_MODEL: {"long prompts": (340, 30), "short prompts": (0, 100)},
    RANDOM: {"long prompts": (160, 15)},
}
SERVERS = ("alone", "serve")
PARTS = ("crowds", "overload", "fairness")
SMALL, LARGE = (0, 8), (1150, 30)  # passage and reply words of the requests of the fairness measurement
LARGE_REQUESTS, SMALL_REQUESTS = 100, 60
OVERLOAD, OVERLOAD_SECONDS, OVERLOAD_WAIT, PATIENCE = 10, 60, 0.5, 60.0


def random_model(folder: Path) -> None:
    """A randomly initialised reward model of about 100 million parameters (Llama, 12 layers)."""
    base = ArmoRM.from_pretrained(EMBEDDED_REWARD_MODEL)
    torch.manual_seed(0)
    backbone = AutoModel.from_config(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=768,
            intermediate_size=2304,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            pad_token_id=base.tokenizer.pad_token_id,
            bos_token_id=base.tokenizer.bos_token_id,
            eos_token_id=base.tokenizer.eos_token_id,
        )
    )
    config = ArmoRMConfig(
        backbone_config=backbone.config,
        objectives=base.objectives.to_dicts(),
        gating_hidden_dim=256,
        gating_n_hidden=1,
        pad_token_id=base.tokenizer.pad_token_id,
        gate_pattern=base.model.config.gate_pattern,
        provenance={"backbone": "random"},
    )
    ArmoRM(ArmoRMForSequenceClassification.assemble(backbone, config), base.tokenizer).save_pretrained(folder)


def alone(model: str, device: str, port: int) -> None:
    """A server that runs each request alone."""
    rm = ArmoRM.from_pretrained(model, device=device)
    reader = RenderedReader(rm.backbone.template, len(rm.tokenizer))
    lock, app = threading.Lock(), FastAPI()

    @app.post("/get_reward")
    def get_reward(body: dict[str, Any]) -> dict[str, Any]:
        conversations = [reader.continuation(q, p) for q, p in zip(body["query"], body["prompts"], strict=True)]
        with lock:
            scores = rm.score(conversations).scores.tolist()
        return {"rewards": scores, "scores": scores, "extra_logs": {}}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


def requests(count: int, load: tuple[int, int], first: int = 0) -> list[bytes]:
    """Complete HTTP requests with distinct samples, grouped by prompt.

    Args:
        load: number of words of the passage before the question, and of a reply.
        first: number of the first group, so that prompts differ between runs.
    """
    passage_words, reply_words = load
    rows = generate(0)
    replies = [row.messages[-1]["content"] for row in rows]
    questions = list(dict.fromkeys(row.messages[0]["content"] for row in rows))
    words = " ".join(replies).split()
    found = []
    for number in range(count):
        group = first + number // GROUP
        start = group * 97 % (len(words) - passage_words)
        passage = " ".join(words[start : start + passage_words])
        question = f"{questions[group % len(questions)]} ({group})"
        user = f"{passage}\n\n{question}" if passage else question
        reply = " ".join(f"{number} {replies[(group * 31 + number) % len(replies)]}".split()[:reply_words])
        prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        body = {"query": [f"{prompt}{reply}<|im_end|>"], "prompts": [prompt], "labels": [None]}
        found.append(post_request("/get_reward", body))
    return found


def post_request(path: str, body: dict[str, Any]) -> bytes:
    """A complete HTTP request, after which the connection is closed."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def call(port: int, request: bytes) -> tuple[int, float]:
    """Status and first reward (NaN if none) of one request on a new connection; status 0 if the connection broke."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            answer = await reader.read()
        finally:
            writer.close()
    except OSError:
        return 0, float("nan")
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
    rewards = json.loads(body).get("rewards") if status == 200 else None  # (`/health` has none.)
    return status, rewards[0] if rewards else float("nan")


async def crowd(
    port: int, todo: Sequence[bytes], clients: int, seconds_at_most: float = float("inf")
) -> tuple[float, list[float], Counter[int], list[float]]:
    """Send every request once with `clients` concurrent clients; nothing new after `seconds_at_most`.

    Returns:
        total seconds, seconds of each call, number of calls by status, rewards.
    """
    waiting = iter(todo)
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    rewards: list[float] = []

    async def client() -> None:
        for request in waiting:
            began = time.perf_counter()
            if began - start > seconds_at_most:
                return
            status, reward = await call(port, request)
            seconds.append(time.perf_counter() - began)
            statuses[status] += 1
            rewards.append(reward)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, seconds, statuses, rewards


def measured(
    port: int, todo: Sequence[bytes], clients: int, process: int, seconds_at_most: float = float("inf")
) -> dict[str, Any]:
    """Throughput and latency of one run with concurrent clients."""
    before = processor_seconds(process)
    took, seconds, statuses, rewards = asyncio.run(crowd(port, todo, clients, seconds_at_most))
    if set(statuses) != {200} or not np.isfinite(rewards).all():
        sys.exit(f"found statuses {dict(statuses)}, expected every call to be scored")
    return {
        "clients": clients,
        "samples": len(seconds),
        "samples_per_second": len(seconds) / took,
        "median_ms": float(np.median(seconds)) * 1e3,
        "p99_ms": float(np.percentile(seconds, 99)) * 1e3,
        "processor_ms": (processor_seconds(process) - before) / len(seconds) * 1e3,
    }


async def overload(port: int, process: int, load: tuple[int, int], capacity: float, seconds: float) -> dict[str, Any]:
    """Send requests at ten times the capacity at fixed times, whatever happens to earlier ones."""
    rate = OVERLOAD * capacity
    pool = requests(4096, load, first=100_000)
    start = time.perf_counter()
    statuses: Counter[int] = Counter()
    without_reward = 0
    memory: list[tuple[float, float]] = []
    health: list[tuple[int, float]] = []

    async def one(request: bytes) -> None:
        nonlocal without_reward
        try:
            status, reward = await asyncio.wait_for(call(port, request), PATIENCE)
        except (asyncio.TimeoutError, TimeoutError):
            status, reward = -1, float("nan")
        statuses[status] += 1
        without_reward += status == 200 and not np.isfinite(reward)

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - start, resident_mib(process)))
            began = time.perf_counter()
            status, _ = await call(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            health.append((status if status else 0, time.perf_counter() - began))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    calls: set[asyncio.Task[None]] = set()
    sent = 0
    while (now := time.perf_counter() - start) < seconds:
        while sent < rate * now:
            task = asyncio.create_task(one(pool[sent % len(pool)]))
            calls.add(task)
            task.add_done_callback(calls.discard)
            sent += 1
        await asyncio.sleep(0.005)
    if watching.done():
        watching.result()
    watching.cancel()
    stormed = time.perf_counter() - start
    fresh = requests(GROUP, load, first=200_000)
    end = time.perf_counter()
    taken_again = None
    while taken_again is None and time.perf_counter() - end < PATIENCE:
        status, _ = await call(port, fresh[0])
        if status == 200:
            taken_again = time.perf_counter() - end
        else:
            await asyncio.sleep(0.02)
    await asyncio.gather(*calls)
    _, after, after_statuses, _ = await crowd(port, fresh[1:], 1)
    settled = [mib for at, mib in memory if at >= 10] or [mib for _, mib in memory]
    return {
        "requests_per_second": sent / stormed,
        "capacity": capacity,
        "seconds": stormed,
        "queue_seconds": OVERLOAD_WAIT,
        "requests": sent,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "accepted_without_reward": without_reward,
        "memory_mib": {"at_10_s": settled[0], "most": max(settled), "at_the_end": settled[-1]},
        "health_asked": len(health),
        "health_ok": sum(status == 200 for status, _ in health),
        "health_slowest_ms": max(took for _, took in health) * 1e3,
        "answers_again_after_s": taken_again,
        "after_median_ms": float(np.median(after)) * 1e3,
        "after_statuses": {str(status): count for status, count in after_statuses.items()},
    }


async def fairness(port: int) -> dict[str, Any]:
    """Latency of small requests, one after another, alone and while large ones are queued."""
    small = [requests(1, SMALL, first=1000 + number)[0] for number in range(2 * SMALL_REQUESTS)]
    large = [requests(1, LARGE, first=5000 + number)[0] for number in range(LARGE_REQUESTS)]

    async def latencies(todo: Sequence[bytes], until: asyncio.Future[Any] | None = None) -> list[float]:
        found = []
        for request in todo:
            if until is not None and until.done():
                break
            began = time.perf_counter()
            if (await call(port, request))[0] != 200:
                sys.exit("a small request was not scored")
            found.append((time.perf_counter() - began) * 1e3)
        return found

    alone = await latencies(small[:SMALL_REQUESTS])
    start = time.perf_counter()
    crowded = asyncio.gather(*(call(port, request) for request in large))
    await asyncio.sleep(1)
    beside = await latencies(small[SMALL_REQUESTS:], crowded)
    statuses = Counter(status for status, _ in await crowded)
    return {
        "large_requests": len(large),
        "large_statuses": {str(status): count for status, count in statuses.items()},
        "large_seconds": time.perf_counter() - start,
        "small_alone_ms": percentiles(alone),
        "small_beside_ms": percentiles(beside),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {"count": len(values), "median": float(np.median(values)), "p99": float(np.percentile(values, 99))}


def resident_mib(process: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor_seconds(process: int) -> float:
    """Processor seconds used by all threads of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a separate process; yields when it is healthy."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"TOKENIZERS_PARALLELISM": "true"})
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None:
                    sys.exit(f"the server ended: {' '.join(command)}")
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    """An unused port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def served(model: str, device: str, port: int) -> list[str]:
    return [*(sys.executable, "-m", "armorm", "serve", "--port", str(port)), "--model", model, "--device", device]


def served_alone(model: str, device: str, port: int) -> list[str]:
    return [sys.executable, __file__, "--alone", str(port), "--model", model, "--device", device]


def crowds(model: str, loads: dict[str, tuple[int, int]], found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Measure the requested servers into `found` by load, server and number of clients; prompts differ between runs."""
    for name in asked.servers:
        port = free_port()
        command = (served_alone if name == "alone" else served)(model, asked.device, port)
        with server(command, port) as process:
            for load, words in loads.items():
                measured(port, requests(8, words, first=10_000), 4, process.pid)  # warm up
                rows = found.setdefault(load, {}).setdefault(name, {})
                for count in asked.clients:
                    todo = requests(max(asked.samples, count), words, first=1000 * count)
                    rows[str(count)] = measured(port, todo, count, process.pid, asked.seconds)


def table_of(found: dict[str, Any]) -> Table:
    columns = ("load", "clients", "server", "samples/s", "gain", "median ms", "p99 ms", "processor ms/sample")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for load, servers in found.items():
        for count in sorted({int(count) for rows in servers.values() for count in rows}):
            before, after = (servers.get(name, {}).get(str(count)) for name in SERVERS)
            gain = f"{after['samples_per_second'] / before['samples_per_second']:.1f}x" if before and after else ""
            for name, row, times in (("alone", before, ""), ("armorm serve", after, gain)):
                if row:
                    keys = ("samples_per_second", "median_ms", "p99_ms", "processor_ms")
                    numbers = [f"{row[key]:,.1f}" for key in keys]
                    table.add_row(load, str(count), name, numbers[0], times, *numbers[1:])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[EMBEDDED_REWARD_MODEL, RANDOM], choices=list(LOADS))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS))
    parser.add_argument("--loads", nargs="+", choices=sorted({load for loads in LOADS.values() for load in loads}))
    parser.add_argument("--samples", type=int, default=64, help="minimum number of samples per run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time limit for sending in each run")
    parser.add_argument("--overload-seconds", type=float, default=OVERLOAD_SECONDS)
    parser.add_argument("--quick", action="store_true", help="1, 16 and 64 clients, at least 32 samples, no file")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        alone(arguments.model, arguments.device, arguments.alone)
        return
    if arguments.quick:
        arguments.clients, arguments.samples, arguments.overload_seconds = list(CLIENTS[:3]), 32, 10.0
    console = Console(highlight=False, width=120)
    # Parts can be measured one by one: earlier results in the file are kept.
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}

    def keep() -> None:
        if not arguments.quick:
            write_json(arguments.output, results)

    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            model = name
            if name == RANDOM:
                model = str(Path(folder) / RANDOM)
                random_model(Path(model))
            result = results.setdefault(name, {})
            result |= {"processors": os.cpu_count(), "device": arguments.device}
            if "crowds" in arguments.parts:
                loads = {load: words for load, words in LOADS[name].items() if load in (arguments.loads or LOADS[name])}
                crowds(model, loads, result.setdefault("crowds", {}), arguments)
                console.print(f"\n{name}, {GROUP} responses per prompt", table_of(result["crowds"]), sep="\n")
                keep()
            if "overload" in arguments.parts and name == EMBEDDED_REWARD_MODEL:
                result["overload"] = overloaded(model, arguments.device, arguments.overload_seconds)
                console.print(overload_summary(result["overload"]))
                keep()
            if "fairness" in arguments.parts:
                port = free_port()
                with server([*served(model, arguments.device, port), "--max-waiting-seconds", "300"], port) as process:
                    measured(port, requests(16, SMALL, first=10_000), 1, process.pid)
                    result["fairness"] = asyncio.run(fairness(port))
                console.print(fairness_summary(result["fairness"]))
                keep()


def overloaded(model: str, device: str, seconds: float) -> dict[str, Any]:
    """Capacity with the default queue; then ten times that load with a short queue."""
    port, load = free_port(), LOADS[EMBEDDED_REWARD_MODEL]["short prompts"]
    with server(served(model, device, port), port) as process:
        measured(port, requests(8, load, first=10_000), 4, process.pid)
        capacity = measured(port, requests(128, load), 16, process.pid)["samples_per_second"]
    with server([*served(model, device, port), "--max-waiting-seconds", str(OVERLOAD_WAIT)], port) as process:
        measured(port, requests(16, load, first=10_000), 1, process.pid)
        return asyncio.run(overload(port, process.pid, load, capacity, seconds))


def fairness_summary(found: dict[str, Any]) -> str:
    alone, beside = found["small_alone_ms"], found["small_beside_ms"]
    return (
        f"\nfairness: {beside['count']} small requests one after another next to {found['large_requests']} large ones "
        f"({found['large_statuses']} in {found['large_seconds']:.1f} s): median {beside['median']:.0f} ms, 99th "
        f"percentile {beside['p99']:.0f} ms; alone {alone['median']:.0f} and {alone['p99']:.0f} ms "
        f"({beside['p99'] / alone['p99']:.1f}x)"
    )


def overload_summary(found: dict[str, Any]) -> str:
    memory, again = found["memory_mib"], found["answers_again_after_s"]
    return (
        f"\noverload: {found['requests']:,} requests in {found['seconds']:.0f} s "
        f"({found['requests_per_second']:.0f} per second, capacity {found['capacity']:.1f}), "
        f"queue of {found['queue_seconds']} s: by status {found['statuses']}, "
        f"{found['accepted_without_reward']} of the 200 responses without a reward; "
        f"memory {memory['at_10_s']:.0f} MiB after 10 s, "
        f"{memory['most']:.0f} at peak, {memory['at_the_end']:.0f} at the end; /health {found['health_ok']} of "
        f"{found['health_asked']} checks OK, slowest {found['health_slowest_ms']:.0f} ms; after the overload the first "
        f"success came after {'never' if again is None else f'{again:.2f} s'}, the next took "
        f"{found['after_median_ms']:.1f} ms"
    )


if __name__ == "__main__":
    main()
