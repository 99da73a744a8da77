"""The record of the rated rows that a run's heads were fitted on: `work/rated_rows.safetensors`.

A run's feature store has features by content alone. The record adds, for each training row in its order, the key of its
features, its ratings, prompt, set, file, row number and the start of its texts, and how stage 1 was fitted (penalties,
intercept, start). So a question about rows needs the run's `work` folder and neither its data nor its recipe.

Sums of rows are made anew from the features, in float64: the products of those that a run saves are float32, and where
the penalty is small relative to the largest eigenvalue, rewards by them are off by more than the effect of many a row.

The record has the key of stage 1 (training/saved_stages.py), which `regression.safetensors` has too: a record of other
rows is rejected. Texts are cut to `EXCERPT` characters, so the record has about 1 KB a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from armorm.errors import StoreError
from armorm.features.store import FeatureStore
from armorm.files import read_arrays, write_arrays
from armorm.heads.influence import FittedRidge
from armorm.heads.statistics import Moments
from armorm.objectives import ObjectiveSet
from armorm.progress import Advance, ignore

FILE = "rated_rows.safetensors"
EXCERPT = 400  # characters of a text
BLOCK_ROWS = 4096
_ARRAYS = ("ratings", "folds", "prompts", "sources", "files", "numbers", "edits", "penalties", "start", "weights")
_LISTS = ("source_names", "file_names", "edit_names", "prompt_texts", "response_texts")


@dataclass(frozen=True)
class RatedRecord:
    """n rated rows, m distinct prompts, k objectives.

    Attributes:
        objectives: (k,).
        keys: (n,) keys of the response features in the store.
        ratings: (n, k) raw, NaN where missing.
        folds: (n,) fold of each row in stage 1.
        prompts, sources, files, edits: (n,) indices into the lists below.
        numbers: (n,) row number in the file.
        penalties: (k,) alpha of each objective, divided by its weight in the recipe.
        intercept: whether stage 1 has one.
        start: (k, d) weights that the penalty shrinks towards, of a fine-tuned backbone; (0, 0) if zero.
        prompt_texts: (m,) start of the last turn of the prompt.
        response_texts: (n,) start of the response.
        source_names, file_names, edit_names: sets, files, and edits of constructed rows ('' for none).
        store: folder of the feature store, relative to the run's `work` if it is inside.
        weights: (n, k) of the squared errors of each row (heads/rater_weights.py); (0, 0) if all are 1.
    """

    objectives: ObjectiveSet
    keys: np.ndarray
    ratings: np.ndarray
    folds: np.ndarray
    prompts: np.ndarray
    sources: np.ndarray
    files: np.ndarray
    numbers: np.ndarray
    edits: np.ndarray
    penalties: np.ndarray
    intercept: bool
    start: np.ndarray
    prompt_texts: Sequence[str]
    response_texts: Sequence[str]
    source_names: Sequence[str]
    file_names: Sequence[str]
    edit_names: Sequence[str]
    store: str
    weights: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    def __len__(self) -> int:
        return len(self.keys)

    def save(self, path: Path, key: str) -> None:
        """Write the record; `key` is that of stage 1."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["keys"] = np.ascontiguousarray(self.keys).view(np.uint8).reshape(len(self), -1)
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        arrays["lists"] = np.frombuffer(json.dumps(lists).encode(), np.uint8)
        settings = {"intercept": self.intercept, "store": self.store, "objectives": self.objectives.to_dicts()}
        write_arrays(path, arrays, {"key": key, "settings": json.dumps(settings)})

    def describe(self, row: int) -> dict[str, Any]:
        """Where a row is from and what it says, for people and JSON."""
        edit = self.edit_names[self.edits[row]]
        return {
            "source": self.source_names[self.sources[row]],
            "file": self.file_names[self.files[row]],
            "row": int(self.numbers[row]),
            **({"edit": edit} if edit else {}),
            "prompt": self.prompt_texts[self.prompts[row]],
            "response": self.response_texts[row],
        }


@dataclass(frozen=True)
class RatedRun:
    """A finished run: the record of its rows and their features.

    Attributes:
        folder: of the run.
        weight: (k, d) float32 heads of the rated objectives, as stage 1 ended.
    """

    folder: Path
    record: RatedRecord
    store: FeatureStore
    weight: np.ndarray

    @classmethod
    def open(cls, folder: str | Path) -> RatedRun:
        """The run in a folder.

        Raises:
            StoreError: for a folder without the record, the fitted stage or the features, in one line.
        """
        from safetensors import SafetensorError, safe_open

        folder = Path(folder)
        path, fitted = folder / "work" / FILE, folder / "work" / "regression.safetensors"
        if not fitted.is_file():
            raise StoreError(f"{folder}: no work/{fitted.name}; expected the folder of a training run with its work/")
        if not path.is_file():
            again = f"armorm train {folder / 'recipe.yaml'} --output {folder}"
            raise StoreError(f"{folder}: no work/{FILE}; `{again}` writes it, from the features that are there")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
            with safe_open(fitted, framework="np") as file:
                if (file.metadata() or {}).get("key") != metadata["key"]:
                    raise StoreError(f"{path}: is of other rows than {fitted.name}; train into this folder again")
                weight = file.get_tensor("weight")
            values: dict[str, Any] = read_arrays(path)
            values |= json.loads(values.pop("lists").tobytes())
            settings = json.loads(metadata["settings"])
            keys = values.pop("keys")
            record = RatedRecord(
                objectives=ObjectiveSet.from_dicts(settings["objectives"]),
                keys=keys.reshape(-1).view(f"S{keys.shape[1]}"),
                intercept=settings["intercept"],
                store=settings["store"],
                **values,
            )
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path}: damaged record of rated rows ({error})") from None
        store = FeatureStore.existing(folder / "work" / record.store)
        if missing := len(store.missing(record.keys)):
            raise StoreError(f"{store.folder}: lacks the features of {missing:,} of {len(record):,} rated rows")
        return cls(folder, record, store, weight)

    def row_sets(self, columns: Sequence[int]) -> list[list[int]]:
        """Columns by the set of rows that rate them, and their weights; these share a decomposition."""
        found: dict[bytes, list[int]] = {}
        for column in columns:
            rated = ~np.isnan(self.record.ratings[:, column])
            name = np.packbits(rated).tobytes() + self.roots([column], np.flatnonzero(rated)).tobytes()
            found.setdefault(name, []).append(column)
        return list(found.values())

    def sums(self, columns: Sequence[int], advance: Advance = ignore) -> dict[int, Moments]:
        """Float64 sums of the rows that rate the columns, one of `row_sets`, by set of rows (index of its name)."""
        found: dict[int, Moments] = {}
        for here, features, ratings in self.blocks(columns):
            for source in np.unique(self.record.sources[here]).tolist():
                own = self.record.sources[here] == source
                part = sum_of_rows(features[own], ratings[own], self.roots(columns, here[own]))
                found[source] = found[source] + part if source in found else part
            advance(len(here))
        return found

    def fitted(self, columns: Sequence[int], total: Moments) -> FittedRidge:
        """The heads of the columns, from the sums of all their rows."""
        return FittedRidge.of(total, self.record.penalties[list(columns)], self.record.intercept)

    def rated(self, columns: Sequence[int]) -> np.ndarray:
        """Rows (r,) that rate an objective set of `row_sets`."""
        return np.flatnonzero(~np.isnan(self.record.ratings[:, columns[0]]))

    def roots(self, columns: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """Roots (b,) of the rows' weights in the fit of the columns, one of `row_sets`: a row that is multiplied by its
        root, rating and feature, counts by its weight."""
        weights = self.record.weights
        roots: np.ndarray = np.sqrt(weights[rows, columns[0]]) if weights.size else np.ones(len(rows))
        return roots

    def blocks(self, columns: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows (b,) that rate the columns, their features (b, d) float32, and mapped ratings (b, j) minus the
        predictions of `start`; near the order of the store, with all rows of a prompt in one block."""
        record, rows = self.record, self.rated(columns)
        place = np.empty(len(rows), np.int64)
        place[self.store.order(record.keys[rows])] = np.arange(len(rows))
        first = np.full(len(record.prompt_texts), len(rows))
        np.minimum.at(first, record.prompts[rows], place)
        order = np.lexsort((place, first[record.prompts[rows]]))
        ends = np.flatnonzero(np.diff(record.prompts[rows[order]], append=-1)) + 1
        start, mapped = 0, record.objectives.to_reward(record.ratings)[:, list(columns)]
        while start < len(rows):
            end = ends[
                max(np.searchsorted(ends, start + BLOCK_ROWS, "right") - 1, np.searchsorted(ends, start, "right"))
            ]
            here = rows[order[start:end]]
            features, ratings = self.store.responses(record.keys[here]), mapped[here]
            if record.start.size:
                ratings = ratings - features.astype(np.float64) @ record.start[list(columns)].T
            yield here, features, ratings
            start = end


def sum_of_rows(features: np.ndarray, ratings: np.ndarray, roots: np.ndarray | None = None) -> Moments:
    """Sums of features (b, d) and ratings (b, j), all products in float64.

    Args:
        roots: (b,) of the rows' weights, by default 1.
    """
    roots = np.ones(len(features)) if roots is None else roots
    x, r = roots[:, None] * features.astype(np.float64), roots[:, None] * ratings
    return Moments(len(x), x.T @ x, roots @ x, x.T @ r, roots @ r, r.T @ r, float(roots @ roots))
