"""OpenRLHF's remote reward model: `POST /get_reward` (OpenRLHF, `--reward.remote_url`).

Request: `{"query": [prompt and response as decoded, special tokens included], "prompts": [...], "labels": [...]}`.
Response: `{"rewards": [...], "scores": [...], "extra_logs": {name: [...]}}`, lists as long as `query`.

`prompts`, if given, is the exact prefix of each query; everything after it is one response. Earlier
versions of OpenRLHF with more servers than samples send `query: []`, which gets empty lists. `extra_logs` holds the
predicted reward of each objective and its contribution to the score.
"""

from __future__ import annotations

from typing import Any, Union

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.errors import RequestError
from armorm.serving.protocols import base


class GetRewardRequest(BaseModel):
    """Body of `POST /get_reward`."""

    model_config = ConfigDict(strict=True)

    query: list[Any] = Field(description="Decoded texts: prompt and response, with special tokens.")
    prompts: Union[list[Any], None] = Field(None, description="The exact prefix of each query.")
    labels: Any = Field(None, description="Not used.")


@base.closed
class GetRewardAnswer(TypedDict):
    """Response of `POST /get_reward`; lists as long as `query`."""

    rewards: list[Union[float, None]]
    scores: list[Union[float, None]]
    extra_logs: dict[str, list[Union[float, None]]]
    errors: NotRequired[list[base.RowError]]


@base.route(
    "/get_reward",
    GetRewardAnswer,
    "OpenRLHF remote reward model",
    {"query": [base.EXAMPLE_RENDERED], "prompts": [base.EXAMPLE_PROMPT], "labels": [None]},
)
def read(request: GetRewardRequest, reader: RenderedReader) -> base.ParsedRequest:
    """Texts to score, each split at the end of its prompt."""
    for name, values in (("prompts", request.prompts), ("labels", request.labels)):
        if isinstance(values, list) and len(values) != len(request.query):
            raise RequestError(
                400, f"{name}: found {len(values)}, expected one for each of {len(request.query)} queries"
            )
    prompts = request.prompts or [None] * len(request.query)
    rows = [
        base.read_row(reader.conversation, query)
        if prompt is None
        else base.read_row(reader.continuation, query, prompt)
        for query, prompt in zip(request.query, prompts, strict=True)
    ]
    return base.ParsedRequest(rows, _write)


def _write(scores: base.RequestScores) -> dict[str, Any]:
    batch, values = scores.batch, scores.scores
    n = len(values)
    # Trainers average the logs: if empty responses have a score, their rows are zeros and are counted in a log of their
    # own; otherwise rows without a score are null.
    rest: float | None = None if scores.empty_score is None else 0.0
    logs: dict[str, list[float | None]] = {}
    for label in ("rewards", "contributions"):
        for name, column in zip(scores.objectives.names, getattr(batch, label).T.tolist(), strict=True):
            found = dict(zip(batch.rows.tolist(), column, strict=True))
            logs[f"{label.removesuffix('s')}/{name}"] = [found.get(index, rest) for index in range(n)]
    if scores.empty_score is not None:
        logs["empty_response"] = (~np.isin(np.arange(n), batch.rows)).astype(float).tolist()
    body: dict[str, Any] = {"rewards": values, "scores": values, "extra_logs": logs if values else {}}
    return body | ({"errors": scores.errors} if scores.errors else {})


ROUTES = (read,)
