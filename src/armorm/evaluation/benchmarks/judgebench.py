"""JudgeBench: pairs of answers of which one is objectively correct, from GPT-4o and from Claude.

In:  scores of answers A and B, and the label, "A>B" or "B>A".
Out: accuracy by source and of each of the two files; the pooled one only under that name.

The official scoring never pools the two files. Reward models play a single game: "A>B" where A scores
strictly higher, else "B>A", so a model that scores everything alike gets the share of "B>A" labels
(44.9% and 47.0%); ties are therefore counted beside it. Judges whose verdict depends on the order play
both orders: a verdict that equals the label counts +1, the opposite -1, a tie 0; correct is a sum above 0.
An answer that was refused makes its pair wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from armorm.evaluation.benchmarks.pairs import RIGHT
from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import Cells, Figure, by_group, mean_figure

FILES: Mapping[str, Mapping[str, int]] = {
    "GPT-4o": {"mmlu-pro": 154, "livebench-reasoning": 98, "livebench-math": 56, "livecodebench": 42},
    "Claude": {"mmlu-pro": 154, "livebench-reasoning": 51, "livebench-math": 34, "livecodebench": 31},
}
SOURCES = tuple(FILES["GPT-4o"])
LABELS = ("A>B", "B>A")
POOLED = "both files pooled"


def single_game(first: np.ndarray, second: np.ndarray, a_is_better: np.ndarray) -> np.ndarray:
    """1.0 where the verdict equals the label.

    Args:
        first, second: (n,) scores of A and B; NaN where refused, which is wrong whatever the label.
        a_is_better: (n,) bool, label "A>B".
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    scored = ~(np.isnan(first) | np.isnan(second))
    return (scored & ((first > second) == np.asarray(a_is_better, bool))).astype(np.float64)


def double_game(verdict: str | None, exchanged_verdict: str | None, label: str) -> bool:
    """Whether a judge that was asked in both orders is correct.

    Args:
        verdict: on (A, B): "A>B", "B>A", "A=B" or None.
        exchanged_verdict: on (B, A), in the names of that order.
    """
    opposite = {"A>B": "B>A", "B>A": "A>B"}
    verdicts = (verdict, opposite.get(exchanged_verdict or "", exchanged_verdict))
    return sum((found == label) - (found == opposite[label]) for found in verdicts) > 0


def measure(items: Sequence[Item], scores: Sequence[np.ndarray]) -> Cells:
    """`right` of every pair: by file and source, by file, and pooled."""
    both = np.array(scores, np.float64).reshape(-1, 2)
    better = np.array([item.labels[0] > item.labels[1] for item in items], bool)
    return _cells(items, single_game(both[:, 0], both[:, 1], better))


def chance(items: Sequence[Item]) -> Cells:
    """What a random order comes to."""
    return _cells(items, np.full(len(items), 0.5))


def figures(cells: Cells) -> list[Figure]:
    """Each file whole, each file by source, and the pooled figure where both files are there."""
    rows = {group: len(measured.rows) for (group, _), measured in cells.items()}
    files = [name for name in FILES if name in rows]
    lacking = {name: _lacking(rows, name) for name in FILES}
    found = []
    if len(files) == len(FILES):
        parts = tuple(part for name in FILES for part in lacking[name])
        found.append(mean_figure("overall", POOLED, (POOLED, RIGHT), lacking=parts))
    for name in files:
        found.append(mean_figure("sections", name, (name, RIGHT), lacking=lacking[name]))
    for name in files:
        for source in SOURCES:
            group = f"{name} {source}"
            if group in rows:
                found.append(mean_figure("subsets", group, (group, RIGHT), lacking=_short(rows, name, source)))
    return found


def source_of(name: str) -> str | None:
    """The source that a row's `source` begins with (`mmlu-pro-law` is mmlu-pro), or None."""
    return next((source for source in SOURCES if name.startswith(source)), None)


def file_of(response_model: str) -> str | None:
    """The file that a row's `response_model` stands in, or None."""
    text = response_model.lower()
    return "GPT-4o" if text.startswith("gpt-4o") else "Claude" if text.startswith("claude") else None


def _cells(items: Sequence[Item], right: np.ndarray) -> Cells:
    files = [item.facts["file"] for item in items]
    cells = by_group([item.subset for item in items], RIGHT, right) | by_group(files, RIGHT, right)
    return cells | by_group([POOLED] * len(items), RIGHT, right)


def _lacking(rows: Mapping[str, int], name: str) -> tuple[str, ...]:
    return tuple(part for source in SOURCES for part in _short(rows, name, source))


def _short(rows: Mapping[str, int], name: str, source: str) -> tuple[str, ...]:
    found, expected = rows.get(f"{name} {source}", 0), FILES[name][source]
    if found == 0:
        return (f"{name} {source}",)
    return () if found == expected else (f"{name} {source} ({found} of {expected} rows)",)
