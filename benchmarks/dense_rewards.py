"""What padding does to a score, to dense rewards that sum to it, and to sums that do not.

The replies are those of `benchmarks/everyday/everyday_pairs.jsonl`. 2 and 8 neutral sentences are added at the end of
each, and the table has the mean change of:

- the score, and the sum of the rewards by token (`per_token` of the server and its client), which is the same number;
- the return from the first token of these rewards, discounted by 0.99 a token: of replies whose normalised score is
  above 0, and below 0;
- the same if the whole score is paid at the last token;
- the plain score times the number of tokens: about what a policy is paid that takes `w . h` of each token as reward,
  without the division by their number.

Costs are CPU seconds of the server, in this process, for all replies, with and without `per_token`, in turn.

    python benchmarks/dense_rewards.py [--model armorm-small-rm] [--pairs 20] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm.client import RewardClient
from armorm.conversation import Conversation
from armorm.files import DEFAULT_REWARD_MODEL, write_json
from armorm.reward_model import ArmoRM
from armorm.serving.engine import ScoringEngine
from armorm.serving.server import running
from armorm.serving.settings import ServingSettings

PAIRS = Path(__file__).parent / "everyday" / "everyday_pairs.jsonl"
PADDING = (
    "I hope this helps.",
    "There is more to say about this topic.",
    "Many people have asked about this.",
    "It is a topic that comes up now and then.",
    "Some read about it in books, others on the web.",
    "Opinions on such things may differ.",
    "That is what comes to mind here.",
    "With that, the reply is at its end.",
)
COUNTS = (0, 2, 8)
DISCOUNT = 0.99
ROUNDS = 2


def padded(pairs: int, sentences: int) -> list[Conversation]:
    """The replies of the first pairs with this number of sentences added."""
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()[:pairs]]
    replies = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    return [Conversation.from_prompt(prompt, " ".join([reply, *PADDING[:sentences]])) for prompt, reply in replies]


def figures(client: RewardClient, pairs: int, sentences: int) -> dict[str, np.ndarray]:
    """Numbers (n,) of all replies with this number of sentences added."""
    batch = client.score(padded(pairs, sentences), normalize=True, include=[], per_token="token")
    reference = client.info()["reference"]
    mean, deviation = float(reference["score_mean"]), float(reference["score_std"])
    assert batch.token_scores is not None and batch.exact_share is not None
    rewards = batch.token_scores
    tokens = np.array([len(values) for values in rewards])
    plain = batch.scores.astype(np.float64) * deviation + mean
    return {
        "tokens": tokens.astype(np.float64),
        "exact share": batch.exact_share,
        "score": batch.scores.astype(np.float64),
        "sum": np.array([values.sum() for values in rewards]),
        "discounted": np.array([values @ DISCOUNT ** np.arange(len(values)) for values in rewards]),
        "at the end, discounted": batch.scores * DISCOUNT ** (tokens - 1.0),
        "undivided": plain * tokens,
    }


def changes(client: RewardClient, pairs: int, base: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """Mean changes, from the figures of the replies as they are, by number of added sentences."""
    high, rows = base["score"] > 0, []
    for count in COUNTS[1:]:
        found = figures(client, pairs, count)
        change = {name: found[name] - base[name] for name in base}
        rows.append(
            {
                "sentences": count,
                "tokens": float(change["tokens"].mean()),
                "score": float(change["score"].mean()),
                "sum": float(change["sum"].mean()),
                "largest difference of sum and score": float(np.abs(found["sum"] - found["score"]).max()),
                **{
                    f"{name}, score {side} 0": float(change[name][mask].mean())
                    for name in ("discounted", "at the end, discounted")
                    for side, mask in (("above", high), ("below", ~high))
                },
                "undivided": float(change["undivided"].mean()),
                "padding pays, score": float((change["score"] > 0).mean()),
                "padding pays, undivided": float((change["undivided"] > 0).mean()),
            }
        )
    return rows


def costs(client: RewardClient, pairs: int) -> dict[str, float]:
    """CPU seconds for all replies by kind of request, means."""
    seconds: dict[str, list[float]] = {"score": [], "token": []}
    conversations = padded(pairs, 0)
    for _ in range(ROUNDS):
        for kind, times in seconds.items():
            options: dict[str, Any] = {} if kind == "score" else {"per_token": kind}
            start = time.process_time()
            client.score(conversations, include=[], **options)
            times.append(time.process_time() - start)
    return {kind: float(np.mean(times)) for kind, times in seconds.items()}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_REWARD_MODEL)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/dense_rewards.json"))
    arguments = parser.parse_args()
    rm = ArmoRM.from_pretrained(arguments.model, dtype="float32")
    engine = ScoringEngine(rm, ServingSettings(name=rm.name, prompt_cache=0))
    with running(engine) as url, RewardClient(url) as client:
        base = figures(client, arguments.pairs, 0)
        rows, seconds = changes(client, arguments.pairs, base), costs(client, arguments.pairs)
    summary: dict[str, Any] = {
        "model": arguments.model,
        "replies": len(base["score"]),
        "above 0": int((base["score"] > 0).sum()),
        **{f"mean {name}": float(base[name].mean()) for name in ("tokens", "score", "exact share")},
    }
    table = Table(title=f"{summary['replies']} replies with neutral sentences added: mean change, normalised scores")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:g}" if name == "sentences" else f"{value:.3g}" for name, value in row.items()))
    Console(width=200).print(table, summary, {"CPU seconds": seconds})
    write_json(arguments.output, {**summary, "discount": DISCOUNT, "changes": rows, "cpu_seconds": seconds})


if __name__ == "__main__":
    main()
