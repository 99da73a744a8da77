"""Requests to a reward model in vLLM: text becomes token ids as in `ArmoRM.score`.

Every route's input passes `RewardRenderer`. Messages are encoded by the model's own chat template, under the model's
length limit; template tokens inside a message are ordinary text (`ChatTemplate`). Rendered text, and the pair of a
`/score` or `/rerank` request (prompt and response), are read as conversations and encoded in the same way. Text or ids
with several assistant turns are rejected, because they cannot be told from a response that imitates a turn, unless
`ARMORM_RENDERED_TURNS` says how to read them (`single` or `multi`, as `armorm serve --rendered-turns`). Token ids that
vLLM would shorten or pad are rejected.

`RewardProcessor` answers `POST /pooling {"data": {"conversations": [[message, ...], ...]}}`, or `{"data": {"prompt":
..., "responses": [...]}}`, with `score`, and by the names of the objectives `rewards`, `gating_weights`,
`coefficients`, `contributions` (their sum is the score) and, if the model has reference data, `relative`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, cast, get_args

import numpy as np
from transformers import BatchEncoding
from vllm.exceptions import VLLMValidationError
from vllm.plugins.io_processors.interface import IOProcessor
from vllm.pooling_params import PoolingParams
from vllm.renderers.hf import HfRenderer
from vllm.utils.async_utils import make_async

from armorm import attribution
from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.backbone.encoding import Overflow, encode_rows
from armorm.backbone.rendered_text import RenderedReader, RenderedTurns
from armorm.conversation import Conversation
from armorm.errors import ConversationError, shown
from armorm.integrations.vllm_plugin import EVERYTHING, reward_config

_TURNS = "ARMORM_RENDERED_TURNS"


class EncodedIds(list):
    """Token ids that the renderer has made or checked; a shortened or padded copy is a plain list."""


class RewardEncoder:
    """Conversations, rendered text and token ids as ids with one gate.

    Args:
        tokenizer: of the model.
        config: `ArmoRMConfig`.
        max_length: most tokens of a conversation in this vLLM.

    Raises:
        ValueError: for an invalid `ARMORM_RENDERED_TURNS`.
    """

    def __init__(self, tokenizer: Any, config: Any, max_length: int) -> None:
        turns = os.environ.get(_TURNS, "refuse")
        if turns not in get_args(RenderedTurns):
            raise ValueError(f"{_TURNS}: found {turns!r}, expected one of {', '.join(get_args(RenderedTurns))}")
        self.template = ChatTemplate(tokenizer)
        self.template.reasoning = config.limits.get("reasoning", "keep")
        vocabulary = config.backbone_config.get_text_config().vocab_size
        self.reader = RenderedReader(
            self.template, vocabulary, cast(RenderedTurns, turns), turns_setting=f"the environment variable {_TURNS}"
        )
        self.max_length = min(config.limits.get("max_length") or max_length, max_length)
        self.overflow: Overflow = "truncate_prompt" if config.limits.get("overflow") == "truncate_prompt" else "skip"
        self.pattern = list(config.gate_pattern)

    def conversation(self, conversation: Conversation) -> EncodedIds:
        """Ids of a conversation; a ConversationError for one that cannot be encoded."""
        rows = encode_rows(self.template, [conversation], self.max_length, self.overflow)
        if rows.rejected:
            raise ConversationError(rows.rejected[0][1])
        return self._checked(rows.encoded[0])

    def messages(self, messages: Any) -> EncodedIds:
        """Ids of a list of messages."""
        return self.conversation(Conversation.from_messages(messages))

    def text(self, text: str) -> EncodedIds:
        """Ids of a rendered conversation."""
        return self.conversation(self.reader.conversation(text))

    def pair(self, prompt: str, response: str) -> EncodedIds:
        """Ids of a prompt and the response to it."""
        return self.conversation(Conversation.from_prompt(prompt, response))

    def ids(self, ids: Sequence[Any]) -> EncodedIds:
        """Ids that a client has rendered by the model's own template."""
        return self._checked(self.reader.from_ids(ids))

    def _checked(self, encoded: EncodedConversation) -> EncodedIds:
        """The ids, if the last gate pattern in them is at the gate, as the pooler assumes."""
        ids, size = encoded.ids.tolist(), len(self.pattern)
        last = next((i for i in range(len(ids) - size, -1, -1) if ids[i : i + size] == self.pattern), None)
        if last != encoded.gate_position:
            raise ConversationError(
                f"found the last gate pattern {self.pattern} at {last}, expected it at {encoded.gate_position}"
            )
        return EncodedIds(ids)


def _or_refused(encode: Any, *arguments: Any) -> EncodedIds:
    """Encode; what the encoder rejects is vLLM's error of a bad request."""
    try:
        return encode(*arguments)
    except ConversationError as error:
        raise VLLMValidationError(str(error)) from None


class RewardRenderer(HfRenderer):
    """vLLM's renderer for reward models: every input becomes `EncodedIds`."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        model_config = config.model_config
        self.encoder = RewardEncoder(tokenizer, reward_config(model_config.hf_config), model_config.max_model_len)
        _encode_pairs(self.tokenizer, self.encoder)
        self._render_messages_async = make_async(self.render_messages, executor=self._executor)

    def render_messages(self, messages: Any, params: Any) -> tuple[Any, Any]:
        """Messages as they were sent, and their ids."""
        settings = params.chat_template_kwargs or {}
        other = [key for key in ("tools", "add_generation_prompt", "continue_final_message") if settings.get(key)]
        if params.chat_template is not None or other:
            raise VLLMValidationError(
                f"{', '.join(other) or 'chat_template'}: a reward model is read with its own chat template, expected "
                "messages alone"
            )
        return messages, {"prompt_token_ids": _or_refused(self.encoder.messages, messages)}

    async def render_messages_async(self, messages: Any, params: Any) -> tuple[Any, Any]:
        return await self._render_messages_async(messages, params)

    def warmup(self, chat_params: Any) -> None:
        """Nothing: the encoder has encoded a conversation, and vLLM's own one has no reply."""

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        return {**prompt, "prompt_token_ids": _or_refused(self.encoder.text, prompt["prompt"])}

    def _tokenize_singleton_prompt(self, prompt: Any, params: Any) -> Any:
        return super()._tokenize_singleton_prompt(self._with_checked_ids(prompt), params)

    async def _tokenize_singleton_prompt_async(self, prompt: Any, params: Any) -> Any:
        return await super()._tokenize_singleton_prompt_async(self._with_checked_ids(prompt), params)

    def _with_checked_ids(self, prompt: Any) -> Any:
        ids = prompt.get("prompt_token_ids")
        if ids is None or isinstance(ids, EncodedIds):
            return prompt
        return {**prompt, "prompt_token_ids": _or_refused(self.encoder.ids, ids)}

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        self._require_whole(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        self._require_whole(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def _require_whole(self, prompt: Any) -> None:
        if not isinstance(prompt["prompt_token_ids"], EncodedIds):
            raise VLLMValidationError(
                "truncate_prompt_tokens and padding would change the response, expected a conversation that fits; the "
                f"model's own limit is {self.encoder.max_length} tokens"
            )

    def _process_embeds(self, prompt: Any) -> Any:
        raise VLLMValidationError("prompt_embeds: expected messages, text or token ids")


def _encode_pairs(tokenizer: Any, encoder: RewardEncoder) -> None:
    """Make a tokenizer encode pairs of texts, which `/score` and `/rerank` give it, as prompt and response."""

    class PairTokenizer(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, text: Any = None, text_pair: Any = None, **kwargs: Any) -> Any:
            if text_pair is None:
                return super().__call__(text, **kwargs)
            if kwargs.get("truncation") == "only_second":
                raise VLLMValidationError("max_tokens_per_doc would cut the response, expected none")
            return BatchEncoding({"input_ids": _or_refused(encoder.pair, text, text_pair)})

    tokenizer.__class__ = PairTokenizer


class RewardProcessor(IOProcessor):
    """Answers with everything that scores are made of."""

    def __init__(self, vllm_config: Any, renderer: RewardRenderer) -> None:
        super().__init__(vllm_config, renderer)
        config = reward_config(vllm_config.model_config.hf_config)
        self.encoder = renderer.encoder
        self.names = config.objective_set.names
        self.means = config.reference.get("reward_means")

    def parse_data(self, data: Any) -> list[EncodedIds]:
        """Ids of each conversation of a request."""
        forms = {"conversations"}, {"prompt", "responses"}
        if not isinstance(data, dict) or set(data) not in forms:
            raise VLLMValidationError(f"data: found {shown(data)}, expected conversations, or prompt and responses")
        listed = data.get("conversations", data.get("responses"))
        if not isinstance(listed, list) or not listed:
            raise VLLMValidationError(f"data: found {shown(listed)}, expected a list of conversations or responses")
        return [_or_refused(self._encode, data, entry, index) for index, entry in enumerate(listed)]

    def _encode(self, data: dict[str, Any], entry: Any, index: int) -> EncodedIds:
        try:
            if "prompt" in data:
                return self.encoder.conversation(Conversation.from_prompt(data["prompt"], entry))
            return self.encoder.messages(entry)
        except ConversationError as error:
            place = f"data, {'response' if 'prompt' in data else 'conversation'} {index}"
            raise ConversationError(str(error), place) from None

    def merge_pooling_params(self, params: Any = None) -> Any:
        """Parameters that request everything."""
        params = params or PoolingParams()
        params.task, params.extra_kwargs = "classify", {**(params.extra_kwargs or {}), EVERYTHING: True}
        return params

    def pre_process(self, prompt: list[EncodedIds], request_id: str | None = None, **kwargs: Any) -> list[Any]:
        """Prompts for the engine."""
        return [{"prompt_token_ids": ids} for ids in prompt]

    def post_process(self, model_output: Sequence[Any], request_id: str | None = None, **kwargs: Any) -> list[Any]:
        """One dictionary per conversation, in the order of the request."""
        return [self._row(np.asarray(output.outputs.data.float().cpu(), np.float64)) for output in model_output]

    def _row(self, values: np.ndarray) -> dict[str, Any]:
        score = float(values[0])
        if not math.isfinite(score):
            raise ConversationError("the model's score is not a finite number")
        rewards, weights, coefficients = np.split(values[1:], 3)
        parts = {
            "rewards": rewards,
            "gating_weights": weights,
            "coefficients": coefficients,
            "contributions": attribution.contributions(coefficients, rewards),
        }
        if self.means:
            parts["relative"] = attribution.relative(coefficients, rewards, np.array(self.means))
        named = {part: dict(zip(self.names, found.tolist(), strict=True)) for part, found in parts.items()}
        return {"score": score, **named}
