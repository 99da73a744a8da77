"""OpenRLHF's remote reward model: `POST /get_reward` (FIELD 5).

In:  `{"query": [prompt and response as decoded, special tokens included], "prompts": [...], "labels": [...]}`.
Out: `{"rewards": [...], "scores": [...], "extra_logs": {name: [...]}}`, lists as long as `query`.

`prompts`, where given, is the exact prefix of each query: all that follows is one response. Surplus servers get
`query: []`, and answer with empty lists. `extra_logs` holds the predicted reward of each objective and its
contribution to the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Union

from pydantic import BaseModel, ConfigDict, Field

from armorm.backbone.rendered_text import RenderedReader
from armorm.serving.errors import RequestError
from armorm.serving.protocols.base import Exchange, Outcome, RowInput, ScoredRow, filled, read_row


class GetRewardRequest(BaseModel):
    """Body of `POST /get_reward`."""

    model_config = ConfigDict(strict=True)

    query: list[Any] = Field(description="Decoded texts: prompt and response, with special tokens.")
    prompts: Union[list[Any], None] = Field(None, description="The exact beginning of each query.")
    labels: Any = Field(None, description="Not used.")


def read(body: Mapping[str, Any], reader: RenderedReader) -> Exchange:
    """A request of OpenRLHF's trainer."""
    request = filled(GetRewardRequest, body)
    for name, values in (("prompts", request.prompts), ("labels", request.labels)):
        if isinstance(values, list) and len(values) != len(request.query):
            raise RequestError(
                400, f"{name}: found {len(values)}, expected one for each of {len(request.query)} queries"
            )
    prompts = request.prompts or [None] * len(request.query)
    rows = [_row(query, prompt, reader) for query, prompt in zip(request.query, prompts, strict=True)]
    return Exchange(rows, answer)


def _row(query: Any, prompt: Any, reader: RenderedReader) -> RowInput:
    if prompt is None:
        return read_row(lambda: reader.conversation(query))
    return read_row(lambda: reader.continuation(query, prompt))


def answer(outcome: Outcome) -> dict[str, Any]:
    """Rewards, the same as scores, and what to log."""
    scores = outcome.scores
    logs: dict[str, list[float | None]] = {}
    for label in ("rewards", "contributions"):
        for i, name in enumerate(outcome.objectives.names):
            logs[f"{label.removesuffix('s')}/{name}"] = [
                float(getattr(result.batch, label)[result.place, i]) if isinstance(result, ScoredRow) else None
                for result in outcome.results
            ]
    if outcome.empty_score is not None:
        # (These are averaged as they come: an empty response counts for none of them, and is counted itself.)
        logs = {name: [0.0 if value is None else value for value in values] for name, values in logs.items()}
        logs["empty_response"] = [0.0 if isinstance(result, ScoredRow) else 1.0 for result in outcome.results]
    found: dict[str, Any] = {"rewards": scores, "scores": scores, "extra_logs": logs if scores else {}}
    return found | ({"errors": outcome.errors} if outcome.errors else {})
