"""The default reward model against its targets: ratings, judged pairs, constructed contrasts, everyday replies, speed.

Each distinct conversation is scored once. Next to every figure are its 95% interval by prompt
(`evaluation/bootstrap.py`), the longest and the shortest response as baselines, and its target. A tie is wrong, and so
is a response that cannot be scored.

- Ratings: the test splits of the real data sets (docs/data.md), read and scored as `armorm evaluate ratings` does. The
  means are over the same objectives for every model: those with at least 100 test ratings, or pairs within prompts.
- Pairs: test splits of finegrained and hh_harmless, all of pandalm. Of similar length: characters of both responses
  within a factor of 1.25; these pairs and those of alpacaeval's test split are pooled.
- humanevalpack: even task ids are problems of the `humaneval` ratings, so the target is for odd ones. Its prompts are
  drawn by task, because the six languages solve the same one.
- Constructed objectives: the test rows of a recipe (`--recipe`), whose prompts and templates training does not see;
  accuracy within prompts, by the objective's own reward and by the score.
- Everyday texts: benchmarks/everyday, written before any training and used for nothing else.

Examples whose prompt, or a near-duplicate of it, the model was trained on are counted in the column `seen`, and the
figure without them is printed. With `--against`, a second model is measured, and paired differences are printed.

    python benchmarks/default_model.py --model runs/real --recipe RECIPE --against armorm-tiny-rm
    python benchmarks/default_model.py --limit 40
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import armorm
from armorm import ArmoRM
from armorm.evaluation.bootstrap import differences
from armorm.evaluation.examples import fingerprint
from armorm.evaluation.model_comparison import ModelComparison
from armorm.evaluation.scorers import ArmoRMScorer
from armorm.evaluation.tables import comparison_table
from armorm.files import DEFAULT_REWARD_MODEL, write_json
from targets.figures import TARGETS, Figures, explanation_time, score_parts
from targets.parts import DATA, constructed_parts, pair_part, rating_part
from targets.tables import results_tables

CONSOLE = Console(width=100, highlight=False)


def measure(rm: ArmoRM, recipe: Path | None, limit: int | None, store: Path) -> tuple[dict[str, Any], list[Figures]]:
    """All figures of a model, as they are written, and what they are computed from."""
    parts = [pair_part(limit), rating_part(rm, limit), *constructed_parts(rm, recipe, limit)]
    figures = score_parts(rm, parts, store / rm.backbone.fingerprint[:16])
    rows = [*(row for part in figures for row in part.rows), explanation_time(rm)]
    met = {row["name"]: row["met"] for row in rows if "met" in row}
    results = {
        "model": ArmoRMScorer(rm).describe(),
        "verdicts": {
            "met": [name for name in TARGETS if met.get(name) is True],
            "missed": [name for name in TARGETS if met.get(name) is False],
            "not measured": [name for name in TARGETS if name not in met],
        },
        "figures": rows,
        "limit": limit,
        "data": {part.kind: fingerprint([example.item for example in part.examples]) for part in parts[:2]},
        "seen_record_partial": rm.seen.partial,
        "machine": {
            "device": str(rm.model.device),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],  # the time of an explanation depends on what else runs
            "torch": torch.__version__,
        },
        "armorm_version": armorm.__version__,
    }
    return results, figures


def compare(first: Sequence[Figures], second: Sequence[Figures], names: tuple[str, str]) -> list[ModelComparison]:
    """Paired differences of the figures that both models have."""
    comparisons = []
    for mine, other in zip(first, second, strict=False):
        known = {metric.name for metric in other.metrics}
        shared = [metric for metric in mine.metrics if metric.name in known]
        found = differences(shared, mine.measurements, other.measurements, mine.part.clusters)
        comparisons.append(ModelComparison(mine.part.kind, *names, len(mine.part.examples), 0, 0, found))
    return comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description="The default reward model against its targets.")
    parser.add_argument("--model", default=DEFAULT_REWARD_MODEL, help="folder, hub id or embedded name")
    parser.add_argument("--against", help="another model, for paired differences")
    parser.add_argument("--recipe", type=Path, help="recipe whose constructed objectives are measured")
    parser.add_argument("--limit", type=int, help="about so many rows of each set, for a quick look; writes no file")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--store", type=Path, default=Path("runs/default_model"), help="folder of extracted features")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/default_model.json"))
    arguments = parser.parse_args()
    if not (DATA / "ratings").is_dir():
        parser.error(f"no real data sets in {DATA}; set ARMORM_DATA to their folder (docs/data.md)")
    options = (arguments.recipe, arguments.limit, arguments.store)
    results, figures = measure(ArmoRM.from_pretrained(arguments.model, dtype=arguments.dtype), *options)
    CONSOLE.print(results_tables(results))
    if arguments.against:
        other, other_figures = measure(ArmoRM.from_pretrained(arguments.against, dtype=arguments.dtype), *options)
        CONSOLE.print(results_tables(other))
        comparisons = compare(figures, other_figures, (results["model"]["name"], other["model"]["name"]))
        for comparison in comparisons:
            CONSOLE.print(comparison_table(comparison))
        results |= {"against": other, "differences": [comparison.to_dict() for comparison in comparisons]}
    if arguments.limit is None:
        write_json(arguments.output, results)
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
