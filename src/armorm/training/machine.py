"""Speed and memory of this machine, for cost estimates: a matrix product is timed for a fraction of a second."""

from __future__ import annotations

import os
import time

import torch

from armorm.backbone.decoder import resolve_dtype
from armorm.backbone.devices import resolve_device
from armorm.training.cost import Hardware

MEASURED_SHARE = (
    0.6  # of the rate of a large product that extraction reaches (0.56 to 0.78 by benchmarks/extraction.py)
)
_SIZE = 1536
_REPEATS = 4


def this_machine(dtype: str = "auto", device: str = "auto") -> Hardware:
    """The device that a recipe would run on, with the measured rate of products in its dtype.

    Raises:
        BackboneError: for an unknown device or dtype.
    """
    place = resolve_device(device)
    chosen = resolve_dtype(dtype, place)
    precision = chosen if isinstance(chosen, torch.dtype) else torch.float32
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        return Hardware(f"this machine: {properties.name}", _rate(precision, place, 8 * _SIZE), properties.total_memory)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else float("inf")
    name = f"this machine, {torch.get_num_threads()} threads"
    return Hardware(name, _rate(precision, torch.device("cpu"), _SIZE), memory)


def processor_rate() -> float:
    """float64 FLOP/s of a large product on the processor."""
    return _rate(torch.float64, torch.device("cpu"), _SIZE // 2)


def _rate(dtype: torch.dtype, device: torch.device, size: int) -> float:
    first, second = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        product = first @ second
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
