"""TRL: reward functions for GRPO, RLOO and their like.

    GRPOTrainer(reward_funcs=reward_funcs(rm), ...)                                      # the score
    GRPOTrainer(reward_funcs=reward_funcs(rm, ["helpsteer-helpfulness", "code-style"]),  # one for each objective
                args=GRPOConfig(multi_objective_aggregation="normalize_then_sum"), ...)  # (GDPO)
    AsyncGRPOTrainer(reward_funcs=reward_funcs("http://host:8008", asynchronous=True), ...)

TRL calls the functions with prompts and completions, as texts or lists of messages, and gets one number per completion.
All functions of one call share a forward pass, or a request. With TRL's `log_metric` the mean score, reward and
contribution of every objective are logged (`armorm/score`, `armorm/OBJECTIVE`, `armorm/contribution/OBJECTIVE`) and the
share of completions without a score (`armorm/unscored`); with `log_extra` the table of completions gets the largest
contributions of each.

The functions of single objectives return predicted rewards (mapped scale, 0 worst and 1 best). Their sum has the length
bias that the score is corrected for; `debiased=True` returns the debiased rewards, which the gate weights
(`rewards @ T`).

Functions of a model given by its name, folder or URL can be pickled, which `experimental.async_grpo` needs: its child
process opens the model again, on the CPU.

`log_file=` appends a line of numbers for each scored completion, for `armorm monitor` (`monitoring/log.py`) and for the
callback that watches the run (`trl_callback.py`).
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np

from armorm.conversation import Conversation, Message, prompt_messages
from armorm.errors import ConversationError, nearest
from armorm.integrations.rewards import (
    SERVED_PARTS,
    IntegrationError,
    biases_of,
    debiased_rewards,
    is_client,
    objective_names,
    opened,
    required_list,
    served_client,
)
from armorm.monitoring.log import append_samples, batch_lines

Refused = Union[float, None, Literal["error"]]

_KEPT_CALLS = 16  # groups that a trainer scores concurrently
_SHOWN_CONTRIBUTIONS = 3


def reward_funcs(
    model: Any,
    objectives: Sequence[str] | None = None,
    *,
    normalize: bool = False,
    debiased: bool = False,
    refused: Refused = "error",
    log_file: str | Path | None = None,
    asynchronous: bool = False,
) -> Any:
    """Reward functions of a model.

    Args:
        model: an `ArmoRM`, a `RewardClient`, the name or folder of a model, or the URL of a server.
        objectives: objectives to return one function each for; None for a single function, the score.
        normalize: the score in standard deviations from the reference mean.
        debiased: debiased rewards of single objectives.
        refused: value of a completion that cannot be scored, such as an empty one: a number, None (TRL then ignores
            the completion), or `error`. A rollout that ends in a tool's turn or has an image part is never an error:
            with `error` its reward is None.
        log_file: log of all scored completions, with the trainer's step; the processes of a run can share it.
        asynchronous: functions that do not wait for the server, which scores several groups at once; for a URL.

    Returns:
        A `RewardFunction` or a list of them, one for each objective; `AsyncRewardFunction` if asynchronous.

    Raises:
        IntegrationError: for an unknown objective, with the nearest known name, with `debiased` for one that others
            are debiased against, or with `asynchronous` for a model that is no URL.
        ConversationError: when called, for a completion that cannot be scored.
    """
    source = str(model) if isinstance(model, (str, os.PathLike)) else model
    if asynchronous and not (isinstance(source, str) and source.startswith(("http://", "https://"))):
        raise IntegrationError(f"asynchronous: found {type(model).__name__}, expected the URL of a server")
    shared = _SharedPass(source, normalize, debiased, refused, log_file)
    kind = AsyncRewardFunction if asynchronous else RewardFunction
    if objectives is None:
        return kind(shared, "armorm", None, logs=True)
    if isinstance(objectives, str) or not objectives:
        raise IntegrationError(f"objectives: found {objectives!r}, expected a list of names, or None for the score")
    names, biases = objective_names(shared.source), biases_of(shared.source)
    for name in objectives:
        if name not in names:
            raise IntegrationError(f"unknown objective {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        if debiased and name in biases:
            raise IntegrationError(
                f"objective {name!r}: the others are debiased against it, so it has no debiased reward"
            )
    return [kind(shared, name, names.index(name), logs=index == 0) for index, name in enumerate(objectives)]


@dataclass(frozen=True)
class _Found:
    """Scores (n,) and rewards (n, k) of the completions of one call; NaN for those without a score."""

    scores: np.ndarray
    rewards: np.ndarray
    columns: np.ndarray  # (n, k) return values of the functions of single objectives
    contributions: np.ndarray
    names: list[str]
    batch: Any = None  # the scored completions, None if there are none
    rows: Sequence[int] = ()  # the completion of each row of `batch`


class RewardFunction:
    """A reward function for TRL; its name is `armorm` or the objective's.

    Args:
        shared: the pass that the functions of a model share.
        name: by which TRL logs the rewards.
        objective: index of the objective, None for the score.
        logs: whether this function logs for all that share the pass.
    """

    def __init__(self, shared: _SharedPass, name: str, objective: int | None, *, logs: bool) -> None:
        self.__name__ = self.__qualname__ = name
        self._shared, self._objective, self._logs = shared, objective, logs

    @property
    def log_file(self) -> str | Path | None:
        """The log of all scored completions."""
        return self._shared.log_file

    def report(self, metrics: Mapping[str, float]) -> None:
        """Give TRL further metrics, with those of the next call."""
        self._shared.reported = dict(metrics)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> Any:
        """Rewards of n completions, a list of numbers or None; `columns` are TRL's other arguments."""
        found = self._shared.score(self._shared.conversations(prompts, completions))
        return self._finished(found, prompts, completion_ids, columns)

    def _finished(
        self, found: _Found, prompts: Sequence[Any], completion_ids: Any, columns: Mapping[str, Any]
    ) -> list[float | None]:
        if self._logs:
            self._shared.log(found, prompts, completion_ids, columns)
        values = found.scores if self._objective is None else found.columns[:, self._objective]
        return [self._shared.unscored if math.isnan(value) else value for value in values.tolist()]


class AsyncRewardFunction(RewardFunction):
    """A `RewardFunction` to await, which leaves the event loop free while the server scores."""

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        """As `RewardFunction.__call__`."""
        found = await self._shared.score_served(self._shared.conversations(prompts, completions))
        return self._finished(found, prompts, completion_ids, columns)


class _SharedPass:
    """Scores the completions of a call once for all functions, and logs them."""

    def __init__(
        self, source: Any, normalize: bool, debiased: bool, refused: Refused, log_file: str | Path | None
    ) -> None:
        self._given, self._normalize, self._debiased, self._refused = source, normalize, debiased, refused
        self.log_file, self._calls = log_file, 0
        self.reported: dict[str, float] = {}  # further metrics for TRL
        self.unscored = None if refused == "error" else refused
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._done: OrderedDict[tuple[str, ...], _Found] = OrderedDict()
        self._requests: dict[tuple[str, ...], asyncio.Task[_Found]] = {}

    def __getstate__(self) -> dict[str, Any]:
        if not isinstance(self._given, str):
            raise TypeError(
                f"a reward function of a {type(self._given).__name__} object cannot be pickled: give reward_funcs the "
                "folder of the model or the URL of a server"
            )
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_done", "_requests")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    @property
    def source(self) -> Any:
        """The model or the client, opened once per process."""
        return opened(self._given) if isinstance(self._given, str) else self._given

    def conversations(self, prompts: Any, completions: Any) -> list[Conversation | None]:
        """One conversation per completion; None for one that gets no score."""
        given = required_list(prompts, "prompts")
        replies = required_list(completions, "completions", len(given))
        found: list[Conversation | None] = []
        for place, (prompt, reply) in enumerate(zip(given, replies, strict=True)):
            for name, value in (("prompts", prompt), ("completions", reply)):
                if value is None:
                    raise IntegrationError(f"{name}[{place}]: found None, expected text or messages")
            if _has_no_reply(prompt, reply):
                found.append(None)
                continue
            try:
                found.append(_conversation(prompt, reply, place))
            except ConversationError:
                if self._refused == "error":
                    raise
                _conversation(prompt, "any", place)  # an invalid prompt remains an error
                found.append(None)
        return found

    def score(self, conversations: Sequence[Conversation | None]) -> _Found:
        """Scores of a call, computed by the first function that asks."""
        keys = _keys(conversations)
        with self._lock:
            if keys not in self._done:
                source, given = self.source, [c for c in conversations if c is not None]
                options: dict[str, Any] = {"include": SERVED_PARTS} if is_client(source) else {}
                options |= {"normalize": self._normalize, "on_refused": self._on_refused}
                batch = source.score(given, **options) if given else None
                debiased = debiased_rewards(source, batch) if batch is not None and self._debiased else None
                self._keep(keys, self._found(conversations, batch, debiased, objective_names(source)))
            return self._done[keys]

    async def score_served(self, conversations: Sequence[Conversation | None]) -> _Found:
        """`score` by the server, without waiting; functions of the same call share the request."""
        keys = _keys(conversations)
        if keys in self._done:
            return self._done[keys]
        if keys not in self._requests:
            self._requests[keys] = asyncio.create_task(self._request(keys, conversations))
        return await asyncio.shield(self._requests[keys])

    async def _request(self, keys: tuple[str, ...], conversations: Sequence[Conversation | None]) -> _Found:
        try:
            client, info = await served_client(self._given)
            given = [c for c in conversations if c is not None]
            options: dict[str, Any] = {"normalize": self._normalize, "on_refused": self._on_refused}
            batch = await client.score(given, include=SERVED_PARTS, **options) if given else None
            debiased = batch.parts["debiased_rewards"] if batch is not None and self._debiased else None
            names = [objective["name"] for objective in info["objectives"]]
            return self._keep(keys, self._found(conversations, batch, debiased, names))
        finally:
            del self._requests[keys]

    @property
    def _on_refused(self) -> str:
        return "error" if self._refused == "error" else "skip"

    def _keep(self, keys: tuple[str, ...], found: _Found) -> _Found:
        self._done[keys] = found
        if len(self._done) > _KEPT_CALLS:
            self._done.popitem(last=False)
        return found

    @staticmethod
    def _found(
        conversations: Sequence[Conversation | None], batch: Any, debiased: np.ndarray | None, names: list[str]
    ) -> _Found:
        places = [place for place, conversation in enumerate(conversations) if conversation is not None]
        scores = np.full(len(conversations), math.nan)
        rewards, columns, contributions = np.full((3, len(conversations), len(names)), math.nan)
        if batch is None:
            return _Found(scores, rewards, columns, contributions, names)
        if len(batch.scores) + len(batch.rejected) != len(places):
            raise IntegrationError(f"found {len(batch.scores)} scores, expected {len(places)}")
        rows = [places[row] for row in batch.rows]
        scores[rows], rewards[rows], contributions[rows] = batch.scores, batch.rewards, batch.contributions
        columns[rows] = batch.rewards if debiased is None else debiased
        return _Found(scores, rewards, columns, contributions, names, batch, rows)

    def log(self, found: _Found, prompts: Sequence[Any], completion_ids: Any, columns: Mapping[str, Any]) -> None:
        """Log a call with what TRL provides, and to the log file."""
        if columns.get("log_metric") is not None:
            scored = ~np.isnan(found.scores)
            metrics = {"score": found.scores} | dict(zip(found.names, found.rewards.T, strict=True))
            contributions = zip(found.names, found.contributions.T, strict=True)
            metrics |= {f"contribution/{name}": values for name, values in contributions}
            for name, values in metrics.items():
                columns["log_metric"](f"armorm/{name}", float(values[scored].mean()) if scored.any() else math.nan)
            columns["log_metric"]("armorm/unscored", 1.0 - float(scored.mean()))
            for name, value in self.reported.items():
                columns["log_metric"](name, value)
        if columns.get("log_extra") is not None:
            columns["log_extra"]("armorm/largest_contributions", _largest_contributions(found))
        if self.log_file is not None:
            state = columns.get("trainer_state")
            step = self._calls if state is None else int(state.global_step)
            self._calls += 1
            if found.batch is not None:
                lengths = found.batch.response_tokens
                if completion_ids is not None:
                    lengths = [len(completion_ids[row]) for row in found.rows]
                lines = batch_lines(found.batch, (repr(prompts[row]) for row in found.rows), lengths, step=step)
                append_samples(self.log_file, lines)


def _keys(conversations: Sequence[Conversation | None]) -> tuple[str, ...]:
    return tuple("" if conversation is None else conversation.key for conversation in conversations)


def _largest_contributions(found: _Found) -> list[str]:
    """The largest contributions of each completion, such as `code-style +0.31, verbosity -0.04`; '' without a score."""
    order = np.argsort(-np.abs(found.contributions), axis=1)[:, :_SHOWN_CONTRIBUTIONS]
    return [
        "" if math.isnan(score) else ", ".join(f"{found.names[i]} {row[i]:+.2f}" for i in places)
        for score, row, places in zip(found.scores, found.contributions, order, strict=True)
    ]


def _has_no_reply(prompt: Any, reply: Any) -> bool:
    """Whether a rollout ends in a tool's turn, or has a part that is not text."""
    if isinstance(reply, str):
        return _has_image(prompt)
    if not isinstance(reply, Sequence) or not reply:
        return False
    last = reply[-1]
    role = last.role if isinstance(last, Message) else last.get("role") if isinstance(last, Mapping) else None
    return role == "tool" or _has_image(prompt) or _has_image(reply)


def _has_image(messages: Any) -> bool:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        return False
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    parts = (part for content in contents if isinstance(content, Sequence) for part in content)
    return any(isinstance(part, Mapping) and part.get("type") not in ("text", None) for part in parts)


def _conversation(prompt: Any, reply: Any, place: int) -> Conversation:
    if isinstance(reply, str):
        return Conversation.from_prompt(prompt, reply, f"completions[{place}]")
    return Conversation.from_messages([*prompt_messages(prompt), *reply])
