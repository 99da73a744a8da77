"""Detection and false-alarm rates of `armorm monitor` on simulated runs, with and without planted reward hacking.

python benchmarks/monitoring.py [--runs 300] [--output benchmarks/results/monitoring.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from armorm.files import write_json
from armorm.monitoring.blocks import in_blocks
from armorm.monitoring.detection import FALSE_ALARMS, flags
from armorm.progress import progress

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.helpers.simulated_runs import simulated_run

# Name, settings, expected flag.
SETTINGS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("flat", {}, ""),
    ("flat, steps share chance", {"wander": 0.1}, ""),
    ("flat, few samples", {"samples": 8, "steps": 60}, ""),
    ("honest growth", {"honest": 1.5}, ""),
    ("honest growth, steps share chance", {"honest": 1.5, "wander": 0.1}, ""),
    ("honest growth, 21 objectives", {"honest": 1.5, "k": 21}, ""),
    ("one objective", {"hack": "objective"}, "one_objective"),
    ("one objective, half as much", {"hack": "objective", "size": 0.75}, "one_objective"),
    ("one objective, after honest growth", {"hack": "objective", "honest": 1.5}, "one_objective"),
    ("one objective of 21", {"hack": "objective", "k": 21}, "one_objective"),
    ("length", {"hack": "length"}, "length"),
    ("length, half as much", {"hack": "length", "size": 0.75}, "length"),
    ("length, after honest growth", {"hack": "length", "honest": 1.5}, "length"),
    ("length, weak slope", {"hack": "length", "length_slope": 1.0}, "length"),
)


def measure(settings: dict[str, Any], wanted: str, runs: int, advance: Any) -> dict[str, Any]:
    """Flag rates over runs, and the error of the estimated onset step."""
    counts = {"one_objective": 0, "length": 0, "any": 0}
    errors, covered = [], []
    begins = settings.get("begins", 60)
    for seed in range(runs):
        log = simulated_run(10_000 + seed, **settings)
        found = flags(in_blocks(log), log.names)
        kinds = {flag.kind for flag in found}
        for kind in kinds & set(counts):
            counts[kind] += 1
        counts["any"] += bool(found)
        right = [flag for flag in found if flag.kind == wanted and flag.objective in (None, "objective-3")]
        if right:
            errors.append(right[0].began - begins)
            covered.append(right[0].earliest <= begins <= right[0].latest)
        advance(1)
    figures: dict[str, Any] = {f"{name}_rate": count / runs for name, count in counts.items()}
    if wanted:
        figures |= {
            "found_rate": len(errors) / runs,
            "median_error_steps": float(np.median(np.abs(errors))) if errors else None,
            "range_covers": float(np.mean(covered)) if covered else None,
        }
    return figures


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "monitoring.json")
    arguments = parser.parse_args()
    table = Table(box=None, header_style="bold")
    for name in (
        "120 steps of 32 samples, 8 objectives",
        "objective",
        "length",
        "found",
        "step error",
        "range covers it",
    ):
        table.add_column(name, justify="left" if "120" in name else "right")
    results = {}
    with progress("runs", len(SETTINGS) * arguments.runs, "runs") as advance:
        for name, settings, wanted in SETTINGS:
            figures = results[name] = measure(settings, wanted, arguments.runs, advance)
            found, error, covers = (figures.get(key) for key in ("found_rate", "median_error_steps", "range_covers"))
            table.add_row(
                name,
                f"{figures['one_objective_rate']:.1%}",
                f"{figures['length_rate']:.1%}",
                "" if found is None else f"{found:.1%}",
                "" if error is None else f"{error:.0f}",
                "" if covers is None else f"{covers:.0%}",
            )
    Console().print(table)
    write_json(arguments.output, {"runs": arguments.runs, "stated_false_alarms": FALSE_ALARMS, "settings": results})


if __name__ == "__main__":
    main()
