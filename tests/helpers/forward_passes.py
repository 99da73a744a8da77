"""Something that happens before each forward pass of a real model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def before_each_pass(model: torch.nn.Module, act: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `act` with the ids before each forward pass of a decoder, in the thread that runs it."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        act(kwargs["input_ids"])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
