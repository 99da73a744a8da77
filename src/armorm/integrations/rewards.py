"""Rewards for trainers, from a model in this process or from a server.

Trainers that call a function by its name pass no settings, so these are environment variables:

    ARMORM_URL                      URL of a server; its key in ARMORM_API_KEY
    ARMORM_MODEL                    without a URL, the model to load; `armorm-small-rm` by default
    ARMORM_DTYPE, ARMORM_DEVICE     as for `ArmoRM.from_pretrained`
    ARMORM_NORMALIZE                1 for scores in standard deviations from the reference mean
    ARMORM_EMPTY_SCORE              score of an empty response; without it, one is an error
    ARMORM_LOG_FILE                 log of all scored responses, for `armorm monitor`; the processes of a run share it

Lists are not broadcast: each must have one entry per response.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import ArmormError, ConversationError, shown
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.monitoring.log import append_samples, batch_lines

_CONNECTIONS = 128  # trainers send single responses, many concurrently
SERVED_PARTS = ("rewards", "debiased_rewards", "contributions")  # that integrations request from a server
_ONE_AT_A_TIME = threading.Lock()
_CLIENTS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


class IntegrationError(ArmormError, ValueError):
    """Invalid arguments or settings of an integration."""


@dataclass(frozen=True)
class Settings:
    """Settings from the environment; `url` is empty without a server, `empty_score` None makes one an error."""

    url: str
    model: str
    dtype: str
    device: str
    normalize: bool
    empty_score: float | None
    log_file: str = ""

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the variables; an IntegrationError names an invalid one."""
        empty, flag = os.environ.get("ARMORM_EMPTY_SCORE"), os.environ.get("ARMORM_NORMALIZE", "0")
        try:
            empty_score = None if empty is None else float(empty)
        except ValueError:
            empty_score = math.nan
        if empty_score is not None and not math.isfinite(empty_score):
            raise IntegrationError(f"ARMORM_EMPTY_SCORE: found {shown(empty)}, expected a finite number")
        if flag not in ("0", "1"):
            raise IntegrationError(f"ARMORM_NORMALIZE: found {shown(flag)}, expected 0 or 1")
        read = os.environ.get
        url, model = read("ARMORM_URL", ""), read("ARMORM_MODEL", DEFAULT_REWARD_MODEL)
        dtype, device = read("ARMORM_DTYPE", "auto"), read("ARMORM_DEVICE", "auto")
        return cls(url, model, dtype, device, flag == "1", empty_score, read("ARMORM_LOG_FILE", ""))

    def source(self) -> Any:
        """The client or the model, opened once per process."""
        return opened(self.url) if self.url else opened(self.model, self.dtype, self.device)


@cache
def opened(name: str, dtype: str = "auto", device: str = "auto") -> Any:
    """A client for a URL, a model for any other name; each is opened once per process."""
    if name.startswith(("http://", "https://")):
        from armorm.client import RewardClient

        return RewardClient(name, connections=_CONNECTIONS)
    from armorm.reward_model import ArmoRM

    return ArmoRM.from_pretrained(name, dtype=dtype, device=device)


def required_list(values: Any, name: str, size: int | None = None) -> list[Any]:
    """Values as a list of the expected length; anything else raises an IntegrationError."""
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, (Sequence, np.ndarray)):
        raise IntegrationError(f"{name}: found {shown(values)}, expected a list")
    if size is not None and len(values) != size:
        raise IntegrationError(f"{name}: found {len(values)}, expected {size}")
    return list(values)


def is_client(source: Any) -> bool:
    """Whether scores come from a server."""
    return hasattr(source, "info")


def objective_names(source: Any) -> list[str]:
    """Names of the k objectives of a model or client."""
    return list(source.names if is_client(source) else source.objectives.names)


def biases_of(source: Any) -> list[str]:
    """Objectives that the others are debiased against."""
    if is_client(source):
        return list(source.info()["debiased_against"])
    return list(source.model.config.debiasing.get("against", ()))


@dataclass(frozen=True)
class Rewards:
    """Score, rewards and contributions of n responses; an empty one has the score set for that, and zeros."""

    scores: list[float]
    rewards: dict[str, list[float]]
    debiased: dict[str, list[float]]  # rewards @ T, without the objectives that others are debiased against
    contributions: dict[str, list[float]]
    empty: list[bool]


def rewards_of(source: Any, conversations: Sequence[Conversation | None], settings: Settings) -> Rewards:
    """Score conversations, None for an empty response, in one call; calls of a model in this process are serialised.

    Raises:
        ConversationError: for a conversation that cannot be scored.
        IntegrationError: if the number of scores is wrong.
    """
    given = _scorable(conversations, settings.empty_score)
    options = {"include": SERVED_PARTS} if is_client(source) else {}
    with nullcontext() if is_client(source) else _ONE_AT_A_TIME:
        batch = source.score(given, normalize=settings.normalize, **options) if given else None
    debiased = None if batch is None else debiased_rewards(source, batch)
    log_scores(settings.log_file, batch)
    return _rewards(conversations, batch, debiased, objective_names(source), biases_of(source), settings.empty_score)


def log_scores(path: str, batch: Any) -> None:
    """Append a scored batch to a log, if there are both; trainers that call us by name do not tell the step."""
    if path and batch is not None:
        append_samples(path, batch_lines(batch, None, batch.response_tokens, time=round(time.time(), 3)))


def debiased_rewards(source: Any, batch: Any) -> np.ndarray:
    """Debiased rewards `rewards @ T` (n, k) of a scored batch; from a server it must include that part."""
    return batch.parts["debiased_rewards"] if is_client(source) else batch.rewards @ source.transform


async def served_rewards_of(conversations: Sequence[Conversation | None], settings: Settings) -> Rewards:
    """`rewards_of` through the server's client of this event loop."""
    client, info = await served_client(settings.url)
    given = _scorable(conversations, settings.empty_score)
    batch = await client.score(given, normalize=settings.normalize, include=SERVED_PARTS) if given else None
    names = [objective["name"] for objective in info["objectives"]]
    debiased = None if batch is None else batch.parts["debiased_rewards"]
    log_scores(settings.log_file, batch)
    return _rewards(conversations, batch, debiased, names, info["debiased_against"], settings.empty_score)


async def served_client(url: str) -> tuple[Any, dict[str, Any]]:
    """The asynchronous client of a server for this event loop, and the server's model card."""
    from armorm.client import AsyncRewardClient

    clients = _CLIENTS.setdefault(asyncio.get_running_loop(), {})
    if url not in clients:
        client = AsyncRewardClient(url, connections=_CONNECTIONS)
        clients.setdefault(url, (client, await client.info()))
    return clients[url]


def _scorable(conversations: Sequence[Conversation | None], empty_score: float | None) -> list[Conversation]:
    if empty_score is None and None in conversations:
        message = "found an empty response, expected text (or set ARMORM_EMPTY_SCORE)"
        raise ConversationError(message, f"response {list(conversations).index(None)}")
    return [conversation for conversation in conversations if conversation is not None]


def _rewards(
    conversations: Sequence[Conversation | None],
    batch: Any,
    debiased: np.ndarray | None,
    names: Sequence[str],
    biases: Sequence[str],
    empty_score: float | None,
) -> Rewards:
    n, places = len(conversations), [place for place, c in enumerate(conversations) if c is not None]
    scores = np.full(n, 0.0 if empty_score is None else empty_score)
    parts = np.zeros((3, n, len(names)))
    if batch is not None:
        if len(batch.scores) != len(places) or not np.isfinite(batch.scores).all():
            raise IntegrationError(f"found {len(batch.scores)} scores, expected {len(places)} finite ones")
        scores[places] = batch.scores
        parts[:, places] = batch.rewards, debiased, batch.contributions
    rewards, without_bias, contributions = (dict(zip(names, part.T.tolist(), strict=True)) for part in parts)
    without_bias = {name: column for name, column in without_bias.items() if name not in biases}
    return Rewards(scores.tolist(), rewards, without_bias, contributions, [c is None for c in conversations])
