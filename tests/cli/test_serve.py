"""`armorm serve`, run as people run it and stopped as supervisors stop it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from tests.helpers.commands import run  # noqa: E402
from tests.helpers.servers import question  # noqa: E402
from tests.helpers.small_models import reward_model  # noqa: E402


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small-rm"
    reward_model().save_pretrained(folder)
    return folder


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_server_answers_under_its_key_and_ends_with_zero_when_told_to_stop(saved, monkeypatch, capsys):
    monkeypatch.setenv("REWARD_KEY", "s3cret")
    port, answers = free_port(), []

    def ask():
        url = f"http://127.0.0.1:{port}"
        for _ in range(1000):
            try:
                httpx.get(f"{url}/ready")
                break
            except httpx.ConnectError:
                time.sleep(0.02)
        body = {"conversations": [question(1)]}
        answers.append(httpx.post(f"{url}/v1/reward", json=body))
        answers.append(httpx.post(f"{url}/v1/reward", json=body, headers={"Authorization": "Bearer s3cret"}))
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    options = ("--port", port, "--api-key-env", "REWARD_KEY", "--dtype", "float32")
    code, _, said = run(capsys, "serve", "--model", saved, *options)
    assert code == 0
    assert [answer.status_code for answer in answers] == [401, 200]
    assert answers[1].json()["model"] == "small-rm"
    assert f"small-rm (4 objectives) on http://127.0.0.1:{port}" in said
    assert "warning" not in said
    assert "s3cret" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api-key-env", "NOT_SET"], "environment variable NOT_SET is empty or absent"),
        (["--rendered-turns", "some"], "rendered_turns 'some', expected refuse, single or multi"),
        (["--host", "no.such.host.invalid"], "host 'no.such.host.invalid'"),
        (["--port", "0", "--policy-tokenizer", "/no/such/folder"], "cannot be loaded as a tokenizer"),
        (["--port", "0", "--model", "/no/such/model"], "/no/such/model: no such folder"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(saved, options, message, capsys):
    code, _, said = run(capsys, "serve", "--model", saved, *options)
    assert code == 1
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_a_port_in_use_is_found_out_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, said = run(capsys, "serve", "--model", "/no/such/model", "--port", taken.getsockname()[1])
    assert code == 1
    assert re.search(r"127.0.0.1, port \d+: Address already in use", said)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr("armorm.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    _, _, said = run(capsys, "serve")
    assert said.strip() == "armorm: serving needs uvicorn, expected: pip install 'armorm[serve]'"
