"""OpenRLHF: a reward function, given by the path of this file.

    --reward.remote_url "$(python -c 'import armorm.integrations.openrlhf as m; print(m.__file__)')"

The model is loaded once per process. Settings are environment variables (`rewards.py`); ARMORM_POLICY_TOKENIZER names
the policy's tokenizer if its template is not a known one. With servers no file is needed:
`--reward.remote_url http://host:8008/get_reward,http://other:8008/get_reward`. For dialogues of several turns there is
an agent (`openrlhf_agent.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer

from armorm.backbone.rendered_text import EmptyResponseError, RenderedReader
from armorm.conversation import Conversation
from armorm.integrations.rewards import IntegrationError, Settings, required_list, rewards_of


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Any = None, **_: Any) -> dict[str, Any]:
    """Rewards of decoded texts.

    Args:
        queries: n prompts with their responses, special tokens included.
        prompts: the exact prefix of each query.

    Returns:
        `{"rewards": (n,), "scores": (n,), "extra_logs": {name: (n,)}}`, float32 tensors.
    """
    texts = required_list(queries, "queries")
    prefixes = required_list(prompts, "prompts", len(texts))
    settings = Settings.from_environment()
    if settings.url:
        raise IntegrationError(
            f"ARMORM_URL is set: pass {settings.url}/get_reward to --reward.remote_url instead of a file"
        )
    conversations = [_conversation(text, prefix) for text, prefix in zip(texts, prefixes, strict=True)]
    found = rewards_of(settings.source(), conversations, settings)
    logs: dict[str, Any] = {f"reward/{name}": values for name, values in found.rewards.items()}
    logs |= {f"contribution/{name}": values for name, values in found.contributions.items()}
    logs["empty_response"] = found.empty
    rewards = torch.tensor(found.scores, dtype=torch.float32)
    return {
        "rewards": rewards,
        "scores": rewards.clone(),
        "extra_logs": {name: torch.tensor(values, dtype=torch.float32) for name, values in logs.items()},
    }


def _conversation(text: Any, prompt: Any) -> Conversation | None:
    try:
        return _reader().continuation(text, prompt)
    except EmptyResponseError:
        return None


@cache
def _reader() -> RenderedReader:
    """Parser of text rendered by the policy's template."""
    template = Settings.from_environment().source().backbone.template
    policy = os.environ.get("ARMORM_POLICY_TOKENIZER")
    tokenizer = AutoTokenizer.from_pretrained(policy) if policy else None
    return RenderedReader(template, len(template.tokenizer), policy_tokenizer=tokenizer)
