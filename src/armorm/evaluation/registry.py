"""The benchmarks by name: where they are published, how their rows are read, how they score.

In:  a name as it is typed.
Out: `Benchmark`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from armorm.data.sources import HubSet
from armorm.errors import ArmormError, nearest
from armorm.evaluation.benchmarks import judgebench, pairs, ppe, ratings, rewardbench, rewardbench2, rm_bench
from armorm.evaluation.examples import Item
from armorm.evaluation.metrics import Cells, Figure

Measure = Callable[[Sequence[Item], Sequence[np.ndarray]], Cells]


class BenchmarkError(ArmormError, ValueError):
    """A benchmark that is unknown, or that was not told where its data is."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: on the command line.
        title: for people.
        measure: from items and scores to cells.
        figures: from the cells at hand to the figures of the report.
        chance: cells of a random order, or None where that means nothing.
        published: its sets on the hub; empty where the user names the data.
        also: sets that may be named beside them, with the splits that count.
        rule: what a tie and a refused row are, in one line for the report.
    """

    name: str
    title: str
    measure: Measure
    figures: Callable[[Cells], list[Figure]]
    chance: Callable[[Sequence[Item]], Cells] | None = None
    published: tuple[HubSet, ...] = ()
    also: tuple[HubSet, ...] = ()
    rule: str = "a tie is wrong, and so is a refused response"


_PPE = ("MMLU-Pro", "MATH", "GPQA", "MBPP-Plus", "IFEval")
_BENCHMARKS = (
    Benchmark("pairs", "preference pairs", pairs.measure, pairs.figures, pairs.chance),
    Benchmark(
        "ratings",
        "held-out ratings",
        partial(ratings.measure, (), True),
        ratings.figures,
        rule="a tie is half right within prompts; a refused response has no prediction, and loses its comparisons",
    ),
    Benchmark(
        "rewardbench",
        "RewardBench",
        rewardbench.measure,
        rewardbench.figures,
        rewardbench.chance,
        (HubSet("allenai/reward-bench", ("filtered",)),),
        (HubSet("allenai/pref-test-sets", rewardbench.PRIOR_SETS),),
    ),
    Benchmark(
        "rewardbench2",
        "RewardBench 2",
        rewardbench2.measure,
        rewardbench2.figures,
        rewardbench2.chance,
        (HubSet("allenai/reward-bench-2", ("test",)),),
        rule="1/m where the chosen one is among m best; an example with a refused response is wrong",
    ),
    Benchmark(
        "rm-bench",
        "RM-Bench",
        rm_bench.measure,
        rm_bench.figures,
        rm_bench.chance,
        (HubSet("THU-KEG/RM-Bench", ("train",)),),
    ),
    Benchmark(
        "judgebench",
        "JudgeBench",
        judgebench.measure,
        judgebench.figures,
        judgebench.chance,
        (HubSet("ScalerLab/JudgeBench", ("gpt", "claude")),),
        rule="single game: a tie is the verdict B>A; a pair with a refused answer is wrong",
    ),
    Benchmark(
        "ppe",
        "PPE",
        ppe.measure,
        ppe.figures,
        ppe.chance,
        (HubSet("lmarena-ai/PPE-Human-Preference-V1"), *(HubSet(f"lmarena-ai/PPE-{n}-Best-of-K") for n in _PPE)),
        rule="votes that are ties do not count; a tie of scores is wrong; a refused answer is never the best",
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _BENCHMARKS}


def find_benchmark(name: str, objectives: Sequence[str] = (), raw: bool = True) -> Benchmark:
    """A benchmark by name.

    Args:
        objectives: names of the rated objectives, for `ratings`.
        raw: whether scores of `ratings` are raw ratings.

    Raises:
        BenchmarkError: for an unknown name, with the nearest right one.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(
            f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}; there are {', '.join(BENCHMARKS)}"
        )
    benchmark = BENCHMARKS[name]
    if name != "ratings":
        return benchmark
    return Benchmark(
        name,
        benchmark.title,
        partial(ratings.measure, tuple(objectives), raw),
        benchmark.figures,
        rule=benchmark.rule,
    )
