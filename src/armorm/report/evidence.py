"""Evidence: the data behind a report (scores with their columns, evaluation results, metrics of the training run).

A model without a run folder is reported on from the data alone; a run without data from what it has written. Every
distinct conversation is scored once.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from armorm.conversation import Conversation
from armorm.data.layout_detection import LAYOUTS
from armorm.data.rows import Row
from armorm.data.sources import Location, Source, find_sources
from armorm.errors import DataError
from armorm.evaluation.audits.perturbation import ROWS, perturb, perturbation_audit
from armorm.evaluation.benchmarks import find_benchmark
from armorm.evaluation.benchmarks.base import Loaded
from armorm.evaluation.examples import Example, LabelledPairs
from armorm.evaluation.results import Results
from armorm.evaluation.runner import compute_results, distinct, leave_out_seen, load_examples, score_once
from armorm.evaluation.scorer import Scored
from armorm.evaluation.scorers import ArmoRMScorer
from armorm.files import read_text, read_yaml

if TYPE_CHECKING:
    from armorm.reward_model import ArmoRM


@dataclass(frozen=True)
class Evidence:
    """Data behind the report of a model."""

    rm: ArmoRM
    metrics: dict[str, Any]  # of its run (metrics.json), empty if none
    alphas: list[float] = field(default_factory=list)  # ridge penalties that the run chose from, empty if unknown
    # Examples of either kind, with counts of skipped rows; `ratings.names` are the rated objectives.
    ratings: Loaded = field(default_factory=Loaded)
    pairs: Loaded = field(default_factory=Loaded)
    seen: dict[str, dict[str, Any]] = field(default_factory=dict)  # by kind, as `runner.leave_out_seen` returns it
    results: dict[str, Results] = field(default_factory=dict)  # by kind (`ratings`, `pairs`)
    conversations: list[Conversation] = field(default_factory=list)  # distinct
    # Of each example (ratings first) the rows of its conversations, -1 for an invalid one.
    rows: list[np.ndarray] = field(default_factory=list)
    scored: Scored = field(default_factory=lambda: Scored(np.empty(0)))  # of the conversations
    perturbations: dict[str, Any] = field(default_factory=dict)  # as `perturbation_audit` returns it, empty if none

    @property
    def examples(self) -> list[Example]:
        """Ratings, then pairs."""
        return [*self.ratings.examples, *self.pairs.examples]

    @property
    def files(self) -> list[dict[str, Any]]:
        """`name`, `kind` (`ratings` or `pairs`) and number of `rows` of each file."""
        counts = Counter(
            (example.origin[0], kind)
            for kind, loaded in (("ratings", self.ratings), ("pairs", self.pairs))
            for example in loaded.examples
        )
        return [{"name": name, "kind": kind, "rows": count} for (name, kind), count in counts.items()]

    @property
    def known(self) -> np.ndarray:
        """Rows of the conversations that were scored."""
        return np.flatnonzero(~np.isnan(self.scored.scores))

    def prompt_kinds(self) -> list[str]:
        """Kind of prompt of each conversation: the subset of an example with that prompt, otherwise its file."""
        subsets: dict[str, str] = {}
        files = [""] * len(self.conversations)
        for example, at in zip(self.examples, self.rows, strict=True):
            for row in at[at >= 0]:
                files[row] = files[row] or Path(example.origin[0]).name.partition(".")[0]
                if example.item.subset:
                    subsets.setdefault(self.conversations[row].prompt_key, example.item.subset)
        return [subsets.get(c.prompt_key, file) for c, file in zip(self.conversations, files, strict=True)]


def gather(
    rm: ArmoRM,
    data: Sequence[Any] = (),
    *,
    run: str | Path | None = None,
    features: str | Path | None = None,
    limit: int | None = None,
    include_seen: bool = False,
    perturbations: int = ROWS,
    strict: bool = False,
) -> Evidence:
    """Read, score and evaluate.

    Args:
        data: files, folders or hub ids of rated rows or preference pairs.
        run: folder of the run; by default the one that the model was loaded from.
        features: feature store to read and fill.
        limit: approximate number of examples of each kind.
        include_seen: evaluate also on prompts that the model was trained on.
        perturbations: responses that each edit of the perturbation audit is applied to; 0 for no such audit.
        strict: as of `load_examples`.

    Raises:
        DataError: for data of neither kind, or without ratings of the model's objectives.
    """
    evidence = Evidence(rm, *_of_run(Path(run if run is not None else rm.name)))
    if not data:
        return evidence
    places: dict[str, list[Any]] = {"ratings": [], "pairs": []}
    for place in data:
        places[kind_of_data(find_sources([place]))].append(place)
    loaded = dict.fromkeys(places, Loaded())
    seen: dict[str, dict[str, Any]] = {}
    for kind, chosen in places.items():
        if chosen:
            examples = load_examples(find_benchmark(kind), find_sources(chosen), limit, rm.objectives, strict=strict)
            loaded[kind], seen[kind] = leave_out_seen(examples, rm.seen, include=include_seen)
    conversations, rows = distinct([*loaded["ratings"].examples, *loaded["pairs"].examples])
    with tempfile.TemporaryDirectory() as temporary:
        scorer = ArmoRMScorer(rm, Path(features) if features else Path(temporary) / "features")
        scored = scorer.score(conversations)
        audited = {}
        if perturbations:
            worse = _only_worse(loaded["pairs"], rows[len(loaded["ratings"].examples) :])
            perturbed = perturb([c for row, c in enumerate(conversations) if row not in worse], perturbations)
            edited = score_once(scorer, perturbed.conversations, None, perturbed.compared)
            audited = perturbation_audit(perturbed, edited, rm.reference.get("score_std"))
    index = {conversation.key: row for row, conversation in enumerate(conversations)}
    results = {}
    for kind, chosen in places.items():
        if loaded[kind].examples:
            unique, own_rows = distinct(loaded[kind].examples)
            own = scored.take(np.array([index[conversation.key] for conversation in unique], np.int64))
            sources, model = [Location.find(place).name for place in chosen], scorer.describe()
            results[kind] = compute_results(
                find_benchmark(kind), loaded[kind], unique, own_rows, own, model=model, sources=sources, seen=seen[kind]
            )
    found: dict[str, Any] = {**loaded, "seen": seen, "results": results, "conversations": conversations}
    return replace(evidence, **found, rows=rows, scored=scored, perturbations=audited)


def _only_worse(pairs: Loaded, rows: Sequence[np.ndarray]) -> set[int]:
    """Rows of responses that are the worse one of every pair that they occur in."""
    found = LabelledPairs.of([example.item for example in pairs.examples], rows)
    return set(found.worse.tolist()) - set(found.better.tolist())


def kind_of_data(sources: Sequence[Source]) -> str:
    """`pairs` if the first row has a chosen and a rejected side, else `ratings`.

    Raises:
        DataError: for data without rows, or whose first row is neither a conversation nor a pair.
    """
    rows = (row for source in sources for row in source.location.rows_or_faults())
    first = next((row for row in rows if isinstance(row, Row)), None)
    if first is None:
        raise DataError("found no rows", file=sources[0].location.name if sources else "")
    if first.kind == "conversations" and not {"messages", "response"} & set(first.values):
        raise first.layout_error([*LAYOUTS[:2], LAYOUTS[3]])
    return "pairs" if first.kind == "pairs" else "ratings"


def _of_run(folder: Path) -> tuple[dict[str, Any], list[float]]:
    """Metrics and ridge penalties of a run, empty without its files."""
    path, recipe = folder / "metrics.json", folder / "recipe.yaml"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path = recipe
        sections = read_yaml(read_text(recipe)) if recipe.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"cannot be read: {error}", file=path) from None
    alphas = (sections.get("regression") or {}).get("alphas", [])
    return metrics if isinstance(metrics, dict) else {}, [float(alpha) for alpha in alphas]
