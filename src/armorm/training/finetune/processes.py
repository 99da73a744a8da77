"""The processes of a fine-tuning run under `torchrun` or `accelerate launch`: one for each device.

Every process has the whole model and computes its share of each optimiser step; gradients are averaged (DDP). A
recipe's `finetune.accumulation` counts the batches of a step over all processes, so the numbers are those of one
process. The first process writes all files, prints, and goes on alone after fine-tuning; the others wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from armorm.errors import FitError

PATIENCE = timedelta(days=7)  # how long a process waits for the others; torchrun ends them all if one fails


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank, count: its number, from 0, and how many there are.
        local_rank: its number on this machine, which is that of its device.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def named(cls) -> Processes:
        """Those that the environment names (RANK, WORLD_SIZE, LOCAL_RANK), else this one."""
        rank, count, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES.items())
        return cls(rank, count, local) if count > 1 else cls()

    @classmethod
    def join(cls) -> Processes:
        """As `named`, once all of them have called this: from here on they can wait for each other."""
        found = cls.named()
        if found.count > 1 and not distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(found.local_rank)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, timeout=PATIENCE)
        return found

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process, for the one that a recipe names."""
        on_gpus = self.count > 1 and torch.cuda.is_available() and not name.startswith("cpu")
        return f"cuda:{self.local_rank}" if on_gpus else name

    def steps_of(self, accumulation: int) -> int:
        """Batches of an optimiser step that this process computes, of all `accumulation`.

        Raises:
            FitError: if they cannot be divided among the processes.
        """
        if accumulation % self.count:
            raise FitError(
                f"finetune.accumulation {accumulation}: expected a multiple of the {self.count} processes, which share "
                f"the batches of each step (--set finetune.accumulation={-(-accumulation // self.count) * self.count})"
            )
        return accumulation // self.count

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            distributed.barrier()

    @contextmanager
    def first(self) -> Iterator[None]:
        """A block that the first process runs before the others, which then find its files."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        values = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
