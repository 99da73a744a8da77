"""What a run records of its rated training rows (heads/rated_record.py): origins and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from armorm.heads.rated_record import EXCERPT, RatedRecord
from armorm.heads.regression import RegressionReport
from armorm.training.dataset import group_index
from armorm.training.featurize import RatedRows
from armorm.training.schema import RegressionSection
from armorm.training.stages import RatedSplit

_WEIGHTS = "row_weights."


def row_record(
    rated: RatedSplit,
    rows: RatedRows,
    reports: Sequence[RegressionReport],
    section: RegressionSection,
    start: np.ndarray | None,
    work: Path,
) -> RatedRecord:
    """The record of the training rows.

    Args:
        rated: before objectives that are fitted to pairs are added.
        rows: its training rows, with the weights of the fit.
        reports: of the heads fitted to them.
        start: (k, d) weights that the penalty shrinks towards.
        work: the run's `work` folder.
    """
    table = rated.table.take(rated.train)
    prompts = group_index([conversation.prompt_key for conversation in table.conversations])
    _, first = np.unique(prompts, return_index=True)
    files, numbers = zip(*(table.origins or [("", 0)] * len(table)), strict=True)
    lists = {"source": table.sources, "file": files, "edit": table.edits or [""] * len(table)}
    store, inside = rows.store.folder.resolve(), work.resolve()
    return RatedRecord(
        objectives=table.objectives,
        keys=rows.keys,
        ratings=table.ratings,
        folds=rows.folds,
        prompts=prompts,
        sources=group_index(table.sources),
        files=group_index(files),
        numbers=np.array(numbers, np.int64),
        edits=group_index(lists["edit"]),
        penalties=np.array([report.alpha / section.weights.get(report.objective, 1.0) for report in reports]),
        intercept=section.intercept,
        start=np.empty((0, 0)) if start is None else start,
        prompt_texts=[table.conversations[i].prompt[-1].content[:EXCERPT] for i in first],
        response_texts=[conversation.response[:EXCERPT] for conversation in table.conversations],
        store=str(store.relative_to(inside) if store.is_relative_to(inside) else store),
        weights=_weights(rows),
        **{f"{name}_names": list(dict.fromkeys(values)) for name, values in lists.items()},
    )


def weights_to_arrays(rows: RatedRows) -> dict[str, np.ndarray]:
    """The rows' weights, as they are saved with the heads."""
    return {f"{_WEIGHTS}{column}": weights for column, weights in rows.weights.items()}


def weights_from_arrays(rows: RatedRows, arrays: Mapping[str, np.ndarray]) -> RatedRows:
    """The rows with the weights among saved arrays."""
    found = {name.removeprefix(_WEIGHTS): array for name, array in arrays.items() if name.startswith(_WEIGHTS)}
    return replace(rows, weights={int(column): array for column, array in found.items()})


def _weights(rows: RatedRows) -> np.ndarray:
    if not rows.weights:
        return np.empty((0, 0))
    weights = np.ones(rows.ratings.shape)
    for column, found in rows.weights.items():
        weights[:, column] = found
    return weights
