"""JudgeBench (arXiv 2410.12784): pairs of answers by GPT-4o and by Claude of which one is objectively correct.

The official scoring never pools the two files. Reward models play a single game: "A>B" if A scores strictly higher,
else "B>A", so a model that gives everything the same score gets the share of "B>A" labels (44.9% and 47.0%); ties are
therefore counted separately. Judges whose verdict depends on the order play both orders: a verdict that equals the
label counts +1, the opposite -1, a tie 0, and the judge is correct if the sum is positive. A pair with an answer that
cannot be scored is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from armorm.data.sources import HubSet, Source
from armorm.errors import shown
from armorm.evaluation.benchmarks.base import Benchmark, Loaded, missing_rows, replies, rows_of, text
from armorm.evaluation.benchmarks.pairs import RIGHT
from armorm.evaluation.examples import Item, make_example
from armorm.evaluation.metrics import Measurements, Metric, by_group, mean_metric

FILES: Mapping[str, Mapping[str, int]] = {
    "GPT-4o": {"mmlu-pro": 154, "livebench-reasoning": 98, "livebench-math": 56, "livecodebench": 42},
    "Claude": {"mmlu-pro": 154, "livebench-reasoning": 51, "livebench-math": 34, "livecodebench": 31},
}
SOURCES = tuple(FILES["GPT-4o"])
POOLED = "both files pooled"
_LABELS = {"A>B": (1, 0), "B>A": (0, 1)}
Game = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def read(sources: Sequence[Source]) -> Loaded:
    """Rows `pair_id`, `source`, `question`, `response_model`, `response_A`, `response_B`, `label`."""
    loaded = Loaded()
    for _, row in rows_of(sources):
        model, origin, label = text(row, "response_model"), text(row, "source"), row.values.get("label")
        file, source = file_of(model), source_of(origin)
        if file is None:
            raise row.error(f"found {shown(model)}, expected a GPT-4o or a Claude model", "response_model")
        if source is None:
            raise row.error(f"found {shown(origin)}, expected one of {', '.join(SOURCES)}", "source")
        if label not in _LABELS:
            raise row.error(f"found {shown(label)}, expected 'A>B' or 'B>A'", "label")
        loaded.examples.append(
            make_example(
                replies(row, "question", [text(row, "response_A"), text(row, "response_B")]),
                _LABELS[label],
                id=row.values.get("pair_id"),
                subset=f"{file} {source}",
                facts={"file": file},
                origin=(row.file, row.number),
            )
        )
    return loaded.checked(sources)


def source_of(name: str) -> str | None:
    """The source that a row's `source` begins with (`mmlu-pro-law` is mmlu-pro), or None."""
    return next((source for source in SOURCES if name.startswith(source)), None)


def file_of(response_model: str) -> str | None:
    """The published file that a row belongs to by its `response_model`, or None."""
    name = response_model.lower()
    return "GPT-4o" if name.startswith("gpt-4o") else "Claude" if name.startswith("claude") else None


def single_game(first: np.ndarray, second: np.ndarray, a_is_better: np.ndarray) -> np.ndarray:
    """1.0 where the verdict equals the label.

    Args:
        first, second: (n,) scores of A and B; NaN if unscored, which is wrong whatever the label.
        a_is_better: (n,) bool, label "A>B".
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    scored = ~(np.isnan(first) | np.isnan(second))
    return (scored & ((first > second) == np.asarray(a_is_better, bool))).astype(np.float64)


def double_game(first: np.ndarray, second: np.ndarray, a_is_better: np.ndarray) -> np.ndarray:
    """1.0 where the sum of both verdicts is for the label.

    Args:
        first, second: (n,) scores of A and B whose difference is that sum (`PairJudge`); NaN without a verdict.
        a_is_better: (n,) bool, label "A>B".
    """
    margins = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    return (np.where(a_is_better, margins, -margins) > 0).astype(np.float64)


def measure(items: Sequence[Item], scores: Sequence[np.ndarray], game: Game = single_game) -> Measurements:
    """`right` of every pair by the rule of a game: by file and source, by file, and pooled."""
    both = np.array(scores, np.float64).reshape(-1, 2)
    better = np.array([item.labels[0] > item.labels[1] for item in items], bool)
    right = game(both[:, 0], both[:, 1], better)
    subsets, files = [item.subset for item in items], [item.facts["file"] for item in items]
    return {
        **by_group(subsets, RIGHT, right),
        **by_group(files, RIGHT, right),
        **by_group([POOLED] * len(items), RIGHT, right),
    }


def metrics(measurements: Measurements) -> list[Metric]:
    """Each file, each file by source, and the pooled accuracy if both files are available."""
    rows = {group: len(found.rows) for (group, _), found in measurements.items()}
    parts = {
        file: {f"{file} {source}": missing_rows(f"{file} {source}", rows.get(f"{file} {source}", 0), expected)
               for source, expected in sources.items()}
        for file, sources in FILES.items()
    }  # fmt: skip
    lacking = {file: tuple(part for missing in found.values() for part in missing) for file, found in parts.items()}
    files = [file for file in FILES if file in rows]
    found = []
    if len(files) == len(FILES):
        found.append(mean_metric("overall", POOLED, (POOLED, RIGHT), lacking=sum(lacking.values(), ())))
    found += [mean_metric("sections", file, (file, RIGHT), lacking=lacking[file]) for file in files]
    return found + [
        mean_metric("subsets", name, (name, RIGHT), lacking=missing)
        for file in files
        for name, missing in parts[file].items()
        if name in rows
    ]


def _random_verdicts(equal: Measurements) -> Measurements:
    """Both of two random verdicts are for the better answer a quarter of the time."""
    return {group: replace(found, values=np.full(len(found.rows), 0.25)) for group, found in equal.items()}


BENCHMARK = Benchmark(
    "judgebench",
    "JudgeBench",
    read,
    measure,
    metrics,
    published=(HubSet("ScalerLab/JudgeBench", ("gpt", "claude")),),
    rule="single game: a tie counts as the verdict B>A; a pair with an answer that cannot be scored is wrong",
)
DOUBLE_GAME = replace(
    BENCHMARK,
    name="judgebench-double",
    title="JudgeBench, double game",
    measure=partial(measure, game=double_game),
    rule="double game: both orders are judged, and the sum of the verdicts must be for the better answer",
    chance=_random_verdicts,
    judged=True,
)
