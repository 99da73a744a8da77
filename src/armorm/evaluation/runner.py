"""Evaluate a scorer on a benchmark: read examples, score each distinct conversation once, compute metrics and audits.

Rows are read and checked before a model is loaded (ratings need its objectives). With an output file, progress is saved
next to it (OUTPUT.partial) until the results are written, so that an interrupted run resumes: features of a model of
this library, scores of any other. With a feature store, features are kept there instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.data.ratings import sample_by_prompt
from armorm.data.seen_prompts import ROLES, SeenPrompts
from armorm.data.sources import Location, Source, find_sources, places_of
from armorm.errors import DataError
from armorm.evaluation import baselines
from armorm.evaluation.audits import run_audits
from armorm.evaluation.audits.bias import lengths
from armorm.evaluation.benchmarks import find_benchmark
from armorm.evaluation.benchmarks.base import Benchmark, BenchmarkError, Loaded, equal_scores
from armorm.evaluation.bootstrap import RESAMPLES, Clusters, intervals
from armorm.evaluation.examples import Example, Item, LabelledPairs, fingerprint, numbered
from armorm.evaluation.metrics import Measurements, Metric, group_sums
from armorm.evaluation.results import MetricResult, NothingHeldOutError, Results, seen_in_training
from armorm.evaluation.scorer import PairJudge, Scored, Scorer, ScorerError, deciding_objectives
from armorm.evaluation.scorer_names import ScorerName
from armorm.evaluation.scorers import ArmoRMScorer, load_scorer
from armorm.evaluation.server_scorer import RewardServerScorer
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.progress import Terminal, progress
from armorm.saved_chunks import SavedChunks, work_folder
from armorm.version import __version__

CHUNK = 512


def evaluate(
    benchmark: str,
    model: Any = DEFAULT_REWARD_MODEL,
    data: Any = (),
    *,
    output: str | Path | None = None,
    features: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    api_key_env: str | None = None,
    include_seen: bool = False,
    strict: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    quiet: bool = False,
) -> Results:
    """Evaluate a reward model.

    Args:
        benchmark: a name in `BENCHMARKS`; `judgebench-double` is for judges of pairs (`PairJudge`).
        model: an `ArmoRM`, a function from a list of conversations (lists of messages) to a list of numbers, any
            `Scorer`, or the name of a model: of this library, of a Hugging Face sequence classifier, or of a kind in
            `evaluation/scorer_names.py` (the URL of a server, `dpo:...`, `judge:...`).
        data: files, folders, hub ids, DataFrames or Datasets; by default the published sets of the benchmark, if any.
        output: results file; it also makes the run resumable.
        features: feature store to read and fill, for models of this library.
        split: of a hub set or a saved folder, instead of the published one.
        limit: approximate number of examples, whole prompts, chosen by their content.
        api_key_env: environment variable with the key of a server; by default ARMORM_API_KEY.
        include_seen: evaluate also on prompts that the model was trained on, or near-duplicates of them.
        strict: as of `load_examples`.
        resamples, seed: of the bootstrap intervals.
        quiet: print only progress on standard error.

    Raises:
        BenchmarkError: for an unknown benchmark, or one without published data and none given.
        DataError: for faults in the data, for an output that is a folder, or features that are a file.
        NothingHeldOutError: if the model was trained on every prompt.
    """
    found = find_benchmark(benchmark)
    places = places_of(data)
    if not places and not found.published:
        raise BenchmarkError(f"{benchmark} has no published data; expected a file, a folder or a hub id (--data)")
    sources = find_sources(places, found.published, found.also, split)
    if output is not None and Path(output).is_dir():
        raise DataError("is a folder, expected a file to write to", file=output)
    if features is not None and Path(features).is_file():
        raise DataError("is a file, expected a folder of features", file=features)
    loaded = None if found.rated else load_examples(found, sources, limit, strict=strict)
    named = ScorerName.parse(model) if isinstance(model, str) else None
    if found.judged and not isinstance(model, PairJudge) and not (named and named.judges_pairs):
        scorer: Scorer = PairJudge.of(model)
    else:
        store = Path(features) if features else None
        scorer = load_scorer(model, store=store, dtype=dtype, device=device, api_key_env=api_key_env)
    if loaded is None:
        loaded = load_examples(found, sources, limit, getattr(scorer, "objectives", None), strict=strict)
    judges_pairs = isinstance(scorer, PairJudge)
    if judges_pairs:
        require_two_responses(found, loaded)
    seen = None
    if isinstance(scorer, ArmoRMScorer):
        loaded, seen = leave_out_seen(loaded, scorer.rm.seen, include=include_seen)
        if not loaded.examples:
            raise NothingHeldOutError(
                f"{seen_in_training(seen)}; --include-seen evaluates on them", file=sources[0].location.name
            )
    elif isinstance(scorer, RewardServerScorer):
        seen = {"examples": 0, "prompts": 0, "roles": {}, "of": len(loaded.examples), "partial": True, "included": True}
    items = [example.item for example in loaded.examples]
    # Whatever the scoring rule rejects, it rejects before any scoring.
    found.of_objectives(loaded.names, loaded.raw).measure(items, equal_scores(items))
    unique, rows = paired(loaded.examples) if judges_pairs else distinct(loaded.examples)
    names = [Location.find(place).name for place in places] or [hub.id for hub in found.published]
    with work_folder(Path(output) if output else None) as folder:
        if folder is not None and isinstance(scorer, ArmoRMScorer) and scorer.store is None:
            # An interrupted run of another model may have left its own features there.
            scorer = ArmoRMScorer(scorer.rm, folder / f"features-{scorer.rm.backbone.fingerprint[:16]}")
        scored = score_once(scorer, unique, folder, rows)
        results = compute_results(
            found,
            loaded,
            unique,
            rows,
            scored,
            model=scorer.describe(),
            sources=names,
            seen=seen,
            resamples=resamples,
            seed=seed,
        )
        console = Terminal(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)
        for entry in results.refused[:5]:
            console.print(f"not scored: {entry['file']}, row {entry['row']}: {entry['reason']}")
        if len(results.refused) > 5:
            console.print(f"not scored: {len(results.refused):,} responses in total; their examples count as wrong")
        if output is not None:
            results.save(output)
    return results


def load_examples(
    benchmark: Benchmark,
    sources: Sequence[Source],
    limit: int | None = None,
    objectives: Any = None,
    *,
    strict: bool = False,
) -> Loaded:
    """Examples of a benchmark with unique keys; what was left out is reported and counted.

    Args:
        limit: approximate number of examples, whole prompts.
        objectives: `ObjectiveSet` of the model or None, for a benchmark that is `rated`.
        strict: a row that cannot be read, a rating off its scale or a response that cannot be scored is an error.

    Raises:
        DataError: for data that cannot be read.
    """
    loaded = benchmark.read(sources, objectives) if benchmark.rated else benchmark.read(sources)
    if strict:
        _require_complete(loaded)
    loaded.rejections.report()
    loaded.skipped |= loaded.rejections.counts
    keys = [blake2b(example.item.prompt.encode(), digest_size=8).hexdigest() for example in loaded.examples]
    return replace(loaded, examples=numbered([loaded.examples[i] for i in sample_by_prompt(keys, limit)]))


def require_two_responses(benchmark: Benchmark, loaded: Loaded) -> None:
    """Check that examples are pairs, as a judge of pairs needs them.

    Raises:
        ScorerError: if one has another number of responses.
    """
    other = next((len(e.conversations) for e in loaded.examples if len(e.conversations) != 2), None)
    if other is not None:
        raise ScorerError(
            f"{benchmark.name} has examples of {other} responses, expected two for a judge of pairs "
            "(mode=absolute rates each response)"
        )


def _require_complete(loaded: Loaded) -> None:
    for error in loaded.rejections.errors:
        raise error
    for example in loaded.examples:
        for _, reason in example.faults:
            raise DataError(reason, file=example.origin[0], row=example.origin[1])


def leave_out_seen(loaded: Loaded, seen: SeenPrompts, *, include: bool = False) -> tuple[Loaded, dict[str, Any]]:
    """The examples whose prompts a model was not trained on, and what was found.

    Args:
        include: keep all examples.

    Returns:
        the examples; `examples` and `prompts` that were seen, `roles` (prompts by what they were used for), `of` how
        many examples, `partial` (the record of the model), `included`.
    """
    # (Of an example without a valid conversation, the prompt is not known.)
    asked = {row: c for row, example in enumerate(loaded.examples) for c in example.conversations if c is not None}
    roles = np.zeros(len(loaded.examples), np.uint8)
    roles[list(asked)] = seen.find([*asked.values()])
    prompts = {loaded.examples[row].item.prompt: int(roles[row]) for row in np.flatnonzero(roles)}
    facts = {
        "examples": int((roles > 0).sum()),
        "prompts": len(prompts),
        "roles": {name: sum(used >> bit & 1 for used in prompts.values()) for bit, name in enumerate(ROLES)},
        "of": len(roles),
        "partial": seen.partial,
        "included": include,
    }
    kept = loaded.examples if include else [loaded.examples[row] for row in np.flatnonzero(roles == 0)]
    return replace(loaded, examples=kept), facts


def distinct(examples: Sequence[Example]) -> tuple[list[Conversation], list[np.ndarray]]:
    """Each distinct conversation, and of each example the rows of its responses (-1 for an invalid one)."""
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


def paired(examples: Sequence[Example]) -> tuple[list[Conversation], list[np.ndarray]]:
    """Both conversations of every example, in turn, and their rows; an example with an invalid response has none."""
    unique: list[Conversation] = []
    rows = []
    for example in examples:
        valid = [conversation for conversation in example.conversations if conversation is not None]
        complete = len(valid) == 2
        rows.append(np.arange(2) + len(unique) if complete else np.full(len(example.conversations), -1, np.int64))
        unique += valid if complete else []
    return unique, rows


def score_once(
    scorer: Scorer, conversations: Sequence[Conversation], folder: Path | None, rows: Sequence[np.ndarray] = ()
) -> Scored:
    """Score conversations: an interpretable model, or one that keeps its answers itself, in one call; others in chunks,
    each saved in `folder` when done.

    Args:
        rows: of each example, the rows of its responses, -1 for an invalid one.
    """
    if isinstance(scorer, ArmoRMScorer):
        return scorer.score(conversations, rows)
    if hasattr(scorer, "objectives") or getattr(scorer, "keeps_answers", False):
        return scorer.score(conversations)
    chunks = SavedChunks(folder, scorer.describe())
    scores: list[float] = []
    unscored: dict[int, str] = {}

    def scores_of(chunk: Sequence[Conversation]) -> dict[str, Any]:
        found = scorer.score(chunk)
        return {"scores": found.scores, "refused": found.unscored}

    with progress("scores", len(conversations), "conversations") as advance:
        for start in range(0, len(conversations), CHUNK):
            chunk = conversations[start : start + CHUNK]
            saved = chunks.get((c.key for c in chunk), partial(scores_of, chunk))
            scores += [np.nan if score is None else score for score in saved["scores"]]
            unscored |= {start + int(row): reason for row, reason in saved["refused"].items()}
            advance(len(chunk))
    return Scored(np.array(scores, np.float64), unscored, margin_scale=getattr(scorer, "margin_scale", None))


def compute_results(
    benchmark: Benchmark,
    loaded: Loaded,
    unique: Sequence[Conversation],
    rows: Sequence[np.ndarray],
    scored: Scored,
    *,
    model: Mapping[str, Any],
    sources: Sequence[str],
    seen: Mapping[str, Any] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Results:
    """Metrics and audits of scored examples.

    Args:
        unique, rows: conversations and rows of the examples, as `distinct` returns them.
        scored: scores of `unique`.
        model: description of the scorer.
        sources: names of the data.
        seen: as `leave_out_seen` returns it.
    """
    items = [example.item for example in loaded.examples]
    scores = _item_scores(rows, scored, loaded)
    measured = benchmark.of_objectives(loaded.names, loaded.raw)
    measurements = measured.measure(items, scores)
    # A baseline is not a rating: it has an order, but no error.
    ordinal = benchmark.of_objectives(loaded.names, raw=False)
    by_length = baselines.by_length(rows, lengths(unique))
    others = {"length": ordinal.measure(items, by_length)}
    others["shortest"] = ordinal.measure(items, [-values for values in by_length])
    if benchmark.rated:
        by_prompt = baselines.by_prompt(items, rows, unique, *(scored.prompts or baselines.prompt_words(unique)))
        others["prompt_only"] = measured.measure(items, by_prompt)
    else:
        others["prompt_only"] = measured.measure(items, equal_scores(items))
    if benchmark.chance is not None:
        others["chance"] = benchmark.chance(others["prompt_only"])
    clusters = Clusters.of_items([item.prompt for item in items], [item.subset for item in items])
    metrics = benchmark.metrics(measurements)
    refused = _unscored_responses(loaded.examples, rows, scored)
    pairs = LabelledPairs.of([], []) if benchmark.rated else LabelledPairs.of(items, rows)
    truncated = set(scored.truncated)
    return Results(
        benchmark=benchmark.name,
        model=model,
        data={
            "sources": list(sources),
            "fingerprint": fingerprint(items),
            "rows": len(items),
            **({"left_out": loaded.skipped} if loaded.skipped else {}),
            **({"seen": seen} if seen else {}),
        },
        counts={
            "examples": len(items),
            "prompts": len(clusters.strata),
            "conversations": len(unique),
            "refused_responses": len(refused),
            "refused_examples": len({entry["key"] for entry in refused}),
            "truncated_examples": sum(bool(truncated & set(at.tolist())) for at in rows),
            "ties": len(np.unique(pairs.item[pairs.difference(scored.scores) == 0])),
            **({} if scored.answers is None else {"answers": scored.answers[0], "unparsed": scored.answers[1]}),
        },
        metrics=_metric_results(metrics, measurements, others, clusters, resamples, seed),
        audits=run_audits(items, rows, unique, scored, pairs, clusters),
        examples=_entries(items, scores, pairs, scored, truncated, rows),
        objectives=loaded.names,
        raw=loaded.raw,
        refused=refused,
        armorm_version=__version__,
    )


def _metric_results(
    metrics: Sequence[Metric],
    measurements: Measurements,
    baselines: Mapping[str, Measurements],
    clusters: Clusters,
    resamples: int,
    seed: int,
) -> list[MetricResult]:
    """Metrics with intervals, and their values for every baseline that has the same groups."""
    ranges = intervals(metrics, measurements, clusters, resamples=resamples, seed=seed)
    own, sums = group_sums(measurements), {name: group_sums(other) for name, other in baselines.items()}
    return [
        MetricResult(
            level=metric.level,
            name=metric.name,
            value=float(metric.value(own)),
            interval=interval,
            prompts=clusters.count(metric, measurements),
            examples=len(metric.rows(measurements)),
            baselines={
                name: float(metric.value(sums[name]))
                for name, other in baselines.items()
                if all(group in other for group in metric.groups if group in measurements)
            },
            lacking=metric.lacking,
            unit=metric.unit,
        )
        for metric, interval in zip(metrics, ranges, strict=True)
    ]


def _item_scores(rows: Sequence[np.ndarray], scored: Scored, loaded: Loaded) -> list[np.ndarray]:
    """Scores of each item: one per response, or, of rated rows, one per objective."""
    padded = np.append(scored.scores, np.nan)
    if not loaded.names:
        return [padded[at] for at in rows]
    if scored.batch is None:
        return [np.full(len(loaded.names), padded[at[0]]) for at in rows]
    columns = [scored.batch.names.index(name) for name in loaded.names]
    ratings = np.concatenate([scored.ratings[:, columns], np.full((1, len(columns)), np.nan)])
    return [ratings[at[0]] for at in rows]


def _unscored_responses(
    examples: Sequence[Example], rows: Sequence[np.ndarray], scored: Scored
) -> list[dict[str, Any]]:
    entries = []
    for example, at in zip(examples, rows, strict=True):
        reasons = dict(example.faults)
        reasons |= {p: scored.unscored[int(row)] for p, row in enumerate(at) if int(row) in scored.unscored}
        file, number = example.origin
        for position, reason in sorted(reasons.items()):
            entries.append(
                {"file": file, "row": number, "key": example.item.key, "response": position, "reason": reason}
            )
    return entries


def _entries(
    items: Sequence[Item],
    scores: Sequence[np.ndarray],
    pairs: LabelledPairs,
    scored: Scored,
    truncated: set[int],
    rows: Sequence[np.ndarray],
) -> list[dict[str, Any]]:
    """One entry per example: item, scores, its smallest margin, and the objectives that decide that pair."""
    closest = pairs.closest(scored.scores)
    margins = dict(zip(closest.item.tolist(), closest.difference(scored.scores).tolist(), strict=True))
    decided: dict[int, list[dict[str, Any]]] = {}
    if scored.batch is not None:
        for item, difference in zip(closest.item, closest.difference(scored.batch.contributions), strict=True):
            found = deciding_objectives(scored.batch.names, difference)
            decided[int(item)] = [{"objective": name, "contribution": value} for name, value in found]
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
