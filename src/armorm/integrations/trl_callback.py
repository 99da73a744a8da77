"""TRL: a callback that watches a run while it trains (`monitoring/alarms.py`).

    rewards = reward_funcs(rm, log_file="run.jsonl")
    GRPOTrainer(reward_funcs=rewards, callbacks=[MonitorCallback(rewards)], ...)

The reward functions of all processes append to the log file; the callback of the main process reads it after every step
and adds the trainer's KL divergence and entropy. Alarms are printed as they are raised. What the trainer reports to
(`report_to`: trackio, MLflow, Weights & Biases, TensorBoard, ...) gets `armorm/warnings`, the number of warnings so
far, and `armorm/alarm/KIND`, how near each alarm is (0 no evidence, 1 an alarm), through TRL's own metrics. `armorm
monitor run.jsonl` reads the same file during or after the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from armorm.data.rows import line_rows
from armorm.integrations.rewards import IntegrationError
from armorm.integrations.trl import RewardFunction
from armorm.monitoring.alarms import Alarm
from armorm.monitoring.live import GrowingFile, LogWatch
from armorm.monitoring.log import METRICS, append_samples, metrics_line
from armorm.progress import say


class MonitorCallback(TrainerCallback):
    """Watches the log of reward functions during training.

    Args:
        rewards: what `reward_funcs` returned, with a `log_file`.
        on_alarm: called with each alarm, by default to print it to stderr.
        stop: end the training at the first warning.
        settings: of `RunWatch`: `rate`, `reference_steps`, `kl_limit`.

    Raises:
        IntegrationError: for reward functions without a log file.
    """

    def __init__(
        self, rewards: Any, *, on_alarm: Callable[[Alarm], None] | None = None, stop: bool = False, **settings: Any
    ) -> None:
        first = rewards[0] if isinstance(rewards, (list, tuple)) and rewards else rewards
        if not isinstance(first, RewardFunction) or first.log_file is None:
            raise IntegrationError("rewards: expected what reward_funcs(..., log_file=FILE) returned")
        self._function, self._path = first, Path(first.log_file)
        self._on_alarm, self._stop = on_alarm or _print, stop
        self._file, self._settings = GrowingFile(self._path), settings
        self._log = LogWatch(str(self._path), **settings)

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far, on the main process."""
        return [] if self._log.watch is None else list(self._log.watch.alarms)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out what the log already holds, unless this run goes on from a checkpoint."""
        if state.is_world_process_zero and state.global_step == 0:
            for _line in self._file.lines():
                pass

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the new samples."""
        if state.is_world_process_zero:
            self._read(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add the trainer's KL divergence and entropy to the log."""
        metrics = {name: logs[name] for name in METRICS if logs and logs.get(name) is not None}
        if state.is_world_process_zero and metrics:
            # The trainer counts a step before it logs it; the samples of the step have the number from before.
            append_samples(self._path, [metrics_line(state.global_step - 1, metrics)])
            self._read(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge the last step, and say how the run ended."""
        if state.is_world_process_zero:
            self._read(control)
            self._handle(self._log.finish(), control)
            self._file.close()
            say(self._log.state)

    def _read(self, control: Any) -> None:
        for row in line_rows(self._file.lines(), str(self._path)):
            self._handle(self._log.add(row), control)
        if self._log.watch is not None:
            closeness = {f"armorm/alarm/{kind}": value for kind, value in self._log.watch.closeness.items()}
            self._function.report({"armorm/warnings": float(len(self._log.watch.warnings)), **closeness})

    def _handle(self, alarms: list[Alarm], control: Any) -> None:
        for alarm in alarms:
            self._on_alarm(alarm)
            if self._stop and alarm.warning:
                control.should_training_stop = True


def _print(alarm: Alarm) -> None:
    say(f"armorm {'warning' if alarm.warning else 'notice'} at step {alarm.step:,.0f}: {alarm.sentence}")
