"""The client, against real servers: the library's answers, and patience with servers in trouble."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType

import numpy as np
import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from armorm.client import AsyncRewardClient, RewardClient, RewardServerError, pause
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from tests.helpers.conversations import chat
from tests.helpers.forward_passes import before_each_pass
from tests.helpers.servers import question, served
from tests.test_uncertain_model import measured, with_uncertainty

CONVERSATIONS = [question(n, words=1 + n % 5) for n in range(23)]


def ask(url: str, asynchronous: bool, conversations, settings=None, **options):
    """Scores by either client."""
    if not asynchronous:
        with RewardClient(url, **(settings or {})) as client:
            return client.score(conversations, **options)

    async def run():
        async with AsyncRewardClient(url, **(settings or {})) as client:
            return await client.score(conversations, **options)

    return asyncio.run(run())


both = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@both
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_scores_and_their_parts_are_the_librarys_however_many_requests_they_take(server, rm, asynchronous, rows):
    found = ask(server.url, asynchronous, CONVERSATIONS, {"rows_per_request": rows})
    expected = rm.score(CONVERSATIONS)
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)
    for part in ("rewards", "gating_weights", "coefficients", "contributions"):
        assert getattr(found, part) == pytest.approx(getattr(expected, part), abs=1e-5)
    assert found.names == expected.names
    assert found.rows.tolist() == list(range(23))
    assert found.model == "small"
    assert found.to_pandas().columns.tolist() == expected.to_pandas().columns.tolist()
    assert found.scores.dtype == np.float32


@both
def test_steering_normalisation_and_parts_are_asked_for_by_call(server, rm, asynchronous):
    found = ask(
        server.url, asynchronous, CONVERSATIONS, normalize=True, steer={"code-style": 2.0}, drop="ultra-helpful", include=["relative"]
    )  # fmt: skip
    expected = rm.steer({"code-style": 2.0}, drop="ultra-helpful").score(CONVERSATIONS, normalize=True)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.parts["relative"] == pytest.approx(expected.relative, abs=1e-5)
    assert found.rewards.shape == (23, 0)


@both
@pytest.mark.parametrize(
    "steering",
    [
        {"pin": {"code-style": 0.25}},
        {"blend": {"share": 0.5, "weights": {"ultra-helpful": 3.0, "verbosity": 1.0}}},
        {"blend": MappingProxyType({"share": 0.25})},
        {"debias_strength": 0.5},
        {"debias_strength": 0},
        {"multiply": {"beaver-harm": 3.0}, "pin": {"code-style": 0.1}, "debias_strength": 2.0},
    ],
)
def test_every_steering_of_the_library_can_be_asked_for(server, rm, asynchronous, steering):
    expected = rm.steer(**steering).score(CONVERSATIONS)
    assert np.abs(expected.scores - rm.score(CONVERSATIONS).scores).max() > 0.01
    asked = {"steer" if name == "multiply" else name: value for name, value in steering.items()}
    found = ask(server.url, asynchronous, CONVERSATIONS, {"rows_per_request": 5}, **asked)
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)
    assert found.coefficients == pytest.approx(expected.coefficients, abs=1e-5)
    assert found.contributions.sum(1) == pytest.approx(found.scores, abs=1e-5)


@both
def test_a_steering_that_cannot_be_meant_is_refused_by_its_name(server, asynchronous):
    for bad, message in (
        ({"pin": {"code-stile": 0.1}}, "did you mean code-style"),
        ({"pin": {"code-style": 1.5}}, "expected a share from 0 to 1"),
        ({"blend": {"weights": {}}}, "steer.blend.share: Field required"),
        ({"debias_strength": "much"}, "steer.debias_strength"),
    ):
        with pytest.raises(RewardServerError, match=message) as refused:
            ask(server.url, asynchronous, CONVERSATIONS[:1], **bad)
        assert refused.value.status == 400


@both
def test_uncertainty_comes_where_the_model_carries_it_and_is_none_elsewhere(server, rm, asynchronous):
    assert ask(server.url, asynchronous, CONVERSATIONS).uncertainty is None
    sure = with_uncertainty(rm, measured(rm.model.config.hidden_size))
    expected = sure.score(CONVERSATIONS)
    with served(sure) as surely:
        for include in (None, ["uncertainty"]):
            found = ask(surely.url, asynchronous, CONVERSATIONS, {"rows_per_request": 5}, include=include)
            assert found.uncertainty == pytest.approx(expected.uncertainty, abs=1e-5)
            assert found.parts == {}
        assert found.rewards.shape == (23, 0)
        assert ask(surely.url, asynchronous, CONVERSATIONS, include=["rewards"]).uncertainty is None
    assert expected.uncertainty.std() > 1e-3
    with pytest.raises(RewardServerError, match="this model carries no uncertainty"):
        ask(server.url, asynchronous, CONVERSATIONS, include=["uncertainty"])


@both
def test_a_refused_conversation_is_an_error_or_listed_with_its_place_across_requests(server, rm, asynchronous):
    rows = [*CONVERSATIONS[:5], chat("Q", " "), *CONVERSATIONS[5:8]]
    with pytest.raises(ConversationError, match=r"conversation 5: messages\[1\].content: found an empty response"):
        ask(server.url, asynchronous, rows, {"rows_per_request": 2})
    found = ask(server.url, asynchronous, rows, {"rows_per_request": 2}, on_refused="skip")
    assert [index for index, _ in found.rejected] == [5]
    assert found.rows.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert found.scores == pytest.approx(rm.score(CONVERSATIONS[:8]).scores, abs=1e-5)


@both
def test_nothing_asked_is_nothing_answered(server, asynchronous):
    found = ask(server.url, asynchronous, [])
    assert len(found) == 0
    assert found.rejected == []


def test_conversations_may_be_objects(server, rm):
    whole = Conversation.from_messages(question(1))
    with RewardClient(server.url) as client:
        found = client.score([whole, list(whole.messages)])
        assert found.scores == pytest.approx(rm.score([whole, whole]).scores, abs=1e-5)
        for bad in ("text", {"role": "user"}, 3, None):
            with pytest.raises(ConversationError, match=r"conversation 0: found .*, expected a list of messages"):
                client.score([bad])
        assert client.names == rm.objectives.names


def test_the_key_comes_from_the_argument_the_environment_or_the_address(rm, monkeypatch):
    with served(rm, api_key="s3cret") as closed:
        with (
            RewardClient(closed.url) as client,
            pytest.raises(RewardServerError, match="401, no valid API key") as refused,
        ):
            client.score([question(1)])
        assert refused.value.status == 401
        monkeypatch.setenv("ARMORM_API_KEY", "s3cret")
        for url, options in (
            (closed.url, {}),
            (closed.url, {"api_key": "s3cret"}),
            (closed.url.replace("//", "//any:s3cret@"), {"api_key": ""}),
        ):
            with RewardClient(url, **options) as client:
                assert len(client.score([question(1)])) == 1


@both
def test_a_full_server_is_asked_again_until_it_has_room(rm, asynchronous):
    opened = threading.Event()
    with (
        before_each_pass(rm.backbone.model, lambda ids: opened.wait(20)),
        served(rm, max_waiting_rows=2, batch_tokens=20) as busy,
    ):
        found = {}
        thread = threading.Thread(
            target=lambda: found.update(
                batch=ask(busy.url, asynchronous, CONVERSATIONS[:8], {"rows_per_request": 1, "retries": 30})
            )
        )
        thread.start()
        while busy.engine.batcher.waiting[0] < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        refusals = 'armorm_requests_total{route="/v1/reward",status="429"}'
        assert refusals in busy.client.get("/metrics").text
        opened.set()
        thread.join(30)
    assert found["batch"].scores == pytest.approx(rm.score(CONVERSATIONS[:8]).scores, abs=1e-5)


class Scripted(BaseHTTPRequestHandler):
    """A server that answers what it is told to, one after another; then an empty result."""

    script: list = []  # noqa: RUF012
    connections: set = set()  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).connections.add(self.client_address)
        status, body = type(self).script.pop(0)
        if status is None:
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr("armorm.client.pause", lambda attempt, at_least=0.0: 0.001)
    Scripted.connections = set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def answer(*results, objectives=("a",)):
    return {"model": "m", "objectives": list(objectives), "results": list(results)}


def result(index=0, score=1.0):
    parts = ("rewards", "gating_weights", "coefficients", "contributions")
    return {"index": index, "score": score} | {part: [1.0] for part in parts}


@both
def test_lost_connections_and_servers_in_trouble_are_tried_again(scripted, asynchronous):
    Scripted.script = [
        (None, ""),
        (503, {}),
        (429, {"error": {"message": "full"}}),
        (502, b"<html>"),
        (504, {}),
        (200, answer(result())),
    ]
    assert ask(scripted, asynchronous, [question(1)]).scores.tolist() == [1.0]
    assert Scripted.script == []


@both
def test_a_refusal_that_stays_one_is_raised_at_once_and_a_trouble_that_stays_after_the_last_try(scripted, asynchronous):
    Scripted.script = [(400, {"error": {"message": "no such field"}}), (200, answer(result()))]
    with pytest.raises(RewardServerError, match="400, no such field") as refused:
        ask(scripted, asynchronous, [question(1)])
    assert refused.value.status == 400
    assert len(Scripted.script) == 1
    Scripted.script = [(503, {"error": {"message": "going down"}})] * 3
    with pytest.raises(RewardServerError, match="503, going down"):
        ask(scripted, asynchronous, [question(1)], {"retries": 2})
    Scripted.script = [(None, "")] * 3
    with pytest.raises(RewardServerError) as lost:
        ask(scripted, asynchronous, [question(1)], {"retries": 2})
    assert lost.value.status is None
    assert Scripted.script == []


@both
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"not json", "the response is not a JSON object"),
        ([], "the response is not a JSON object"),
        (answer(), "found 0 results, expected 2"),
        (answer(result(0)), "found 1 results, expected 2"),
        (answer(result(0), result(1), result(2)), "found 3 results, expected 2"),
        (answer(result(1), result(0)), "result 0 of a response is missing or out of order"),
        (answer(result(0), result(1, None)), "found score None, expected a finite number"),
        (answer(result(0), result(1, "3")), "found score '3', expected a finite number"),
        (
            b'{"objectives": ["a"], "results": [{"index": 0, "score": NaN}, {"index": 1, "score": 1}]}',
            "found score nan",
        ),
        (answer(result(0), {"index": 1, "score": 2.0}), "invalid part of a response"),
        (answer(result(0), result(1), objectives=("a", "b")), "invalid part of a response"),
    ],
)
def test_an_answer_of_another_length_or_order_or_without_numbers_is_an_error(scripted, asynchronous, body, message):
    Scripted.script = [(200, body)]
    with pytest.raises(RewardServerError, match=message):
        ask(scripted, asynchronous, [question(1), question(2)])


class Slow(Scripted):
    """Sends its answer in pieces that come in time, and takes longer for all of them."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        data = json.dumps(answer(result())).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for start in range(0, len(data), 50):
            self.wfile.write(data[start : start + 50])
            time.sleep(0.25)


@both
def test_waiting_for_a_connection_is_no_timeout(asynchronous):
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        settings = {"rows_per_request": 1, "connections": 1, "timeout": 0.5, "retries": 0}
        found = ask(f"http://127.0.0.1:{http.server_port}", asynchronous, CONVERSATIONS[:2], settings)
        http.shutdown()
    assert found.scores.tolist() == [1.0, 1.0]


def test_a_connection_is_used_again(scripted):
    Scripted.script = [(200, answer(result()))] * 10
    with RewardClient(scripted) as client:
        for _ in range(10):
            client.score([question(1)])
    assert len(Scripted.connections) == 1


def test_pauses_grow_are_spread_and_respect_what_the_server_says():
    for attempt in range(12):
        assert all(
            0.25 * 2**attempt <= pause(attempt) <= 0.5 * 2**attempt or 15 <= pause(attempt) <= 30 for _ in range(20)
        )
    assert all(7 <= pause(0, 7.0) <= 8.75 for _ in range(20))
    assert pause(0, 1e9) <= 37.5


def test_settings_that_make_no_sense_are_refused():
    for bad in ({"rows_per_request": 0}, {"connections": 0}, {"retries": -1}):
        with pytest.raises(ValueError, match=r"expected (rows_per_request|connections) above 0"):
            RewardClient(**bad)
