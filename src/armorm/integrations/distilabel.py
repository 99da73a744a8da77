"""distilabel: pipeline steps that score generated responses.

    rate = ArmoRMRatings(model="http://127.0.0.1:8008")           # or the name or folder of a model
    load >> generate >> group >> rate >> FormatTextGenerationDPO()

`ArmoRMScore` scores one response per row, `ArmoRMRatings` all generations of a row, for preference data. A row's
`system_prompt`, if any, precedes its instruction.

A response that cannot be scored, such as one that the LLM failed to generate, has null as its score and the reason in
`refusal`; their number is logged, and the others of its batch are scored. (If a step raises, distilabel fills the whole
batch with nulls.) The API key of a server is read from ARMORM_API_KEY, so that it is not part of a saved pipeline.
"""

# No `from __future__ import annotations`: distilabel reads the annotations of `process`.
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

from pydantic import Field, PrivateAttr

from armorm.conversation import Conversation
from armorm.errors import ArmormError, ConversationError, MissingExtraError, shown
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.integrations.rewards import IntegrationError, is_client, opened

try:
    from distilabel.steps import Step, StepInput
except ImportError:
    raise MissingExtraError("this step needs distilabel, expected: pip install distilabel") from None

if TYPE_CHECKING:
    from distilabel.typing import StepColumns, StepOutput

_Read = Union[Conversation, ConversationError]
_Rated = dict[str, Any]  # score, rewards, contributions, refusal of one response


class _RewardStep(Step):
    """A step that scores the responses of its rows.

    Attributes:
        model: name, folder or hub id of a reward model, or the URL of a server. Defaults to the embedded one.
        dtype: dtype of the model's weights, as for `ArmoRM.from_pretrained`. Defaults to `"auto"`.
        device: device of the model, as for `ArmoRM.from_pretrained`. Defaults to `"auto"`.
        normalize: scores in standard deviations from the reference mean. Defaults to `False`.
        steer: factors of the objectives' weights, as for `ArmoRM.steer`. Defaults to none.
        drop: objectives to drop, as for `ArmoRM.steer`. Defaults to none.
    """

    model: str = DEFAULT_REWARD_MODEL
    dtype: str = "auto"
    device: str = "auto"
    normalize: bool = False
    steer: dict[str, float] = Field(default_factory=dict)
    drop: list[str] = Field(default_factory=list)

    _source: Any = PrivateAttr(None)
    _options: dict[str, Any] = PrivateAttr(default_factory=dict)

    def load(self) -> None:
        """Load the model, or open a client of the server."""
        super().load()
        source = opened(self.model, self.dtype, self.device)
        self._options = {"normalize": self.normalize, "on_refused": "skip"}
        if is_client(source):  # a server is steered by each request
            self._options |= {"steer": self.steer, "drop": self.drop}
        elif self.steer or self.drop:
            source = source.steer(self.steer, drop=self.drop)
        self._source = source

    def unload(self) -> None:
        """Release the model."""
        self._source = None
        super().unload()

    def process(self, inputs: StepInput) -> "StepOutput":
        """Score the responses of all rows in one call."""
        conversations = [self._conversations(row) for row in inputs]
        rated = iter(self._rated([conversation for row in conversations for conversation in row]))
        for row, own in zip(inputs, conversations, strict=True):
            self._write(row, [next(rated) for _ in own])
        yield inputs

    def _conversations(self, row: dict[str, Any]) -> list[_Read]:
        raise NotImplementedError

    def _write(self, row: dict[str, Any], rated: list[_Rated]) -> None:
        raise NotImplementedError

    def _rated(self, conversations: Sequence[_Read]) -> list[_Rated]:
        if self._source is None:
            raise IntegrationError("the step is not loaded, expected a call of load() first")
        nothing: _Rated = {"score": None, "rewards": None, "contributions": None}
        found: list[_Rated] = [nothing | {"refusal": str(conversation)} for conversation in conversations]
        places = [place for place, given in enumerate(conversations) if isinstance(given, Conversation)]
        if places:
            batch = self._source.score([conversations[place] for place in places], **self._options)
            if len(batch.scores) + len(batch.rejected) != len(places):
                raise IntegrationError(f"found {len(batch.scores)} scores, expected {len(places)}")
            for row, reason in batch.rejected:
                found[places[row]]["refusal"] = reason
            for at, row in enumerate(batch.rows.tolist()):
                score = float(batch.scores[at])
                if not math.isfinite(score):
                    raise ArmormError(f"found score {score}, expected a finite number")
                found[places[row]] = {"score": score, "refusal": None}
                for part in ("rewards", "contributions"):
                    found[places[row]][part] = dict(zip(batch.names, getattr(batch, part)[at].tolist(), strict=True))
        rejected = sum(entry["score"] is None for entry in found)
        if rejected:
            self._logger.warning("%d of %d responses have no score; see `refusal`", rejected, len(found))
        return found


class ArmoRMScore(_RewardStep):
    """Score one response per row, with the reward and contribution of every objective.

    Input columns:
        - instruction (`str`, optional): the prompt; requires `response`.
        - response (`str`, optional): the reply.
        - system_prompt (`str`, optional): system prompt of the instruction.
        - conversation (`ChatType`, optional): a conversation that ends with the reply, instead of the others.

    Output columns:
        - score (`float`): the score.
        - rewards (`Dict[str, float]`): predicted reward of each objective.
        - contributions (`Dict[str, float]`): contribution of each objective to the plain score.
        - refusal (`str`): why a row has no score.

    Categories:
        - scorer
    """

    @property
    def inputs(self) -> "StepColumns":
        return {"instruction": False, "response": False, "system_prompt": False, "conversation": False}

    @property
    def outputs(self) -> "StepColumns":
        return ["score", "rewards", "contributions", "refusal"]

    def _conversations(self, row: dict[str, Any]) -> list[_Read]:
        if row.get("conversation") is not None:
            return [_read(row["conversation"])]
        if "instruction" not in row or "response" not in row:
            return [ConversationError("found neither instruction and response nor conversation, expected either")]
        return [_replied(row, row["response"])]

    def _write(self, row: dict[str, Any], rated: list[_Rated]) -> None:
        row.update(rated[0])


class ArmoRMRatings(_RewardStep):
    """Score several generations of each instruction, for preference data.

    Input columns:
        - instruction (`str`): the prompt.
        - generations (`List[str]`): the replies.
        - system_prompt (`str`, optional): system prompt of the instruction.

    Output columns:
        - ratings (`List[float]`): the score of each generation.
        - rewards (`List[Dict[str, float]]`): predicted reward of each objective.
        - contributions (`List[Dict[str, float]]`): contribution of each objective to the plain score.
        - refusals (`List[str]`): why a generation has no rating.

    Categories:
        - scorer
        - preference
    """

    @property
    def inputs(self) -> "StepColumns":
        return {"instruction": True, "generations": True, "system_prompt": False}

    @property
    def outputs(self) -> "StepColumns":
        return ["ratings", "rewards", "contributions", "refusals"]

    def _conversations(self, row: dict[str, Any]) -> list[_Read]:
        replies = row["generations"]
        if not isinstance(replies, list):
            raise IntegrationError(f"generations: found {shown(replies)}, expected a list of texts")
        return [_replied(row, reply) for reply in replies]

    def _write(self, row: dict[str, Any], rated: list[_Rated]) -> None:
        parts = {"ratings": "score", "rewards": "rewards", "contributions": "contributions", "refusals": "refusal"}
        row.update({column: [entry[part] for entry in rated] for column, part in parts.items()})


def _replied(row: dict[str, Any], reply: Any) -> _Read:
    system = row.get("system_prompt")
    turns = [("system", system)] if system else []
    turns += [("user", row["instruction"]), ("assistant", reply)]
    return _read([{"role": role, "content": content} for role, content in turns])


def _read(messages: Any) -> _Read:
    try:
        return Conversation.from_messages(messages)
    except ConversationError as error:
        return error
