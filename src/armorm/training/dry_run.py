"""The outlook of a run: everything that a dry run can say, with no network beyond what is cached.

In:  a recipe, hardware.
Out: `Outlook`: rows of each set (counted where the set is at hand, else the published figure), tokens (counted by
     the backbone's tokenizer where that is at hand), the cost of each stage on one device, eight, and a cluster, and
     the list of what is missing.

Nothing is loaded but tokenizer and config. Each figure says whether it was counted, sampled or assumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from armorm.backbone.chat_template import ChatTemplate
from armorm.conversation import Conversation
from armorm.data.presets import PREFERENCE_PRESETS, RATING_PRESETS, PreferencePreset, Preset
from armorm.data.sources import Location
from armorm.embedded import embedded_path
from armorm.errors import ArmormError, RecipeError
from armorm.evaluation.registry import BENCHMARKS
from armorm.training.cost import KNOWN_SHAPES, Gate, Hardware, Shape, Stage, Workload, fleets, stages
from armorm.training.dataset import TrainingData, locations, plan
from armorm.training.recipe import Recipe

SAMPLE = 2000  # conversations whose tokens are counted
ROW_TOKENS = 450  # of a conversation that is not at hand, unless the user says otherwise
CHARACTERS_A_TOKEN = 4.0  # where there is text but no tokenizer
SPREAD = 1.6  # mean of squared lengths over squared mean, where they are not at hand


@dataclass
class Outlook:
    """What is known of a run before it.

    Attributes:
        recipe: of the run.
        data: the plan, where every set is at hand.
        sets: rows of each set, and where that number comes from.
        missing: what is not at hand, and where it may be put.
        shape: of the backbone, and where that comes from.
        work: what is to be computed.
        tokens_from: how the tokens were found.
        fleets: name and stages of each fleet.
    """

    recipe: Recipe
    data: TrainingData | None
    sets: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    shape: Shape | None = None
    shape_from: str = ""
    work: Workload | None = None
    tokens_from: str = ""
    fleets: list[tuple[str, Hardware, list[Stage]]] = field(default_factory=list)


def outlook(
    recipe: Recipe, device: Hardware, *, share: float = 0.4, nodes: int = 4, row_tokens: float = ROW_TOKENS
) -> Outlook:
    """Look ahead.

    Raises:
        RecipeError, DataError: for faults of the recipe or of sets that are at hand.
    """
    found = Outlook(recipe, None)
    for place, kind, location, preset in locations(recipe):
        at_hand = location.available_offline
        known = None if at_hand else _preset(kind, preset)
        rows = known.count if known is not None else None
        found.sets.append(
            {
                "place": place,
                "set": location.name,
                "kind": kind,
                "rows": rows,
                "conversations": (rows or 0) * (2 if isinstance(known, PreferencePreset) else 1),
                "from": "at hand" if at_hand else "as stated" + (", rounded" if known and known.rounded else ""),
            }
        )
        if not at_hand:
            _note(found.missing, f"{location.name} (fetch it, or put its files below {recipe.data_root})")
    for entry in recipe.evaluation:
        if entry.benchmark in ("pairs", "ratings") or entry.data is not None:
            continue
        for hub in BENCHMARKS[entry.benchmark].published:
            if not Location.find(hub.id, Path(recipe.data_root).expanduser()).available_offline:
                _note(found.missing, f"{hub.id} ({entry.benchmark})")
    if not found.missing:
        found.data = plan(recipe)
    found.shape, found.shape_from, template = _backbone(recipe, found.missing)
    found.work, found.tokens_from = _workload(found, template, row_tokens)
    if found.shape is not None:
        section = recipe.gating
        gate = Gate(section.hidden_size, section.hidden_layers, section.steps, section.batch_size)
        weight_bytes = 4 if recipe.backbone.dtype == "float32" else 2
        found.fleets = [
            (
                name,
                fleet,
                stages(
                    found.shape,
                    found.work,
                    fleet,
                    share=share,
                    gate=gate,
                    folds=recipe.regression.folds,
                    alphas=len(recipe.regression.alphas),
                    batch_tokens=recipe.backbone.batch_tokens,
                    weight_bytes=weight_bytes,
                ),
            )
            for name, fleet in fleets(device, nodes)
        ]
    return found


def workload_of(data: TrainingData, lengths: dict[str, int], objectives: int) -> Workload:
    """The exact workload of a plan whose conversations' lengths are known.

    Args:
        lengths: tokens of each conversation by its content key.
    """
    unique = {c.key: c for c in conversations_of(data)}
    counted = [lengths[key] for key in unique if key in lengths]
    patterns = np.unique(~np.isnan(data.table.ratings[data.train_rows]), axis=0)
    return Workload(
        len(unique),
        len({c.prompt_key for c in unique.values()}),
        sum(counted),
        sum(length * length for length in counted),
        len(data.train_rows),
        len(patterns) + bool(data.computed),
        objectives,
        len(data.pairs),
    )


def conversations_of(data: TrainingData) -> Iterable[Conversation]:
    """Every conversation of a run, some more than once."""
    yield from (data.table.conversations[i] for i in (*data.train_rows, *data.test_rows))
    for pairs in (data.pairs, data.test_pairs, *(evaluation.pairs for evaluation in data.evaluations)):
        for pair in pairs:
            yield from (pair.chosen, pair.rejected)
    yield from data.reference or ()


def _note(missing: list[str], what: str) -> None:
    if what not in missing:
        missing.append(what)


def _workload(found: Outlook, template: ChatTemplate | None, row_tokens: float) -> tuple[Workload, str]:
    recipe, data = found.recipe, found.data
    if data is None:
        rated = sum(entry["rows"] or 0 for entry in found.sets if entry["kind"] == "ratings")
        pairs = sum(entry["rows"] or 0 for entry in found.sets if entry["kind"] == "pairs")
        reference = sum(entry["conversations"] for entry in found.sets if entry["kind"] == "reference")
        conversations = rated + 2 * pairs + reference
        objectives = sum(
            len(RATING_PRESETS[entry.preset].columns) if entry.preset else len(entry.objectives) + bool(entry.compute)
            for entry in recipe.ratings
        )
        tokens = conversations * row_tokens
        groups = sum(RATING_PRESETS[entry.preset].groups if entry.preset else 1 for entry in recipe.ratings)
        # Prompts are counted as if each pair and each rated row had its own: the most there can be.
        work = Workload(
            conversations,
            rated + pairs + reference,
            tokens,
            tokens * row_tokens * SPREAD,
            rated,
            groups,
            objectives,
            pairs,
        )
        return work, f"assumed: {row_tokens:g} a conversation (--row-tokens), nothing shared"
    unique = list({c.key: c for c in conversations_of(data)}.values())
    sample = unique if len(unique) <= SAMPLE else random.Random(0).sample(unique, SAMPLE)
    lengths = [_length(c, template, recipe.backbone.max_length) for c in sample]
    scale = len(unique) / max(len(sample), 1)
    objectives = len(data.table.objectives) + len(data.computed)
    exact = workload_of(data, {}, objectives)
    work = Workload(
        exact.conversations,
        exact.prompts,
        sum(lengths) * scale,
        sum(length * length for length in lengths) * scale,
        exact.rated,
        exact.groups,
        objectives,
        exact.pairs,
    )
    by = "the backbone's tokenizer" if template is not None else f"{CHARACTERS_A_TOKEN:g} characters a token"
    how = (
        "counted" if len(sample) == len(unique) else f"estimated from {len(sample):,} of {len(unique):,} conversations"
    )
    return work, f"{how} by {by}"


def _length(conversation: Conversation, template: ChatTemplate | None, most: int) -> float:
    if template is None:
        return min(sum(len(turn.content) for turn in conversation.messages) / CHARACTERS_A_TOKEN, most)
    try:
        return min(len(template.encode([conversation])[0]), most)
    except ArmormError:
        return 0.0  # it will be refused, and costs nothing


def _preset(kind: str, name: str) -> Preset | None:
    of_pairs, rated = PREFERENCE_PRESETS.get(name), RATING_PRESETS.get(name)
    if kind == "reference":
        return of_pairs or rated
    return of_pairs if kind == "pairs" else rated


def _backbone(recipe: Recipe, missing: list[str]) -> tuple[Shape | None, str, ChatTemplate | None]:
    """Shape and template from what is on this machine; the shape of a well-known backbone else."""
    from transformers import AutoConfig, AutoTokenizer

    name = recipe.backbone.model
    path = str(embedded_path(name) or name)
    options = {"revision": recipe.backbone.revision, "local_files_only": True}
    try:
        shape = Shape.of_config(AutoConfig.from_pretrained(path, **options))
        origin = "its config"
    except (OSError, ValueError, AttributeError):
        if name not in KNOWN_SHAPES:
            missing.append(f"{name} (backbone; its shape is not known here, so there is no cost)")
            return None, "", None
        shape, origin = KNOWN_SHAPES[name], "its published shape"
    try:
        return shape, origin, ChatTemplate(AutoTokenizer.from_pretrained(path, **options))
    except (OSError, ValueError, ArmormError):
        missing.append(f"{name} (backbone)")
        return shape, origin, None


def require_known_device(name: str, devices: Sequence[str]) -> None:
    """Refuse an unknown device.

    Raises:
        RecipeError: with those there are.
    """
    if name not in devices:
        raise RecipeError(f"unknown hardware {name!r}; there are {', '.join(devices)}")
