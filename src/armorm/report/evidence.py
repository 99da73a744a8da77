"""Evidence: everything a report is made of, gathered once.

In:  a reward model, files of ratings and of preference pairs (told apart by their columns), the folder of its run.
Out: `Evidence`: evaluation results with intervals, scores with their parts, texts, and what the run has written.

A model without a run folder is reported on from the data alone; a run without data from what it has written. Every
distinct conversation goes through the backbone once, by way of a feature store.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from armorm.conversation import Conversation
from armorm.data.sources import Source, find_sources
from armorm.errors import DataError, shown
from armorm.evaluation.benchmarks.ratings import load_ratings
from armorm.evaluation.examples import Example, numbered
from armorm.evaluation.loaders import Loaded, load_pairs
from armorm.evaluation.results import Results
from armorm.evaluation.runner import distinct, evaluate
from armorm.evaluation.scorers import ArmoRMScorer, Scored

if TYPE_CHECKING:
    from armorm.reward_model import ArmoRM


@dataclass(frozen=True)
class Evidence:
    """What is known of a model.

    Attributes:
        rm: the model.
        metrics: of its run (metrics.json), empty where there is none.
        alphas: ridge penalties that the run chose from, empty where it does not say.
        files: of the data: `name`, `kind` (`ratings` or `pairs`), `rows` used.
        ratings, pairs: examples of either kind.
        names: objectives that are rated.
        left_out: rows of the data that were not used, by reason.
        results: of `ratings` and of `pairs`, where there is such data.
        conversations: all distinct ones, scored.
        rows: of each example (ratings first) the rows of its conversations, -1 where there is none.
        scored: scores and their parts; of no conversation where no data is given.
    """

    rm: ArmoRM
    metrics: dict[str, Any]
    alphas: list[float] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    ratings: list[Example] = field(default_factory=list)
    pairs: list[Example] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    results: dict[str, Results] = field(default_factory=dict)
    conversations: list[Conversation] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    scored: Scored = field(default_factory=lambda: Scored(np.empty(0)))

    @property
    def has_scores(self) -> bool:
        """Whether any conversation was scored."""
        return self.scored.parts is not None

    @property
    def known(self) -> np.ndarray:
        """Rows of the conversations that were scored."""
        return np.flatnonzero(~np.isnan(self.scored.scores))

    @property
    def prompts(self) -> np.ndarray:
        """One row of the conversations for each distinct prompt that was scored."""
        assert self.scored.parts is not None
        index = self.scored.parts.prompt_index
        return np.flatnonzero(index >= 0)[np.unique(index[index >= 0], return_index=True)[1]]

    def kind_of(self) -> list[str]:
        """Kind of each conversation: the subset that an example with its prompt names, else the file it stands in."""
        subsets: dict[str, str] = {}
        files = [""] * len(self.conversations)
        for example, at in zip([*self.ratings, *self.pairs], self.rows, strict=True):
            for row in at[at >= 0]:
                files[row] = files[row] or Path(example.origin[0]).name.partition(".")[0]
                if example.item.subset:
                    subsets.setdefault(self.conversations[row].prompt_key, example.item.subset)
        return [subsets.get(c.prompt_key, file) for c, file in zip(self.conversations, files, strict=True)]


def gather(
    rm: ArmoRM,
    data: Sequence[str | Path] = (),
    *,
    run: str | Path | None = None,
    features: str | Path | None = None,
    limit: int | None = None,
) -> Evidence:
    """Read, score and evaluate.

    Args:
        data: files, folders or hub ids of rated rows or preference pairs.
        run: folder of the run; by default the one that the model was loaded from.
        features: feature store to read and fill.
        limit: about how many examples of each kind to keep.

    Raises:
        DataError: for data that is neither, or that the model has no objective for.
    """
    folder = Path(run if run is not None else rm.name)
    metrics, alphas = _metrics(folder), _alphas(folder)
    if not data:
        return Evidence(rm, metrics, alphas)
    places: dict[str, list[str | Path]] = {"ratings": [], "pairs": []}
    for place in data:
        places[kind_of_data(find_sources([place]))].append(place)
    with tempfile.TemporaryDirectory() as temporary:
        store = Path(features) if features else Path(temporary) / "features"
        results = {
            kind: evaluate(kind, rm, chosen, features=store, limit=limit, quiet=True)
            for kind, chosen in places.items()
            if chosen
        }
        loaded = {
            "ratings": load_ratings(find_sources(places["ratings"]), rm.objectives)
            if places["ratings"]
            else Loaded([]),
            "pairs": load_pairs(find_sources(places["pairs"])) if places["pairs"] else Loaded([]),
        }
        kept = {
            kind: _kept(loaded[kind].examples, results[kind]) if kind in results else []
            for kind in ("ratings", "pairs")
        }
        unique, rows = distinct([*kept["ratings"], *kept["pairs"]])
        scored = ArmoRMScorer(rm, store).score(unique)
    counts: dict[tuple[str, str], int] = {}
    for kind, examples in kept.items():
        for example in examples:
            counts[example.origin[0], kind] = counts.get((example.origin[0], kind), 0) + 1
    return Evidence(
        rm,
        metrics,
        alphas,
        [{"name": file, "kind": kind, "rows": count} for (file, kind), count in counts.items()],
        kept["ratings"],
        kept["pairs"],
        loaded["ratings"].names,
        {**loaded["ratings"].left_out, **loaded["pairs"].left_out},
        results,
        unique,
        rows,
        scored,
    )


def kind_of_data(sources: Sequence[Source]) -> str:
    """`pairs` where the first row has a chosen and a rejected side, else `ratings`.

    Raises:
        DataError: for data without rows, or with neither conversations nor pairs.
    """
    first = next((row for source in sources for row in source.rows()), None)
    if first is None:
        raise DataError("found no rows", file=sources[0].location.name if sources else "")
    if first.values.get("chosen") is not None and first.values.get("rejected") is not None:
        return "pairs"
    if first.values.get("messages") is None and first.values.get("response") is None:
        raise first.error(
            f"found columns {shown(first.filled, 80)}, expected 'chosen' and 'rejected', or a conversation with ratings"
        )
    return "ratings"


def _kept(examples: list[Example], results: Results) -> list[Example]:
    """The examples that were evaluated: all, or those within the limit."""
    keys = {item.key for item in results.items}
    return [example for example in numbered(examples) if example.item.key in keys]


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"cannot be read: {error}", file=path) from None
    return found if isinstance(found, dict) else {}


def _alphas(folder: Path) -> list[float]:
    path = folder / "recipe.yaml"
    if not path.is_file():
        return []
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [float(alpha) for alpha in (found.get("regression") or {}).get("alphas", [])]
