"""Under pressure the server stays up: full queues, large requests, lost clients, failing models, shutdown."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from tests.helpers.conversations import chat
from tests.helpers.forward_passes import before_each_pass
from tests.helpers.servers import question, served
from tests.helpers.small_models import changed, reward_model


@pytest.fixture(scope="module")
def own_rm():
    """A model whose forward pass tests may hold up."""
    return reward_model(seed=3)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def request_bytes(path, body):
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


class Gate:
    """Holds the model's passes until it is opened, and counts rows."""

    def __init__(self):
        self.open = threading.Event()
        self.rows = 0
        self.passes = 0

    def __call__(self, ids):
        self.passes += 1
        self.rows += len(ids)
        self.open.wait(60)


def test_a_full_queue_turns_requests_away_with_a_time_to_come_back_and_keeps_what_it_has(own_rm):
    gate = Gate()
    with (
        before_each_pass(own_rm.backbone.model, gate),
        served(own_rm, max_waiting_rows=3) as server,
        ThreadPoolExecutor(20) as pool,
    ):
        held = pool.submit(server.post, "/v1/reward", conversations=[question(0)])
        until(lambda: gate.passes)
        kept = [pool.submit(server.post, "/v1/reward", conversations=[question(n)]) for n in (1, 2, 3)]
        until(lambda: server.engine.batcher.waiting[0] == 3)
        assert server.client.get("/ready").status_code == 503
        assert server.client.get("/health").status_code == 200
        for path, status in (("/v1/reward", 429), ("/score", 429), ("/classify", 503), ("/v1/embeddings", 503)):
            body = {"/v1/reward": {"conversations": [question(9)]}, "/score": {"text_1": "a", "text_2": "b"}}
            text = "Human: a\n\nAssistant: b"
            answer = server.client.post(path, json=body.get(path, {"input": text}))
            assert answer.status_code == status, path
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["message"] == "the queue is full; try again later"
        with socket.create_connection(
            (httpx.URL(server.url).host, httpx.URL(server.url).port), 10
        ) as unread:  # turned away by its head alone
            unread.sendall(
                b"POST /v1/reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
            )
            assert unread.recv(100).startswith(b"HTTP/1.1 429 ")
        gate.open.set()
        scores = [call.result(60).json()["results"][0]["score"] for call in (held, *kept)]
        assert scores == pytest.approx(own_rm.score([question(n) for n in range(4)]).scores.tolist(), abs=1e-5)
        assert server.client.get("/ready").status_code == 200
    assert gate.rows == 4 + 4  # those of the comparison are passes, too


def test_requests_beyond_the_limits_are_refused(rm):
    with served(rm, max_body=2000, max_rows=3, max_length=50) as server:
        large = server.post("/v1/reward", conversations=[chat("Q", "x" * 3000)])
        assert (large.status_code, large.json()["error"]["type"]) == (413, "too_large")
        many = server.post("/v1/reward", conversations=[question(n) for n in range(4)])
        assert many.status_code == 413
        assert many.json()["error"]["message"] == "found 4 rows in one request, expected at most 3"
        long = server.post("/v1/reward", conversations=[question(1), question(2, words=60)]).json()["results"]
        assert "score" in long[0]
        assert "expected at most 50" in long[1]["error"]
        assert server.post("/v1/reward", conversations=[question(1)]).status_code == 200


def test_endless_dialogues_and_texts_are_shortened_or_refused_in_good_time(rm):
    cutting = changed(rm, limits={"max_length": 200, "overflow": "truncate_prompt"})
    turns = chat(*(f"turn {n}" for n in range(601)), "Yes.")
    rows = [turns[1:], turns[1:] * 50, chat("word " * 200_000, "Yes."), chat("Q", "word " * 200_000)]
    start = time.process_time()
    with served(cutting) as server:
        results = server.post("/v1/reward", conversations=rows, include=[]).json()["results"]
        text = server.post("/classify", input="Human: " + "word " * 200_000 + "\n\nAssistant: x")
    assert time.process_time() - start < 5
    assert results[0]["truncated_tokens"] > 1000
    for result in results[1:]:
        assert "expected at most 200 tokens" in result["error"]
    assert text.status_code == 422


def test_a_body_that_says_no_length_is_counted_as_it_comes(rm):
    with served(rm, max_body=2000) as server:
        answer = server.client.post("/v1/reward", content=(b"x" * 500 for _ in range(20)))
        assert answer.status_code == 413
        assert server.client.get("/health").status_code == 200


def test_a_request_that_takes_too_long_is_answered_so_and_its_rows_leave_the_queue(own_rm):
    gate = Gate()
    with before_each_pass(own_rm.backbone.model, gate), served(own_rm, request_seconds=0.4) as server:
        with ThreadPoolExecutor(4) as pool:
            held = pool.submit(server.post, "/v1/reward", conversations=[question(0)])
            until(lambda: gate.passes)
            late = server.post("/get_reward", query=["Human: a\n\nAssistant: b"])
            assert late.status_code == 504
            assert late.json()["error"]["message"] == "not scored within 0.4 s"
            assert held.result(10).status_code == 504
            assert server.engine.batcher.waiting == (0, 0)
        gate.open.set()
        until(lambda: server.post("/v1/reward", conversations=[question(1)]).status_code == 200)


def test_a_client_that_stalls_in_its_body_is_cut_off(rm):
    with served(rm, request_seconds=0.3) as server, socket.create_connection(server.url[7:].split(":")) as client:
        client.sendall(
            b"POST /v1/reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        client.settimeout(10)
        assert b"504" in client.recv(4096)


def test_the_work_of_clients_that_have_gone_is_dropped(own_rm):
    gate = Gate()
    with before_each_pass(own_rm.backbone.model, gate), served(own_rm) as server, ThreadPoolExecutor(4) as pool:
        held = pool.submit(server.post, "/v1/reward", conversations=[question(0)])
        until(lambda: gate.passes)
        host, port = server.url[7:].split(":")
        clients = [socket.create_connection((host, port)) for _ in range(5)]
        for number, client in enumerate(clients):
            body = json.dumps({"prompt": "a", "responses": [f"{number}", f"{number} b"]})
            client.sendall(request_bytes("/v1/reward", body))
        until(lambda: server.engine.batcher.waiting[0] == 10)
        for client in clients:
            client.close()
        until(lambda: server.engine.batcher.waiting == (0, 0))
        gate.open.set()
        assert held.result(60).status_code == 200
        assert server.post("/v1/reward", conversations=[question(1)]).status_code == 200
        assert gate.rows == 2
        text = server.client.get("/metrics").text
        assert 'armorm_rows_total{outcome="dropped"} 10.0' in text
        assert 'armorm_requests_total{route="/v1/reward",status="499"} 5.0' in text


def test_a_stopping_server_answers_what_it_has_accepted(own_rm):
    gate = Gate()
    with before_each_pass(own_rm.backbone.model, gate), ThreadPoolExecutor(20) as pool:
        with served(own_rm, batch_tokens=60) as server:
            url = server.url

            def ask(number):
                body = {"conversations": [question(number)]}
                return pool.submit(httpx.post, f"{url}/v1/reward", json=body, timeout=20)

            calls = [ask(0)]
            until(lambda: gate.passes)
            calls += [ask(number) for number in range(1, 12)]
            until(lambda: server.engine.batcher.waiting[0] == 11)
            threading.Timer(0.3, gate.open.set).start()
        answers = [call.result(60) for call in calls]
    scores = [answer.json()["results"][0]["score"] for answer in answers]
    assert scores == pytest.approx(own_rm.score([question(n) for n in range(12)]).scores.tolist(), abs=1e-5)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=5)


def test_one_row_that_the_model_fails_on_fails_alone_among_all_requests_of_its_batch(own_rm, caplog):
    bad = chat("Secret", "zebra " * 3)
    marker = own_rm.tokenizer(" zebra", add_special_tokens=False).input_ids[-1]

    def fail(ids):
        if (ids == marker).any():
            raise RuntimeError("shapes do not fit")

    gate = Gate()

    def act(ids):
        gate(ids)
        fail(ids)

    with before_each_pass(own_rm.backbone.model, act), served(own_rm) as server, ThreadPoolExecutor(20) as pool:
        held = pool.submit(server.post, "/v1/reward", conversations=[question(0)])
        until(lambda: gate.passes)
        calls = [pool.submit(server.post, "/v1/reward", conversations=[question(n)]) for n in range(1, 6)]
        mixed = pool.submit(server.post, "/v1/reward", conversations=[question(6), bad, question(7)])
        lone = pool.submit(server.post, "/score", text_1="Secret", text_2="zebra " * 3)
        until(lambda: server.engine.batcher.waiting[0] >= 8)
        gate.open.set()
        good = [call.result(60).json()["results"][0]["score"] for call in (held, *calls)]
        results = mixed.result(60).json()["results"]
        assert lone.result(60).status_code == 500
        assert server.client.get("/health").status_code == 200
    assert results[1] == {"index": 1, "error": "the model failed on this conversation"}
    expected = own_rm.score([question(n) for n in range(8)]).scores.tolist()
    assert [*good, results[0]["score"], results[2]["score"]] == pytest.approx(expected, abs=1e-5)
    assert "shapes do not fit" in caplog.text  # the operator sees why,
    assert "zebra" not in caplog.text  # and nobody's text
    assert "Secret" not in caplog.text


def test_a_score_that_is_no_number_is_an_error_and_never_sent(own_rm):
    def spoil(module, args, kwargs, output):
        output.last_hidden_state[:1] = torch.nan
        return output

    handle = own_rm.model.model.register_forward_hook(spoil, with_kwargs=True)
    try:
        with served(own_rm) as server:
            answer = server.post("/v1/reward", conversations=[question(1, words=9), question(2)])
            lone = server.post("/get_reward", query=["Human: a\n\nAssistant: b"])
    finally:
        handle.remove()
    assert answer.json()["results"][0]["error"] == "the model's score of this conversation is not a finite number"
    assert "score" in answer.json()["results"][1]
    assert lone.status_code == 500


def test_a_model_that_runs_out_of_memory_goes_on_with_smaller_batches(own_rm):
    def limited(ids):
        if ids.numel() > 200:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    rows = [question(n, words=1 + n % 9) for n in range(40)]
    with before_each_pass(own_rm.backbone.model, limited), served(own_rm) as server:
        answer = server.post("/v1/reward", conversations=[*rows, question(1, words=150)]).json()["results"]
        scores = [result["score"] for result in answer[:-1]]
        assert "out of memory" in answer[-1]["error"]
        assert server.engine.batcher.budget <= 200
        assert server.client.get("/health").status_code == 200
        again = server.post("/v1/reward", conversations=rows).json()["results"]
        assert [result["score"] for result in again] == pytest.approx(scores, abs=1e-5)
        assert "armorm_out_of_memory_total 0.0" not in server.client.get("/metrics").text
    assert scores == pytest.approx(own_rm.score(rows).scores.tolist(), abs=1e-5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_model_thread_is_reported_and_answered_for(own_rm):
    def end(ids):
        raise SystemExit

    with before_each_pass(own_rm.backbone.model, end), served(own_rm) as server:
        answer = server.post("/v1/reward", conversations=[question(1)])
        assert answer.status_code == 503
        assert "the model's thread has ended" in answer.json()["error"]["message"]
        until(lambda: server.client.get("/health").status_code == 503)
        assert server.client.get("/ready").status_code == 503
        assert server.post("/v1/reward", conversations=[question(1)]).status_code == 503


def test_too_many_requests_and_too_many_bytes_under_way_are_turned_away(own_rm):
    gate = Gate()
    with (
        before_each_pass(own_rm.backbone.model, gate),
        served(own_rm, max_requests=2) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        held = [pool.submit(server.post, "/v1/reward", conversations=[question(0)])]
        until(lambda: gate.passes)  # the second must not join the pass of the first
        held.append(pool.submit(server.post, "/v1/reward", conversations=[question(1)]))
        until(lambda: server.engine.batcher.waiting[0] == 1)
        answer = server.post("/v1/reward", conversations=[question(3)])
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        assert server.client.get("/health").status_code == 200
        gate.open.set()
        assert [call.result(60).status_code for call in held] == [200, 200]
    with served(own_rm, max_bytes=300) as server:
        assert server.post("/v1/reward", conversations=[chat("Q", "x" * 400)]).status_code == 429
        assert server.post("/v1/reward", conversations=[chat("Q", "x")]).status_code == 200


def test_a_crowd_of_clients_is_all_served_in_few_passes(own_rm):
    gate = Gate()
    gate.open.set()
    with before_each_pass(own_rm.backbone.model, gate), served(own_rm) as server:
        found = server.together(
            [
                lambda n=n: server.post("/v1/reward", conversations=[question(n)]).json()["results"][0]["score"]
                for n in range(64)
            ]
        )
    passes = gate.passes
    assert found == pytest.approx(own_rm.score([question(n) for n in range(64)]).scores.tolist(), abs=1e-5)
    assert passes < 40


def test_identical_conversations_of_many_clients_go_through_the_model_once(own_rm):
    gate = Gate()
    with before_each_pass(own_rm.backbone.model, gate), served(own_rm) as server, ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(server.post, "/v1/reward", conversations=[question(1)] * 3) for _ in range(10)]
        until(lambda: gate.passes)
        time.sleep(1)
        gate.open.set()
        scores = {result["score"] for call in calls for result in call.result(60).json()["results"]}
    assert len(scores) == 1
    assert gate.rows <= 3  # one; a straggler may come after it was done


def test_texts_reach_the_log_only_when_asked_for(rm, caplog):
    conversation = chat("my secret question", "my secret answer")
    with caplog.at_level(logging.DEBUG), served(rm) as server:
        server.post("/v1/reward", conversations=[conversation, chat("my secret", " ")])
        server.post("/classify", input="my secret text")
        server.client.post("/v1/reward", content=b'{"conversations": "my secret"}')
    assert "secret" not in "".join(record.getMessage() for record in caplog.records if "httpx" not in record.name)
    with caplog.at_level(logging.INFO, "armorm.serving"), served(rm, log_texts=True) as server:
        server.post("/v1/reward", conversations=[conversation])
    assert "my secret answer" in caplog.text


def test_a_small_request_overtakes_a_large_one_between_its_layers_and_both_get_their_scores(own_rm):
    begun, answered, sizes = threading.Event(), threading.Event(), []
    large, small = question(1, words=150), question(2, words=1)
    expected = own_rm.score([large, small]).scores.tolist()
    with served(own_rm) as server, ThreadPoolExecutor(2) as pool:

        def at_the_first_layer(module, args):
            sizes.append(args[0].shape[1])
            begun.set()
            if sizes[-1] > 200:
                until(lambda: server.engine.batcher.waiting[0])

        def at_the_last_layer(module, args):
            if args[0].shape[1] > 200:
                assert answered.wait(20)

        layers = own_rm.backbone.model.layers
        hooks = [layers[0].register_forward_pre_hook(at_the_first_layer, prepend=True)]
        hooks += [layers[-1].register_forward_pre_hook(at_the_last_layer, prepend=True)]
        try:
            first = pool.submit(server.post, "/v1/reward", conversations=[large])
            begun.wait(20)
            answer = server.post("/v1/reward", conversations=[small])
            assert not first.done()
            answered.set()
            answers = [first.result(30), answer]
        finally:
            answered.set()
            for hook in hooks:
                hook.remove()
    assert len(sizes) == 2
    assert sizes[0] > 200 > sizes[1]
    found = [answer.json()["results"][0]["score"] for answer in answers]
    assert found == pytest.approx(expected, abs=1e-5)
