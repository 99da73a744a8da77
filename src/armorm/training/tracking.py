"""Training metrics per step: metrics.jsonl always, TensorBoard and Weights & Biases if the recipe requests them.

Trackers get metrics, named `stage/metric`, and the recipe; never the text of a conversation. metrics.jsonl is replaced
as a whole at every step, so it is always valid.
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
    """Logs the metrics of a run to files in `folder` and to `report_to`; a context manager that closes the trackers.

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

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.append(json.dumps(plain({"stage": stage, "step": step, **metrics})))
        write_text(self._path, "\n".join(self._lines) + "\n")
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log({f"{stage}/{name}": value for name, value in metrics.items()} | {f"{stage}/step": step})

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
