"""Errors and time of the search for near-duplicate prompts (`armorm.data.decontamination`).

Errors: every two prompts of the public sets (docs/data.md) are compared by their sets of word triples. By similarity of
the two, the table has the share that the sketches call near-duplicates, and the share that ends up in one group. Time
and memory: random prompts of 20 to 120 words, and their search among a million others.

    python benchmarks/near_duplicates.py [--data ../shared/data] [--output benchmarks/results/near_duplicates.json]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import sparse

from armorm.conversation import Conversation
from armorm.data.decontamination import AGREEING, MINIMA, SKETCH, nearest, prompt_groups, sketches, words
from armorm.data.preferences import row_conversations
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.files import write_json
from peak import peak_bytes

ENDS = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)


def conversation_of(row: Row) -> Conversation:
    """A conversation with the prompt of the row."""
    return row_conversations(row)[0]


def triples(conversation: Conversation) -> set[tuple[str, ...]]:
    """Three consecutive words of the prompt each."""
    turns = [turn for turn in conversation.prompt if turn.role != "system"]
    found = ["", *(word for turn in turns for word in (f"{turn.role}:", *words(turn.content))), "", ""]
    return set(zip(found, found[1:], found[2:], strict=False))


def errors(conversations: list[Conversation]) -> list[dict[str, Any]]:
    """Share of the pairs of prompts in each range of similarity that are found."""
    ids: dict[tuple[str, ...], int] = {}
    rows = [[ids.setdefault(triple, len(ids)) for triple in triples(c)] for c in conversations]
    lengths = np.array([len(row) for row in rows])
    places = np.repeat(np.arange(len(rows)), lengths), np.concatenate(rows)
    table = sparse.csr_matrix((np.ones(len(places[0]), np.int32), places), (len(rows), len(ids)))
    shared = sparse.triu(table @ table.T, 1).tocoo()
    similarity = shared.data / (lengths[shared.row] + lengths[shared.col] - shared.data)
    found, groups = sketches(conversations)[:, :MINIMA], prompt_groups(conversations)
    _, group, sizes = np.unique([groups[c.prompt_key] for c in conversations], return_inverse=True, return_counts=True)
    grouped = int((sizes * (sizes - 1) // 2).sum())  # pairs
    result = []
    for low, high in zip((0.0, *ENDS), ENDS, strict=False):
        pairs = (similarity >= low) & (similarity < high)
        first, second = shared.row[pairs], shared.col[pairs]
        agree = [(found[a] == found[b]).sum(1) >= AGREEING for a, b in _parts(first, second)]
        count = len(first) if low else len(rows) * (len(rows) - 1) // 2 - int((similarity >= high).sum())
        together = int((group[first] == group[second]).sum())
        if not low:  # with the pairs that share no triple
            together = grouped - int((group[shared.row] == group[shared.col])[similarity >= high].sum())
        agreeing = int(sum(part.sum() for part in agree))
        result.append({"from": low, "pairs": count, "agree": agreeing / count, "one_group": together / count})
    return result


def _parts(*arrays: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    return list(zip(*(np.array_split(array, len(array) // 100_000 + 1) for array in arrays), strict=True))


def times(count: int, known: int) -> dict[str, float]:
    """CPU seconds of each step for `count` prompts, the last among `known` others; peak memory of the process."""
    draw = random.Random(0)
    texts = (" ".join(f"w{draw.randrange(3000)}" for _ in range(draw.randint(20, 120))) for _ in range(count))
    prompts = [Conversation.from_prompt(text, "yes") for text in texts]
    others = np.random.default_rng(0).integers(0, 256, (known, SKETCH), np.uint8)
    found: dict[str, float] = {"prompts": count, "known": known}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = work()
        found[name] = time.process_time() - start
        return result

    timed("content keys", lambda: [prompt.prompt_key for prompt in prompts])
    table = timed("sketches", lambda: sketches(prompts))
    timed("sketches and groups", lambda: prompt_groups(prompts))
    timed("search among the known", lambda: nearest(others, table))
    return found | {"peak bytes": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--known", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/near_duplicates.json"))
    arguments = parser.parse_args()
    prompts = {
        conversation.prompt_key: conversation
        for path in sorted(arguments.data.glob("*/*.jsonl.gz"))
        for conversation in map(conversation_of, Location.find(str(path)).rows())
    }
    rates, seconds = errors([*prompts.values()]), times(arguments.count, arguments.known)
    table = Table("similarity", "pairs", "sketches agree", "in one group", title=f"{len(prompts):,} prompts")
    for entry in rates:
        shares = (f"{entry[name]:.4%}" for name in ("agree", "one_group"))
        table.add_row(f"{entry['from']:.2f} and more", f"{entry['pairs']:,}", *shares)
    console = Console()
    console.print(table, *(f"{name}: {value:,.1f}" for name, value in seconds.items()), sep="\n")
    write_json(arguments.output, {"prompts": len(prompts), "errors": rates, "times": seconds})


if __name__ == "__main__":
    main()
