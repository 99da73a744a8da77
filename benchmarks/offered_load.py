"""Latency of servers at fixed offered loads: requests come at random moments, whether earlier ones are answered or not.

    python benchmarks/offered_load.py [--vllm PYTHON] [--seconds 20] [--output benchmarks/results/offered_load.json]

`serving.py` measures throughput with clients that wait for their answer. Here a request with one sample is sent at each
moment of a Poisson process, the same moments and samples for every server: `armorm serve`, a server that runs each
request alone, and with `--vllm` vLLM's pooling server (PYTHON has armorm and vLLM, as of `make test-vllm`; `/classify`
with rendered text, its defaults, float32). The loads are shares of the rate that `armorm serve` reaches with 64 waiting
clients in the same run. Every answer is awaited; a server that cannot keep up shows it by its latency. Client and
server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm.files import EMBEDDED_REWARD_MODEL, embedded_path, write_json
from armorm.progress import progress
from serving import LOADS, call, free_port, measured, post_request, requests, served, served_alone, server
from vllm_agreement import SETTINGS

SHARES = (0.25, 0.5, 0.8)  # of the capacity
CLIENTS = 64  # of the measurement of the capacity
LOAD = LOADS[EMBEDDED_REWARD_MODEL]["short prompts"]
PERCENTILES = (50, 90, 99)
Translate = Callable[[bytes], bytes]  # a request of `serving.requests` to one of another server


def for_vllm(request: bytes) -> bytes:
    """The same sample as a request to `/classify`."""
    (query,) = json.loads(request.partition(b"\r\n\r\n")[2])["query"]
    return post_request("/classify", {"model": "model", "input": query})


async def offered(port: int, todo: Sequence[bytes], moments: np.ndarray) -> tuple[float, list[float]]:
    """Send each request at its moment on a connection of its own.

    Args:
        moments: (n,) seconds from now, ascending.

    Returns:
        seconds until the last answer, and seconds of each call.
    """
    seconds: list[float] = []

    async def one(request: bytes) -> None:
        began = time.perf_counter()
        status, _ = await call(port, request)
        if status != 200:
            sys.exit(f"found status {status}, expected every request to be answered")
        seconds.append(time.perf_counter() - began)

    start, calls = time.perf_counter(), []
    for moment, request in zip(moments, todo, strict=True):
        await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
        calls.append(asyncio.create_task(one(request)))
    await asyncio.gather(*calls)
    return time.perf_counter() - start, seconds


def arrivals(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """Moments of a Poisson process."""
    count = max(1, round(rate * seconds))
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def latencies(port: int, rate: float, seconds: float, translate: Translate) -> dict[str, Any]:
    """Percentiles of the latency at one load."""
    moments = arrivals(rate, seconds)
    todo = [translate(request) for request in requests(len(moments), LOAD, first=round(1000 * rate))]
    took, found = asyncio.run(offered(port, todo, moments))
    latency = {f"p{share}_ms": float(np.percentile(found, share)) * 1e3 for share in PERCENTILES}
    return {"offered": rate, "requests": len(found), "answered_per_second": len(found) / took, **latency}


def table_of(results: dict[str, Any]) -> Table:
    table = Table(title=f"{results['model']}, short prompts", box=None, title_justify="left")
    for column in ("server", "offered a second", "answered", *(f"p{share} ms" for share in PERCENTILES)):
        table.add_column(column, justify="left" if column == "server" else "right")
    for name, rows in results["servers"].items():
        for row in rows:
            numbers = [row["offered"], row["answered_per_second"], *(row[f"p{share}_ms"] for share in PERCENTILES)]
            table.add_row(name, *(f"{value:,.1f}" for value in numbers))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with armorm and vLLM")
    parser.add_argument("--seconds", type=float, default=20.0, help="time in which requests are sent, per load")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "offered_load.json")
    arguments = parser.parse_args()
    model = EMBEDDED_REWARD_MODEL
    ports = {name: free_port() for name in ("armorm serve", "alone", "vllm")}
    commands = {
        "armorm serve": served(model, "auto", ports["armorm serve"]),
        "alone": served_alone(model, "auto", ports["alone"]),
    }
    if arguments.vllm:
        commands["vllm"] = [
            *(arguments.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded_path(model))),
            *("--served-model-name", "model", "--runner", "pooling", "--dtype", "float32"),
            *("--host", "127.0.0.1", "--port", str(ports["vllm"]), "--disable-uvicorn-access-log"),
        ]
        settings = SETTINGS | {"VLLM_LOGGING_LEVEL": "ERROR"}
        os.environ.update({key: os.environ.get(key, value) for key, value in settings.items()})
    results: dict[str, Any] = {"model": model, "processors": os.cpu_count(), "seconds": arguments.seconds}
    results["servers"] = {}
    with progress("loads", len(commands) * len(SHARES), "loads") as advance:
        for name, command in commands.items():
            translate: Translate = for_vllm if name == "vllm" else lambda request: request
            with server(command, ports[name]) as process:
                asyncio.run(
                    offered(ports[name], [translate(r) for r in requests(32, LOAD, first=90_000)], np.zeros(32))
                )
                if name == "armorm serve":
                    found = measured(ports[name], requests(4 * CLIENTS, LOAD, first=50_000), CLIENTS, process.pid)
                    results["capacity"] = found["samples_per_second"]
                rows = results["servers"].setdefault(name, [])
                for share in SHARES:
                    rows.append(latencies(ports[name], share * results["capacity"], arguments.seconds, translate))
                    advance(1)
            write_json(arguments.output, results)
    console = Console(highlight=False, width=120)
    console.print(table_of(results))
    console.print(f"armorm serve with {CLIENTS} waiting clients: {results['capacity']:.1f} samples a second")


if __name__ == "__main__":
    main()
