"""HTTP requests whose responses are JSON objects, with retries, over several connections.

A server that is full, restarting or unreachable is retried with growing pauses, at least as long as its `Retry-After`;
any other error is raised at once, in one line.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Union
from urllib.parse import urlsplit, urlunsplit

from armorm.errors import ArmormError, MissingExtraError, shown
from armorm.progress import Advance, ignore

if TYPE_CHECKING:
    import httpx
    from typing_extensions import Self

KEY_VARIABLE = "ARMORM_API_KEY"
RETRIED = frozenset({429, 502, 503, 504})
_LONGEST_PAUSE = 30.0
Request = tuple[str, str, Union[bytes, None]]  # method, path, body


class RewardServerError(ArmormError, RuntimeError):
    """A server that rejects a request, cannot be reached, or sends an invalid response."""

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status  # of the response, if any
        super().__init__(message)


class Connections:
    """Settings of requests to one server, and what its responses mean.

    Args:
        url: address of the server; it may contain a key (`http://any:KEY@host:8008`).
        api_key: by default that of the environment variable ARMORM_API_KEY.
        timeout: seconds of one attempt.
        retries: attempts after the first.
        connections: concurrent requests.
        verify: how https certificates are verified, as for httpx: True, or an `ssl.SSLContext`.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 180.0,
        retries: int = 6,
        connections: int = 8,
        verify: Any = True,
    ) -> None:
        if connections < 1 or retries < 0:
            raise ValueError("expected connections above 0, and retries of at least 0")
        self.url = url.rstrip("/")
        self.retries, self.connections = retries, connections
        key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE, "").strip()
        self.options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            "timeout": import_httpx().Timeout(timeout, pool=None),  # one that waits for a connection is not late
            "verify": verify,
            "trust_env": False,  # a proxy of the cluster is not meant for a server inside it
            "limits": import_httpx().Limits(max_connections=connections, max_keepalive_connections=connections),
        }

    @property
    def address(self) -> str:
        """The URL without a key."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    def answer_or_pause(self, outcome: httpx.Response | Exception, attempt: int) -> dict[str, Any] | float:
        """The response as JSON, or seconds to wait before the next attempt; an error that is not retried is raised."""
        if isinstance(outcome, Exception):
            if attempt >= self.retries:
                raise RewardServerError(f"{self.address}: {type(outcome).__name__}: {outcome}") from outcome
            return pause(attempt)
        status = outcome.status_code
        try:
            body = outcome.json()
        except ValueError:
            body = None
        if status == 200:
            if not isinstance(body, dict):
                raise RewardServerError(f"{self.address}: the response is not a JSON object", status)
            return body
        if status not in RETRIED or attempt >= self.retries:
            raise RewardServerError(f"{self.address}: {status}, {_reason(body) or outcome.reason_phrase}", status)
        stated = outcome.headers.get("Retry-After", "")
        return pause(attempt, float(stated) if stated.isdecimal() else 0.0)


class JsonClient(Connections):
    """Requests of synchronous programs."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._http = import_httpx().Client(**self.options)
        self._pool = ThreadPoolExecutor(self.connections, thread_name_prefix="armorm-client")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def send(self, request: Request) -> dict[str, Any]:
        """The response to a request.

        Raises:
            RewardServerError: if the server rejects it, stays unreachable, or does not send a JSON object.
        """
        method, path, body = request
        for attempt in itertools.count():
            try:
                outcome = self._http.request(method, path, content=body)
            except import_httpx().TransportError as error:
                outcome = error
            found = self.answer_or_pause(outcome, attempt)
            if isinstance(found, dict):
                return found
            time.sleep(found)
        raise AssertionError("unreachable")

    def send_all(
        self,
        requests: Sequence[Request],
        sizes: Sequence[int] = (),
        advance: Advance = ignore,
        kept: frozenset[int] = frozenset(),
        arrived: Callable[[int, dict[str, Any] | RewardServerError], None] | None = None,
    ) -> list[dict[str, Any] | RewardServerError]:
        """The responses to all requests, in order; requests that are waiting are cancelled when one fails.

        Args:
            sizes: units of work of each request, which `advance` is called with when its response has come.
            kept: statuses of errors that concern one request only: they are returned in its place.
            arrived: called with the place and response of each request when it comes, in the request's thread.
        """

        def answer(place: int) -> dict[str, Any] | RewardServerError:
            found: dict[str, Any] | RewardServerError
            try:
                found = self.send(requests[place])
            except RewardServerError as error:
                if error.status not in kept:
                    raise
                found = error
            if arrived is not None:
                arrived(place, found)
            return found

        found = []
        futures = [self._pool.submit(answer, place) for place in range(len(requests))]
        try:
            for place, future in enumerate(futures):
                found.append(future.result())
                advance(sizes[place] if sizes else 1)
        finally:
            for future in futures:
                future.cancel()
        return found


def address_fault(url: str) -> str:
    """What is wrong with the address of a server that a user typed; empty if nothing is."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"found {shown(url)}, expected the address of a server, such as http://127.0.0.1:8008"
    if parts.username is not None or parts.password is not None:
        return f"the address of {parts.hostname} holds a key, expected it in an environment variable (--api-key-env)"
    return ""


def json_request(path: str, body: Any) -> Request:
    """A POST request of a JSON body."""
    return "POST", path, json.dumps(body).encode()


def pause(attempt: int, at_least: float = 0.0) -> float:
    """Seconds before the next attempt: doubling from half a second, with jitter so that clients spread out."""
    seconds = min(0.5 * 2**attempt, _LONGEST_PAUSE)
    return max(seconds * random.uniform(0.5, 1.0), min(at_least, _LONGEST_PAUSE) * random.uniform(1.0, 1.25))


def import_httpx() -> Any:
    """The module httpx; a MissingExtraError names the extra that installs it."""
    try:
        import httpx
    except ImportError:
        raise MissingExtraError("the client needs httpx, expected: pip install 'armorm[client]'") from None
    return httpx


def _reason(body: Any) -> str:
    """The message of an error response: `{"error": {"message"}}`, `{"message"}` or `{"detail"}`."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error")
    found = error.get("message") if isinstance(error, dict) else error or body.get("message") or body.get("detail")
    return "" if found is None else str(found)
