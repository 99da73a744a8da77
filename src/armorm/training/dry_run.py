"""Dry run: dataset sizes, token counts and cost estimates, without loading weights or using the network.

Loads only the tokenizer and the config, and only from disk. The first row of the costs is for this machine, from a
matrix product that is timed here; the others are for GPUs, from data sheets. Every number is labelled as
counted, sampled or assumed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from armorm.backbone.chat_template import ChatTemplate
from armorm.backbone.locate import backbone_path
from armorm.backbone.model_files import CONFIG, require_sound_folder
from armorm.conversation import Conversation
from armorm.data.presets import RATING_PRESETS, PreferencePreset
from armorm.errors import ArmormError, BackboneError, RecipeError
from armorm.training.cost import KNOWN_SHAPES, Hardware, Shape, Stage, Workload, fine_tuning, fleets, stages
from armorm.training.dataset import TrainingData, read_training_data, set_locations
from armorm.training.machine import MEASURED_SHARE, processor_rate, this_machine
from armorm.training.recipe import Recipe

SAMPLE = 2000  # conversations that are tokenized to estimate the number of tokens
ROW_TOKENS = 450  # default tokens per conversation of a set that is not available
CHARACTERS_PER_TOKEN = 4.0  # without a tokenizer
LENGTH_SPREAD = 1.6  # mean squared length over squared mean length, of sets that are not available


class Lengths(NamedTuple):
    """Tokens of a conversation, and of its prompt."""

    total: float
    prompt: float


@dataclass
class DryRun:
    """What is known about a run before it starts."""

    recipe: Recipe
    data: TrainingData | None  # the training data, if every set is available offline
    sets: list[dict[str, Any]]  # number of rows of each set, and the origin of that number
    missing: list[str]  # sets and models that are not available offline
    shape: Shape | None  # the backbone's shape and its origin
    shape_from: str
    work: Workload  # the workload and how its tokens were counted
    tokens_from: str
    fleets: list[tuple[str, list[Stage]]]  # name and cost of the stages on each fleet; empty without a shape


def dry_run(
    recipe: Recipe,
    device: Hardware,
    *,
    share: float = 0.4,
    nodes: int = 4,
    row_tokens: float = ROW_TOKENS,
    strict: bool = False,
) -> DryRun:
    """Estimate the size and cost of a run.

    Args:
        share: assumed fraction of the device's peak FLOP/s.
        nodes: machines of the Ray cluster in the cost table.
        row_tokens: assumed tokens per conversation of sets that are not available.
        strict: as of `read_training_data`.

    Raises:
        RecipeError, DataError: for faults of the recipe or of the available sets.
    """
    sets, missing = [], []
    for place, kind, location, preset in set_locations(recipe):
        available = location.available_offline
        if not available:
            missing.append(f"{location.name} (fetch it, or put its files below {recipe.data_root})")
        if kind == "evaluation":
            continue
        rows = preset.count if preset is not None and not available else None
        published = "published size" + (", rounded" if preset and preset.rounded else "")
        sets.append(
            {
                "place": place,
                "set": location.name,
                "kind": kind,
                "rows": rows,
                "conversations": (rows or 0) * (2 if isinstance(preset, PreferencePreset) else 1),
                "from": "available offline" if available else published,
            }
        )
    missing = list(dict.fromkeys(missing))
    data = None if missing else read_training_data(recipe, strict=strict)
    shape, shape_from, template = _backbone(recipe, missing)
    if data is None:
        work = _assumed_workload(recipe, sets, row_tokens)
        tokens_from = f"assumed: {row_tokens:g} per conversation (--row-tokens), no shared prompts"
    else:
        work, tokens_from = _sampled_workload(recipe, data, template)
    cost = partial(
        stages,
        work=work,
        share=share,
        gate=recipe.gating,
        folds=recipe.regression.folds,
        alphas=len(recipe.regression.alphas),
        batch_tokens=recipe.backbone.batch_tokens,
        weight_bytes=4 if recipe.backbone.dtype == "float32" else 2,
    )
    costs = []
    if shape:
        here = this_machine(recipe.backbone.dtype, recipe.backbone.device)
        costs.append((here.name, cost(shape, hardware=here, share=MEASURED_SHARE, host_rate=processor_rate())))
        costs += [(name, cost(shape, hardware=fleet)) for name, fleet in fleets(device, nodes)]
    if shape and recipe.finetune:
        local = fine_tuning(shape, work, here, recipe.finetune, share=MEASURED_SHARE)
        tuned = fine_tuning(shape, work, device, recipe.finetune, share=share)
        costs = [(name, [*parts, local if name == here.name else tuned]) for name, parts in costs]
    return DryRun(recipe, data, sets, missing, shape, shape_from, work, tokens_from, costs)


def workload_of(data: TrainingData, lengths: Mapping[str, Lengths]) -> Workload:
    """The exact workload of data whose conversation lengths are known; a prompt is computed once for its responses.

    Args:
        lengths: tokens of each conversation by its content key.
    """
    conversations = data.conversations()
    shared = Counter(c.prompt_key for c in conversations)
    counted = [(lengths[c.key], shared[c.prompt_key]) for c in conversations if c.key in lengths]
    patterns = np.unique(~np.isnan(data.table.ratings[data.train_rows]), axis=0)
    return Workload(
        conversations=len(conversations),
        prompts=len(shared),
        tokens=sum(length.total - length.prompt * (1 - 1 / times) for length, times in counted),
        squares=sum(length.total**2 - length.prompt**2 * (1 - 1 / times) for length, times in counted),
        rated=len(data.train_rows),
        groups=len(patterns) + bool(data.computed),
        objectives=len(data.table.objectives) + len(data.computed),
        pairs=len(data.pairs),
    )


def _assumed_workload(recipe: Recipe, sets: Sequence[dict[str, Any]], row_tokens: float) -> Workload:
    """The workload by the published sizes of the sets; every pair and every rated row is given a prompt of its own."""
    rated, pairs = (sum(entry["rows"] or 0 for entry in sets if entry["kind"] == kind) for kind in ("ratings", "pairs"))
    reference = sum(entry["conversations"] for entry in sets if entry["kind"] == "reference")
    conversations = rated + 2 * pairs + reference
    for entry in recipe.ratings:
        if entry.constructed:  # (a good reply is mostly a conversation that is there already)
            replies = sum(source.rows or entry.construct_rows for source in entry.from_)
            conversations += replies * entry.variants
            rated += replies * (1 + entry.variants)
    presets = [RATING_PRESETS[entry.preset] for entry in recipe.ratings if entry.preset]
    others = [entry for entry in recipe.ratings if not entry.preset]
    return Workload(
        conversations=conversations,
        prompts=rated + pairs + reference,
        tokens=conversations * row_tokens,
        squares=conversations * row_tokens**2 * LENGTH_SPREAD,
        rated=rated,
        groups=sum(preset.groups for preset in presets) + len(others),
        objectives=sum(len(preset.columns) for preset in presets)
        + sum(len(entry.objectives) + (not entry.reads_rows) for entry in others),
        pairs=pairs,
    )


def _sampled_workload(recipe: Recipe, data: TrainingData, template: ChatTemplate | None) -> tuple[Workload, str]:
    conversations = data.conversations()
    sample = conversations if len(conversations) <= SAMPLE else random.Random(0).sample(conversations, SAMPLE)
    lengths = {c.key: _lengths(c, template, recipe.backbone.max_length) for c in sample}
    scale = len(conversations) / max(len(sample), 1)
    work = workload_of(data, lengths)
    requested = sum(length.total for length in lengths.values()) * scale
    by = "the backbone's tokenizer" if template is not None else f"{CHARACTERS_PER_TOKEN:g} characters per token"
    complete = len(sample) == len(conversations)
    how = "counted" if complete else f"estimated from {len(sample):,} of {len(conversations):,} conversations"
    how = f"{requested:,.0f} without shared prompts; {how} by {by}"
    return replace(work, tokens=work.tokens * scale, squares=work.squares * scale), how


def _lengths(conversation: Conversation, template: ChatTemplate | None, most: int) -> Lengths:
    if template is None:
        *prompt, response = (len(turn.content) / CHARACTERS_PER_TOKEN for turn in conversation.messages)
        return Lengths(min(sum(prompt) + response, most), min(sum(prompt), most))
    try:
        encoded = template.encode([conversation])[0]
    except ArmormError:
        return Lengths(0, 0)  # it will be rejected
    response = len(encoded) - encoded.gate_position - 1
    return Lengths(min(len(encoded), most), max(0, min(len(encoded), most) - response))


def _backbone(recipe: Recipe, missing: list[str]) -> tuple[Shape | None, str, ChatTemplate | None]:
    """Shape, its origin, and chat template from local files; the shape may also be that of a known backbone."""
    from transformers import AutoConfig, AutoTokenizer

    name = recipe.backbone.model
    path = backbone_path(name, recipe.backbone.revision)
    if (Path(path) / CONFIG).is_file():
        require_sound_folder(Path(path), BackboneError)
    options = {"revision": recipe.backbone.revision, "local_files_only": True}
    try:
        shape = Shape.of_config(AutoConfig.from_pretrained(path, **options))
        origin = "its config"
    except (OSError, ValueError, AttributeError):
        if name not in KNOWN_SHAPES:
            missing.append(f"{name} (backbone; its shape is unknown, so no cost is estimated)")
            return None, "", None
        shape, origin = KNOWN_SHAPES[name], "its published shape"
    shape = shape.read(recipe.backbone.layer, recipe.backbone.pooling)
    try:
        return shape, origin, ChatTemplate(AutoTokenizer.from_pretrained(path, **options))
    except (OSError, ValueError, ArmormError):
        missing.append(f"{name} (backbone)")
        return shape, origin, None


def require_known_device(name: str, devices: Sequence[str]) -> None:
    """Raise RecipeError for an unknown device, naming the known ones."""
    if name not in devices:
        raise RecipeError(f"unknown hardware {name!r}, expected one of {', '.join(devices)}")
