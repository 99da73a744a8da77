"""The bytes of a weight, for hashes: of a plain tensor, and of the tensors that a quantized one consists of."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def weight_bytes(tensor: torch.Tensor, values: int | None = None) -> Iterator[memoryview]:
    """The bytes of each plain tensor of a weight.

    Args:
        values: only so many values of each, from its start.
    """
    for part in _parts(tensor):
        yield part.detach().reshape(-1)[:values].cpu().contiguous().view(torch.uint8).numpy().data


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor itself; of a quantized one its integers and their scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names = tensor.__tensor_flatten__()[0]
    return [part for name in names for part in _parts(getattr(tensor, name))]
