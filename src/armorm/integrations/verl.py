"""verl: a reward function, and the parts of the reward manager (`verl_manager.py`) that need no verl.

    reward.custom_reward_function.path=pkg://armorm.integrations.verl
    reward.custom_reward_function.name=compute_score          # or compute_score_async, for a server

verl does not pass the prompt to a function: it is read from `extra_info`, field `prompt` (messages or text), else
`raw_prompt` or `question`. In a dataset of verl's format, copy the `prompt` column there, or use the manager, which
gets the prompt. Every response gets `{"score", "reward/OBJECTIVE"..., "debiased/OBJECTIVE"..., "empty_response"}`,
always with the same keys.

Settings of the functions are environment variables (`rewards.py`). With a server (ARMORM_URL), `compute_score_async`
keeps many requests in flight, which the server batches.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import ConversationError, nearest, shown
from armorm.integrations.rewards import (
    SERVED_PARTS,
    IntegrationError,
    Rewards,
    Settings,
    log_scores,
    rewards_of,
    served_client,
    served_rewards_of,
)

PROMPT_FIELDS = ("prompt", "raw_prompt", "question")
_GATHERED_SECONDS = 0.01  # a response waits this long for others to share its request


def compute_score(
    data_source: Any, solution_str: str, ground_truth: Any = None, extra_info: Any = None, **_: Any
) -> dict[str, float]:
    """Score of one response.

    Raises:
        IntegrationError: without a prompt in `extra_info`.
        ConversationError: for a response that cannot be scored.
    """
    settings = Settings.from_environment()
    return _row(rewards_of(settings.source(), [_conversation(extra_info, solution_str)], settings))


async def compute_score_async(
    data_source: Any, solution_str: str, ground_truth: Any = None, extra_info: Any = None, **_: Any
) -> dict[str, float]:
    """`compute_score` without blocking the event loop."""
    settings = Settings.from_environment()
    if not settings.url:
        return await asyncio.to_thread(compute_score, data_source, solution_str, ground_truth, extra_info)
    return _row(await served_rewards_of([_conversation(extra_info, solution_str)], settings))


def _row(found: Rewards) -> dict[str, float]:
    rewards = {f"reward/{name}": values[0] for name, values in found.rewards.items()}
    debiased = {f"debiased/{name}": values[0] for name, values in found.debiased.items()}
    return {"score": found.scores[0], **rewards, **debiased, "empty_response": float(found.empty[0])}


def _conversation(info: Any, reply: Any) -> Conversation | None:
    if not isinstance(reply, str):
        raise IntegrationError(f"solution_str: found {type(reply).__name__}, expected text")
    if not reply.strip():
        return None
    for name in PROMPT_FIELDS:
        prompt = info.get(name) if isinstance(info, Mapping) else None
        if prompt is not None:  # an array if read from Parquet
            return Conversation.from_prompt(prompt if isinstance(prompt, str) else list(prompt), reply)
    raise IntegrationError(f"extra_info: found no prompt, expected one in field {' or '.join(PROMPT_FIELDS)}")


# --- parts of the reward manager -------------------------------------------------------------------------


@dataclass(frozen=True)
class ManagerSettings:
    """Settings of the reward manager, `+reward.armorm.NAME=VALUE`.

    Attributes:
        url: of the server; by default that of the environment variable ARMORM_URL.
        normalize: scores in standard deviations from the reference mean.
        refused_score: score of a response that cannot be scored (empty, too long, a prompt with an image); without it
            one ends the run with an error.
        log_file: log of all scored responses, for `armorm monitor`; by default that of ARMORM_LOG_FILE, if any.
    """

    url: str
    normalize: bool = False
    refused_score: float | None = None
    log_file: str = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ManagerSettings:
        """Read verl's configuration; an IntegrationError names an invalid or missing entry."""
        given = dict((config.get("reward") or {}).get("armorm") or {})
        for name in given:
            if name not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                hint = nearest(str(name), cls.__dataclass_fields__)
                raise IntegrationError(f"reward.armorm.{name}: unknown, expected one of {known}{hint}")
        url = given.get("url") or Settings.from_environment().url
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            found = shown(url) if url else "none"
            raise IntegrationError(
                f"reward.armorm.url: found {found}, expected the URL of a server (`armorm serve`): each reward "
                "worker would load a model of its own"
            )
        normalize, refused = given.get("normalize", False), given.get("refused_score")
        if not isinstance(normalize, bool):
            raise IntegrationError(f"reward.armorm.normalize: found {shown(normalize)}, expected true or false")
        is_number = isinstance(refused, (int, float)) and not isinstance(refused, bool) and math.isfinite(refused)
        if refused is not None and not is_number:
            raise IntegrationError(f"reward.armorm.refused_score: found {shown(refused)}, expected a finite number")
        log_file = given.get("log_file") or Settings.from_environment().log_file
        if not isinstance(log_file, str):
            raise IntegrationError(f"reward.armorm.log_file: found {shown(log_file)}, expected the path of a file")
        return cls(url, normalize, None if refused is None else float(refused), log_file)


def reward_keys(info: Mapping[str, Any]) -> list[str]:
    """Keys that every response of the manager has besides `score`, from the server's model card."""
    names = [objective["name"] for objective in info["objectives"]]
    debiased = [f"debiased/{name}" for name in names if name not in info["debiased_against"]]
    return [*(f"reward/{name}" for name in names), *debiased, "refused"]


def check_gdpo_keys(algorithm: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Check GDPO's keys and weights before a run; an IntegrationError names the first invalid one."""
    if algorithm.get("adv_estimator") != "gdpo":
        return
    known, keys = ["score", *reward_keys(info)], list(algorithm.get("gdpo_reward_keys") or ())
    if not keys:
        raise IntegrationError(f"algorithm.gdpo_reward_keys: found none, expected some of {', '.join(known)}")
    for key in keys:
        if key not in known:
            hint = nearest(str(key), known)
            raise IntegrationError(f"algorithm.gdpo_reward_keys: unknown {key!r}{hint}; there are {', '.join(known)}")
    weights = algorithm.get("gdpo_reward_weights")
    if weights is not None and len(weights) != len(keys):
        raise IntegrationError(f"algorithm.gdpo_reward_weights: found {len(weights)}, expected {len(keys)}")


class GatheredScores:
    """Scores of single responses, requested from a server together: those that arrive within 10 ms share a request."""

    def __init__(self, settings: ManagerSettings) -> None:
        self._settings = settings
        self._open: tuple[list[Conversation], asyncio.Task[list[dict[str, float] | ConversationError]]] | None = None

    async def score(self, conversation: Conversation) -> dict[str, float]:
        """`{"score", *reward_keys}` of a response.

        Raises:
            ConversationError: for a response that the model cannot score; others of its request are not affected.
            RewardServerError: if the server cannot be reached or rejects the request.
        """
        if self._open is None:
            rows: list[Conversation] = []
            self._open = rows, asyncio.create_task(self._request(rows))
        rows, request = self._open
        rows.append(conversation)
        row = len(rows) - 1
        found = (await asyncio.shield(request))[row]
        if isinstance(found, ConversationError):
            raise found
        return found

    async def refused(self) -> dict[str, float]:
        """The entries of a response that gets the refused score; its rewards are zeros."""
        _, info = await served_client(self._settings.url)
        score = self._settings.refused_score
        if score is None:
            raise IntegrationError("reward.armorm.refused_score: not set")
        return {"score": score, **dict.fromkeys(reward_keys(info), 0.0), "refused": 1.0}

    async def _request(self, rows: list[Conversation]) -> list[dict[str, float] | ConversationError]:
        """Scores or errors of the rows that arrive in time."""
        await asyncio.sleep(_GATHERED_SECONDS)
        self._open = None
        client, info = await served_client(self._settings.url)
        batch = await client.score(rows, normalize=self._settings.normalize, include=SERVED_PARTS, on_refused="skip")
        log_scores(self._settings.log_file, batch)
        kept = [place for place, name in enumerate(batch.names) if name not in info["debiased_against"]]
        columns = [batch.scores[:, None], batch.rewards, batch.parts["debiased_rewards"][:, kept]]
        values = np.concatenate([*columns, np.zeros((len(batch.scores), 1))], axis=1).tolist()
        keys = ["score", *reward_keys(info)]
        found: dict[int, Any] = {row: ConversationError(reason) for row, reason in batch.rejected}
        found |= {
            row: dict(zip(keys, line, strict=True)) for row, line in zip(batch.rows.tolist(), values, strict=True)
        }
        return [found[row] for row in range(len(rows))]
