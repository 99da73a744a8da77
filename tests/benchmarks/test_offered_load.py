"""Requests at fixed moments, to a server that answers none before all have come."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import offered_load
from serving import requests


@pytest.mark.parametrize("status", [200, 503])
def test_requests_come_at_their_moments_whether_earlier_ones_are_answered_or_not(status):
    bodies: list[dict] = []

    async def answer(all_came: asyncio.Event, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split()[0])
        bodies.append(json.loads(await reader.readexactly(size)))
        if len(bodies) == 5:
            all_came.set()
        await all_came.wait()
        writer.write(f"HTTP/1.1 {status} Some\r\n\r\n".encode() + b"{}")
        writer.close()

    async def run() -> tuple[float, list[float]]:
        server = await asyncio.start_server(partial(answer, asyncio.Event()), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        todo = [offered_load.for_vllm(request) for request in requests(5, offered_load.LOAD)]
        async with server:
            sent = offered_load.offered(port, todo, np.array([0, 0.05, 0.1, 0.15, 0.2]))
            return await asyncio.wait_for(sent, 60)

    if status != 200:
        with pytest.raises(SystemExit, match="found status 503"):
            asyncio.run(run())
        return
    took, seconds = asyncio.run(run())
    assert len(seconds) == 5 and took >= max(seconds) > 0
    assert took >= 0.2  # the last one was not sent before its moment
    assert all(body["input"].endswith("<|im_end|>") and body["model"] == "model" for body in bodies)


def test_moments_are_a_poisson_process_of_the_given_rate_and_the_same_every_time():
    moments = offered_load.arrivals(50, 200)
    assert len(moments) == 10_000
    gaps = np.diff(moments)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05) and gaps.std() == pytest.approx(1 / 50, rel=0.05)
    np.testing.assert_array_equal(moments, offered_load.arrivals(50, 200))
