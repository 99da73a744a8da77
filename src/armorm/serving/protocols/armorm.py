"""armorm's own format: `POST /v1/reward`, scores with everything they are made of.

Request: `{"conversations": [[message, ...], ...]}`, or `{"prompt": text or messages, "responses": [...]}`; a
conversation may also be `{"messages": [...], "tools": [...]}`. Optionally `tools` of all conversations, `turns`,
`normalize`, `steer` (the arguments of `ArmoRM.steer`), `include` (parts of the scores), and `per_token` with
`policy_tokens` (each score as a sum over tokens or sentences: `armorm.explain.dense_rewards`).
Response: `{"model", "objectives", "normalized", "steering", "results": [...], "usage"}`. A result holds `index`,
`score`, `tokens`, the parts, each a list in the order of `objectives`, and `per_token`; or `index` and `error`.

With `turns: "all"` there is a result for each assistant turn: `index` is that of the conversation, `turn` the place of
the reply in its messages.

Contributions sum to the plain score. The status is 200 even if no row has a score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.backbone.score_input import answered_turns
from armorm.conversation import Conversation
from armorm.errors import ConversationError, nearest, shown
from armorm.explain.dense_rewards import Unit
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base

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
    """Fixed weights for a share of the total weight."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    share: float = Field(description="0 to 1.")
    weights: dict[str, float] = Field(default_factory=dict, description="Weight of each objective; equal if empty.")


class Steer(BaseModel):
    """Changes to the weights of the objectives."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    multiply: dict[str, float] = Field(default_factory=dict, description="Factor of each named gating weight, >= 0.")
    drop: list[str] = Field(default_factory=list, description="Objectives whose weight goes to the others.")
    pin: dict[str, float] = Field(default_factory=dict, description="Fixed share of the weight, 0 to 1, by objective.")
    blend: Union[Blend, None] = Field(None, description="Fixed weights for a share of the total weight.")
    debias_strength: float = Field(1.0, description="Strength of the debiasing: 0 off, 1 as trained.")

    @model_validator(mode="before")
    @classmethod
    def _factors_are_in_multiply(cls, value: Any) -> Any:
        """Numbers by objective are `steer=` of `ArmoRM.steer` and the client: here they are `multiply`."""
        for name, factor in value.items() if isinstance(value, dict) else ():
            is_field = name in cls.model_fields or nearest(name, cls.model_fields)
            if isinstance(factor, (int, float)) and not is_field:
                form = json.dumps({"multiply": {name: factor}})
                raise ValueError(f"found a number for {shown(name)}, expected {form} for a factor of an objective")
        return value


class RewardRequest(base.ModelRequest):
    """Body of `POST /v1/reward`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"anyOf": [{"required": ["conversations"]}, {"required": ["prompt", "responses"]}]},
    )

    conversations: Union[list[Any], None] = Field(
        None, description="Lists of messages, each ending with the reply; or objects of `messages` and `tools`."
    )
    prompt: Union[str, list[Any], None] = Field(None, description="Text of one user turn, or messages.")
    responses: Union[list[Any], None] = Field(None, description="Texts, or assistant messages.")
    tools: Union[list[Any], None] = Field(
        None, description="Definitions of the tools, of conversations that have none of their own."
    )
    turns: Literal["last", "all"] = Field(
        "last", description="`all`: a result for every assistant turn, as if the conversation ended there."
    )
    normalize: Union[bool, None] = Field(None, description="Scores in standard deviations from the reference mean.")
    steer: Steer = Field(default_factory=Steer)
    include: Union[list[Part], None] = Field(
        None,
        description=f"Parts of each score to send; by default {', '.join(PARTS)}, and uncertainty if the model "
        "provides it.",
    )
    per_token: Union[Unit, None] = Field(
        None, description="Also each score as a sum over tokens, or over the sentences of the response."
    )
    policy_tokens: Union[Literal["tokenizer"], list[Any], None] = Field(
        None,
        description="Tokens of the policy that the sum is over, for each conversation: their texts, their numbers of "
        "characters, or [start, end] in characters of the response; null for the reward model's own. `tokenizer`: "
        "those of the server's policy tokenizer.",
    )

    @model_validator(mode="after")
    def _one_form(self) -> RewardRequest:
        if (self.conversations is None) == (self.prompt is None):
            raise ValueError("expected either conversations, or prompt and responses")
        if (self.prompt is None) != (self.responses is None):
            raise ValueError("expected prompt and responses together")
        if self.policy_tokens is not None and self.per_token is None:
            raise ValueError("policy_tokens: expected per_token with them")
        if self.policy_tokens is not None and self.turns == "all":
            raise ValueError('policy_tokens: expected turns "last": they are those of one reply')
        return self


@base.closed
class PerTokenRewards(TypedDict):
    """A score as a sum over tokens or sentences."""

    rewards: list[float]  # they sum to the score
    spans: list[list[int]]  # start and end of each, in characters of the response
    # What is read from the last token's state and is no sum over tokens: a part of the last reward, paid at the end. No
    # potential is subtracted.
    rest: float
    exact_share: float  # of the score, that is an exact sum over tokens; 0 to 1
    last_tokens: NotRequired[list[int]]  # index of the policy's token that each sentence ends in


@base.closed
class ScoredResult(TypedDict):
    """A scored conversation; parts are lists in the order of `objectives`."""

    index: int
    turn: NotRequired[int]
    score: float
    tokens: int
    truncated_tokens: NotRequired[int]
    rewards: NotRequired[list[float]]
    ratings: NotRequired[list[float]]
    debiased_rewards: NotRequired[list[float]]
    gating_weights: NotRequired[list[float]]
    gating_output: NotRequired[list[float]]
    coefficients: NotRequired[list[float]]
    contributions: NotRequired[list[float]]
    relative: NotRequired[list[float]]
    uncertainty: NotRequired[list[float]]
    per_token: NotRequired[PerTokenRewards]


@base.closed
class RefusedResult(TypedDict):
    """A conversation without a score, and the reason."""

    index: int
    turn: NotRequired[int]
    error: str


@base.closed
class RewardAnswer(TypedDict):
    """Response of `POST /v1/reward`."""

    model: str
    objectives: list[str]
    normalized: bool
    steering: dict[str, Any]
    results: list[Union[ScoredResult, RefusedResult]]
    usage: base.Usage


@base.route(
    "/v1/reward",
    RewardAnswer,
    "Scores with rewards, weights and contributions of every objective",
    {"conversations": [base.EXAMPLE_MESSAGES], "normalize": False},
)
def read(request: RewardRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Conversations to score."""
    tools = request.tools
    if request.conversations is not None:
        rows = [base.read_row(_conversation, given, tools) for given in request.conversations]
    else:
        replies = request.responses or ()
        rows = [base.read_row(Conversation.from_prompt, request.prompt, reply, "response", tools) for reply in replies]
    places: list[dict[str, int]] = [{"index": index} for index in range(len(rows))]
    if request.turns == "all":
        turns = [(index, *turn) for index, row in enumerate(rows) for turn in _turns(row)]
        rows = [row for *_, row in turns]
        places = [{"index": index} if turn is None else {"index": index, "turn": turn} for index, turn, _ in turns]
    given = request.policy_tokens
    if isinstance(given, list) and len(given) != len(rows):
        raise RequestError(400, f"policy_tokens: found {len(given)} rows, expected {len(rows)}, one per conversation")
    per_token = None if request.per_token is None else base.PerToken(request.per_token, given)
    include = None if request.include is None else list(dict.fromkeys(request.include))
    # Only what the client sent: it is passed to `ArmoRM.steer` and returned unchanged.
    steering = {
        key: value for key, value in request.steer.model_dump(exclude_unset=True).items() if value not in ({}, [], None)
    }

    def write(scores: base.RequestScores) -> dict[str, Any]:
        return {
            "model": scores.model,
            "objectives": scores.objectives.names,
            "normalized": scores.scale is not None,
            "steering": steering,
            "results": _results(scores, include, places),
            "usage": scores.usage,
        }

    return base.ParsedRequest(
        rows, write, normalize=request.normalize, steering=steering, per_token=per_token, partial=True
    )


def _conversation(given: Any, tools: list[Any] | None) -> Conversation:
    if not isinstance(given, dict):
        return Conversation.from_messages(given, tools)
    if given.keys() - {"messages", "tools"}:
        raise ConversationError(f"found fields {shown(list(given))}, expected messages and tools")
    return Conversation.from_messages(given.get("messages"), given.get("tools", tools))  # type: ignore[arg-type]


def _turns(row: base.RowInput) -> list[tuple[int | None, base.RowInput]]:
    """Place and row of each assistant turn; a row without a conversation has no place."""
    return [*answered_turns(row, "all")] if isinstance(row, Conversation) else [(None, row)]


def _results(
    scores: base.RequestScores, include: list[Part] | None, places: Sequence[Mapping[str, int]]
) -> list[dict[str, Any]]:
    """A result for each row, with its place: index, and turn."""
    batch = scores.batch
    if include is None:
        include = [*PARTS, "uncertainty"] if batch.uncertainty is not None else list(PARTS)
    parts = {part: _part(part, scores).tolist() for part in include} if len(batch) else {}
    results: list[dict[str, Any]] = [
        {**place, "score": score} if reason is None else {**place, "error": reason}
        for place, (score, reason) in zip(places, scores.rows, strict=True)
    ]
    for at, index in enumerate(batch.rows.tolist()):
        results[index]["tokens"] = scores.tokens[at]
        if index in scores.truncated:
            results[index]["truncated_tokens"] = scores.truncated[index]
        results[index].update((part, values[at]) for part, values in parts.items())
        if (dense := scores.dense.get(index)) is not None:
            results[index]["per_token"] = {
                "rewards": dense.rewards.tolist(),
                "spans": dense.spans.tolist(),
                "rest": dense.rest,
                "exact_share": dense.exact_share,
            }
            if dense.last_tokens is not None:
                results[index]["per_token"]["last_tokens"] = dense.last_tokens.tolist()
    return results


def _part(part: Part, scores: base.RequestScores) -> np.ndarray:
    """(m, k) values of the scored rows."""
    if part == "ratings":
        return scores.objectives.to_raw(scores.batch.rewards)
    if part == "debiased_rewards":
        return scores.batch.rewards.astype(np.float64) @ scores.transform
    values: np.ndarray | None = getattr(scores.batch, part)
    if values is None:
        raise RequestError(400, f"include: this model carries no {part}")
    return values


ROUTES = (read,)
