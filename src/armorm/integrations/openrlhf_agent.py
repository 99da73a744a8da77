"""OpenRLHF: an agent for `--train.agent_func_path`, whose reward is the score of the dialogue.

    --train.agent_func_path "$(python -c 'import armorm.integrations.openrlhf_agent as m; print(m.__file__)')"

This file scores single replies. For several turns, a file of your own says what the environment answers:

    from armorm.integrations import openrlhf_agent

    class Agent(openrlhf_agent.ScoredAgent):
        async def feedback(self, conversation, label):
            return None if label in conversation.response else "That is not right. Try again."

    class AgentExecutor(openrlhf_agent.AgentExecutor):
        agent_class = Agent

The reward of a turn is the change of the score, so that OpenRLHF's sum is the score of the dialogue after its last
turn, also if the rollout ends because it is too long. Settings are environment variables (`rewards.py`); with
ARMORM_URL a server scores the dialogues. Turns are taken from the steps, not from the text, so no reply can forge one.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

from armorm.backbone.chat_formats import FAMILIES, ChatFormat, learn_format
from armorm.conversation import Conversation
from armorm.integrations.rewards import IntegrationError, Rewards, Settings, rewards_of, served_rewards_of

_POLICY_TOKENIZER: ContextVar[Any] = ContextVar("policy tokenizer")  # of the rollout that a task executes
_MARK = "\ue200"


class ScoredAgent(AgentInstanceBase):
    """One dialogue of a rollout."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._tokenizer = _POLICY_TOKENIZER.get()
        self._turns: list[dict[str, str]] = []
        self._format: ChatFormat | None = None
        self._score = 0.0

    async def feedback(self, conversation: Conversation, label: Any) -> str | None:
        """The user's next turn, None at the end of the dialogue.

        Args:
            conversation: all turns so far; the reply may be blank only if ARMORM_EMPTY_SCORE is set.
            label: of the prompt, from the data set.
        """
        return None

    async def step(self, state_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Score the dialogue after a reply, in the form that `MultiTurnAgentExecutor` expects.

        Raises:
            IntegrationError: for a prompt that no known chat template rendered.
            ConversationError: for a reply that cannot be scored.
        """
        if self._format is None:
            self._format, self._turns = _opening(self._tokenizer, state_dict["observation_text"])
        action = state_dict["action_text"]
        reply = self._format.without_end(action)
        self._turns.append({"role": "assistant", "content": reply})
        conversation = Conversation.from_messages(self._turns) if reply.strip() else None
        found = await _rewards(conversation)
        change, self._score = found.scores[0] - self._score, found.scores[0]
        answer = None if conversation is None else await self.feedback(conversation, state_dict["label"])
        logs = {f"reward/{name}": values[0] for name, values in found.rewards.items()}
        logs |= {f"contribution/{name}": values[0] for name, values in found.contributions.items()}
        logs["empty_response"] = float(found.empty[0])
        return {
            "rewards": torch.tensor(change),
            "scores": torch.tensor(self._score),
            "environment_feedback": "" if answer is None else self._rendered(answer, action[len(reply) :]),
            "done": answer is None,
            "sampling_params": state_dict.get("sampling_params"),
            "extra_logs": {name: torch.tensor(value) for name, value in logs.items()},
        }

    def _rendered(self, answer: str, closed: str) -> str:
        """A user's turn with the generation prompt after it; `closed` is the end that the reply already has."""
        self._turns.append({"role": "user", "content": answer})
        dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}, self._turns[-1]]
        text = self._tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        return text.split(_MARK, 1)[1].removeprefix(closed.rstrip())


class AgentExecutor(MultiTurnAgentExecutor):
    """Runs rollouts with an agent of `agent_class`, a `ScoredAgent`."""

    agent_class: type[ScoredAgent] = ScoredAgent

    def __init__(self) -> None:
        super().__init__(self.agent_class)

    async def execute(self, *arguments: Any, hf_tokenizer: Any, **named: Any) -> dict[str, Any]:
        """Run one rollout; its agent gets the policy's tokenizer."""
        _POLICY_TOKENIZER.set(hf_tokenizer)
        rollout: dict[str, Any] = await super().execute(*arguments, hf_tokenizer=hf_tokenizer, **named)
        return rollout


async def _rewards(conversation: Conversation | None) -> Rewards:
    settings = Settings.from_environment()
    if settings.url:
        return await served_rewards_of([conversation], settings)
    return await asyncio.to_thread(lambda: rewards_of(settings.source(), [conversation], settings))


def _opening(tokenizer: Any, prompt: str) -> tuple[ChatFormat, list[dict[str, str]]]:
    """The format of a rendered prompt and its turns."""
    learned = learn_format(tokenizer, "the policy's")
    for chat_format in filter(None, (learned, *FAMILIES)):
        turns = chat_format.split(prompt)
        if turns is None:
            continue
        if turns[-1].role == "assistant":
            turns = turns[:-1]  # opened by the generation prompt
        return chat_format, [{"role": turn.role, "content": turn.content} for turn in turns]
    raise IntegrationError("found a prompt of no known chat template, expected --data.apply_chat_template")
