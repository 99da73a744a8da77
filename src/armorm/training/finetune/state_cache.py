"""States of the frozen layers, computed once for every token and kept on disk.

`work/states/KEY/states.bin` is one memory-mapped array (t, d), bfloat16 by default, of the distinct tokens of all
conversations (`TokenIndex`): the states of a prompt are there once for all its responses. The key is a hash of the
weights, the token ids, the number of frozen layers, the dtype and the way of computing. `progress.json` counts the
finished batches, so a killed run goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.lower_layers import lower_states
from armorm.errors import FitError
from armorm.features.engine import keys_of
from armorm.files import write_json
from armorm.progress import progress
from armorm.training.cost import readable_bytes
from armorm.training.finetune.collator import (
    WIDTH_STEP,
    TokenIndex,
    grow_trees,
    model_inputs,
    tree_batches,
    tree_tensors,
)
from armorm.training.saved_stages import stage_key

BATCHES_PER_FLUSH = 32
_STORED = {torch.bfloat16: np.uint16, torch.float32: np.uint32}  # numpy has no bfloat16: bits are stored


@dataclass(frozen=True)
class StateCache:
    """States (t, d) of the tokens of an index after `layers` layers, read from disk when they are used."""

    index: TokenIndex
    states: torch.Tensor
    layers: int

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """States (B, t, d) of tokens (B, t) by their numbers; 0 where the number is -1."""
        found = self.states[tokens.clamp(min=0)]
        return found.masked_fill_(tokens[..., None] < 0, 0.0)


def cached_states(
    backbone: Backbone,
    encoded: Sequence[EncodedConversation],
    layers: int,
    folder: Path,
    *,
    share: bool,
    tree_tokens: int,
    batch_tokens: int,
    few_shapes: bool = False,
    autocast: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> StateCache:
    """States after the first `layers` >= 1 layers, from the folder or computed now.

    Args:
        folder: of the states; those of another key in it are removed.
        share: compute a prompt once for its responses (`reads_trees`).
        few_shapes: as in `tree_tensors`.
        autocast: compute in bfloat16 with the weights of a float32 model.
        dtype: that states are stored in.

    Raises:
        FitError: if the disk has no room for them.
    """
    key = stage_key(
        "states", backbone.fingerprint_parts, keys_of(encoded), layers, str(dtype), share, tree_tokens, batch_tokens,
        few_shapes, autocast,
    )  # fmt: skip
    index = TokenIndex.of(encoded)
    shape = index.size, backbone.hidden_size
    place = folder / key
    for other in folder.glob("*"):
        if other != place:
            shutil.rmtree(other)
    path = place / "states.bin"
    size = shape[0] * shape[1] * dtype.itemsize
    if not path.is_file():
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free
        if size > free:
            raise FitError(
                f"{place}: the states of {shape[0]:,} tokens after layer {layers} need {readable_bytes(size)}, found "
                f"{readable_bytes(free)} free; expected more, or finetune.cache_states: false"
            )
        with open(path, "wb") as file:
            file.truncate(size)
    array = np.memmap(path, _STORED[dtype], "r+", shape=shape)
    states = torch.from_numpy(array).view(dtype)
    trees = grow_trees(encoded, [(row,) for row in range(len(encoded))], tree_tokens, share=share)
    batches = tree_batches(trees, batch_tokens, seed=0, step=WIDTH_STEP if few_shapes else 1)
    done = _done(place)
    left = sum(tree.tokens for batch in batches[done:] for tree in batch)
    with progress(f"states after layer {layers} ({readable_bytes(size)})", left, "tokens") as advance:
        for number, batch in enumerate(batches[done:], done + 1):
            tensors = tree_tensors(encoded, batch, share=share, budget=batch_tokens if few_shapes else 0, index=index)
            with torch.autocast(backbone.device.type, torch.bfloat16, enabled=autocast):
                computed = lower_states(backbone.model, layers, model_inputs(tensors.inputs, backbone.model))
            real = tensors.tokens >= 0
            states[tensors.tokens[real]] = computed.cpu()[real].to(dtype)
            if number % BATCHES_PER_FLUSH == 0 or number == len(batches):
                array.flush()
                write_json(place / "progress.json", {"batches": number})
            advance(sum(tree.tokens for tree in batch))
    return StateCache(index, states, layers)


def _done(place: Path) -> int:
    """Number of batches whose states are on disk."""
    path = place / "progress.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["batches"]) if path.is_file() else 0
