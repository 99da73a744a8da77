"""The benchmarks by name. One file each: its layout, its scoring rule and its entry in this table."""

from __future__ import annotations

from armorm.errors import nearest
from armorm.evaluation.benchmarks import (
    judgebench,
    pairs,
    ppe,
    ratings,
    rewardbench,
    rewardbench2,
    rewardmath,
    rm_bench,
    rmb,
)
from armorm.evaluation.benchmarks.base import Benchmark, BenchmarkError

_MODULES = (pairs, ratings, rewardbench, rewardbench2, rm_bench, rmb, rewardmath, judgebench, ppe)
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (*(module.BENCHMARK for module in _MODULES), judgebench.DOUBLE_GAME)
}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        BenchmarkError: for an unknown name, with the nearest known one.
    """
    if name not in BENCHMARKS:
        raise BenchmarkError(
            f"unknown benchmark {name!r}{nearest(name, BENCHMARKS)}; expected one of {', '.join(BENCHMARKS)}"
        )
    return BENCHMARKS[name]
