"""Ablation of each part of the method on real data.

Every method reads the same cached features and is tested on the same pairs of held-out prompts: the test pairs of the
sets that the gate is trained on, and benchmarks that nothing is trained on. Intervals are over prompts. Questions:

- how to weight the objectives (learned gate, uniform, fixed weights, best single objective, a plain Bradley-Terry head
  on the same features, the published script, the longer response), with and without debiasing;
- the architecture of the gate; the reference data of the debiasing; domains that the gate was not trained on;
- absolute ratings against the same ratings as pairs; heads trained on ratings and pairs jointly; quantile heads.

Prints tables and writes `benchmarks/results/ablation.json`; with --findings also the tables, sentences and plots of
docs/findings.md. Results on other backbones (`ablation-NAME.json` in the same folder) are compared with it.

    python benchmarks/ablation.py                          # armorm-tiny, everything
    python benchmarks/ablation.py --backbone FOLDER_OR_HUB_ID --output benchmarks/results/ablation-other.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import armorm
from ablations import backbones, findings, studies, tables
from ablations.corpus import load
from ablations.measuring import GATE, measure, measure_domains
from ablations.methods import Bench, compare
from armorm import Recipe
from armorm.files import plain, write_json
from armorm.heads.regression import RegressionHead


def run(bench: Bench, seeds: list[int], published_steps: int) -> dict[str, Any]:
    """Every study."""
    results: dict[str, Any] = {}
    margins, notes = compare(bench, seeds, published_steps)
    head, report = bench.joint()
    seen = set(bench.corpus.train.prompts.tolist()) | set(bench.corpus.pairs.prompts.tolist())
    joint = bench.rewards_of(head, seen)
    debiasing = bench.debias(joint.reference)
    fits = [bench.gate(joint, debiasing, seed=seed)[0] for seed in seeds]
    margins["joint heads, gate"] = np.stack([bench.gated(network, joint, debiasing) for network in fits])
    uniform = debiasing.apply(joint.test_chosen - joint.test_rejected).mean(1)
    margins["joint heads, uniform weights"] = uniform[None]
    results["methods"] = {"figures": measure(bench, margins, GATE), "notes": notes}
    results["joint"] = {
        "report": asdict(report),
        "stage_1": studies.held_out_ratings(bench, bench.head),
        "joint": studies.held_out_ratings(bench, head),
    }
    forms, form_notes = studies.gate_forms(bench, seeds)
    results["forms"] = {"figures": measure(bench, forms, "2 hidden layers"), "notes": form_notes}
    by_reference, table = studies.references(bench)
    results["references"] = {"figures": measure(bench, by_reference, "all rating rows"), "table": table}
    results["domains"] = measure_domains(bench, studies.domains(bench))
    results["ratings_against_pairs"] = studies.ratings_against_pairs(bench)
    results["quantiles"] = studies.quantiles(bench)
    return results


def regression_figures(head: RegressionHead) -> dict[str, Any]:
    return {report.objective: {"r2": report.r2, "alpha": report.alpha} for report in head.reports}


def other_results(output: Path) -> list[Path]:
    """Results on other backbones: `ablation-NAME.json` next to `ablation.json`."""
    return sorted(output.parent.glob(f"{output.stem}-*.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Ablation of each part of the method on real data.")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/real-small.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="override a recipe key: KEY=VALUE")
    parser.add_argument("--backbone", help="backbone instead of the recipe's: hub id, folder, or armorm-tiny")
    parser.add_argument(
        "--store", type=Path, default=Path("runs/ablation/features"), help="folder of feature stores, one per backbone"
    )
    parser.add_argument(
        "--train-rows", type=int, help="approximate number of training rows per rated set (default: all)"
    )
    parser.add_argument("--benchmark-pairs", type=int, help="approximate number of pairs per benchmark (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per learned gate in the main comparison")
    parser.add_argument(
        "--published-steps", type=int, default=200, help="training steps of the published script's gate"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ablation.json"))
    parser.add_argument("--findings", type=Path, help="page whose marked parts and plots are rewritten")
    parser.add_argument(
        "--from-json", action="store_true", help="skip the measurements; make tables and page from --output"
    )
    arguments = parser.parse_args()
    if not arguments.from_json:
        overrides = [*arguments.overrides, *([f"backbone.model={arguments.backbone}"] if arguments.backbone else [])]
        recipe = Recipe.from_yaml(arguments.recipe, overrides)
        start = time.monotonic()
        corpus = load(recipe, arguments.store, arguments.train_rows, arguments.benchmark_pairs)
        bench = Bench(corpus, recipe)
        results = run(bench, list(range(arguments.seeds)), arguments.published_steps)
        results["setting"] = {
            "recipe": recipe.name,
            "changed": arguments.overrides,
            "backbone": corpus.backbone,
            "armorm_version": armorm.__version__,
            "train_rows_of_each_set": arguments.train_rows,
            "pairs_of_each_benchmark": arguments.benchmark_pairs,
            "seeds": arguments.seeds,
            "counts": corpus.counts(),
            "objectives": bench.names,
            "bias": bench.names[corpus.bias],
            "regression": regression_figures(bench.head),
            "seconds": round(time.monotonic() - start),
        }
        write_json(arguments.output, plain(results))
        print(f"wrote {arguments.output}")
    results = json.loads(arguments.output.read_text(encoding="utf-8"))
    others = [json.loads(path.read_text(encoding="utf-8")) for path in other_results(arguments.output)]
    tables.show([*tables.tables(results).values(), *([backbones.table([results, *others])] if others else [])])
    if arguments.findings:
        findings.write(arguments.findings, results, others)
        print(f"wrote {arguments.findings}")


if __name__ == "__main__":
    main()
