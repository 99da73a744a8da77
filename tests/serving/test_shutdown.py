"""A stopping server answers every request that it has accepted: scores within its time limit, then 503."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from armorm.client import RewardClient
from armorm.serving.engine import ScoringEngine
from armorm.serving.server import bound_socket, running
from armorm.serving.settings import ServingSettings
from tests.helpers.forward_passes import before_each_pass
from tests.helpers.servers import question, served
from tests.helpers.small_models import reward_model


@pytest.fixture(scope="module")
def own_rm():
    """A model whose forward pass tests may slow down."""
    return reward_model(seed=3)


def test_what_the_time_limit_leaves_is_answered_with_503_and_a_time_to_come_back(own_rm, caplog):
    all_accepted = threading.Event()

    def slow_pass(ids):
        all_accepted.wait(60)
        time.sleep(0.05)

    with before_each_pass(own_rm.backbone.model, slow_pass), ThreadPoolExecutor(50) as pool:
        with caplog.at_level(logging.WARNING), served(own_rm, batch_tokens=1, shutdown_seconds=1) as server:

            def ask(number):
                body = {"conversations": [question(number)]}
                return httpx.post(f"{server.url}/v1/reward", json=body, timeout=60)

            calls = [pool.submit(ask, number) for number in range(50)]
            address = httpx.URL(server.url)
            unfinished = socket.create_connection((address.host, address.port), 20)
            head = "POST /v1/reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            unfinished.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            while server.engine.batcher.waiting[0] < 49:  # (and one in the forward pass)
                time.sleep(0.01)
            all_accepted.set()
            start = time.monotonic()
        took = time.monotonic() - start
        answers = [call.result(60) for call in calls]
        with unfinished:
            assert unfinished.recv(4096).startswith(b"HTTP/1.1 503 ")
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.headers["Content-Type"] == "application/json"
            assert answer.json()["error"]["type"] == "unavailable"
    assert took < 1 + 5
    assert "Traceback" not in caplog.text
    assert "Exception" not in caplog.text


ENDLESS = """
import torch
from armorm.serving.engine import ScoringEngine
from armorm.serving.server import address_of, bound_socket, serve
from armorm.serving.settings import ServingSettings
from tests.helpers.small_models import reward_model

def endless(*_):
    print("computing", flush=True)
    while True:
        numbers @ numbers

numbers = torch.ones(1000, 1000)
rm = reward_model(seed=3)
rm.backbone.model.register_forward_pre_hook(endless)
sock = bound_socket("127.0.0.1", 0)
print(address_of(sock), flush=True)
serve(ScoringEngine(rm, ServingSettings(shutdown_seconds=0.2)), sock)
"""


def test_a_server_that_stops_within_a_forward_pass_ends_with_zero():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ENDLESS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ThreadPoolExecutor(1) as pool, subprocess.Popen(command, cwd=root, **pipes) as process:
        url = process.stdout.readline().strip()
        answer = pool.submit(httpx.post, f"{url}/v1/reward", json={"conversations": [question(1)]}, timeout=60)
        assert process.stdout.readline() == "computing\n"
        process.terminate()
        assert answer.result(60).status_code == 503
        assert process.wait(60) == 0
        assert "terminate called" not in process.stderr.read()


def test_the_queue_is_no_longer_than_a_stopping_server_works_on_it():
    assert ServingSettings().max_waiting_seconds < ServingSettings().shutdown_seconds


@contextmanager
def forwarded(ports):
    """A balancer in front of servers on this machine: connections in turn, past a port where nobody listens."""
    listener = socket.create_server(("127.0.0.1", 0))
    turn = iter(range(10**9))

    def pump(source, target):
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def accept():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            first = next(turn)
            for step in range(len(ports)):
                try:
                    server = socket.create_connection(("127.0.0.1", ports[(first + step) % len(ports)]), 5)
                    break
                except OSError:
                    continue
            else:
                client.close()
                continue
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


@pytest.mark.slow
def test_a_rolling_restart_of_two_replicas_loses_no_training_step(own_rm):
    settings = ServingSettings(batch_tokens=64, shutdown_seconds=1)
    ports = []
    for _ in range(2):
        with bound_socket("127.0.0.1", 0) as sock:
            ports.append(sock.getsockname()[1])
    steps = [[question(100 * step + row) for row in range(16)] for step in range(8)]
    found, failures, restarts, stop = [], [], [0], threading.Event()
    expected = [own_rm.score(step).scores for step in steps]

    def replica(port):
        while not stop.is_set():
            with running(ScoringEngine(own_rm, settings), port=port):
                restart[port].wait(60)
                restart[port].clear()
            restarts[0] += 1

    def load(url):  # other clients, so that there is more work than the time limit gives
        with RewardClient(url, rows_per_request=1, connections=16, retries=20) as client:
            for number in range(1000, 100_000, 40):
                if stop.is_set():
                    return
                try:
                    client.score([question(number + row, words=9) for row in range(40)], include=[])
                except Exception as error:  # noqa: BLE001  # every failure counts
                    if not stop.is_set():
                        failures.append(error)
                    return

    restart = {port: threading.Event() for port in ports}
    with before_each_pass(own_rm.backbone.model, lambda ids: time.sleep(0.05)), forwarded(ports) as url:
        replicas = [threading.Thread(target=replica, args=(port,), daemon=True) for port in ports]
        for thread in replicas:
            thread.start()
        loader = threading.Thread(target=load, args=(url,), daemon=True)
        loader.start()
        with RewardClient(url, rows_per_request=2) as client:
            for number, step in enumerate(steps):
                if number in (1, 4):
                    restart[ports[number == 4]].set()
                found.append(client.score(step, include=[]).scores)
        stop.set()
        for event in restart.values():
            event.set()
        loader.join(30)
        for thread in replicas:
            thread.join(30)
    assert not failures
    assert restarts[0] >= 4  # two during the run, two at its end
    for scores, right in zip(found, expected, strict=True):
        assert scores == pytest.approx(right, abs=1e-5)
