"""Figures while a run goes on: metrics.jsonl always, TensorBoard and Weights & Biases where the recipe asks for them.

In:  a stage, a step, named figures.
Out: a line of metrics.jsonl, `{"stage", "step", ...}`, and a point in each tracker, named `stage/figure`.

`report_to` is the habit of the Hugging Face `Trainer`. Nothing of a conversation is ever sent, figures and the recipe
alone. The file is written anew at every line, whole, so that it can be read at any moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from armorm.errors import MissingExtraError
from armorm.files import plain, write_text


class Tracking:
    """Where a run's figures go; a context that closes the trackers.

    Args:
        folder: of the run; metrics.jsonl and `tensorboard/` are there.
        report_to: `tensorboard`, `wandb`.
        settings: of the run, for trackers that keep them.

    Raises:
        MissingExtraError: for a tracker that is not installed.
    """

    def __init__(self, folder: Path, report_to: Sequence[str], name: str, settings: Mapping[str, Any]) -> None:
        self._path = folder / "metrics.jsonl"
        self._lines: list[str] = []
        self._board: Any = None
        self._wandb: Any = None
        if "tensorboard" in report_to:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MissingExtraError("report_to tensorboard: not installed; pip install tensorboard") from None
            self._board = SummaryWriter(str(folder / "tensorboard"))
        if "wandb" in report_to:
            try:
                import wandb
            except ImportError:
                raise MissingExtraError("report_to wandb: not installed; pip install wandb") from None
            project = os.environ.get("WANDB_PROJECT", "armorm")
            self._wandb = wandb.init(project=project, name=name, config=dict(settings), dir=str(folder))

    def log(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """Record figures of a step."""
        self._lines.append(json.dumps(plain({"stage": stage, "step": step, **figures})))
        write_text(self._path, "\n".join(self._lines) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in figures.items()} | {f"{stage}/step": step})

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
