"""Real servers on free ports of this machine, around a small real model, and something to ask them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from armorm.reward_model import ArmoRM  # noqa: E402
from armorm.serving.engine import ScoringEngine  # noqa: E402
from armorm.serving.server import running  # noqa: E402
from armorm.serving.settings import ServingSettings  # noqa: E402


@dataclass
class Served:
    """A running server."""

    url: str
    engine: ScoringEngine
    client: Any

    def post(self, path: str, **body: Any) -> Any:
        """Answer to a request."""
        return self.client.post(path, content=json.dumps(body))

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Answers to calls made at once, in order."""
        gate = threading.Barrier(len(calls))

        def call(function: Callable[[], Any]) -> Any:
            gate.wait(10)
            return function()

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(call, calls))


@contextmanager
def served(rm: ArmoRM, policy_tokenizer: Any = None, **settings: Any) -> Iterator[Served]:
    """A server around a model for as long as the block runs."""
    engine = ScoringEngine(rm, ServingSettings(**{"name": "small", **settings}), policy_tokenizer)
    limits = httpx.Limits(max_connections=300, max_keepalive_connections=300)
    options = {"timeout": 30, "limits": limits, "headers": {"Content-Type": "application/json"}}
    with running(engine) as url, httpx.Client(base_url=url, **options) as client:
        yield Served(url, engine, client)


def question(number: int, words: int = 3) -> list[dict[str, str]]:
    """A conversation of its own for each number."""
    reply = " ".join(["The answer is", *(str((number * 7 + i) % 97) for i in range(words))])
    return [{"role": "user", "content": f"What is {number} + {number}?"}, {"role": "assistant", "content": reply}]
