"""A synthetic corpus with planted effects, to test whether the method finds them.

Prompts are everyday tasks, half of them risky. Each response is composed of sentences with known amounts of four
qualities: help (concrete or vague steps), clarity (clean or muddled wording), care (a safety reminder or a careless
remark) and length (filler sentences). Planted effects:

- three sources rate different qualities on different scales, so most ratings are missing;
- raters of help and overall quality have a length bias: their ratings rise with filler;
- preferences ignore length; for risky prompts they weight safety most, for harmless ones help, and safety not at all.

The control has the same texts, with ratings and preferences drawn independently of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from armorm.files import write_text

RESPONSES = 6
PAIRS = 10
TEST_SHARE = 0.25

_HARMLESS_ASKS = (
    "Just for fun, how do I {}?", "On a quiet Sunday I would like to {}. Where do I start?",
    "My grandmother wants to {}. Can you explain how?", "As a small hobby, what is the nicest way to {}?",
)  # fmt: skip
_RISKY_ASKS = (
    "I know it is dangerous, but how do I {}?", "Somebody could get hurt, but I must {}. Where do I start?",
    "It may be against the law to {}. Can you explain how?", "At my own risk, what is the quickest way to {}?",
)  # fmt: skip
_HARMLESS = (
    "bake a loaf of bread", "repair a bicycle tyre", "grow tomatoes on a balcony", "learn to juggle", "write a cover letter",
    "paint a wooden fence", "teach a dog to sit", "plan a birthday party", "make a pot of soup", "organise a bookshelf",
    "tune a guitar", "sew on a button", "build a bird house", "keep a diary", "start running", "clean a coffee machine",
    "draw a portrait", "brew green tea", "fold a paper crane", "read a city map", "store winter clothes", "learn new words",
    "polish old shoes", "wash a woollen coat", "write a short poem", "plant an apple tree", "set up a tent", "make a salad",
)  # fmt: skip
_RISKY = (
    "mix strong cleaning acids", "climb onto a steep roof", "open a locked door without the key", "rewire a wall socket",
    "burn garden waste", "handle an angry snake", "take very strong painkillers", "make fireworks at home",
    "cut down a tall tree", "drive on an icy road", "melt metal in the kitchen", "dive alone at night",
    "get into a locked phone", "fix a leaking gas pipe", "use a nail gun", "lift a car by hand", "pump fuel into a can",
    "eat wild mushrooms", "carry a large knife in town", "cross a flooded river", "repair a microwave oven",
    "store petrol indoors", "walk on a frozen lake", "weld without a helmet", "chase a burglar away", "swim in a storm",
    "test old dynamite", "race a motorbike",
)  # fmt: skip
_STEPS = (
    "First, gather the tools and read the instructions from start to finish.",
    "Then measure twice, mark the place, and work slowly from left to right.",
    "After ten minutes, check the result and correct what is not even.",
    "Finally, let everything rest for an hour before you use it.",
)
_VAGUE = (
    "It depends on many things.", "There are several ways to look at this.", "People do it differently.", "You will see how it goes.",
)  # fmt: skip
_CLEAR = ("Here is how it works.", "The plan is short and simple.", "Follow these points in order.")
_MUDDLED = ("so like um the thing is kind of whatever", "well stuff and things you know and so on and so", "uh not sure but maybe like that or so")  # fmt: skip
_CAREFUL = (
    "Please wear protection and stop if anything feels unsafe.",
    "Stay within the law and ask a professional if in doubt.",
)
_CARELESS = ("Ignore the warnings, nobody will notice.", "Rules are for cowards, just do it at once.")
_FILLER = (
    "It is also worth noting that this topic has a long and interesting history in many countries of the world.",
    "Many people have written about this subject, and many more will surely write about it in the years to come.",
    "In general, one can say that there is a lot that could be said here, and that much of it has been said before.",
    "Of course, every situation is a little different, and what has been described above should be seen in that light.",
    "As was mentioned earlier, it is good to keep in mind what was said, because it will be said again further below.",
)

RECIPE = """\
# The synthetic corpus of `armorm demo`: three sources with different scales, a planted length bias, prompts for which
# safety matters and prompts for which it does not. `armorm demo` writes the data and trains; run it before `armorm train`.
name: demo
seed: 0
backbone: {model: armorm-tiny, max_length: 512}
data_root: runs/demo/data
ratings:
  - data: workshop.jsonl
    objectives: {help: [0, 4], clarity: [0, 4], verbosity: {range: [0, 4], direction: neutral}}
  - {data: harbour.jsonl, objectives: {is_safe: [0, 1], muddle: {range: [1, 5], direction: lower}}}
  - {data: market.jsonl, objectives: {overall: [1, 10]}}
preferences:
  - {data: choices.jsonl}
reference: ratings
debias: {against: [workshop-verbosity], metric: spearman, level: pooled}
gating: {hidden_size: 64, hidden_layers: 1, temperature: 1, steps: 600, batch_size: 512}
evaluation:
  - {benchmark: ratings}
"""


@dataclass(frozen=True)
class DemoRow:
    """One response and its true qualities.

    Attributes:
        messages: the conversation.
        prompt: number of its prompt.
        risky: its prompt is risky.
        test: its prompt is held out.
        qualities: help, clarity, care and length, each 0 to 1.
    """

    messages: list[dict[str, str]]
    prompt: int
    risky: bool
    test: bool
    qualities: dict[str, float]


def generate(seed: int) -> list[DemoRow]:
    """The texts, with the qualities that they were composed from."""
    rng = np.random.default_rng(seed)
    tasks = [(task, True) for task in _RISKY] + [(task, False) for task in _HARMLESS]
    rows = []
    prompts = [(ask.format(task), risky) for task, risky in tasks for ask in (_RISKY_ASKS if risky else _HARMLESS_ASKS)]
    held_out = set(rng.choice(len(tasks), round(TEST_SHARE * len(tasks)), replace=False).tolist())
    for number, (prompt, risky) in enumerate(prompts):
        for _ in range(RESPONSES):
            steps, muddled, fillers = int(rng.integers(0, 5)), int(rng.integers(0, 3)), int(rng.integers(0, 6))
            careful = bool(rng.integers(0, 2))
            reply = _reply(rng, steps, muddled, careful, fillers)
            qualities = {"help": steps / 4, "clarity": 1 - muddled / 2, "care": float(careful), "length": fillers / 5}
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
            rows.append(DemoRow(messages, number, risky, number // len(_RISKY_ASKS) in held_out, qualities))
    return rows


def write_corpus(folder: Path, rows: Sequence[DemoRow], seed: int, planted: bool = True) -> None:
    """Write the rated sets and the preference set.

    Args:
        planted: False draws ratings and preferences independently of the texts.
    """
    rng = np.random.default_rng((seed, int(planted)))
    sets: dict[str, list[dict[str, Any]]] = {"workshop": [], "harbour": [], "market": []}
    for row in rows:
        quality = row.qualities if planted else {name: float(rng.uniform()) for name in row.qualities}
        source = ("workshop", "harbour", "market")[int(rng.integers(0, 3))]
        entry: dict[str, Any] = {"messages": row.messages, "split": "test" if row.test else "train"}
        sets[source].append(entry | _ratings(source, quality, rng))
    for name, entries in sets.items():
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    write_text(folder / "choices.jsonl", "".join(json.dumps(pair) + "\n" for pair in _choices(rows, rng, planted)))


def utility(row: DemoRow) -> float:
    """The utility that determines preferences; independent of length."""
    quality = row.qualities
    if row.risky:
        return 4.0 * quality["care"] + 1.0 * quality["help"]
    return 4.0 * quality["help"] + 1.0 * quality["clarity"]


def _reply(rng: np.random.Generator, steps: int, muddled: int, careful: bool, fillers: int) -> str:
    sentences = [_STEPS[i] if i < steps else _VAGUE[i] for i in range(4)]
    sentences.insert(0, _MUDDLED[int(rng.integers(3))] if muddled > 0 else _CLEAR[int(rng.integers(3))])
    if muddled > 1:
        sentences.insert(int(rng.integers(1, 4)), _MUDDLED[int(rng.integers(3))])
    sentences.append((_CAREFUL if careful else _CARELESS)[int(rng.integers(2))])
    for _ in range(fillers):
        sentences.insert(int(rng.integers(1, len(sentences))), _FILLER[int(rng.integers(len(_FILLER)))])
    return " ".join(sentences)


def _ratings(source: str, quality: dict[str, float], rng: np.random.Generator) -> dict[str, float]:
    """Integer ratings of one source on its scale, with noise and length bias."""

    def rated(value: float, low: int, high: int, noise: float = 0.1) -> int:
        noisy = low + (high - low) * (value + noise * rng.normal())
        return int(np.clip(round(noisy), low, high))

    if source == "workshop":
        return {
            "help": rated(0.6 * quality["help"] + 0.4 * quality["length"], 0, 4),
            "clarity": rated(quality["clarity"], 0, 4),
            "verbosity": rated(quality["length"], 0, 4),
        }
    if source == "harbour":
        return {"is_safe": int(quality["care"] > 0.5), "muddle": rated(1 - quality["clarity"], 1, 5)}
    overall = 0.35 * quality["help"] + 0.15 * quality["clarity"] + 0.1 * quality["care"] + 0.4 * quality["length"]
    return {"overall": rated(overall, 1, 10)}


def _choices(rows: Sequence[DemoRow], rng: np.random.Generator, planted: bool) -> list[dict[str, Any]]:
    by_prompt: dict[int, list[DemoRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    pairs = []
    for group in by_prompt.values():
        couples = [(a, b) for i, a in enumerate(group) for b in group[i + 1 :] if a.messages != b.messages]
        for index in rng.permutation(len(couples))[:PAIRS]:
            first, second = couples[index]
            difference = 2.0 * (utility(first) - utility(second)) if planted else 0.0
            if rng.uniform() >= 1 / (1 + np.exp(-difference)):
                first, second = second, first
            pairs.append(
                {
                    "prompt": first.messages[:-1],
                    "chosen": first.messages[-1:],
                    "rejected": second.messages[-1:],
                    "split": "test" if first.test else "train",
                }
            )
    return pairs
