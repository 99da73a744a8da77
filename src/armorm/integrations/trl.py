"""TRL: reward functions for GRPO, RLOO and their like.

    GRPOTrainer(reward_funcs=reward_funcs(rm), ...)                                      # the score
    GRPOTrainer(reward_funcs=reward_funcs(rm, ["helpsteer-helpfulness", "code-style"]),  # one for each objective
                args=GRPOConfig(multi_objective_aggregation="normalize_then_sum"), ...)  # (GDPO)

TRL calls the functions with prompts and completions, as texts or lists of messages, and gets one number per completion.
All functions of one call share a forward pass, and the mean predicted reward of every objective is logged with TRL's
`log_metric`, as `armorm/OBJECTIVE`.

The functions of single objectives return predicted rewards (mapped scale, 0 worst and 1 best). Their sum has the length
bias that the score is corrected for; `debiased=True` returns the debiased rewards, which the gate weights
(`rewards @ T`).

`log_file=` appends a line of numbers for each scored completion, for `armorm monitor` (`monitoring/log.py`).
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np

from armorm.conversation import Conversation, prompt_messages
from armorm.errors import ConversationError, nearest
from armorm.integrations.rewards import IntegrationError, biases_of, is_client, objective_names, opened, required_list
from armorm.monitoring.log import append_samples, batch_lines

RewardFunction = Callable[..., list[Union[float, None]]]
Refused = Union[float, None, Literal["error"]]


def reward_funcs(
    model: Any,
    objectives: Sequence[str] | None = None,
    *,
    normalize: bool = False,
    debiased: bool = False,
    refused: Refused = "error",
    log_file: str | Path | None = None,
) -> RewardFunction | list[RewardFunction]:
    """Reward functions of a model.

    Args:
        model: an `ArmoRM`, a `RewardClient`, the name or folder of a model, or the URL of a server.
        objectives: objectives to return one function each for; None for a single function, the score.
        normalize: the score in standard deviations from the reference mean.
        debiased: debiased rewards of single objectives.
        refused: value of a completion that cannot be scored, such as an empty one: a number, None (TRL then ignores
            the completion), or `error`.
        log_file: log of all scored completions, with the trainer's step; the processes of a run can share it.

    Raises:
        IntegrationError: for an unknown objective, with the nearest known name, or with `debiased` for one that others
            are debiased against.
        ConversationError: when called, for a completion that cannot be scored.
    """
    source = opened(str(model)) if isinstance(model, (str, os.PathLike)) else model
    shared = _SharedPass(source, normalize, debiased, refused, log_file)
    if objectives is None:
        return shared.function("armorm", lambda found: found.scores, logs=True)
    if isinstance(objectives, str) or not objectives:
        raise IntegrationError(f"objectives: found {objectives!r}, expected a list of names, or None for the score")
    names = objective_names(source)
    functions: list[RewardFunction] = []
    for name in objectives:
        if name not in names:
            raise IntegrationError(f"unknown objective {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        if debiased and name in biases_of(source):
            raise IntegrationError(
                f"objective {name!r}: the others are debiased against it, so it has no debiased reward"
            )
        take = partial(lambda i, found: found.columns[:, i], names.index(name))
        functions.append(shared.function(name, take, logs=not functions))
    return functions


@dataclass(frozen=True)
class _Found:
    """Scores (n,) and rewards (n, k) of the completions of one call; NaN for rejected ones."""

    scores: np.ndarray
    rewards: np.ndarray
    columns: np.ndarray  # (n, k) return values of the functions of single objectives
    names: list[str]
    batch: Any = None  # the scored completions, None if there are none
    rows: Sequence[int] = ()  # the completion of each row of `batch`


class _SharedPass:
    """Scores the completions of a call once for all functions, and logs them."""

    def __init__(
        self, source: Any, normalize: bool, debiased: bool, refused: Refused, log_file: str | Path | None
    ) -> None:
        self._source, self._normalize, self._debiased, self._refused = source, normalize, debiased, refused
        self._log_file, self._calls = log_file, 0
        self._lock = threading.Lock()
        self._last: tuple[list[str], _Found] | None = None

    def function(self, name: str, take: Callable[[_Found], np.ndarray], *, logs: bool) -> RewardFunction:
        """A reward function for TRL that returns the values (n,) of `take`; one of the functions of a call logs."""
        other = None if self._refused == "error" else self._refused

        def reward(
            prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
        ) -> list[float | None]:
            found = self._found(_conversations(prompts, completions, refusals=self._refused != "error"))
            if logs and columns.get("log_metric") is not None:
                # (Every process logs every name, since TRL waits for all of them.)
                scored = ~np.isnan(found.scores)
                for metric, values in (("score", found.scores), *zip(found.names, found.rewards.T, strict=True)):
                    mean = float(values[scored].mean()) if scored.any() else math.nan
                    columns["log_metric"](f"armorm/{metric}", mean)
            if logs and self._log_file is not None:
                state = columns.get("trainer_state")
                step = self._calls if state is None else int(state.global_step)
                self._calls += 1
                if found.batch is not None:
                    lengths = found.batch.response_tokens
                    if completion_ids is not None:
                        lengths = [len(completion_ids[row]) for row in found.rows]
                    lines = batch_lines(found.batch, (repr(prompts[row]) for row in found.rows), lengths, step=step)
                    append_samples(self._log_file, lines)
            return [other if math.isnan(value) else value for value in take(found).tolist()]

        reward.__name__ = reward.__qualname__ = name
        return reward

    def _found(self, conversations: list[Conversation | None]) -> _Found:
        keys = ["" if conversation is None else conversation.key for conversation in conversations]
        with self._lock:
            if self._last is None or self._last[0] != keys:
                self._last = (keys, self._score(conversations))
            return self._last[1]

    def _score(self, conversations: list[Conversation | None]) -> _Found:
        names = objective_names(self._source)
        places = [place for place, conversation in enumerate(conversations) if conversation is not None]
        scores = np.full(len(conversations), math.nan)
        rewards = np.full((len(conversations), len(names)), math.nan)
        if not places:
            return _Found(scores, rewards, rewards, names)
        options: dict[str, Any] = {"on_refused": "error" if self._refused == "error" else "skip"}
        remote = is_client(self._source)
        if remote:
            logged = [] if self._log_file is None else ["contributions"]
            options["include"] = ["rewards", "debiased_rewards", *logged]
        batch = self._source.score([conversations[p] for p in places], normalize=self._normalize, **options)
        if len(batch.scores) + len(batch.rejected) != len(places):
            raise IntegrationError(f"found {len(batch.scores)} scores, expected {len(places)}")
        rows = [places[row] for row in batch.rows]
        scores[rows], rewards[rows] = batch.scores, batch.rewards
        columns = rewards
        if self._debiased:
            columns = rewards.copy()
            columns[rows] = batch.parts["debiased_rewards"] if remote else rewards[rows] @ self._source.transform
        return _Found(scores, rewards, columns, names, batch, rows)


def _conversations(prompts: Any, completions: Any, *, refusals: bool) -> list[Conversation | None]:
    """One conversation per completion; with `refusals`, None for an invalid one."""
    given = required_list(prompts, "prompts")
    replies = required_list(completions, "completions", len(given))
    found: list[Conversation | None] = []
    for place, (prompt, reply) in enumerate(zip(given, replies, strict=True)):
        for name, value in (("prompts", prompt), ("completions", reply)):
            if value is None:
                raise IntegrationError(f"{name}[{place}]: found None, expected text or messages")
        try:
            found.append(_conversation(prompt, reply, place))
        except ConversationError:
            if not refusals:
                raise
            _conversation(prompt, "any", place)  # an invalid prompt remains an error
            found.append(None)
    return found


def _conversation(prompt: Any, reply: Any, place: int) -> Conversation:
    if isinstance(reply, str):
        return Conversation.from_prompt(prompt, reply, f"completions[{place}]")
    return Conversation.from_messages([*prompt_messages(prompt), *reply])
