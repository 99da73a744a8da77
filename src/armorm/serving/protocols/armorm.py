"""armorm's own format: `POST /v1/reward`.

In:  `{"conversations": [[message, ...], ...]}`, or `{"prompt": text or messages, "responses": [...]}`; optionally
     `normalize`, `steer` (the arguments of `ArmoRM.steer`), and `include`, the parts wanted.
Out: `{"model", "objectives", "normalized", "steering", "results": [...], "usage"}`. A result holds `index`,
     `score`, `tokens`, and each part as a list in the order of `objectives`; or `index` and `error`.

Contributions sum to the plain score. A row that cannot be scored has its error at its place; the answer is 200.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Union

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from armorm.backbone.rendered_text import RenderedReader
from armorm.conversation import Conversation
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import Exchange, Outcome, RefusedRow, Result, RowInput, filled, read_row

Part = Literal[
    "rewards",
    "ratings",
    "debiased_rewards",
    "gating_weights",
    "gating_output",
    "coefficients",
    "contributions",
    "relative",
    "uncertainty",
]
PARTS: tuple[Part, ...] = ("rewards", "gating_weights", "coefficients", "contributions")


class Blend(BaseModel):
    """Fixed weights for a share of the whole."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    share: float = Field(description="0 to 1.")
    weights: dict[str, float] = Field(default_factory=dict, description="By objective; equal ones where none is given.")


class Steer(BaseModel):
    """Explicit changes to how the objectives are weighed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    multiply: dict[str, float] = Field(default_factory=dict, description="Factor of each named gating weight, >= 0.")
    drop: list[str] = Field(default_factory=list, description="Objectives whose weight is shared out.")
    pin: dict[str, float] = Field(default_factory=dict, description="Fixed share of the weight, 0 to 1, by objective.")
    blend: Union[Blend, None] = Field(None, description="A share of the weight that goes by fixed weights.")
    debias_strength: float = Field(1.0, description="0 takes the debiasing back, 1 leaves it as trained.")


class RewardRequest(BaseModel):
    """Body of `POST /v1/reward`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"anyOf": [{"required": ["conversations"]}, {"required": ["prompt", "responses"]}]},
    )

    model: Union[str, None] = Field(None, description="Ignored: a server holds one model.")
    conversations: Union[list[Any], None] = Field(None, description="Each a list of messages that ends with the reply.")
    prompt: Union[str, list[Any], None] = Field(None, description="Text of one user turn, or messages.")
    responses: Union[list[Any], None] = Field(None, description="Texts, or assistant messages.")
    normalize: Union[bool, None] = Field(None, description="Scores in standard deviations from the reference mean.")
    steer: Steer = Field(default_factory=Steer)
    include: Union[list[Part], None] = Field(
        None,
        description=f"Parts of each score to send; by default {', '.join(PARTS)}, and uncertainty where the model "
        "carries it.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> RewardRequest:
        if (self.conversations is None) == (self.prompt is None):
            raise ValueError("expected either conversations, or prompt and responses")
        if (self.prompt is None) != (self.responses is None):
            raise ValueError("expected prompt and responses together")
        return self


def read(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request for rewards."""
    request = filled(RewardRequest, body)
    rows: list[RowInput]
    if request.conversations is not None:
        rows = [
            read_row(lambda messages=messages: Conversation.from_messages(messages))  # type: ignore[misc]
            for messages in request.conversations
        ]
    else:
        prompt = request.prompt
        assert prompt is not None and request.responses is not None
        rows = [
            read_row(lambda reply=reply: Conversation.from_prompt(prompt, reply))  # type: ignore[misc]
            for reply in request.responses
        ]
    include = None if request.include is None else list(dict.fromkeys(request.include))
    # (What is given, and no more: it goes to `ArmoRM.steer` as it stands.)
    asked = request.steer.model_dump(exclude_unset=True)
    steering = {key: value for key, value in asked.items() if value not in ({}, [], None)}

    def answer(outcome: Outcome) -> dict[str, Any]:
        return {
            "model": outcome.model,
            "objectives": outcome.objectives.names,
            "normalized": outcome.scale is not None,
            "steering": steering,
            "results": [_entry(index, result, outcome, include) for index, result in enumerate(outcome.results)],
            "usage": outcome.usage,
        }

    return Exchange(rows, answer, normalize=request.normalize, steering=steering, partial=True)


def _entry(index: int, result: Result, outcome: Outcome, include: list[Part] | None) -> dict[str, Any]:
    if isinstance(result, RefusedRow):
        return {"index": index, "error": result.reason}
    entry: dict[str, Any] = {"index": index, "score": outcome.score(result), "tokens": result.tokens}
    if result.truncated:
        entry["truncated_tokens"] = result.truncated
    if include is None:
        include = [*PARTS, "uncertainty"] if result.batch.uncertainty is not None else list(PARTS)
    for part in include:
        entry[part] = _part(part, result.batch, result.place, outcome).tolist()
    return entry


def _part(part: Part, batch: Any, place: int, outcome: Outcome) -> np.ndarray:
    if part == "ratings":
        return outcome.objectives.to_raw(batch.rewards[place])
    if part == "debiased_rewards":
        return batch.rewards[place].astype(np.float64) @ outcome.transform
    values = getattr(batch, part)
    if values is None:
        raise RequestError(400, f"include: this model carries no {part}")
    found: np.ndarray = values[place]
    return found
