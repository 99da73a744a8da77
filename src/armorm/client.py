"""The client of a reward server: score conversations on another machine as if the model were here.

In:  conversations, and the address of an `armorm serve`.
Out: `ServedScores`: what `ArmoRM.score` gives, as far as it was asked for.

    with RewardClient("http://rewards:8008") as client:
        client.score([[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]]).scores

Connections are kept. Many conversations go out in several requests at once, and the server puts them together
again. A server that is full, restarting or out of reach is asked again, with growing pauses, as long as it says
itself where it says so; any other refusal is raised at once. What comes back is checked: one finite score for
each conversation, at its place, or its error; never a list of another length.
It needs httpx (`armorm[client]`), neither torch nor transformers.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from armorm.conversation import Conversation, ConversationLike, Message
from armorm.errors import ArmormError, ConversationError, MissingExtraError, shown

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "ARMORM_API_KEY"
PARTS = ("rewards", "gating_weights", "coefficients", "contributions")
UNCERTAINTY = "uncertainty"
_AGAIN = frozenset({429, 502, 503, 504})
_LONGEST_PAUSE = 30.0


class RewardServerError(ArmormError, RuntimeError):
    """A server that refused, could not be reached, or answered nonsense.

    Attributes:
        status: HTTP status, or None where no answer came.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class ServedScores:
    """Scores of n conversations over k objectives, as a server gave them.

    Attributes:
        scores: (n,) float32, normalised if that was asked for.
        rewards, gating_weights, coefficients, contributions: (n, k) float32, as in `ScoreBatch`; other parts that
            were asked for stand in `parts`.
        uncertainty: (n, k) float32, as in `ScoreBatch`; None where the model carries none, or it was not asked for.
        names: (k,) objectives.
        rows: (n,) int64, index of each scored conversation in what was given.
        rejected: (index, reason) of each conversation that was not scored.
        truncated: index of each that lost the beginning of its prompt to the length limit.
        model: the server's name of its model.
        parts: further parts by name, (n, k).
    """

    scores: np.ndarray
    rewards: np.ndarray
    gating_weights: np.ndarray
    coefficients: np.ndarray
    contributions: np.ndarray
    names: list[str]
    rows: np.ndarray
    rejected: list[tuple[int, str]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    model: str = ""
    uncertainty: np.ndarray | None = None
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores)


class _Settings:
    """What both clients share: address, key, patience, sizes."""

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
            "timeout": timeout,
            "verify": verify,
            "trust_env": False,  # a proxy of the cluster's is not meant for a server inside it
            "limits": _httpx().Limits(max_connections=connections, max_keepalive_connections=connections),
        }

    def _bodies(self, conversations: Sequence[ConversationLike], options: Mapping[str, Any]) -> list[bytes]:
        """Bodies of as many requests as the conversations need."""
        rows = [_plain(conversation, index) for index, conversation in enumerate(conversations)]
        starts = range(0, len(rows), self.rows_per_request)
        return [
            json.dumps({"conversations": rows[start : start + self.rows_per_request], **options}).encode()
            for start in starts
        ]

    def _judged(self, response: httpx.Response, attempt: int) -> float | None:
        """Seconds to wait before asking again; None where the response is an answer.

        Raises:
            RewardServerError: for a refusal that stays one.
        """
        if response.status_code == 200:
            return None
        message = f"{self.url}: {response.status_code}, {_reason(response)}"
        if response.status_code not in _AGAIN or attempt >= self.retries:
            raise RewardServerError(message, response.status_code)
        stated = response.headers.get("Retry-After", "")
        return pause(attempt, float(stated) if stated.isdecimal() else 0.0)

    def _unreached(self, error: Exception, attempt: int) -> float:
        if attempt >= self.retries:
            raise RewardServerError(f"{self.url}: {type(error).__name__}: {error}") from error
        return pause(attempt)


class RewardClient(_Settings):
    """A client for programs with threads.

    Args:
        url: of the server; a key may stand in it (`http://any:KEY@host:8008`).
        api_key: by default that of the environment variable ARMORM_API_KEY.
        timeout: seconds of one attempt.
        retries: attempts after the first.
        rows_per_request: conversations of one request.
        connections: requests at once.
        verify: how https certificates are checked, as for httpx: True, or an `ssl.SSLContext`.
    """

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
    ) -> ServedScores:
        """Score conversations.

        Args:
            normalize: scores in standard deviations from the reference mean.
            steer, drop, pin, blend, debias_strength: as for `ArmoRM.steer`, for this call; `steer` is its `multiply`.
            on_refused: what happens to a conversation that cannot be scored: an error, or an entry in `rejected`.
            include: parts of the scores to send; by default the four that `ServedScores` names, and the uncertainty
                where the model carries it.

        Raises:
            ConversationError: naming the first conversation that cannot be scored, and why.
            RewardServerError: where the server refuses, stays out of reach, or answers nonsense.
        """
        steering = {"pin": pin, "blend": blend, "debias_strength": debias_strength}
        bodies = self._bodies(conversations, _options(normalize, include, steer, drop, **steering))
        answers = list(self._pool.map(self._ask, bodies)) if len(bodies) > 1 else [self._ask(body) for body in bodies]
        return _joined(answers, len(conversations), on_refused, include, self)

    def info(self) -> dict[str, Any]:
        """The server's model card: name, objectives with their scales, reference figures."""
        card: dict[str, Any] = self._attempt("GET", "/v1/models", None)["data"][0]
        return card

    @cached_property
    def names(self) -> list[str]:
        """The model's objectives."""
        return [objective["name"] for objective in self.info()["objectives"]]

    def _ask(self, body: bytes) -> dict[str, Any]:
        return self._attempt("POST", "/v1/reward", body)

    def _attempt(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        for attempt in itertools.count():
            try:
                response = self._http.request(method, path, content=body)
            except _httpx().TransportError as error:
                seconds = self._unreached(error, attempt)
            else:
                again = self._judged(response, attempt)
                if again is None:
                    return _decoded(response, self.url)
                seconds = again
            time.sleep(seconds)
        raise AssertionError  # (the count has no end)


class AsyncRewardClient(_Settings):
    """The same for asyncio; arguments as for `RewardClient`."""

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

    async def score(
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
    ) -> ServedScores:
        """Score conversations, as `RewardClient.score`."""
        steering = {"pin": pin, "blend": blend, "debias_strength": debias_strength}
        bodies = self._bodies(conversations, _options(normalize, include, steer, drop, **steering))
        answers = await asyncio.gather(*(self._attempt("POST", "/v1/reward", body) for body in bodies))
        return _joined(answers, len(conversations), on_refused, include, self)

    async def info(self) -> dict[str, Any]:
        """The server's model card: name, objectives with their scales, reference figures."""
        card: dict[str, Any] = (await self._attempt("GET", "/v1/models", None))["data"][0]
        return card

    async def _attempt(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        for attempt in itertools.count():
            try:
                response = await self._http.request(method, path, content=body)
            except _httpx().TransportError as error:
                seconds = self._unreached(error, attempt)
            else:
                again = self._judged(response, attempt)
                if again is None:
                    return _decoded(response, self.url)
                seconds = again
            await asyncio.sleep(seconds)
        raise AssertionError  # (the count has no end)


def pause(attempt: int, at_least: float = 0.0) -> float:
    """Seconds before the next attempt: doubling from half a second, spread so that clients do not come back at once."""
    seconds = min(0.5 * 2**attempt, _LONGEST_PAUSE)
    return max(seconds * random.uniform(0.5, 1.0), min(at_least, _LONGEST_PAUSE) * random.uniform(1.0, 1.25))


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise MissingExtraError("the client needs httpx, expected: pip install 'armorm[client]'") from None
    return httpx


def _plain(conversation: ConversationLike, index: int) -> list[Any]:
    if isinstance(conversation, Conversation):
        return conversation.to_list()
    if isinstance(conversation, (str, Mapping)) or not isinstance(conversation, Sequence):
        raise ConversationError(f"found {shown(conversation)}, expected a list of messages", f"conversation {index}")
    return [message.to_dict() if isinstance(message, Message) else message for message in conversation]


def _options(
    normalize: bool,
    include: Sequence[str] | None,
    multiply: Mapping[str, float] | None,
    drop: str | Sequence[str],
    **others: Any,
) -> dict[str, Any]:
    """What is asked for, and no more: without a steering the server keeps that of its model."""
    asked = {"multiply": multiply, "drop": [drop] if isinstance(drop, str) else list(drop), **others}
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in asked.items()}
    steering = {name: value for name, value in plain.items() if value not in (None, {}, [])}
    parts = {} if include is None else {"include": list(include)}
    return {"normalize": normalize, **parts, **({"steer": steering} if steering else {})}


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase


def _decoded(response: httpx.Response, url: str) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RewardServerError(f"{url}: the answer is no JSON object", response.status_code)
    return found


def _joined(
    answers: Sequence[Mapping[str, Any]],
    size: int,
    on_refused: Literal["error", "skip"],
    include: Sequence[str] | None,
    client: _Settings,
) -> ServedScores:
    """One result from the answers to all requests of a call."""
    found = list(_results(answers, size, client))
    rejected = [(index, str(result["error"])) for index, result in enumerate(found) if "error" in result]
    if rejected and on_refused == "error":
        raise ConversationError(rejected[0][1], f"conversation {rejected[0][0]}")
    kept = [(index, result) for index, result in enumerate(found) if "error" not in result]
    names = list(answers[0]["objectives"]) if answers else []
    if include is None:
        include = [*PARTS, UNCERTAINTY] if kept and UNCERTAINTY in kept[0][1] else PARTS
    try:
        values = {
            part: np.array([result[part] for _, result in kept], np.float32).reshape(len(kept), len(names))
            for part in include
        }
    except (KeyError, TypeError, ValueError) as error:
        raise RewardServerError(f"{client.url}: a part of an answer is not as expected: {error}") from None
    nothing = np.empty((len(kept), 0), np.float32)
    return ServedScores(
        scores=np.array([result["score"] for _, result in kept], np.float32),
        **{part: values.get(part, nothing) for part in PARTS},
        uncertainty=values.get(UNCERTAINTY),
        names=names,
        rows=np.array([index for index, _ in kept], np.int64),
        rejected=rejected,
        truncated=[index for index, result in kept if result.get("truncated_tokens")],
        model=str(answers[0].get("model", "")) if answers else "",
        parts={part: value for part, value in values.items() if part not in (*PARTS, UNCERTAINTY)},
    )


def _results(answers: Sequence[Mapping[str, Any]], size: int, client: _Settings) -> Iterator[Mapping[str, Any]]:
    """Results in order, each checked to be a score or an error at its place."""
    for number, answer in enumerate(answers):
        expected = min(client.rows_per_request, size - number * client.rows_per_request)
        results = answer.get("results")
        count = len(results) if isinstance(results, list) else 0
        if not isinstance(results, list) or count != expected:
            raise RewardServerError(f"{client.url}: found {count} results, expected {expected}")
        for place, result in enumerate(results):
            if not isinstance(result, Mapping) or result.get("index") != place:
                raise RewardServerError(f"{client.url}: found no result {place} at its place")
            score = result.get("score")
            if "error" not in result and not (isinstance(score, (int, float)) and math.isfinite(score)):
                raise RewardServerError(f"{client.url}: found score {shown(score)}, expected a finite number")
            yield result
