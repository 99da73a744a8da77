"""What each part of the default model's recipe adds: the same rows, trained and measured step by step.

From the paper's setting to the recipe: the last token of the last layer with rated objectives and judged pairs only; an
inner layer; another pooling; constructed objectives with their pairs, and an objective fitted to judged pairs; weights
discounted by reliability; a tuned backbone. Each step is a whole training run on about `--limit` rows of each set,
measured on about `--measure` examples of each set as `benchmarks/default_model.py` measures the shipped model; a
figure depends on both numbers, so only rows of this table are comparable with each other. Differences are paired, from
the step before.

    python benchmarks/recipe_steps.py --tuned RUN        # RUN: a finished run of the recipe with a section finetune
    python benchmarks/recipe_steps.py --from-json        # print the table of the committed results
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import armorm
from armorm import Recipe
from armorm.evaluation.bootstrap import differences
from armorm.files import write_json, write_text
from armorm.training.pipeline import train
from targets.figures import Figures, score_parts
from targets.parts import DATA, EVERYDAY, HARMLESS, JUDGED, MACRO, SPEARMAN, WITHIN, pair_part, rating_part

CONSOLE = Console(width=150, highlight=False)
RESULTS = Path(__file__).parent / "results" / "recipe_steps.json"
COLUMNS = (SPEARMAN, WITHIN, MACRO, *JUDGED, EVERYDAY, HARMLESS)
SHORT = {SPEARMAN: "Spearman", WITHIN: "within", MACRO: "pairs", EVERYDAY: "everyday", HARMLESS: "harmless"}
_CONSTRUCTED = ("construct", "bradley_terry")


def steps(recipe: Mapping[str, Any], tuned: Path | None) -> list[tuple[str, dict[str, Any]]]:
    """Name and recipe of each step."""
    full = {key: value for key, value in recipe.items() if key != "finetune"}
    made = [entry for entry in full["ratings"] if any(entry.get(key) is not None for key in _CONSTRUCTED)]
    names = {entry.get("name") or entry.get("construct") for entry in made}
    undiscounted = {**full, "gating": {**full["gating"], "reliability": [0]}}
    keep = {name: biases for name, biases in full["debias"].get("keep", {}).items() if name not in names}
    plain = {
        **undiscounted,
        "ratings": [entry for entry in full["ratings"] if entry not in made],
        "preferences": [entry for entry in full["preferences"] if entry.get("from_ratings") not in names],
        "debias": {**full["debias"], "keep": keep},
    }
    layer, pooling = full["backbone"]["layer"], full["backbone"]["pooling"]
    found = [
        ("last layer, last token", _read(plain, None, "last")),
        (f"layer {layer}, last token", _read(plain, layer, "last")),
        (f"layer {layer}, {pooling}", plain),
        ("+ constructed objectives, pairs' objective", undiscounted),
        ("+ weights discounted by reliability", full),
    ]
    if tuned is not None:
        model = {"model": str(tuned / "work" / "backbone")}
        found.append(("+ upper layers tuned", {**full, "backbone": {**full["backbone"], **model}}))
    return found


def _read(recipe: dict[str, Any], layer: int | None, pooling: str) -> dict[str, Any]:
    return {**recipe, "backbone": {**recipe["backbone"], "layer": layer, "pooling": pooling}}


def measure(model: armorm.ArmoRM, size: int, store: Path) -> list[Figures]:
    """Figures of the judged pairs and everyday texts, and of the ratings."""
    parts = [pair_part(size, (*JUDGED, EVERYDAY, HARMLESS)), rating_part(model, size)]
    return score_parts(model, parts, store / model.backbone.fingerprint[:16])


def run(arguments: argparse.Namespace) -> None:
    """Train and measure every step, and write the results."""
    recipe = Recipe.from_yaml(arguments.recipe, [f"data_root={DATA.resolve()}", f"limit={arguments.limit}"])
    results: dict[str, Any] = {
        "steps": [],
        "limit": arguments.limit,
        "measured": arguments.measure,
        "recipe": arguments.recipe.name,
        "machine": {"device": "cpu", "threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "armorm_version": armorm.__version__,
    }
    before = None
    for number, (name, values) in enumerate(steps(recipe.model_dump(mode="json", by_alias=True), arguments.tuned)):
        start = time.monotonic()
        readout = "-".join(str(values["backbone"][key]) for key in ("layer", "pooling"))
        stored = arguments.work / f"features-{readout}{'-tuned' if name.endswith('tuned') else ''}"
        CONSOLE.print(f"{name}: training", style="bold")
        step = Recipe.from_dict(values)
        model = train(step, arguments.work / f"step-{number}", features=stored)
        found = measure(model, arguments.measure, arguments.work / "measured" / stored.name)
        entry = {"step": name, "objectives": len(model.objectives), "seconds": time.monotonic() - start}
        entry["figures"] = {row["name"]: row for part in found for row in part.rows if row["name"] in COLUMNS}
        entry["change"] = _changes(before, found)
        results["steps"].append(entry)
        write_json(arguments.output, results)  # as it goes: a later step may fail
        before = found


def _changes(before: Sequence[Figures] | None, now: Sequence[Figures]) -> dict[str, Any]:
    """Paired differences from the step before, of the figures that both have."""
    found: dict[str, Any] = {}
    for earlier, later in zip(before or (), now, strict=False):
        known = {metric.name for metric in earlier.metrics} & set(COLUMNS)
        shared = [metric for metric in later.metrics if metric.name in known]
        changes = differences(shared, later.measurements, earlier.measurements, later.part.clusters)
        found |= {change.name: asdict(change) for change in changes}
    return found


def results_table(results: Mapping[str, Any]) -> Table:
    """One row per step."""
    table = Table(title=f"about {results['limit']} rows of each set", box=None)
    for heading in ("step", "objectives", *(SHORT.get(name, name) for name in COLUMNS)):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "step" else "right")
    for entry in results["steps"]:
        cells = [_cell(entry["figures"].get(name), entry["change"].get(name)) for name in COLUMNS]
        table.add_row(entry["step"], str(entry["objectives"]), *cells)
    return table


def _cell(figure: Mapping[str, Any] | None, change: Mapping[str, Any] | None) -> str:
    if figure is None or figure["value"] is None:
        return "-"
    marked = change is not None and change.get("interval") and change["interval"][0] * change["interval"][1] > 0
    return f"{figure['value']:.3f}{'*' if marked else ''}"


def write_page(page: Path, results: Mapping[str, Any]) -> None:
    """Replace the table between the marks of a page."""
    header = ["step", *(SHORT.get(name, name) for name in COLUMNS)]
    lines = [f"| {' | '.join(header)} |", f"|---{'|--:' * len(COLUMNS)}|"]
    for entry in results["steps"]:
        cells = [_cell(entry["figures"].get(name), entry["change"].get(name)) for name in COLUMNS]
        lines.append(f"| {' | '.join([entry['step'], *cells])} |")
    begin, end = "<!-- table recipe_steps -->\n", "<!-- end of table -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    write_text(page, before + begin + "\n" + "\n".join(lines).replace("*", "\\*") + "\n\n" + end + rest.split(end)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="What each part of the default model's recipe adds.")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/small.yaml"))
    parser.add_argument("--tuned", type=Path, help="folder of a finished run whose backbone was fine-tuned")
    parser.add_argument("--limit", type=int, default=400, help="about so many rows of each set in training")
    parser.add_argument("--measure", type=int, default=250, help="about so many examples of each set")
    parser.add_argument("--work", type=Path, default=Path("runs/recipe_steps"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="also write the table into this page (docs/findings.md)")
    parser.add_argument("--from-json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.from_json:
        run(arguments)
    CONSOLE.print(results_table(json.loads(arguments.output.read_text())))
    if arguments.page:
        write_page(arguments.page, json.loads(arguments.output.read_text()))
    CONSOLE.print("* the paired difference from the step before has an interval on one side of 0", style="dim")


if __name__ == "__main__":
    main()
