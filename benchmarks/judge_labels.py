"""What the labels of a small language model are worth: `armorm label` with armorm-small as the judge.

armorm-small (SmolLM2-135M-Instruct) generates behind a local OpenAI-compatible server (tools/chat_server.py) and rates
replies whose ratings by people, or by a test, are in the shared data: one reply each to up to 60 prompts of each set,
with prompt and reply of at most 900 characters together. Printed are the share of answers with a rating, free text and
by a JSON schema, and the agreement of the latter as `armorm label` measures it.

    python benchmarks/judge_labels.py [--data ../shared/data/ratings] [--output benchmarks/results/judge_labels.json]

Sets with fewer prompts have fewer replies, and no intervals below 50.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm.client.chat import ChatClient
from armorm.conversation import Conversation
from armorm.data.rubric import Rubric, RubricObjective
from armorm.data.sources import Location
from armorm.evaluation.label_agreement import rating_agreement
from armorm.evaluation.labelling import ask, rating_requests
from armorm.files import write_json
from armorm.progress import say

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from chat_server import chat_server, generator

PROMPTS = 60
LONGEST = 900  # characters of prompt and reply
ANSWER_TOKENS = 12
QUESTIONS = (
    (
        "justeval",
        RubricObjective(
            *("justeval-helpfulness", "How helpful is the reply?", 1, 5),
            anchors=((1, "not helpful at all"), (3, "partly helpful"), (5, "very helpful")),
        ),
    ),
    (
        "truthfulqa",
        RubricObjective(
            *("truthfulqa-truthful", "Is the reply true?", 0, 1), anchors=((0, "says something false"), (1, "true"))
        ),
    ),
    (
        "topicalchat",
        RubricObjective(
            *("topicalchat-overall", "How good is the reply, overall?", 1, 5),
            anchors=((1, "very bad"), (5, "very good")),
        ),
    ),
)


def sample(path: Path, column: str) -> tuple[list[Conversation], np.ndarray]:
    """One rated reply of each of the first prompts, in the order of their content keys, and its rating."""
    found: dict[str, tuple[str, Conversation, float]] = {}
    for row in Location.find(str(path)).rows():
        conversation, rating = row.conversation(), row.value(column)
        length = sum(len(message.content) for message in conversation.messages)
        if rating is not None and length <= LONGEST:
            entry = (conversation.key, conversation, float(rating))
            found[conversation.prompt_key] = min(found.get(conversation.prompt_key, entry), entry, key=lambda e: e[0])
    chosen = [found[key] for key in sorted(found)[:PROMPTS]]
    return [conversation for _, conversation, _ in chosen], np.array([rating for _, _, rating in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ratings"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/judge_labels.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    table = Table("objective", "replies", "valid, text", "valid, schema", "Spearman", "kappa", "bias", "length")
    with chat_server(generator("armorm-small"), "armorm-small") as url:
        client = ChatClient(url, "armorm-small", connections=1, max_tokens=ANSWER_TOKENS, timeout=600)
        for name, objective in QUESTIONS:
            conversations, own = sample(arguments.data / f"{name}.jsonl.gz", objective.name)
            rubric, valid, figures = Rubric((objective,)), {}, {}
            for structured in (False, True):
                requests = rating_requests(rubric, conversations, structured=structured)
                labels = ask(rubric, requests, client, len(conversations))
                judged = labels.ratings[:, 0]
                kind = "schema" if structured else "text"
                valid[kind] = float((~np.isnan(judged)).mean())
                figures = {f.name: f.to_dict() for f in rating_agreement(judged, own, conversations)}
                say(f"{objective.name}, {kind}: {valid[kind]:.0%} valid, Spearman {figures['Spearman']['value']:.2f}")
            levels, counts = np.unique(judged, return_counts=True)
            results[objective.name] = {
                "replies": len(conversations),
                "valid": valid,
                "agreement": figures,
                "judged": dict(zip(map(str, levels.tolist()), counts.tolist(), strict=True)),
            }
            cells = [_cell(figures[figure]) for figure in ("Spearman", "kappa", "bias", "length")]
            table.add_row(
                objective.name, str(len(conversations)), *(f"{share:.0%}" for share in valid.values()), *cells
            )
            write_json(arguments.output, {"prompts": PROMPTS, "longest": LONGEST, "objectives": results})
    Console(width=150).print(table)


def _cell(figure: dict[str, Any]) -> str:
    ends = "" if figure["interval"] is None else " ({:.2f} to {:.2f})".format(*figure["interval"])
    return f"{figure['value']:.2f}{ends}"


if __name__ == "__main__":
    main()
