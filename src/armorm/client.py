"""Clients of a reward server (`armorm serve`): score conversations remotely as `ArmoRM.score` does locally.

    with RewardClient("http://rewards:8008") as client:
        client.score([[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]]).scores

Connections are reused; many conversations are sent in several concurrent requests. A server that is full, restarting or
unreachable is retried with growing pauses, at least as long as its `Retry-After`; any other error is raised at once.
Responses are checked: one finite score or one error for each conversation, in order. Needs httpx (`armorm[client]`),
neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union

import numpy as np

from armorm.conversation import Conversation, ConversationLike, Message
from armorm.errors import ArmormError, ConversationError, MissingExtraError, shown
from armorm.score_batch import ScoreBatch

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "ARMORM_API_KEY"
PARTS = ("rewards", "gating_weights", "coefficients", "contributions")
UNCERTAINTY = "uncertainty"
_RETRIED = frozenset({429, 502, 503, 504})
_LONGEST_PAUSE = 30.0
_SUM_TOLERANCE = 1e-4  # between a score and the sum of its rewards by token, relative to scores above 1
S = TypeVar("S")  # what `score` returns
D = TypeVar("D")  # what `info` returns
_Request = tuple[str, str, Union[bytes, None]]  # method, path, body


class RewardServerError(ArmormError, RuntimeError):
    """A server that rejects a request, cannot be reached, or sends an invalid response."""

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status  # of the response, if any
        super().__init__(message)


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


class _Client(Generic[S, D]):
    """Requests and responses of both clients, which differ in how they send and wait.

    Args:
        url: address of the server; it may contain a key (`http://any:KEY@host:8008`).
        api_key: by default that of the environment variable ARMORM_API_KEY.
        timeout: seconds of one attempt.
        retries: attempts after the first.
        rows_per_request: conversations of one request.
        connections: concurrent requests.
        verify: how https certificates are verified, as for httpx: True, or an `ssl.SSLContext`.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8008",
        *,
        api_key: str | None = None,
        timeout: float = 180.0,
        retries: int = 6,
        rows_per_request: int = 64,
        connections: int = 8,
        verify: Any = True,
    ) -> None:
        if rows_per_request < 1 or connections < 1 or retries < 0:
            raise ValueError("expected rows_per_request and connections above 0, and retries of at least 0")
        self.url = url.rstrip("/")
        self.retries, self.rows_per_request, self.connections = retries, rows_per_request, connections
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE, "").strip()
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            "timeout": _httpx().Timeout(timeout, pool=None),  # a request that waits for a connection is not late
            "verify": verify,
            "trust_env": False,  # a proxy of the cluster is not meant for a server inside it
            "limits": _httpx().Limits(max_connections=connections, max_keepalive_connections=connections),
        }

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

        Raises:
            ConversationError: naming the first conversation that cannot be scored, and why.
            RewardServerError: if the server rejects the request, stays unreachable, or sends an invalid response.
        """
        steering = {"multiply": steer, "pin": pin, "blend": blend, "debias_strength": debias_strength}
        given = policy_tokens if isinstance(policy_tokens, Sequence) and policy_tokens != "tokenizer" else None
        if given is not None and len(given) != len(conversations):
            raise ValueError(f"policy_tokens: found {len(given)} rows, expected {len(conversations)}")
        options: dict[str, Any] = {"normalize": normalize}
        options |= {} if include is None else {"include": list(include)}
        options |= {} if per_token is None else {"per_token": per_token}
        options |= {} if policy_tokens is None or given is not None else {"policy_tokens": policy_tokens}
        bodies = self._bodies(conversations, options, given, drop, **steering)
        requests = [("POST", "/v1/reward", body) for body in bodies]

        def read(answers: list[dict[str, Any]]) -> ServedScores:
            batch = self._joined(answers, len(conversations), on_refused, include)
            return batch if per_token is None else self._with_tokens(batch, answers, given, per_token)

        return self._answers(requests, read)

    def info(self) -> D:
        """The server's model card: name, objectives with their scales, reference statistics."""
        return self._answers([("GET", "/v1/models", None)], lambda answers: answers[0]["data"][0])

    def _answers(self, requests: Sequence[_Request], read: Callable[[list[dict[str, Any]]], Any]) -> Any:
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
        columns: dict[str, Sequence[Any]] = {"conversations": [_messages(c, i) for i, c in enumerate(conversations)]}
        columns |= {} if policy_tokens is None else {"policy_tokens": policy_tokens}
        size = self.rows_per_request
        return [
            json.dumps({name: list(rows[start : start + size]) for name, rows in columns.items()} | options).encode()
            for start in range(0, len(conversations), size)
        ]

    def _answer_or_pause(self, outcome: httpx.Response | Exception, attempt: int) -> dict[str, Any] | float:
        """The response as JSON, or seconds to wait before the next attempt; an error that is not retried is raised."""
        if isinstance(outcome, Exception):
            if attempt >= self.retries:
                raise RewardServerError(f"{self.url}: {type(outcome).__name__}: {outcome}") from outcome
            return pause(attempt)
        status = outcome.status_code
        try:
            body = outcome.json()
        except ValueError:
            body = None
        if status == 200:
            if not isinstance(body, dict):
                raise RewardServerError(f"{self.url}: the response is not a JSON object", status)
            return body
        if status not in _RETRIED or attempt >= self.retries:
            error = body.get("error") if isinstance(body, dict) else None
            reason = error.get("message") if isinstance(error, dict) else None
            raise RewardServerError(f"{self.url}: {status}, {reason or outcome.reason_phrase}", status)
        stated = outcome.headers.get("Retry-After", "")
        return pause(attempt, float(stated) if stated.isdecimal() else 0.0)

    def _joined(
        self,
        answers: Sequence[Mapping[str, Any]],
        size: int,
        on_refused: Literal["error", "skip"],
        include: Sequence[str] | None,
    ) -> ServedScores:
        """One result from the responses to all requests of a call."""
        results = list(self._results(answers, size))
        rejected = [(index, str(result["error"])) for index, result in enumerate(results) if "error" in result]
        if rejected and on_refused == "error":
            raise ConversationError(rejected[0][1], f"conversation {rejected[0][0]}")
        scored = [(index, result) for index, result in enumerate(results) if "error" not in result]
        names = list(answers[0]["objectives"]) if answers else []
        if include is None:
            include = [*PARTS, UNCERTAINTY] if scored and UNCERTAINTY in scored[0][1] else PARTS
        try:
            values = {
                part: np.array([result[part] for _, result in scored], np.float32).reshape(len(scored), len(names))
                for part in include
            }
        except (KeyError, TypeError, ValueError) as error:
            raise RewardServerError(f"{self.url}: invalid part of a response: {error}") from None
        nothing = np.empty((len(scored), 0), np.float32)
        columns: dict[str, Any] = {part: values.get(part, nothing) for part in (*PARTS, "gating_output", "relative")}
        return ServedScores(
            scores=np.array([result["score"] for _, result in scored], np.float32),
            **columns,
            uncertainty=values.get(UNCERTAINTY),
            names=names,
            rows=np.array([index for index, _ in scored], np.int64),
            rejected=rejected,
            truncated=[index for index, result in scored if result.get("truncated_tokens")],
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

    def _results(self, answers: Sequence[Mapping[str, Any]], size: int) -> Iterator[Mapping[str, Any]]:
        """Results in order, each checked to be a score or an error with its index."""
        for number, answer in enumerate(answers):
            expected = min(self.rows_per_request, size - number * self.rows_per_request)
            results = answer.get("results")
            count = len(results) if isinstance(results, list) else 0
            if not isinstance(results, list) or count != expected:
                raise RewardServerError(f"{self.url}: found {count} results, expected {expected}")
            for index, result in enumerate(results):
                if not isinstance(result, Mapping) or result.get("index") != index:
                    raise RewardServerError(f"{self.url}: result {index} of a response is missing or out of order")
                score = result.get("score")
                if "error" not in result and not (isinstance(score, (int, float)) and math.isfinite(score)):
                    raise RewardServerError(f"{self.url}: found score {shown(score)}, expected a finite number")
                yield result


class RewardClient(_Client[ServedScores, dict[str, Any]]):
    """Client for synchronous programs."""

    def __init__(self, url: str = "http://127.0.0.1:8008", **settings: Any) -> None:
        super().__init__(url, **settings)
        self._http = _httpx().Client(**self._options)
        self._pool = ThreadPoolExecutor(self.connections, thread_name_prefix="armorm-client")

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    @cached_property
    def names(self) -> list[str]:
        """Names of the model's objectives."""
        return [objective["name"] for objective in self.info()["objectives"]]

    def _answers(self, requests: Sequence[_Request], read: Callable[[list[dict[str, Any]]], Any]) -> Any:
        return read(list((self._pool.map if len(requests) > 1 else map)(self._send, requests)))

    def _send(self, request: _Request) -> dict[str, Any]:
        method, path, body = request
        for attempt in itertools.count():
            try:
                outcome = self._http.request(method, path, content=body)
            except _httpx().TransportError as error:
                outcome = error
            found = self._answer_or_pause(outcome, attempt)
            if isinstance(found, dict):
                return found
            time.sleep(found)
        raise AssertionError("unreachable")


class AsyncRewardClient(_Client[Awaitable[ServedScores], Awaitable[dict[str, Any]]]):
    """Client for asyncio: `score` and `info` are awaited."""

    def __init__(self, url: str = "http://127.0.0.1:8008", **settings: Any) -> None:
        super().__init__(url, **settings)
        self._http = _httpx().AsyncClient(**self._options)

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _answers(self, requests: Sequence[_Request], read: Callable[[list[dict[str, Any]]], Any]) -> Any:
        return read(await asyncio.gather(*map(self._send, requests)))

    async def _send(self, request: _Request) -> dict[str, Any]:
        method, path, body = request
        for attempt in itertools.count():
            try:
                outcome = await self._http.request(method, path, content=body)
            except _httpx().TransportError as error:
                outcome = error
            found = self._answer_or_pause(outcome, attempt)
            if isinstance(found, dict):
                return found
            await asyncio.sleep(found)
        raise AssertionError("unreachable")


def pause(attempt: int, at_least: float = 0.0) -> float:
    """Seconds before the next attempt: doubling from half a second, with jitter so that clients spread out."""
    seconds = min(0.5 * 2**attempt, _LONGEST_PAUSE)
    return max(seconds * random.uniform(0.5, 1.0), min(at_least, _LONGEST_PAUSE) * random.uniform(1.0, 1.25))


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise MissingExtraError("the client needs httpx, expected: pip install 'armorm[client]'") from None
    return httpx


def _messages(conversation: ConversationLike, index: int) -> list[Any]:
    if isinstance(conversation, Conversation):
        return conversation.to_list()
    if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
        raise ConversationError(f"found {shown(conversation)}, expected a list of messages", f"conversation {index}")
    return [message.to_dict() if isinstance(message, Message) else message for message in conversation]
