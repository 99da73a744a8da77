"""The runner: a benchmark, a scorer, data; out comes everything that `Results` holds.

In:  names of benchmark and model (or the objects), where the data is.
Out: `Results`, and the file, if one was asked for.

Rows are read and checked before a model is loaded. Every distinct conversation is scored once. With an
output file, what was scored is kept beside it (OUTPUT.partial) until the result is written, so that a run
that was killed goes on where it was: features of a model of this library, scores of any other. With a
feature store the features stay there, and those that are there already are not computed again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from armorm.attribution import deciding
from armorm.conversation import Conversation
from armorm.data.ratings import sample_by_prompt
from armorm.data.sources import find_sources
from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.errors import DataError
from armorm.evaluation import baselines
from armorm.evaluation.audits.audit import audits
from armorm.evaluation.audits.bias import lengths
from armorm.evaluation.benchmarks.ratings import load_ratings
from armorm.evaluation.bootstrap import RESAMPLES, Clusters, intervals, rows_of, value_of
from armorm.evaluation.examples import Comparisons, Example, Item, fingerprint, numbered
from armorm.evaluation.loaders import READERS, Loaded
from armorm.evaluation.metrics import Cells, Figure, totals
from armorm.evaluation.registry import BENCHMARKS, Benchmark, BenchmarkError, find_benchmark
from armorm.evaluation.results import FigureResult, Results
from armorm.evaluation.scorers import ArmoRMScorer, Scored, Scorer, load_scorer
from armorm.files import plain, write_json
from armorm.progress import progress
from armorm.version import __version__

CHUNK = 512


def evaluate(
    benchmark: str,
    model: Any = EMBEDDED_REWARD_MODEL,
    data: str | Path | Sequence[str | Path] = (),
    *,
    output: str | Path | None = None,
    features: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    resamples: int = RESAMPLES,
    seed: int = 0,
    quiet: bool = False,
) -> Results:
    """Evaluate a reward model.

    Args:
        benchmark: `pairs`, `ratings`, `rewardbench`, `rewardbench2`, `rm-bench`, `judgebench` or `ppe`.
        model: an `ArmoRM`, a function from a list of conversations (lists of messages) to a list of numbers, any
            `Scorer`, or the name of a model: of this library, or a plain sequence classifier.
        data: files, folders or hub ids; the published sets where there are such.
        output: file for the results; it also makes the run resumable.
        features: feature store to read and fill, for models of this library.
        split: of a hub set or a saved folder, where the known one is not meant.
        limit: about how many examples to keep, whole prompts, drawn by their content.
        resamples, seed: of the intervals.
        quiet: say nothing on standard error but progress.

    Raises:
        BenchmarkError: for an unknown benchmark, or one without data.
        DataError: for faults in the data, and for an output that is a folder or features that are a file.
    """
    find_benchmark(benchmark)
    places = [data] if isinstance(data, (str, Path)) else list(data)
    if not places and not BENCHMARKS[benchmark].published:
        raise BenchmarkError(f"{benchmark} has no data of its own; expected a file, a folder or a hub id (--data)")
    sources = find_sources(places, BENCHMARKS[benchmark].published, BENCHMARKS[benchmark].also, split)
    console = Console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
    partial_folder = Path(output).with_name(f"{Path(output).name}.partial") if output else None

    if output is not None and Path(output).is_dir():
        raise DataError("is a folder, expected a file to write to", file=output)
    if features is not None and Path(features).is_file():
        raise DataError("is a file, expected a folder of features", file=features)
    loaded = None if benchmark == "ratings" else READERS[benchmark](sources)
    scorer = load_scorer(model, store=Path(features) if features else None, dtype=dtype, device=device)
    if partial_folder is not None and isinstance(scorer, ArmoRMScorer) and scorer.store is None:
        # (Another model's stopped run may have left its own features there.)
        scorer = ArmoRMScorer(scorer.rm, partial_folder / f"features-{scorer.rm.backbone.fingerprint[:16]}")
    if loaded is None:
        loaded = load_ratings(sources, getattr(scorer, "objectives", None))
    examples = numbered(_limited(loaded.examples, limit))
    measured = find_benchmark(benchmark, loaded.names, loaded.raw)
    items = [example.item for example in examples]
    measured.measure(items, baselines.by_nothing(items))  # what the rule refuses, it refuses before any scoring
    unique, rows = distinct(examples)
    scored = score_once(scorer, unique, partial_folder)
    results = _results(
        measured,
        scorer,
        loaded,
        examples,
        unique,
        rows,
        scored,
        {"sources": [str(place) for place in places] or [hub.id for hub in BENCHMARKS[benchmark].published]},
        resamples,
        seed,
    )
    for entry in results.refused[:5]:
        console.print(f"refused: {entry['file']}, row {entry['row']}: {entry['reason']}")
    if len(results.refused) > 5:
        console.print(f"refused: {len(results.refused):,} responses in all; their examples count as wrong")
    if output is not None:
        results.save(output)
        if partial_folder is not None and partial_folder.exists():
            shutil.rmtree(partial_folder)
    return results


def distinct(examples: Sequence[Example]) -> tuple[list[Conversation], list[np.ndarray]]:
    """Every conversation once, and of each example the rows of its responses (-1: no conversation)."""
    index: dict[str, int] = {}
    unique: list[Conversation] = []
    rows = []
    for example in examples:
        at = np.full(len(example.conversations), -1, np.int64)
        for position, conversation in enumerate(example.conversations):
            if conversation is not None:
                at[position] = index.setdefault(conversation.key, len(unique))
                if at[position] == len(unique):
                    unique.append(conversation)
        rows.append(at)
    return unique, rows


def score_once(scorer: Scorer, conversations: Sequence[Conversation], folder: Path | None) -> Scored:
    """Score conversations: an interpretable model in one call, which returns the parts; others chunk by chunk, each
    kept in `folder` when done."""
    if hasattr(scorer, "objectives"):
        return scorer.score(conversations)
    identity = json.dumps(plain(scorer.describe()), sort_keys=True)
    scores: list[float] = []
    refused: dict[int, str] = {}
    with progress("scores", len(conversations), "conversations") as advance:
        for start in range(0, len(conversations), CHUNK):
            chunk = conversations[start : start + CHUNK]
            digest = blake2b("\n".join([identity, *(c.key for c in chunk)]).encode(), digest_size=8).hexdigest()
            path = folder / f"scores-{digest}.json" if folder is not None else None
            if path is not None and path.exists():
                kept = json.loads(path.read_text(encoding="utf-8"))
            else:
                found = scorer.score(chunk)
                kept = plain({"scores": found.scores, "refused": found.refused})
                if path is not None:
                    write_json(path, kept)
            scores += [np.nan if score is None else score for score in kept["scores"]]
            refused |= {start + int(row): reason for row, reason in kept["refused"].items()}
            advance(len(chunk))
    return Scored(np.array(scores, np.float64), refused)


def _limited(examples: list[Example], limit: int | None) -> list[Example]:
    keys = [blake2b(example.item.prompt.encode(), digest_size=8).hexdigest() for example in examples]
    return [examples[i] for i in sample_by_prompt(keys, limit)]


def _results(
    benchmark: Benchmark,
    scorer: Scorer,
    loaded: Loaded,
    examples: Sequence[Example],
    unique: Sequence[Conversation],
    rows: Sequence[np.ndarray],
    scored: Scored,
    data: dict[str, Any],
    resamples: int,
    seed: int,
) -> Results:
    items = [example.item for example in examples]
    rated = bool(loaded.names)
    scores = _item_scores(rows, scored, loaded)
    cells = benchmark.measure(items, scores)
    clusters = Clusters.of_items([item.prompt for item in items], [item.subset for item in items])
    sizes = lengths(unique)
    # A length is no rating: it has an order, but no error.
    by_order = find_benchmark(benchmark.name, loaded.names, raw=False)
    beside = {"length": by_order.measure(items, baselines.by_length(rows, sizes))}
    if not rated:
        beside["prompt_only"] = benchmark.measure(items, baselines.by_nothing(items))
    else:
        parts = scored.parts
        seen = (parts.prompt_features, parts.prompt_index) if parts else baselines.prompt_words(unique)
        beside["prompt_only"] = benchmark.measure(items, baselines.by_prompt(items, rows, *seen))
    if benchmark.chance is not None:
        beside["chance"] = benchmark.chance(items)
    figures = figure_results(benchmark.figures(cells), cells, beside, clusters, resamples, seed)
    refused = _refused(examples, rows, scored)
    comparisons = Comparisons.of(items, rows) if not rated else Comparisons.of([], [])
    margins = comparisons.difference(scored.scores)
    truncated = set(scored.truncated)
    counts = {
        "examples": len(items),
        "prompts": len(clusters.strata),
        "conversations": len(unique),
        "refused_responses": len(refused),
        "refused_examples": len({entry["key"] for entry in refused}),
        "truncated_examples": sum(bool(truncated & set(at.tolist())) for at in rows),
        "ties": len(np.unique(comparisons.item[margins == 0])),
    }
    data |= {"fingerprint": fingerprint(items), "rows": len(items)}
    data |= {"left_out": loaded.left_out} if loaded.left_out else {}
    return Results(
        benchmark=benchmark.name,
        model=scorer.describe(),
        data=data,
        counts=counts,
        figures=figures,
        audits=audits(items, rows, unique, scored, comparisons, clusters),
        examples=_entries(items, scores, comparisons, scored, truncated, rows),
        objectives=loaded.names,
        raw=loaded.raw,
        refused=refused,
        armorm_version=__version__,
    )


def figure_results(
    figures: Sequence[Figure], cells: Cells, beside: dict[str, Cells], clusters: Clusters, resamples: int, seed: int
) -> list[FigureResult]:
    """Figures with interval, prompts, and the same figure by every baseline that has what it is made of."""
    ranges = intervals(figures, cells, clusters, resamples=resamples, seed=seed)
    results = []
    for figure, interval in zip(figures, ranges, strict=True):
        used = [cell for cell in figure.cells if cell in cells]
        values = {
            name: float(figure.value(totals(other)))
            for name, other in beside.items()
            if all(cell in other for cell in used)
        }
        results.append(
            FigureResult(
                level=figure.level,
                name=figure.name,
                value=value_of(figure, cells),
                prompts=clusters.count(figure, cells),
                examples=len(rows_of(figure, cells)),
                interval=interval,
                baselines=values,
                lacking=figure.lacking,
                unit=figure.unit,
            )
        )
    return results


def _item_scores(rows: Sequence[np.ndarray], scored: Scored, loaded: Loaded) -> list[np.ndarray]:
    """Scores of each item: one a response, or, of rated rows, one an objective."""
    if loaded.names and scored.parts is not None:
        columns = [scored.parts.names.index(name) for name in loaded.names]
        padded = np.concatenate([scored.parts.raw[:, columns], np.full((1, len(columns)), np.nan)])
        return [padded[at[0]] for at in rows]
    padded = np.append(scored.scores, np.nan)
    if loaded.names:
        return [np.full(len(loaded.names), padded[at[0]]) for at in rows]
    return [padded[at] for at in rows]


def _refused(examples: Sequence[Example], rows: Sequence[np.ndarray], scored: Scored) -> list[dict[str, Any]]:
    entries = []
    for example, at in zip(examples, rows, strict=True):
        reasons = dict(example.faults)
        reasons |= {p: scored.refused[int(row)] for p, row in enumerate(at) if int(row) in scored.refused}
        file, number = example.origin
        for position, reason in sorted(reasons.items()):
            entries.append(
                {"file": file, "row": number, "key": example.item.key, "response": position, "reason": reason}
            )
    return entries


def _entries(
    items: Sequence[Item],
    scores: Sequence[np.ndarray],
    comparisons: Comparisons,
    scored: Scored,
    truncated: set[int],
    rows: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """One entry an example: item, scores, margin of its closest comparison, and what decided that."""
    closest = comparisons.closest(scored.scores)
    margins = dict(zip(closest.item.tolist(), closest.difference(scored.scores).tolist(), strict=True))
    decided: dict[int, list[dict[str, Any]]] = {}
    if scored.parts is not None and len(closest):
        contributions = closest.difference(scored.parts.contributions)
        for place, mask in enumerate(deciding(contributions)):
            columns = sorted(np.flatnonzero(mask), key=lambda c: -abs(contributions[place, c]))
            decided[int(closest.item[place])] = [
                {"objective": scored.parts.names[c], "contribution": float(contributions[place, c])} for c in columns
            ]
    entries = []
    for number, (item, values, at) in enumerate(zip(items, scores, rows, strict=True)):
        entry = item.to_dict() | {"scores": values.tolist()}
        if number in margins:
            entry["margin"] = margins[number]
        if number in decided:
            entry["decided_by"] = decided[number]
        if truncated & set(at.tolist()):
            entry["truncated"] = True
        entries.append(entry)
    return entries
