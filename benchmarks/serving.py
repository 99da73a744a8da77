"""How many samples a second does the server score for clients that send one at a time, and what does each wait?

In:  nothing: texts of the generated corpus, in ChatML, as OpenRLHF sends them: `POST /get_reward` with one query, its
     prompt and its label, a new connection for each call.
Out: a table and `benchmarks/results/serving.json`: throughput and latency (median, 99th percentile) at 1, 16, 64 and
     256 clients, of `armorm serve` and of a server that runs each request alone (below: FastAPI, a lock around the
     model, `score` of one conversation); then what `armorm serve` does when far more comes than it can take: how many
     were scored, how many turned away, whether it stayed up, and what a request takes when the storm is over.

    python benchmarks/serving.py                # the embedded model; --model and --device for others
    python benchmarks/serving.py --quick        # a look, without a file
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.table import Table

from armorm import ArmoRM
from armorm.data.demo import generate
from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.files import write_json
from armorm.serving.rendered import RenderedReader

CLIENTS = (1, 16, 64, 256)
STORM_CLIENTS, STORM_QUEUE = 512, 64


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


def calls(count: int) -> list[dict[str, Any]]:
    """Bodies of different samples: some 170 prompts in turn, their responses made different by their number."""
    rows = generate(0)
    bodies = []
    for number in range(count):
        row = rows[number % len(rows)]
        user, reply = row.messages[0]["content"], row.messages[-1]["content"]
        prompt = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        text = f"{prompt}{reply} ({number})<|im_end|>"
        bodies.append({"query": [text], "prompts": [prompt], "labels": [None]})
    return bodies


@contextmanager
def server(command: list[str], port: int) -> Iterator[str]:
    """A server in a process of its own, once it is up."""
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"TOKENIZERS_PARALLELISM": "true"})
    try:
        while True:
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    sys.exit(f"the server ended: {' '.join(command)}")
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


async def crowd(
    url: str, bodies: list[dict[str, Any]], clients: int
) -> tuple[float, np.ndarray, Counter[int], list[float]]:
    """Send every body once, `clients` at a time.

    Returns:
        seconds in all, seconds of each scored call, calls by status, rewards in order (NaN where there is none).
    """
    todo = iter(enumerate(bodies))
    seconds: list[float] = []
    statuses: Counter[int] = Counter()
    rewards = [float("nan")] * len(bodies)
    # (One client without kept connections: as a new connection for each call, without making a TLS context for each.)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def client(http: httpx.AsyncClient) -> None:
        for number, body in todo:
            began = time.perf_counter()
            answer = await http.post(f"{url}/get_reward", json=body)
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                seconds.append(time.perf_counter() - began)
                rewards[number] = answer.json()["rewards"][0]

    async with httpx.AsyncClient(timeout=180, limits=limits, trust_env=False) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return time.perf_counter() - start, np.array(seconds), statuses, rewards


def measured(url: str, bodies: list[dict[str, Any]], clients: int) -> dict[str, Any]:
    """Throughput and latency of one crowd."""
    took, seconds, statuses, rewards = asyncio.run(crowd(url, bodies, clients))
    if set(statuses) != {200} or not np.isfinite(rewards).all():
        sys.exit(f"{url}: found statuses {dict(statuses)}, expected every call to be scored")
    return {
        "clients": clients,
        "samples": len(bodies),
        "samples_per_second": len(bodies) / took,
        "median_ms": float(np.median(seconds)) * 1e3,
        "p99_ms": float(np.percentile(seconds, 99)) * 1e3,
    }


async def watched(url: str, ended: asyncio.Event) -> list[tuple[int, float]]:
    """Status and seconds of `GET /health`, asked ten times a second."""
    found = []
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
        while not ended.is_set():
            began = time.perf_counter()
            status = (await http.get(f"{url}/health")).status_code
            found.append((status, time.perf_counter() - began))
            await asyncio.sleep(0.1)
    return found


async def storm(url: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Far more at once than the queue takes."""
    ended = asyncio.Event()
    watching = asyncio.create_task(watched(url, ended))
    took, seconds, statuses, _ = await crowd(url, bodies, STORM_CLIENTS)
    ended.set()
    health = await watching
    _, after, after_statuses, _ = await crowd(url, bodies[:20], 1)
    return {
        "clients": STORM_CLIENTS,
        "queue": STORM_QUEUE,
        "samples": len(bodies),
        "seconds": took,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "scored_p99_ms": float(np.percentile(seconds, 99)) * 1e3 if len(seconds) else None,
        "health_asked": len(health),
        "health_ok": sum(status == 200 for status, _ in health),
        "health_slowest_ms": max(seconds for _, seconds in health) * 1e3,
        "after_median_ms": float(np.median(after)) * 1e3,
        "after_statuses": {str(status): count for status, count in after_statuses.items()},
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_REWARD_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=2048, help="for each crowd")
    parser.add_argument("--quick", action="store_true", help="64 samples, 1 and 16 clients, no file")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    parser.add_argument("--alone", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        alone(arguments.model, arguments.device, arguments.alone)
        return
    samples, crowds = (64, CLIENTS[:2]) if arguments.quick else (arguments.samples, CLIENTS)
    bodies = calls(samples)
    options = ["--model", arguments.model, "--device", arguments.device]
    console = Console(highlight=False)
    table = Table(
        "server", "clients", "samples/s", "median ms", "p99 ms", box=None, pad_edge=False, header_style="bold"
    )
    found: dict[str, Any] = {"model": arguments.model, "processors": os.cpu_count(), "device": arguments.device}
    for name in ("each request alone", "armorm serve"):
        port = free_port()
        serving = [sys.executable, "-m", "armorm", "serve", "--port", str(port)]
        command = [sys.executable, __file__, "--alone", str(port)] if name != "armorm serve" else serving
        with server([*command, *options], port) as url:
            measured(url, bodies[:32], 4)  # the first passes are slower
            found[name] = [measured(url, bodies, clients) for clients in crowds]
        for row in found[name]:
            numbers = (f"{row[key]:,.1f}" for key in ("samples_per_second", "median_ms", "p99_ms"))
            table.add_row(name, str(row["clients"]), *numbers)
    console.print(table)
    port = free_port()
    limited = [sys.executable, "-m", "armorm", "serve", "--port", str(port), "--max-waiting-rows", str(STORM_QUEUE)]
    with server([*limited, *options], port) as url:
        found["overload"] = asyncio.run(storm(url, calls(256 if arguments.quick else 4 * samples)))
    overload = found["overload"]
    console.print(
        f"overload: {overload['samples']:,} samples from {STORM_CLIENTS} clients, queue of {STORM_QUEUE}: by status "
        f"{overload['statuses']} in {overload['seconds']:.1f} s; /health {overload['health_ok']} of "
        f"{overload['health_asked']} times 200, slowest {overload['health_slowest_ms']:.0f} ms; afterwards a request "
        f"takes {overload['after_median_ms']:.1f} ms"
    )
    if not arguments.quick:
        write_json(arguments.output, found)
        console.print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
