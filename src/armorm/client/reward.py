"""Clients of a reward server (`armorm serve`): score conversations remotely as `ArmoRM.score` does locally.

    with RewardClient("http://rewards:8008") as client:
        client.score([[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]]).scores

Many conversations are sent in several concurrent requests. Responses are checked: one finite score or one error for
each conversation, in order.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from armorm.client.http import Connections, JsonClient, Request, RewardServerError, import_httpx
from armorm.conversation import Conversation, ConversationLike, Message
from armorm.errors import ConversationError, shown
from armorm.progress import Advance, ignore
from armorm.score_batch import ScoreBatch

PARTS = ("rewards", "gating_weights", "coefficients", "contributions")
UNCERTAINTY = "uncertainty"
_SUM_TOLERANCE = 1e-4  # between a score and the sum of its rewards by token, relative to scores above 1
S = TypeVar("S")  # what `score` returns
D = TypeVar("D")  # what `info` returns


@dataclass(frozen=True)
class ServedScores(ScoreBatch):
    """Scores from a server. Arrays that were not requested have the shape (n, 0); `uncertainty` is None if so.

    With `per_token`, `token_scores` and `token_spans` are by token of the policy, or by sentence.

    Attributes:
        model: the server's name of its model.
        parts: (n, k) values of requested parts without a field.
        rest: (n,) float64, the part of each last reward that is read from the last token's state and is no sum over
            tokens; this and the next two are None without `per_token`.
        exact_share: (n,) float64, share of each score that is an exact sum over tokens.
        last_tokens: an array (u,) int64 for each row, the policy's token that each sentence ends in; None unless
            sentences and tokens of the policy were given.
    """

    model: str = ""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    rest: np.ndarray | None = None
    exact_share: np.ndarray | None = None
    last_tokens: list[np.ndarray] | None = field(default=None, metadata={"by_row": True})


class _Client(Connections, Generic[S, D]):
    """Requests and responses of both clients, which differ in how they send and wait.

    Args:
        url: address of the server; it may contain a key (`http://any:KEY@host:8008`).
        rows_per_request: conversations of one request.
        settings: api_key, timeout, retries, connections, verify, as for `Connections`.
    """

    def __init__(self, url: str = "http://127.0.0.1:8008", *, rows_per_request: int = 64, **settings: Any) -> None:
        if rows_per_request < 1:
            raise ValueError("expected rows_per_request above 0")
        self.rows_per_request = rows_per_request
        super().__init__(url, **settings)

    def score(
        self,
        conversations: Sequence[ConversationLike],
        *,
        normalize: bool = False,
        steer: Mapping[str, float] | None = None,
        drop: str | Sequence[str] = (),
        pin: Mapping[str, float] | None = None,
        blend: Mapping[str, Any] | None = None,
        debias_strength: float | None = None,
        on_refused: Literal["error", "skip"] = "error",
        include: Sequence[str] | None = None,
        per_token: Literal["token", "sentence"] | None = None,
        policy_tokens: Literal["tokenizer"] | Sequence[Sequence[Any] | None] | None = None,
        turns: Literal["last", "all"] = "last",
        advance: Advance = ignore,
    ) -> S:
        """Score conversations.

        Args:
            normalize: scores in standard deviations from the reference mean.
            steer, drop, pin, blend, debias_strength: as for `ArmoRM.steer`, for this call; `steer` is its `multiply`.
            on_refused: whether a conversation that cannot be scored is an error or an entry of `rejected` (`skip`).
            include: parts of the scores to request; by default rewards, gating weights, coefficients and contributions,
                and uncertainty if the model provides it.
            per_token: also each score as a sum over tokens, or over sentences (`token_scores`), for dense rewards.
            policy_tokens: the tokens that the sum is over, a list for each conversation: their texts, their numbers of
                characters, or [start, end] in characters of the response; or `tokenizer`, for those of the server's
                policy tokenizer. By default the reward model's own.
            turns: `all` scores every assistant turn, as `ArmoRM.score` does; not together with `per_token`.
            advance: called with the number of conversations just done.

        Raises:
            ConversationError: naming the first conversation that cannot be scored, and why.
            RewardServerError: if the server rejects the request, stays unreachable, or sends an invalid response.
        """
        steering = {"multiply": steer, "pin": pin, "blend": blend, "debias_strength": debias_strength}
        given = policy_tokens if isinstance(policy_tokens, Sequence) and policy_tokens != "tokenizer" else None
        if given is not None and len(given) != len(conversations):
            raise ValueError(f"policy_tokens: found {len(given)} rows, expected {len(conversations)}")
        if turns == "all" and per_token is not None:
            raise ValueError("per_token: expected turns='last'")
        options: dict[str, Any] = {"normalize": normalize}
        options |= {} if turns == "last" else {"turns": turns}
        options |= {} if include is None else {"include": list(include)}
        options |= {} if per_token is None else {"per_token": per_token}
        options |= {} if policy_tokens is None or given is not None else {"policy_tokens": policy_tokens}
        bodies = self._bodies(conversations, options, given, drop, **steering)
        requests: list[Request] = [("POST", "/v1/reward", body) for body in bodies]
        sizes = [min(self.rows_per_request, len(conversations) - i * self.rows_per_request) for i in range(len(bodies))]

        def read(answers: list[dict[str, Any]]) -> ServedScores:
            batch = self._joined(answers, len(conversations), on_refused, include, turns)
            return batch if per_token is None else self._with_tokens(batch, answers, given, per_token)

        return self._answers(requests, read, sizes, advance)

    def info(self) -> D:
        """The server's model card: name, objectives with their scales, reference statistics."""
        return self._answers([("GET", "/v1/models", None)], lambda answers: answers[0]["data"][0])

    def _answers(
        self,
        requests: Sequence[Request],
        read: Callable[[list[dict[str, Any]]], Any],
        sizes: Sequence[int] = (),
        advance: Advance = ignore,
    ) -> Any:
        """What `read` makes of the responses to all requests."""
        raise NotImplementedError

    def _bodies(
        self,
        conversations: Sequence[ConversationLike],
        options: dict[str, Any],
        policy_tokens: Sequence[Any] | None,
        drop: str | Sequence[str],
        **steering: Any,
    ) -> list[bytes]:
        """Request bodies for all conversations. Without a steering the server applies that of its model."""
        steering["drop"] = [drop] if isinstance(drop, str) else list(drop)
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in steering.items()}
        steer = {name: value for name, value in plain.items() if value not in (None, {}, [])}
        options |= {"steer": steer} if steer else {}
        columns: dict[str, Sequence[Any]] = {"conversations": [as_messages(c, i) for i, c in enumerate(conversations)]}
        columns |= {} if policy_tokens is None else {"policy_tokens": policy_tokens}
        size = self.rows_per_request
        return [
            json.dumps({name: list(rows[start : start + size]) for name, rows in columns.items()} | options).encode()
            for start in range(0, len(conversations), size)
        ]

    def _joined(
        self,
        answers: Sequence[Mapping[str, Any]],
        size: int,
        on_refused: Literal["error", "skip"],
        include: Sequence[str] | None,
        turns: Literal["last", "all"] = "last",
    ) -> ServedScores:
        """One result from the responses to all requests of a call."""
        results = list(self._results(answers, size, turns))
        rejected = [(index, str(result["error"])) for index, result in results if "error" in result]
        if rejected and on_refused == "error":
            raise ConversationError(rejected[0][1], f"conversation {rejected[0][0]}")
        scored = [(index, result) for index, result in results if "error" not in result]
        names = list(answers[0]["objectives"]) if answers else []
        if include is None:
            include = [*PARTS, UNCERTAINTY] if scored and UNCERTAINTY in scored[0][1] else PARTS
        try:
            values = {
                part: np.array([result[part] for _, result in scored], np.float32).reshape(len(scored), len(names))
                for part in include
            }
        except (KeyError, TypeError, ValueError) as error:
            raise RewardServerError(f"{self.address}: invalid part of a response: {error}") from None
        nothing = np.empty((len(scored), 0), np.float32)
        columns: dict[str, Any] = {part: values.get(part, nothing) for part in (*PARTS, "gating_output", "relative")}
        return ServedScores(
            scores=np.array([result["score"] for _, result in scored], np.float32),
            **columns,
            uncertainty=values.get(UNCERTAINTY),
            names=names,
            rows=np.array([index for index, _ in scored], np.int64),
            rejected=rejected,
            truncated=sorted({index for index, result in scored if result.get("truncated_tokens")}),
            turns=np.array([result["turn"] for _, result in scored], np.int64) if turns == "all" else None,
            model=str(answers[0].get("model", "")) if answers else "",
            parts={part: value for part, value in values.items() if part not in (*PARTS, UNCERTAINTY)},
        )

    def _with_tokens(
        self,
        batch: ServedScores,
        answers: Sequence[Mapping[str, Any]],
        policy_tokens: Sequence[Any] | None,
        unit: str,
    ) -> ServedScores:
        """The batch with its scores as sums, each checked to be one, of as many rewards as there are tokens."""
        results = [result for answer in answers for result in answer["results"]]
        found: list[Mapping[str, Any]] = [results[row].get("per_token") or {} for row in batch.rows.tolist()]
        try:
            sums = [np.array(entry["rewards"], np.float64) for entry in found]
            spans = [
                np.array(entry["spans"], np.int64).reshape(len(s), 2) for entry, s in zip(found, sums, strict=True)
            ]
            rest, share = (np.array([float(e[name]) for e in found], np.float64) for name in ("rest", "exact_share"))
            ends = [np.array(entry["last_tokens"], np.int64) for entry in found if "last_tokens" in entry]
        except (KeyError, TypeError, ValueError) as error:
            raise RewardServerError(f"{self.url}: invalid per_token of a response: {error}") from None
        for row, values, score in zip(batch.rows.tolist(), sums, batch.scores.tolist(), strict=True):
            if not abs(values.sum() - score) <= _SUM_TOLERANCE * max(1.0, abs(score)):
                raise RewardServerError(
                    f"{self.url}: conversation {row}: rewards sum to {values.sum()}, not to {score}"
                )
            tokens = None if policy_tokens is None or unit == "sentence" else policy_tokens[row]
            if tokens is not None and len(values) != len(tokens):
                raise RewardServerError(
                    f"{self.url}: conversation {row}: found {len(values)} rewards for {len(tokens)} tokens"
                )
        columns: dict[str, Any] = {"token_scores": sums, "token_spans": spans, "rest": rest, "exact_share": share}
        return replace(batch, **columns, last_tokens=ends if ends and len(ends) == len(batch) else None)

    def _results(
        self, answers: Sequence[Mapping[str, Any]], size: int, turns: Literal["last", "all"]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Index of the conversation and result, in order, each checked to be a score or an error with its place."""
        for number, answer in enumerate(answers):
            first = number * self.rows_per_request
            expected = min(self.rows_per_request, size - first)
            results = answer.get("results")
            count = len(results) if isinstance(results, list) else 0
            if not isinstance(results, list) or (count != expected and turns == "last"):
                raise RewardServerError(f"{self.address}: found {count} results, expected {expected}")
            earlier = (-1, -1)
            for place, result in enumerate(results):
                found = _place(result, turns)
                if found is None or (found != (place, 0) if turns == "last" else not earlier < found < (expected, 0)):
                    raise RewardServerError(f"{self.address}: result {place} of a response is missing or out of order")
                earlier = found
                score = result.get("score")
                if "error" not in result and not (isinstance(score, (int, float)) and math.isfinite(score)):
                    raise RewardServerError(f"{self.address}: found score {shown(score)}, expected a finite number")
                yield first + found[0], result


class RewardClient(_Client[ServedScores, dict[str, Any]], JsonClient):
    """Client for synchronous programs."""

    @cached_property
    def names(self) -> list[str]:
        """Names of the model's objectives."""
        return [objective["name"] for objective in self.info()["objectives"]]

    def _answers(
        self,
        requests: Sequence[Request],
        read: Callable[[list[dict[str, Any]]], Any],
        sizes: Sequence[int] = (),
        advance: Advance = ignore,
    ) -> Any:
        if len(requests) == 1:
            answer = self.send(requests[0])
            advance(sizes[0] if sizes else 1)
            return read([answer])
        return read([answer for answer in self.send_all(requests, sizes, advance) if isinstance(answer, dict)])


class AsyncRewardClient(_Client[Awaitable[ServedScores], Awaitable[dict[str, Any]]]):
    """Client for asyncio: `score` and `info` are awaited."""

    def __init__(self, url: str = "http://127.0.0.1:8008", **settings: Any) -> None:
        super().__init__(url, **settings)
        self._http = import_httpx().AsyncClient(**self.options)

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _answers(
        self,
        requests: Sequence[Request],
        read: Callable[[list[dict[str, Any]]], Any],
        sizes: Sequence[int] = (),
        advance: Advance = ignore,
    ) -> Any:
        async def answer(place: int) -> dict[str, Any]:
            found = await self._send(requests[place])
            advance(sizes[place] if sizes else 1)
            return found

        return read(await asyncio.gather(*map(answer, range(len(requests)))))

    async def _send(self, request: Request) -> dict[str, Any]:
        method, path, body = request
        for attempt in itertools.count():
            try:
                outcome = await self._http.request(method, path, content=body)
            except import_httpx().TransportError as error:
                outcome = error
            found = self.answer_or_pause(outcome, attempt)
            if isinstance(found, dict):
                return found
            await asyncio.sleep(found)
        raise AssertionError("unreachable")


def _place(result: Any, turns: str) -> tuple[int, int] | None:
    """Index and turn of a result; turn 0 for a last turn, or a conversation that was rejected whole."""
    if not isinstance(result, Mapping):
        return None
    index, turn = result.get("index"), result.get("turn") if turns == "all" else 0
    if turn is None and "error" in result:
        turn = 0
    return (index, turn) if type(index) is int and type(turn) is int else None


def as_messages(conversation: ConversationLike, index: int) -> list[Any] | dict[str, Any]:
    """The messages of a conversation as JSON values, with its tools if it has some; `index` names it in errors."""
    if isinstance(conversation, Conversation):
        messages = conversation.to_list()
        return {"messages": messages, "tools": list(conversation.tools)} if conversation.tools else messages
    if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
        raise ConversationError(f"found {shown(conversation)}, expected a list of messages", f"conversation {index}")
    return [message.to_dict() if isinstance(message, Message) else message for message in conversation]
