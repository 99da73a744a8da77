"""verl: a reward manager that sends responses to one server, for scores and for GDPO.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=ArmoRMRewardManager
    reward.reward_manager.module.path=pkg://armorm.integrations.verl_manager
    +reward.armorm.url=http://host:8008

The manager reads the prompt of each row (`raw_prompt`), so that nothing is copied into `extra_info`, and no worker
loads a model. Settings are those of `ManagerSettings`. The score is the reward; GDPO finds the objectives by its keys:

    algorithm.adv_estimator=gdpo
    +algorithm.gdpo_reward_keys=[debiased/helpsteer-helpfulness,debiased/code-style]
    trainer.use_v1=false

verl 0.9.1's newer trainer (`use_v1`, the default) does not hand the objectives to GDPO.

A rollout with several turns is split by the policy's chat template, so it is scored as the dialogue that it is.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from armorm.backbone.chat_formats import ChatFormat, learn_format
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.integrations.rewards import IntegrationError
from armorm.integrations.verl import GatheredScores, ManagerSettings, check_gdpo_keys

_SINGLE_TURN = 2  # verl counts the user's turn and the reply


class ArmoRMRewardManager(RewardManagerBase):
    """Rewards from `armorm serve`; arguments are those with which verl creates a manager.

    Raises:
        IntegrationError: for invalid settings, GDPO keys that the model does not have, or a custom reward function,
            which the manager would ignore.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        path = config.reward.custom_reward_function.path
        if path is not None:
            raise IntegrationError(
                f"reward.custom_reward_function.path: found {path!r}, expected none with this reward manager"
            )
        self._settings = ManagerSettings.from_config(config)
        from armorm.client import RewardClient

        with RewardClient(self._settings.url) as client:
            check_gdpo_keys(config.algorithm, client.info())
        self._scores = GatheredScores(self._settings)
        self._format: ChatFormat | None = None

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Reward of the last row of a `DataProto`, with the predicted and debiased rewards as extra information.

        Raises:
            ConversationError: for a response that cannot be scored, without a `refused_score`.
        """
        try:
            found = await self._scores.score(self._conversation(data[-1:][0]))
        except ConversationError:
            if self._settings.refused_score is None:
                raise
            found = await self._scores.refused()
        return {"reward_score": found["score"], "reward_extra_info": found}

    def _conversation(self, row: Any) -> Conversation:
        fields = row.non_tensor_batch
        if "raw_prompt" not in fields:
            raise IntegrationError("found a row without raw_prompt, expected verl's own dataset (RLHFDataset)")
        prompt = list(fields["raw_prompt"])
        mask = row.batch["attention_mask"].bool()
        prompt_ids, response_ids = row.batch["prompts"], row.batch["responses"]
        if "response_len" in fields:  # rows of one trajectory are padded on the right
            prompt_ids = prompt_ids[: int(fields["prompt_len"])]
            response_ids = response_ids[: int(fields["response_len"])]
        else:
            response_mask = mask[-len(response_ids) :]
            prompt_ids = prompt_ids[mask[: len(prompt_ids)]]
            response_ids = response_ids[: int(response_mask.sum())]
        if int(fields.get("__num_turns__") or _SINGLE_TURN) <= _SINGLE_TURN:
            return Conversation.from_prompt(prompt, self.tokenizer.decode(response_ids, skip_special_tokens=True))
        opening, rest = (self.tokenizer.decode(ids, skip_special_tokens=False) for ids in (prompt_ids, response_ids))
        return Conversation.from_messages([*prompt, *self._turns(opening, opening + rest)])

    def _turns(self, opening: str, text: str) -> list[dict[str, str]]:
        """The turns of a rollout after its prompt."""
        self._format = self._format or learn_format(self.tokenizer, "the policy's")
        before = self._format.split(opening) if self._format else None
        turns = self._format.split(text) if self._format else None
        if not before or not turns:
            raise IntegrationError(
                "found a chat template that cannot be split into turns, expected a rendered dialogue"
            )
        # (The generation prompt at the end of the opening begins the first reply.)
        first = len(before) - (before[-1].role == "assistant")
        return [{"role": turn.role, "content": turn.content} for turn in turns[first:]]
