"""verl: reward functions, given by path and name.

    custom_reward_function.path=PATH_OF_THIS_FILE custom_reward_function.name=compute_score          # or _async, _batch

verl does not pass the prompt: it is read from `extra_info`, field `prompt` (messages or text), else `raw_prompt` or
`question`. In a dataset of verl's format, copy the `prompt` column there. Every response gets
`{"score", "reward/OBJECTIVE"..., "empty_response"}`, always with the same keys.

Settings are environment variables (`rewards.py`). With a server (ARMORM_URL), `compute_score_async` keeps many requests
in flight, which the server batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from armorm.conversation import Conversation
from armorm.integrations.rewards import (
    IntegrationError,
    Rewards,
    Settings,
    required_list,
    rewards_of,
    served_rewards_of,
)

PROMPT_FIELDS = ("prompt", "raw_prompt", "question")


def compute_score(
    data_source: Any, solution_str: str, ground_truth: Any = None, extra_info: Any = None, **_: Any
) -> dict[str, float]:
    """Score of one response; errors as those of `compute_score_batch`."""
    return compute_score_batch([data_source], [solution_str], [ground_truth], [extra_info])[0]


async def compute_score_async(
    data_source: Any, solution_str: str, ground_truth: Any = None, extra_info: Any = None, **_: Any
) -> dict[str, float]:
    """`compute_score` without blocking the event loop."""
    settings = Settings.from_environment()
    if not settings.url:
        return await asyncio.to_thread(compute_score, data_source, solution_str, ground_truth, extra_info)
    return _row(await served_rewards_of([_conversation(extra_info, solution_str, 0)], settings), 0)


def compute_score_batch(
    data_sources: Any, solution_strs: Any, ground_truths: Any = None, extra_infos: Any = None, **_: Any
) -> list[dict[str, float]]:
    """Scores of many responses, for verl's `batch` reward manager.

    Raises:
        IntegrationError: for lists of different lengths, or rows without a prompt.
        ConversationError: for a response that cannot be scored.
    """
    responses = required_list(solution_strs, "solution_strs")
    infos = required_list(extra_infos, "extra_infos", len(responses))
    required_list(data_sources, "data_sources", len(responses))
    settings = Settings.from_environment()
    conversations = [
        _conversation(info, reply, row) for row, (info, reply) in enumerate(zip(infos, responses, strict=True))
    ]
    found = rewards_of(settings.source(), conversations, settings)
    return [_row(found, row) for row in range(len(responses))]


def _row(found: Rewards, row: int) -> dict[str, float]:
    rewards = {f"reward/{name}": values[row] for name, values in found.rewards.items()}
    return {"score": found.scores[row], **rewards, "empty_response": float(found.empty[row])}


def _conversation(info: Any, reply: Any, row: int) -> Conversation | None:
    if not isinstance(reply, str):
        raise IntegrationError(f"solution_strs[{row}]: found {type(reply).__name__}, expected text")
    if not reply.strip():
        return None
    for name in PROMPT_FIELDS:
        prompt = info.get(name) if isinstance(info, Mapping) else None
        if prompt is not None:  # an array if read from Parquet
            return Conversation.from_prompt(prompt if isinstance(prompt, str) else list(prompt), reply)
    raise IntegrationError(f"extra_infos[{row}]: found no prompt, expected one in field {' or '.join(PROMPT_FIELDS)}")
