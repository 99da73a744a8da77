"""Is the attribution true? Maps of a score over a reply, against marked spans, deletions, planted faults and chance.

Maps give every token, or sentence, of a reply a number that should be low where a fault is: the exact sum over tokens
of the mean part, integrated gradients of the last part, both, occlusion of sentences, and variants of them; with them
chance, position (later is worse) and the surprisal of the tokens. Nothing is fitted to the spans, and every variant
is reported (`token_maps/maps.py`).

- spans: AUC within answers of `finegrained_spans` (docs/data.md), tokens that people marked against unmarked ones, by
  type of error; the mean over answers, and its difference from position on the same answers.
- deletion: good replies without the k sentences said to be worst: the gain of the score, against random sentences, and
  R^2 of the predicted gain.
- insult, off-topic sentence, false number: planted in a good reply, by templates that no training row has, from the
  reply to another prompt, by changing a number: is that sentence the lowest?
- gradient: spans and single deletions with integrated gradients of the last part, of few answers because it is slow.
- shuffled, in spans and for planted faults: with shuffled head weights, the map must be noise.
- cost: seconds of each method next to a plain score.

Intervals are 95%, by prompt (`evaluation/bootstrap.py`), none below 50 prompts.

    python benchmarks/attribution.py                  # every part
    python benchmarks/attribution.py --part insult    # one part; the others are kept in the file
    python benchmarks/attribution.py --limit 8        # a quick look; writes no file
    python benchmarks/attribution.py --from-json --page docs/attribution.md    # rewrite the tables of the page
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import armorm
from armorm import ArmoRM
from armorm.backbone.decoder import Backbone
from armorm.backbone.encoding import encode_rows
from armorm.backbone.likelihood import load_language_model
from armorm.evaluation.scorers import ArmoRMScorer
from armorm.explain.integrated_gradients import STEPS, attribute_last_state
from armorm.files import DEFAULT_REWARD_MODEL, plain, write_json
from token_maps import page
from token_maps.measures import (
    ANY,
    deletion_figures,
    planted_figures,
    shuffled_answers,
    shuffled_planted,
    span_figures,
)
from token_maps.reading import read_replies, with_gradients
from token_maps.replies import DATA, PLANTED, good_replies, marked_answers, plant

CONSOLE = Console(width=110, highlight=False)
TIMES = 3


@dataclass(frozen=True)
class Sizes:
    """Number of marked answers, of good replies, and of marked answers with gradients."""

    answers: int = 100
    good: int = 50
    gradients: int = 10


def measure_spans(rm: ArmoRM, language_model: Backbone, sizes: Sizes) -> dict[str, Any]:
    """AUC on marked tokens; single sentences of these answers removed; the sum itself."""
    readings = read_replies(rm, language_model, marked_answers(sizes.answers))
    off = [abs(reading.attribution.contributions.sum() - reading.score) for reading in readings]
    return {
        "auc": span_figures(readings, rm),
        "shuffled": shuffled_answers(readings, rm),
        "deletion": deletion_figures(readings, rm, (1,)),
        "largest_difference_from_score": float(max(off)),
        "mean_exact_share": float(np.mean([reading.attribution.exact_share for reading in readings])),
    }


def measure_gradient(rm: ArmoRM, language_model: Backbone, sizes: Sizes) -> dict[str, Any]:
    """The same with integrated gradients, of fewer answers, and their completeness."""
    readings = with_gradients(rm, read_replies(rm, language_model, marked_answers(sizes.gradients)))
    errors = [reading.completeness for reading in readings if reading.completeness is not None]
    changes = [abs(float(reading.gradient.sum())) for reading in readings if reading.gradient is not None]
    return {
        "auc": span_figures(readings, rm),
        "deletion": deletion_figures(readings, rm, (1,)),
        "median_completeness_error": float(np.median(errors)),
        "median_explained_change": float(np.median(changes)),
        "score_std": float(rm.reference["score_std"]),
    }


def measure_deletion(rm: ArmoRM, language_model: Backbone, sizes: Sizes) -> dict[str, Any]:
    """One to three sentences of good replies removed."""
    return deletion_figures(read_replies(rm, language_model, good_replies(rm, sizes.good)), rm)


def measure_planted(kind: str, rm: ArmoRM, language_model: Backbone, sizes: Sizes) -> dict[str, Any]:
    """A fault of one kind planted in good replies."""
    readings = read_replies(rm, language_model, plant(kind, good_replies(rm, sizes.good)))
    return {"lowest": planted_figures(readings), "shuffled": shuffled_planted(readings, rm)}


def measure_cost(rm: ArmoRM, language_model: Backbone, sizes: Sizes) -> dict[str, Any]:
    """Processor seconds of each method on one good reply, the fastest of `TIMES`."""
    reply = good_replies(rm, 1)[0]
    conversation = reply.conversation
    row = encode_rows(rm.backbone.template, [conversation], None).encoded[0]
    head = rm.model.regression_layer.weight.detach()
    last = rm.backbone.readout.split(head)[0]
    assert last is not None
    methods: dict[str, tuple[Callable[[], object], int]] = {
        "score": (lambda: rm.score([conversation]), TIMES),
        "explain(tokens=True)": (lambda: rm.explain(conversation, tokens=True), TIMES),
        "occlude": (lambda: rm.occlude(conversation), TIMES),
        "gradient of the score": (lambda: attribute_last_state(rm.backbone, row, last[:1]), 1),
        'explain(tokens="gradient"), one of its steps': (
            lambda: attribute_last_state(rm.backbone, row, last, steps=1), 1
        ),
    }  # fmt: skip
    seconds = {}
    for name, (work, times) in methods.items():
        spent = []
        for _ in range(times):
            start = time.process_time()
            work()
            spent.append(time.process_time() - start)
        seconds[name] = min(spent)
    return {
        "tokens": len(row),
        "response_tokens": row.response_tokens,
        "sentences": len(reply.sentences),
        "gradient_steps": STEPS,
        "processor_seconds": seconds,
        "relative": {name: value / seconds["score"] for name, value in seconds.items()},
    }


def _cell(entry: Mapping[str, Any] | None, digits: int = 3) -> str:
    if entry is None:
        return ""
    interval = entry.get("interval")
    span = f" {interval[0]:.{digits}f}-{interval[1]:.{digits}f}" if interval else ""
    return f"{entry['value']:.{digits}f}{span}"


def _print(title: str, columns: Mapping[str, Mapping[str, Any]], digits: int = 3) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("map")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        table.add_row(name, *(_cell(column.get(name), digits) for column in columns.values()))
    CONSOLE.print(table, "")


def print_results(results: Mapping[str, Any]) -> None:
    """Tables of all parts that were measured."""
    for part in ("spans", "gradient"):
        if part in results:
            _print_spans(part, results[part]["auc"])
            _print_deletion(f"{part}, marked answers", results[part]["deletion"])
    if "deletion" in results:
        _print_deletion("good replies", results["deletion"])
    planted = {kind: results[kind] for kind in PLANTED if kind in results}
    if planted:
        lowest = {kind: found["lowest"] for kind, found in planted.items()}
        _print("the planted sentence is the lowest (share of replies)", lowest, 2)
        CONSOLE.print({kind: found["shuffled"] for kind, found in planted.items()})
    for part in ("spans", "gradient"):
        found = results.get(part, {})
        CONSOLE.print({name: value for name, value in found.items() if name not in ("auc", "deletion", "machine")})
    CONSOLE.print(results.get("cost", {}))


def _print_spans(part: str, spans: Mapping[str, Any]) -> None:
    differences = {
        name: {"value": entry["minus_position"][0], "interval": entry["minus_position"][1]}
        for name, entry in spans[ANY]["maps"].items()
    }
    _print(f"{part}: AUC on marked tokens", {ANY: spans[ANY]["maps"], "minus position": differences})
    kinds = {kind: found for kind, found in spans.items() if kind != ANY}
    _print("by type", {kind: found["maps"] for kind, found in kinds.items()}, 2)
    _print("by objective", {kind: found["objectives"] for kind, found in spans.items()}, 2)


def _print_deletion(title: str, found: Mapping[str, Any]) -> None:
    _print(f"{title}: gain of the score by removing the k worst sentences (sd)", found["removed"], 2)
    fits = {f"R2, {k}": entry["r2"] for k, entry in found["predicted"].items()}
    fits |= {f"r, {k}": entry["correlation_within_replies"] for k, entry in found["predicted"].items()}
    _print("predicted against measured gain; r within replies", fits, 2)


PARTS: dict[str, Callable[[ArmoRM, Backbone, Sizes], dict[str, Any]]] = {
    "spans": measure_spans,
    "deletion": measure_deletion,
    **{kind: partial(measure_planted, kind) for kind in PLANTED},
    "gradient": measure_gradient,
    "cost": measure_cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Is the attribution true?")
    parser.add_argument("--part", action="append", choices=PARTS, help="by default all; others are kept in the file")
    parser.add_argument("--model", default=DEFAULT_REWARD_MODEL, help="a model with both parts (last+mean)")
    parser.add_argument("--language-model", default="armorm-small", help="its backbone with all layers")
    parser.add_argument("--answers", type=int, default=Sizes.answers, help="marked answers, of 249")
    parser.add_argument("--good", type=int, default=Sizes.good, help="good replies")
    parser.add_argument("--gradients", type=int, default=Sizes.gradients, help="marked answers with gradients")
    parser.add_argument("--limit", type=int, help="so many replies of each kind, for a quick look; writes no file")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attribution.json"))
    parser.add_argument("--page", type=Path, help="page whose marked parts are rewritten, such as docs/attribution.md")
    parser.add_argument("--from-json", action="store_true", help="measure nothing; use the results in the file")
    arguments = parser.parse_args()
    if not arguments.from_json:
        measure(parser, arguments)
    if arguments.page:
        page.write(arguments.page, json.loads(arguments.output.read_text(encoding="utf-8")))
        print(f"wrote {arguments.page}")


def measure(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Measure the parts, print them, and keep them in the file."""
    if not (DATA / "benchmarks").is_dir():
        parser.error(f"no real data sets in {DATA}; set ARMORM_DATA to their folder (docs/data.md)")
    numbers = (arguments.answers, arguments.good, arguments.gradients)
    sizes = Sizes(*(min(number, arguments.limit or number) for number in numbers))
    rm = ArmoRM.from_pretrained(arguments.model)
    if rm.backbone.readout.pooling != "last+mean":
        parser.error(f"{arguments.model} reads {rm.backbone.readout.pooling}; expected a model that reads last+mean")
    language_model = load_language_model(arguments.language_model, device=str(rm.backbone.device))
    language_model.model.to(rm.backbone.model.dtype)
    model = ArmoRMScorer(rm).describe()
    dtype = model["backbone"].pop("dtype")  # of a part, as is the fingerprint, which covers it
    fingerprint = model["backbone"].pop("fingerprint")
    results: dict[str, Any] = {"model": model, "armorm_version": armorm.__version__}
    if arguments.output.exists():
        kept = json.loads(arguments.output.read_text(encoding="utf-8"))
        results = kept if {name: kept.get(name) for name in results} == plain(results) else results
    machine = {
        "device": str(rm.model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": dtype,
        "backbone_fingerprint": fingerprint,
    }
    for part in arguments.part or PARTS:
        start = time.process_time()
        results[part] = PARTS[part](rm, language_model, sizes)
        results[part] |= {"sizes": asdict(sizes), "machine": machine, "seconds": time.process_time() - start}
        if arguments.limit is None:
            write_json(arguments.output, plain(results))
        print_results({part: results[part]})
    if arguments.limit is None:
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
