"""Files of the published scripts: features that were computed before, read as they are.

In:  one safetensors file, or several that continue each other.
Out: `Published`: embeddings with labels, or embeddings of pairs with those of their prompts, all float32.

Layouts: `embeddings` (n, d) with `labels` (n, k); or `embeddings` (n, 2, d), chosen first, with `prompt_embeddings`
(n, 2, d) or (n, d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from armorm.errors import StoreError


@dataclass(frozen=True)
class Published:
    """Attributes: embeddings (n, d) with labels (n, k), or embeddings (n, 2, d) with prompts (n, 2, d) or (n, d)."""

    embeddings: np.ndarray
    labels: np.ndarray | None = None
    prompts: np.ndarray | None = None


def read_published(paths: Sequence[Path]) -> Published:
    """Read files in the order given.

    Raises:
        StoreError: naming file, tensor, what was found and what was expected.
    """
    if not paths:
        raise StoreError("found no files of embeddings, expected at least one")
    parts = [_read(path) for path in paths]
    first = {name: array.shape[1:] for name, array in parts[0].items()}
    for path, part in zip(paths, parts, strict=True):
        found = {name: array.shape[1:] for name, array in part.items()}
        if found != first:
            raise StoreError(f"{path}: found {found} for each row, expected {first} as in {paths[0]}")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Published(whole["embeddings"], whole.get("labels"), whole.get("prompt_embeddings"))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    embeddings = tensors.get("embeddings")
    if embeddings is None or embeddings.ndim not in (2, 3) or (embeddings.ndim == 3 and embeddings.shape[1] != 2):
        found = "no such tensor" if embeddings is None else str(tuple(embeddings.shape))
        raise StoreError(f"{path}: tensor 'embeddings': found {found}, expected (n, d) or (n, 2, d)")
    n, d = embeddings.shape[0], embeddings.shape[-1]
    name = "labels" if embeddings.ndim == 2 else "prompt_embeddings"
    other = tensors.get(name)
    shape = None if other is None else tuple(other.shape)
    right = len(shape or ()) == 2 and shape[0] == n if name == "labels" and shape else shape in ((n, 2, d), (n, d))
    if other is None or not right:
        wanted = f"({n}, k)" if name == "labels" else f"({n}, 2, {d}) or ({n}, {d})"
        raise StoreError(f"{path}: tensor '{name}': found {shape or 'no such tensor'}, expected {wanted}")
    for key, tensor in (("embeddings", embeddings), (name, other)):
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise StoreError(f"{path}: tensor '{key}': found {tensor.dtype}, expected float32 or bfloat16")
    return {"embeddings": embeddings.float().numpy(), name: other.float().numpy()}
