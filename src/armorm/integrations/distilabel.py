"""distilabel: steps that rate what a pipeline has generated.

    rate = ArmoRMRatings(model="http://127.0.0.1:8008")           # or the name or folder of a model
    load >> generate >> group >> rate >> FormatTextGenerationDPO()

In:  `ArmoRMScore`: rows of `instruction` and `response`, or of a `conversation` that ends with the reply;
     `ArmoRMRatings`: rows of `instruction` and `generations`. Before an instruction goes its `system_prompt`, where a
     row has one.
Out: `ArmoRMScore`: columns `score`, `rewards`, `contributions` (a number for each objective), `refusal`;
     `ArmoRMRatings`: `ratings` (the scores; distilabel's steps for preferences read them), `rewards`,
     `contributions`, `refusals`: lists as long as `generations`.

A response that cannot be scored, such as one that the LLM failed to give, has null for its score and the reason in
`refusal`, and their number is logged; the others of its batch are scored. (Of a step that raises, distilabel fills the
whole batch with nulls.) The key of a server is read from ARMORM_API_KEY, so that it stands in no dumped pipeline.

Unlike the other integrations this one imports the library that it is for: distilabel finds steps by their class.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, PrivateAttr

from armorm.conversation import Conversation
from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.errors import ArmormError, ConversationError, MissingExtraError, shown
from armorm.integrations.rewards import IntegrationError, opened

try:
    from distilabel.steps import Step, StepInput
except ImportError:
    raise MissingExtraError("this step needs distilabel, expected: pip install distilabel") from None

if TYPE_CHECKING:
    from distilabel.typing import StepColumns, StepOutput

_Rated = dict[str, Any]  # score, rewards, contributions, refusal of one response


class _Rater(Step):
    """What both steps share.

    Attributes:
        model: name, folder or hub id of a reward model, or the URL of a server.
        dtype, device: as for `ArmoRM.from_pretrained`; not for a server.
        normalize: scores in standard deviations from the reference mean.
        steer, drop: as for `ArmoRM.steer`.
    """

    model: str = EMBEDDED_REWARD_MODEL
    dtype: str = "auto"
    device: str = "auto"
    normalize: bool = False
    steer: dict[str, float] = Field(default_factory=dict)
    drop: list[str] = Field(default_factory=list)

    _source: Any = PrivateAttr(None)
    _options: dict[str, Any] = PrivateAttr(default_factory=dict)

    def load(self) -> None:
        """Open the model or the server."""
        super().load()
        source = opened(self.model, self.dtype, self.device)
        self._options = {"normalize": self.normalize, "on_refused": "skip"}
        if hasattr(source, "info"):  # a server is told with each request
            self._options |= {"steer": self.steer, "drop": self.drop}
        elif self.steer or self.drop:
            source = source.steer(self.steer, drop=self.drop)
        self._source = source

    def unload(self) -> None:
        """Let the model go."""
        self._source = None
        super().unload()

    def _rated(self, conversations: Sequence[Conversation | ConversationError]) -> list[_Rated]:
        """Score, rewards and contributions of each, or why there are none."""
        if self._source is None:
            raise IntegrationError("the step is not loaded, expected a call of load() first")
        found: list[_Rated] = [
            {"score": None, "rewards": None, "contributions": None, "refusal": str(conversation)}
            for conversation in conversations
        ]
        places = [place for place, given in enumerate(conversations) if isinstance(given, Conversation)]
        if places:
            batch = self._source.score([conversations[place] for place in places], **self._options)
            if len(batch.scores) + len(batch.rejected) != len(places):
                raise IntegrationError(f"found {len(batch.scores)} scores, expected {len(places)}")
            for row, reason in batch.rejected:
                found[places[row]]["refusal"] = reason
            for at, row in enumerate(batch.rows.tolist()):
                found[places[row]] = {
                    "score": _finite(float(batch.scores[at])),
                    "rewards": dict(zip(batch.names, batch.rewards[at].tolist(), strict=True)),
                    "contributions": dict(zip(batch.names, batch.contributions[at].tolist(), strict=True)),
                    "refusal": None,
                }
        refused = sum(entry["score"] is None for entry in found)
        if refused:
            self._logger.warning("%d of %d responses have no score; `refusal` says why", refused, len(found))
        return found


class ArmoRMScore(_Rater):
    """Score one response a row, with everything the score is made of.

    Attributes:
        model: name, folder or hub id of a reward model, or the URL of a server. Defaults to the embedded one.
        dtype: of the model's weights. Defaults to `"auto"`.
        device: that the model is put on. Defaults to `"auto"`.
        normalize: scores in standard deviations from the reference mean. Defaults to `False`.
        steer: factors of the objectives' weights. Defaults to none.
        drop: objectives that are left out. Defaults to none.

    Input columns:
        - instruction (`str`, optional): what was asked; `response` must stand beside it.
        - response (`str`, optional): the reply.
        - system_prompt (`str`, optional): of the instruction.
        - conversation (`ChatType`, optional): a conversation that ends with the reply, in place of the others.

    Output columns:
        - score (`float`): the score.
        - rewards (`Dict[str, float]`): predicted reward of each objective.
        - contributions (`Dict[str, float]`): what each objective adds to the plain score.
        - refusal (`str`): why a row has no score.

    Categories:
        - scorer
    """

    @property
    def inputs(self) -> "StepColumns":
        """`instruction` and `response`, or `conversation`."""
        return {"instruction": False, "response": False, "system_prompt": False, "conversation": False}

    @property
    def outputs(self) -> "StepColumns":
        """The score and its parts."""
        return ["score", "rewards", "contributions", "refusal"]

    def process(self, inputs: StepInput) -> "StepOutput":
        """Score a batch of rows."""
        for row, rated in zip(inputs, self._rated([_conversation(row) for row in inputs]), strict=True):
            row.update(rated)
        yield inputs


class ArmoRMRatings(_Rater):
    """Rate several generations of each instruction, for preference data.

    Attributes:
        model: name, folder or hub id of a reward model, or the URL of a server. Defaults to the embedded one.
        dtype: of the model's weights. Defaults to `"auto"`.
        device: that the model is put on. Defaults to `"auto"`.
        normalize: scores in standard deviations from the reference mean. Defaults to `False`.
        steer: factors of the objectives' weights. Defaults to none.
        drop: objectives that are left out. Defaults to none.

    Input columns:
        - instruction (`str`): what was asked.
        - generations (`List[str]`): the replies.
        - system_prompt (`str`, optional): of the instruction.

    Output columns:
        - ratings (`List[float]`): the score of each generation.
        - rewards (`List[Dict[str, float]]`): predicted reward of each objective.
        - contributions (`List[Dict[str, float]]`): what each objective adds to the plain score.
        - refusals (`List[str]`): why a generation has no rating.

    Categories:
        - scorer
        - preference
    """

    @property
    def inputs(self) -> "StepColumns":
        """`instruction` and `generations`."""
        return {"instruction": True, "generations": True, "system_prompt": False}

    @property
    def outputs(self) -> "StepColumns":
        """Lists of scores and their parts."""
        return ["ratings", "rewards", "contributions", "refusals"]

    def process(self, inputs: StepInput) -> "StepOutput":
        """Rate a batch of rows, all of their generations in one call.

        Raises:
            IntegrationError: for a row whose `generations` are no list.
        """
        counts = []
        conversations: list[Conversation | ConversationError] = []
        for row in inputs:
            replies = row["generations"]
            if not isinstance(replies, list):
                raise IntegrationError(f"generations: found {shown(replies)}, expected a list of texts")
            counts.append(len(replies))
            conversations += [_replied(row, row["instruction"], reply) for reply in replies]
        rated = iter(self._rated(conversations))
        for row, count in zip(inputs, counts, strict=True):
            own = [next(rated) for _ in range(count)]
            row["ratings"] = [entry["score"] for entry in own]
            row["rewards"] = [entry["rewards"] for entry in own]
            row["contributions"] = [entry["contributions"] for entry in own]
            row["refusals"] = [entry["refusal"] for entry in own]
        yield inputs


def _conversation(row: dict[str, Any]) -> Conversation | ConversationError:
    if row.get("conversation") is not None:
        return _read(row["conversation"])
    if "instruction" not in row or "response" not in row:
        return ConversationError("found neither instruction and response nor conversation, expected either")
    return _replied(row, row["instruction"], row["response"])


def _replied(row: dict[str, Any], instruction: Any, reply: Any) -> Conversation | ConversationError:
    system = row.get("system_prompt")
    turns = [("system", system)] if system else []
    turns += [("user", instruction), ("assistant", reply)]
    return _read([{"role": role, "content": content} for role, content in turns])


def _read(messages: Any) -> Conversation | ConversationError:
    try:
        return Conversation.from_messages(messages)
    except ConversationError as error:
        return error


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise ArmormError(f"found score {score}, expected a finite number")
    return score
