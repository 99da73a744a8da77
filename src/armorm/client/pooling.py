"""Client of vLLM's pooling server: scores of conversations from `POST /classify` or `/pooling`.

A server with armorm's plugin (docs/vllm.md) encodes messages as `ArmoRM.score` does, many in a request, and sends
rewards, weights and contributions by the names of the objectives (`plugin`). For any other server, `encode` turns
conversations into token ids: many are sent in one request, and no text can forge a turn. Without it each conversation
is one request of messages, which the server renders with the template of its model; vLLM reads template tokens inside a
message as such.

A request that the server rejects (400, 413, 422) rejects its conversation alone, unless all are rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Union, cast, get_args

import numpy as np

from armorm.client.http import JsonClient, Request, RewardServerError, json_request
from armorm.client.reward import RewardClient, ServedScores, as_messages
from armorm.conversation import Conversation
from armorm.errors import ConversationError, shown
from armorm.progress import Advance, ignore

Api = Literal["plugin", "classify", "pooling"]
# From conversations and the server's maximum length to the token ids of each, or why it has none.
Encode = Callable[[Sequence[Conversation], Union[int, None]], Sequence[Union[list[int], str]]]
APIS = ("armorm", *get_args(Api))
_COLUMNS = ("rewards", "gating_weights", "gating_output", "coefficients", "contributions", "relative")
_REJECTING = frozenset({400, 413, 422})
_ABSENT = frozenset({404, 405})
_PROBE = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]


class PoolingClient(JsonClient):
    """Client of a server that loads the model as a classifier with one logit.

    Args:
        url: address of the server.
        api: route to use, `classify` or `pooling`; `plugin` is `/pooling` of a server with armorm's plugin.
        encode: from conversations to token ids; None sends messages, which `plugin` expects.
        rows_per_request: conversations of one request, unless messages are sent to `classify` or `pooling`.
        settings: api_key, timeout, retries, connections, verify, as for `Connections`.
    """

    def __init__(
        self,
        url: str,
        api: Api = "classify",
        *,
        encode: Encode | None = None,
        rows_per_request: int = 32,
        **settings: Any,
    ) -> None:
        if api == "plugin" and encode is not None:
            raise RewardServerError(f"{url}: the plugin takes messages, expected no tokenizer (or api=classify)")
        super().__init__(url, **settings)
        self.api, self.encode, self.rows_per_request = api, encode, rows_per_request

    @cached_property
    def card(self) -> Mapping[str, Any]:
        """The server's entry of its model: `id`, `max_model_len`, `root`."""
        return model_card(self)

    def score(
        self,
        conversations: Sequence[Conversation],
        *,
        normalize: bool = False,
        on_refused: Literal["error", "skip"] = "error",
        advance: Advance = ignore,
    ) -> ServedScores:
        """Score conversations; only the plugin sends objectives, of which the result has no `gating_output`.

        Args:
            normalize: not available, since such a server has no reference scores.
            on_refused: whether a conversation that cannot be scored is an error or an entry of `rejected` (`skip`).
            advance: called with the number of conversations just done.

        Raises:
            ConversationError: naming the first conversation that cannot be scored, and why.
            RewardServerError: if the server rejects all requests, stays unreachable, or sends an invalid response.
        """
        if normalize:
            raise RewardServerError(f"{self.address}: has no reference scores to normalise by, as armorm serve has")
        inputs, reasons = self._inputs(conversations)
        rows, entries = list(inputs), dict[int, Mapping[str, Any]]()
        size = self.rows_per_request if self.api == "plugin" or self.encode is not None else 1
        failed: list[tuple[list[int], RewardServerError]] = []
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        while parts:
            answers = self.send_all(
                [self._request(inputs, part) for part in parts], list(map(len, parts)), advance, _REJECTING
            )
            failed = []
            for part, answer in zip(parts, answers, strict=True):
                if isinstance(answer, RewardServerError):
                    failed.append((part, answer))
                else:
                    self._read(part, answer, entries, reasons)
            # A rejected request of several rows is sent again row by row, to lose only the faulty ones.
            reasons |= {part[0]: str(error) for part, error in failed if len(part) == 1}
            parts = [[row] for part, _ in failed if len(part) > 1 for row in part]
        if failed and not entries:
            raise failed[0][1]
        rejected = sorted(reasons.items())
        if rejected and on_refused == "error":
            raise ConversationError(rejected[0][1], f"conversation {rejected[0][0]}")
        known = sorted(entries)
        names, columns = self._columns([entries[row] for row in known])
        return ServedScores(
            scores=np.array([entries[row]["score"] for row in known], np.float32),
            **columns,
            names=names,
            rows=np.array(known, np.int64),
            rejected=rejected,
            model=str(self.card.get("id", "")),
        )

    def _inputs(self, conversations: Sequence[Conversation]) -> tuple[dict[int, Any], dict[int, str]]:
        """What to send for each conversation, and why others cannot be sent."""
        if self.encode is None:
            without = {row: as_messages(c, row) for row, c in enumerate(conversations) if not c.tools}
            reason = "found definitions of tools, expected none, or URL,tokenizer=NAME: the server gets messages alone"
            return without, {row: reason for row in range(len(conversations)) if row not in without}
        encoded = self.encode(conversations, self.card.get("max_model_len"))
        inputs = {row: ids for row, ids in enumerate(encoded) if not isinstance(ids, str)}
        return inputs, {row: reason for row, reason in enumerate(encoded) if isinstance(reason, str)}

    def _request(self, inputs: Mapping[int, Any], part: Sequence[int]) -> Request:
        rows = [inputs[row] for row in part]
        body: dict[str, Any] = {"model": self.card.get("id")}
        if self.api == "plugin":
            return json_request("/pooling", body | {"data": {"conversations": rows}})
        body |= {"use_activation": False} | ({"task": "classify"} if self.api == "pooling" else {})
        content = {"messages": rows[0]} if self.encode is None else {"input": rows}
        return json_request(f"/{self.api}", body | content)

    def _read(
        self,
        part: Sequence[int],
        answer: Mapping[str, Any],
        entries: dict[int, Mapping[str, Any]],
        reasons: dict[int, str],
    ) -> None:
        """Add the entries of a response, each with its score, or reasons of rows without one."""
        data = answer.get("data")
        if not isinstance(data, list) or len(data) != len(part):
            count = len(data) if isinstance(data, list) else 0
            raise RewardServerError(f"{self.address}: found {count} results, expected {len(part)}")
        for place, (row, entry) in enumerate(zip(part, data, strict=True)):
            if not isinstance(entry, Mapping) or entry.get("index", place) != place:
                raise RewardServerError(f"{self.address}: result {place} of a response is missing or out of order")
            if entry.get("error") is not None:
                reasons[row] = str(entry["error"])
                continue
            key = {"plugin": "score", "classify": "probs", "pooling": "data"}[self.api]
            values = [entry.get(key)] if self.api == "plugin" else entry.get(key)
            if not isinstance(values, list) or len(values) != 1 or not isinstance(values[0], (int, float)):
                raise RewardServerError(
                    f"{self.address}: {self.api} sent {shown(values)}, expected one score of each conversation"
                )
            if math.isfinite(values[0]):
                entries[row] = {**entry, "score": float(values[0])}
            else:
                reasons[row] = "the model's score is not a finite number"

    def _columns(self, entries: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
        """Names of the objectives and the parts (n, k) that the plugin sends; no names and (n, 0) of other servers."""
        columns: dict[str, Any] = dict.fromkeys(_COLUMNS, np.empty((len(entries), 0), np.float32))
        if self.api != "plugin" or not entries:
            return [], columns
        try:
            names = list(entries[0]["rewards"])
            for part in (part for part in _COLUMNS if part in entries[0]):
                rows = [[entry[part][name] for name in names] for entry in entries]
                columns[part] = np.array(rows, np.float32).reshape(len(entries), len(names))
        except (KeyError, TypeError, ValueError) as error:
            raise RewardServerError(f"{self.address}: invalid part of a response: {error}") from None
        return names, columns


def model_card(client: JsonClient) -> Mapping[str, Any]:
    """The first entry of `GET /v1/models`.

    Raises:
        RewardServerError: if the server is none, or does not answer.
    """
    data = client.send(("GET", "/v1/models", None)).get("data")
    if not isinstance(data, list) or not data or not isinstance(data[0], Mapping):
        raise RewardServerError(f"{client.address}: /v1/models names no model")
    return data[0]


def connect(
    url: str, api: str = "auto", *, encode: Encode | None = None, **settings: Any
) -> RewardClient | PoolingClient:
    """A client of the server at a URL.

    Args:
        api: `armorm`, `plugin`, `classify` or `pooling`; `auto` asks the server.
        encode: as for `PoolingClient`.

    Raises:
        RewardServerError: if no known server answers there.
    """
    if api == "auto":
        api = _detected(url, encodes=encode is not None, **settings)
    if api == "armorm":
        return RewardClient(url, **settings)
    return PoolingClient(url, cast(Api, api), encode=encode, **settings)


def _detected(url: str, *, encodes: bool, **settings: Any) -> str:
    client = PoolingClient(url, **settings)
    try:
        try:
            if client.card.get("owned_by") == "armorm":
                return "armorm"
        except RewardServerError as error:
            if error.status not in _ABSENT:
                raise
        if not encodes and _has_plugin(client):
            return "plugin"
        for api in ("classify", "pooling"):
            try:
                client.send(json_request(f"/{api}", {"model": client.card.get("id"), "messages": _PROBE}))
            except RewardServerError as error:
                if error.status in _ABSENT:
                    continue
                if error.status not in _REJECTING:
                    raise
            return api
        raise RewardServerError(
            f"{client.address}: answers neither /v1/reward, /classify nor /pooling, expected the address of "
            "armorm serve or of a vLLM server with a classifier (--runner pooling)"
        )
    finally:
        client.close()


def _has_plugin(client: PoolingClient) -> bool:
    """Whether the server answers with the rewards of a conversation."""
    try:
        body = {"model": client.card.get("id"), "data": {"conversations": [_PROBE]}}
        data = client.send(json_request("/pooling", body)).get("data")
    except RewardServerError as error:
        if error.status in _ABSENT | _REJECTING:
            return False
        raise
    return isinstance(data, list) and len(data) == 1 and isinstance(data[0], Mapping) and "rewards" in data[0]
