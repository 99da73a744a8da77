"""Early stopping: how well the heads in training rank the rows of validation prompts.

The metric of a rated set is Spearman's correlation of rewards and ratings, averaged over its objectives; that of a set
of pairs is 2 x accuracy - 1. Both are 1 at best and 0 for chance, and do not depend on scales, which the heads of the
final model are fitted for anew. Their mean over the sets decides, so that a large set does not drown a small one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from armorm.correlation import spearman
from armorm.files import write_json, write_whole

LEAST_ITEMS = 10  # ratings of an objective, or pairs of a set; the metric of fewer is noise
_KEPT = 2  # best states on disk: after a kill, training may go back to a step before the newest


@dataclass(frozen=True)
class ValidationSets:
    """Rows and pairs of validation prompts, by set."""

    rows: np.ndarray  # (n,) conversations, in the order of the features that are measured
    ratings: Mapping[str, tuple[np.ndarray, np.ndarray]]  # places (r,) in `rows` and mapped ratings (r, k), NaN if none
    pairs: Mapping[str, np.ndarray]  # places (p, 2) in `rows`: chosen, rejected

    @classmethod
    def select(
        cls, rated: np.ndarray, ratings: np.ndarray, sources: Sequence[str], pairs: Mapping[str, Sequence[Any]]
    ) -> ValidationSets:
        """The sets with enough rows.

        Args:
            rated: (n,) conversations with ratings (n, k) of the sets `sources` (n,).
            pairs: (chosen, rejected) conversations by set.
        """
        kept = {name: np.array(found, np.int64) for name, found in pairs.items() if len(found) >= LEAST_ITEMS}
        rows = np.unique(np.concatenate([rated, *(found.ravel() for found in kept.values())]))
        places, names = np.searchsorted(rows, rated), np.array(sources)
        sets = {}
        for name in dict.fromkeys(sources):
            of_set = np.flatnonzero(names == name)
            enough = (~np.isnan(ratings[of_set])).sum(0) >= LEAST_ITEMS
            if enough.any():
                sets[name] = places[of_set], np.where(enough, ratings[of_set], np.nan)
        return cls(rows, sets, {name: np.searchsorted(rows, found) for name, found in kept.items()})

    def __len__(self) -> int:
        return len(self.ratings) + len(self.pairs)

    def measure(self, rewards: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """The metric of each set, -1 to 1, and their `mean`, for rewards (n, k) and pair scores (n,) of `rows`."""
        metrics = {}
        for name, (places, ratings) in self.ratings.items():
            found = []
            for column, rewarded in zip(ratings.T, rewards[places].T, strict=True):
                rated = ~np.isnan(column)
                if rated.any():
                    found.append(spearman(rewarded[rated], column[rated]))
            metrics[name] = float(np.mean(found))
        for name, places in self.pairs.items():
            margins = scores[places[:, 0]] - scores[places[:, 1]]
            metrics[f"{name} (pairs)"] = float(np.sign(margins).mean())
        return metrics | {"mean": float(np.mean([*metrics.values()]))}


@dataclass
class BestState:
    """Validations so far, and the state of the best one, in a folder; steps after a resumed one are measured again."""

    folder: Path
    patience: int
    history: list[dict[str, Any]] = field(default_factory=list)
    writes: bool = True  # one process of several

    def resume(self, step: int) -> None:
        """Forget what was measured after a step."""
        path = self.folder / "validation.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self.history = [entry for entry in known if entry["step"] <= step]

    def has(self, step: int) -> bool:
        """Whether a step was measured."""
        return any(entry["step"] == step for entry in self.history)

    @property
    def best_step(self) -> int:
        """The step of the highest mean, the first of equal ones."""
        return int(max(self.history, key=lambda entry: entry["mean"])["step"])

    @property
    def is_over(self) -> bool:
        """Whether the last `patience` validations brought no gain."""
        steps = [entry["step"] for entry in self.history]
        return bool(steps) and len(steps) - 1 - steps.index(self.best_step) >= self.patience

    def add(self, step: int, metrics: Mapping[str, float], state: Mapping[str, Any]) -> None:
        """Record a validation, and the state (tensors by name) if it is the best."""
        self.history.append({"step": step, **metrics})
        if not self.writes:
            return
        if self.best_step == step:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            write_whole(self.folder / f"best-{step}.safetensors", lambda path: save_file(tensors, path))
            found = {int(path.stem.rpartition("-")[2]): path for path in self.folder.glob("best-*.safetensors")}
            for old in sorted(found)[:-_KEPT]:
                found[old].unlink()
        write_json(self.folder / "validation.json", self.history)

    def state(self) -> dict[str, Any]:
        """Tensors of the best state."""
        return load_file(self.folder / f"best-{self.best_step}.safetensors")
