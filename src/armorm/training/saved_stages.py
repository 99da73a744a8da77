"""Fitted stages of a run, saved under keys of everything that decides them.

A stage is used again only if its key is the same. So a killed run resumes, and a run on changed data or settings fits
again the stages that read what has changed, and no others. `stage_keys` is the only place that says what decides a
stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from armorm.backbone.devices import resolve_device
from armorm.conversation import Conversation
from armorm.data.preferences import PreferencePair
from armorm.files import plain, read_arrays, write_arrays
from armorm.training.dataset import sides
from armorm.training.featurize import Corpus
from armorm.training.recipe import Recipe
from armorm.training.stages import RatedSplit

_plain = methodcaller("model_dump", mode="json")  # of a recipe section
Fitted = tuple[dict[str, np.ndarray], Any]
# Raise a stage's number when its code computes something else from the same inputs.
VERSIONS = {"states": 1, "finetune": 3, "regression": 2, "first_gate": 2, "joint": 2, "gate": 2, "quantiles": 1}
VERSIONS |= {"preferences": 1}


def stage_key(stage: str, *inputs: Any) -> str:
    """32 hex digits of a stage's version and inputs: arrays, JSON values, recipe sections, keys of other stages."""
    digest = blake2b(digest_size=16)
    for value in (stage, VERSIONS[stage], *inputs):
        if isinstance(value, np.ndarray):
            kind, content = f"{value.dtype.str} {value.shape}", value.tobytes()
        else:
            kind, content = "json", json.dumps(value, default=_plain, sort_keys=True).encode()
        digest.update(f"{kind} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def stage_keys(
    recipe: Recipe,
    rated: RatedSplit,
    pairs: Sequence[PreferencePair],
    reference: Sequence[Conversation],
    corpus: Corpus,
    start: np.ndarray | None,
) -> dict[str, str]:
    """The key of each stage, chained: a stage's key is made from those of the stages that it reads.

    Args:
        rated: rated rows, of which the training rows are read.
        pairs: training pairs.
        reference: reference conversations of the debiasing.
        start: weights (k, d) that stage 1 shrinks towards, of a fine-tuned backbone.
    """

    def read(conversations: Sequence[Conversation]) -> list[Any]:
        """Features by content, the prompts, and their groups, which decide the folds."""
        prompts = [conversation.prompt_key for conversation in conversations]
        return [corpus.response_keys(conversations), prompts, corpus.group_keys(conversations)]

    rows, table = rated.train_conversations, rated.table
    ratings = table.ratings[rated.train]
    settings = [recipe.regression, recipe.backbone.engine]
    if table.spreads is not None and table.raters is not None:  # several raters: weights of rows
        settings += [table.spreads[rated.train], table.raters[rated.train]]
    keys = {
        "regression": stage_key(
            "regression", corpus.store.fingerprint, *read(rows), ratings, table.objectives.to_dicts(), start, *settings
        )
    }
    debiasing = [recipe.debias, *read(reference)]
    labels = [[pair.margin, pair.source, pair.weight, pair.weak] for pair in pairs]
    gate = [*read([pair.chosen for pair in pairs]), *read([pair.rejected for pair in pairs]), labels]
    gate += [corpus.of_pairs.response_keys(list(sides(pairs)))]
    gate += [recipe.gating, recipe.seed, resolve_device(recipe.backbone.device).type]
    heads = keys["regression"]
    if recipe.preference_objectives:
        keys["preferences"] = heads = stage_key("preferences", heads, *gate, recipe.preference_objectives)
    if recipe.joint is not None:
        keys["first_gate"] = stage_key("first_gate", heads, *debiasing, *gate)
        keys["joint"] = heads = stage_key("joint", keys["first_gate"], recipe.joint)
    keys["gate"] = stage_key("gate", heads, *debiasing, *gate)
    keys["quantiles"] = stage_key("quantiles", heads, recipe.quantiles)
    return keys


@dataclass(frozen=True)
class SavedStages:
    """Fitted stages in the files of a folder."""

    folder: Path
    keys: Mapping[str, str]  # key of each stage, by name

    def get(self, name: str, fit: Callable[[], Fitted]) -> Fitted:
        """Arrays and report of a stage: the saved ones, else those of `fit`, which are then saved."""
        from safetensors import safe_open

        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
            if metadata.get("key") == self.keys[name]:
                return read_arrays(path), json.loads(metadata["report"])
            path.unlink()  # what `fit` writes beside it is then never that of another key
        arrays, report = fit()
        text = json.dumps(plain(report))
        write_arrays(path, arrays, {"key": self.keys[name], "report": text})
        return arrays, json.loads(text)
