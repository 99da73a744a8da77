"""Feature files of the published scripts (RLHFlow/RLHF-Reward-Modeling)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from armorm.errors import StoreError


def read_published(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Feature files, joined in the order given.

    Returns:
        float32 arrays by tensor name: `embeddings` (n, d) with `labels` (n, k), or `embeddings` (n, 2, d) of pairs,
        chosen first, with `prompt_embeddings` (n, 2, d) or (n, d).

    Raises:
        StoreError: naming file and tensor, what was found and what was expected.
    """
    if not paths:
        raise StoreError("found no files of embeddings, expected at least one")
    parts = [_tensors(path) for path in paths]
    first = {name: array.shape[1:] for name, array in parts[0].items()}
    for path, part in zip(paths, parts, strict=True):
        found = {name: array.shape[1:] for name, array in part.items()}
        if found != first:
            raise StoreError(f"{path}: found {found} for each row, expected {first} as in {paths[0]}")
    return {name: np.concatenate([part[name] for part in parts]) for name in first}


def _tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shape = shapes.get("embeddings", ())
    if len(shape) != 2 and (len(shape) != 3 or shape[1] != 2):
        found = shape or "no such tensor"
        raise StoreError(f"{path}: tensor 'embeddings': found {found}, expected (n, d) or (n, 2, d)")
    n, d = shape[0], shape[-1]
    name = "labels" if len(shape) == 2 else "prompt_embeddings"
    other = shapes.get(name, ())
    if other not in ((n, 2, d), (n, d)) if name != "labels" else len(other) != 2 or other[0] != n:
        expected = f"({n}, k)" if name == "labels" else f"({n}, 2, {d}) or ({n}, {d})"
        raise StoreError(f"{path}: tensor '{name}': found {other or 'no such tensor'}, expected {expected}")
    for key in ("embeddings", name):
        if tensors[key].dtype not in (torch.float32, torch.bfloat16):
            raise StoreError(f"{path}: tensor '{key}': found {tensors[key].dtype}, expected float32 or bfloat16")
    return {key: tensors[key].float().numpy() for key in ("embeddings", name)}
