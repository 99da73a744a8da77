"""Writes docs/everyday.md: the verdicts of a reward model on the twenty everyday pairs, right and wrong, with reasons.

The pairs are those of benchmarks/everyday; reasons are those of `ArmoRM.compare`, in float32 on the processor.

    python tools/everyday_page.py
    python tools/everyday_page.py --model runs/small
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from armorm import ArmoRM
from armorm.conversation import Conversation
from armorm.data.preferences import preference_pair
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.explain.response_comparison import ResponseComparison
from armorm.files import DEFAULT_REWARD_MODEL, write_text

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "benchmarks" / "everyday" / "everyday_pairs.jsonl"
NAMES = {"A": "the good reply", "B": "the bad reply"}

HEAD = """\
# Everyday replies

Twenty prompts, each with a good and a bad reply that anybody can tell apart, and the verdicts of the model `{model}`, wrong
ones included. The texts were written for this project before any model was measured on them, and no model is trained on
them (`benchmarks/everyday`). The deciding objectives are those without which the preference would not hold
([`armorm compare`](explaining.md#two-responses)); their predicted ratings are given for the preferred reply first.
`python tools/everyday_page.py --model MODEL` writes this page.

**{right} of {count} right.** Always choosing the longer reply gets {longer} right, the shorter one {shorter}.

| pair | what differs | verdict | margin (SD) |
| --- | --- | --- | --: |
"""


def judged(rm: ArmoRM) -> list[tuple[Row, Conversation, Conversation, ResponseComparison]]:
    """Every pair, the good reply as A, with its comparison."""
    rows = list(Location.find(PAIRS).rows())
    pairs = [preference_pair(row) for row in rows]
    return [
        (row, pair.chosen, pair.rejected, rm.compare(pair.chosen, pair.rejected))
        for row, pair in zip(rows, pairs, strict=True)
    ]


def page(rm: ArmoRM) -> str:
    """The page of a model."""
    found = judged(rm)
    right = sum(comparison.better == "A" for *_, comparison in found)
    longer = sum(len(good.response) > len(bad.response) for _, good, bad, _ in found)
    shorter = sum(len(good.response) < len(bad.response) for _, good, bad, _ in found)
    parts = [HEAD.format(model=rm.name, right=right, count=len(found), longer=longer, shorter=shorter)]
    for row, _, _, comparison in found:
        name, margin = row.values["id"], comparison.margin_in_std
        shown = "" if margin is None else f"{margin:+.2f}"
        parts.append(f"| [{name}](#{name}) | {row.values['kind']} | {verdict(comparison)} | {shown} |\n")
    for row, good, bad, comparison in found:
        parts.append(f"\n## {row.values['id']}\n\n{row.values['kind'].capitalize()}.\n")
        for message in good.prompt:
            parts.append(f"\n*{message.role}*\n\n{quoted(message.content)}\n")
        parts.append(f"\n*good reply*\n\n{quoted(good.response)}\n\n*bad reply*\n\n{quoted(bad.response)}\n")
        sentence = comparison.in_words(NAMES)
        parts.append(f"\n{verdict(comparison)}: {sentence}\n")
    return "".join(parts)


def verdict(comparison: ResponseComparison) -> str:
    return "right" if comparison.better == "A" else "**wrong**"  # a tie is wrong


def quoted(text: str) -> str:
    """A text as a quotation, with its line breaks."""
    return f"<pre>{escape(text, quote=False)}</pre>" if "\n" in text else f"> {escape(text, quote=False)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/everyday.md.")
    parser.add_argument("--model", default=DEFAULT_REWARD_MODEL, help="folder, hub id or embedded name")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "everyday.md")
    arguments = parser.parse_args()
    write_text(arguments.output, page(ArmoRM.from_pretrained(arguments.model, dtype="float32", device="cpu")))
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
