"""Who may ask, and what an answer gives away."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from armorm.serving.engine import ScoringEngine
from armorm.serving.errors import RequestError
from armorm.serving.server import (
    ServerError,
    address_of,
    bound_socket,
    exposure_warnings,
    key_from_environment,
    served_name,
)
from armorm.serving.settings import ServingSettings, SettingsError
from tests.helpers.servers import question, served
from tests.helpers.small_models import changed

KEY = "k3y-with-ünicode"


def test_without_the_key_nothing_is_answered_but_health(rm):
    with served(rm, api_key=KEY) as server:
        for path in ("/v1/reward", "/get_reward", "/classify", "/v1/chat/completions"):
            answer = server.client.post(path, json={})
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "unauthorized"
        for path in ("/metrics", "/v1/models", "/openapi.json", "/nope"):
            assert server.client.get(path).status_code == 401
        assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200


def test_the_key_is_taken_as_a_bearer_token_or_as_the_password_of_an_address(rm):
    body = {"conversations": [question(1)]}
    with served(rm, api_key=KEY) as server:
        bearer = {"Authorization": b"Bearer " + KEY.encode()}
        assert server.client.post("/v1/reward", json=body, headers=bearer).status_code == 200
        address = server.url.replace("http://", "http://any:k3y-with-%C3%BCnicode@")
        assert httpx.post(f"{address}/v1/reward", json=body).status_code == 200
        for value in ("", "Bearer", "Bearer wrong", f"Basic {KEY}".encode(), "Basic ****", KEY.encode(), "Digest a"):
            assert server.client.post("/v1/reward", json=body, headers={"Authorization": value}).status_code == 401


def test_a_key_that_is_absent_or_empty_does_not_leave_the_server_open(monkeypatch):
    monkeypatch.setenv("SET", "abc\n")
    monkeypatch.setenv("EMPTY", " ")
    assert key_from_environment(None) is None
    assert key_from_environment("SET") == "abc"
    for name in ("EMPTY", "ABSENT"):
        with pytest.raises(SettingsError, match=f"environment variable {name} is empty or absent"):
            key_from_environment(name)
    with pytest.raises(SettingsError, match="the API key is empty"):
        ServingSettings(api_key="")


@pytest.mark.parametrize(("host", "open_to_others"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("127.1.2.3", False), ("0.0.0.0", True), ("::", True), ("10.0.0.5", True), ("example.org", True)])  # fmt: skip
def test_a_server_that_others_can_reach_without_a_key_is_warned_about(host, open_to_others):
    warnings = exposure_warnings(host, ServingSettings())
    assert [name for name in ("--api-key-env", "--allowed-hosts") if name in "".join(warnings)] == (
        ["--api-key-env", "--allowed-hosts"] if open_to_others else []
    )
    assert exposure_warnings(host, ServingSettings(api_key="key", allowed_hosts=("a.example",))) == []


def test_no_answer_names_a_path_of_the_servers_machine(rm, tmp_path):
    folder = tmp_path / "my-model"
    rm.save_pretrained(folder)
    loaded = type(rm).from_pretrained(folder, dtype="float32", device="cpu")
    assert served_name(str(folder)) == "my-model"
    assert served_name("org/model-on-the-hub") == "org/model-on-the-hub"
    with served(loaded, name=served_name(loaded.name)) as server:
        answers = [server.client.get(path) for path in ("/v1/models", "/metrics", "/health", "/openapi.json", "/nope")]
        answers += [
            server.client.post(path, json=body)
            for path in ("/v1/reward", "/get_reward", "/classify", "/v1/chat/completions", "/v1/score/evaluation")
            for body in (
                {},
                {"input": "x"},
                {"query": ["x"]},
                {"messages": question(1)},
                {"conversations": [question(1)]},
            )
        ]
    assert "my-model" in answers[0].text
    for answer in answers:
        assert str(tmp_path) not in answer.text
        assert not re.search(r"/(home|tmp|root|work|usr|src)/|\.py\b|Traceback|site-packages", answer.text), answer.text


def test_an_unknown_route_and_a_wrong_method_are_errors_of_the_same_shape(server):
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/reward", 405), ("DELETE", "/health", 405)):
        answer = server.client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status


def test_a_port_in_use_and_an_unknown_host_are_said_in_one_line():
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = int(address_of(taken).rpartition(":")[2])
        with pytest.raises(ServerError, match=f"127.0.0.1, port {port}: Address already in use"):
            bound_socket("127.0.0.1", port)
    with pytest.raises(ServerError, match=r"host 'no\.such\.host\.invalid'"):
        bound_socket("no.such.host.invalid", 0)
    with pytest.raises(ServerError, match="port 99999"):
        bound_socket("127.0.0.1", 99999)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_rows": 0},
        {"request_seconds": -1},
        {"batch_wait": -0.1},
        {"empty_score": float("nan")},
        {"rendered_turns": "all"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(SettingsError, match=next(iter(settings))):
        ServingSettings(**settings)


def test_a_server_cannot_normalise_by_figures_that_the_model_lacks(rm):
    with pytest.raises(SettingsError, match="no reference scores"):
        ScoringEngine(changed(rm, reference={}), ServingSettings(normalize=True))


def test_every_failure_has_a_name():
    for status, name in ((429, "overloaded"), (418, "error")):
        error = json.loads(RequestError(status, "x").response().body)["error"]
        assert error == {"message": "x", "type": name, "code": status}
