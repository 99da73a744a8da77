"""Devices by name, and copies of a network on several of them.

A name is `auto` (the first CUDA device, else the processor), `all` (every CUDA device, else the processor), a torch
device, or several of these with commas: `cuda:0,cuda:2`. Naming the processor twice gives two threads that share the
weights.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, TypeVar

import torch

from armorm.errors import BackboneError

M = TypeVar("M", bound=torch.nn.Module)


def resolve_device(name: str) -> torch.device:
    """The first of `resolve_devices`."""
    return resolve_devices(name)[0]


def resolve_devices(name: str) -> list[torch.device]:
    """The devices of a name, at least one.

    Raises:
        BackboneError: for a name that torch does not know, or a CUDA device that this machine does not have.
    """
    return [device for part in name.split(",") for device in _devices(part.strip())]


def _devices(name: str) -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in ("auto", "all"):
        return (
            [torch.device("cuda", i) for i in range(count if name == "all" else 1)] if count else [torch.device("cpu")]
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BackboneError(
            f"device {name!r}, expected auto, all, cpu, cuda, cuda:1, ..., or several with commas"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BackboneError(f"device {name!r}: this machine has {count} CUDA devices that torch can use")
    return [device]


def replica(network: M, device: torch.device) -> M:
    """A copy of a network whose weights are on another device; on the same device they are shared."""
    copies: dict[int, Any] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        moved = tensor.detach().to(device)
        copies[id(tensor)] = (
            torch.nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else moved
        )
    return copy.deepcopy(network, copies)
