"""The real sets, each file read once."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import pytest

from armorm.data.preferences import PreferencePair, read_preferences
from armorm.data.ratings import RatedSet, RatingTable, read_ratings
from armorm.data.sources import Location
from armorm.objectives import Objective

# Rows and scales as the data's own page states them (docs/data.md).
RATED = {
    "truthfulqa": (18_268, {"truthfulqa-truthful": (0, 1), "truthfulqa-informative": (0, 1)}),
    "diasafety": (11_206, {"diasafety-is_safe": (0, 1)}),
    "halueval": (4_496, {"halueval-no_hallucination": (0, 1)}),
    "gsm8k": (5_276, {"gsm8k-is_correct": (0, 1)}),
    "humaneval": (6_291, {"humaneval-is_correct": (0, 1)}),
    "justeval": (
        3_719,
        {
            f"justeval-{name}": (1, 5)
            for name in ("helpfulness", "clarity", "factuality", "depth", "engagement", "safety")
        },
    ),
    "unieval_d2t": (2_056, {f"unieval-{name}": (1, 6) for name in ("informativeness", "naturalness", "overall")}),
    "topicalchat": (
        360,
        {
            "topicalchat-understandability": (0, 1),
            "topicalchat-groundedness": (0, 1),
            "topicalchat-naturalness": (1, 3),
            "topicalchat-coherence": (1, 3),
            "topicalchat-engagingness": (1, 3),
            "topicalchat-overall": (1, 5),
        },
    ),
}
PREFERENCES = {"alpacaeval": 13_480, "convarg": 11_650, "hh_harmless": 2_303, "pandalm": 778}
BENCHMARKS = {"llmbar": 419, "humanevalpack": 984}


@dataclass(frozen=True)
class RealSets:
    """All of them.

    Attributes:
        ratings: the eight rated sets as one table.
        pairs: preference sets and benchmarks by name.
    """

    ratings: RatingTable
    pairs: dict[str, list[PreferencePair]]


@pytest.fixture(scope="session")
def real_sets(data_root: Path) -> RealSets:
    sets = [
        RatedSet(
            Location.find(f"ratings/{name}.jsonl.gz", data_root),
            {column: Objective.rated(column, low, high) for column, (low, high) in columns.items()},
            name,
        )
        for name, (_, columns) in RATED.items()
    ]
    files = {name: f"preferences/{name}.jsonl.gz" for name in PREFERENCES}
    files |= {name: f"benchmarks/{name}.jsonl.gz" for name in BENCHMARKS}
    gc.disable()  # millions of objects, none of them garbage: looking for it takes a third of the time
    try:
        pairs = {name: read_preferences(Location.find(file, data_root), name) for name, file in files.items()}
        return RealSets(read_ratings(sets), pairs)
    finally:
        gc.enable()
