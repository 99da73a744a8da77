"""Pages of other sites, ambiguous requests and slow clients, over real sockets."""

from __future__ import annotations

import gzip
import json
import socket
import sys
import time
from contextlib import ExitStack

import httpx
import pytest

from armorm.serving.hosts import HostRules, is_local
from armorm.serving.settings import ServingSettings, SettingsError
from tests.helpers.servers import question, served

BODY = json.dumps({"conversations": [question(1)]}).encode()
JSON = "Content-Type: application/json"


def connected(server, seconds=10.0):
    address = httpx.URL(server.url)
    return socket.create_connection((address.host, address.port), seconds)


def sent(server, *head, body=b""):
    """Everything that the server sends in response to raw bytes until it closes the connection or is silent."""
    with connected(server, 5) as client:
        client.sendall("\r\n".join([*head, "", ""]).encode() + body)
        return received(client)


def received(client):
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except TimeoutError:
        parts.append(b"<open>")
    return b"".join(parts)


def post(*headers, host="localhost", length=None):
    length = len(BODY) if length is None else length
    return ["POST /v1/reward HTTP/1.1", f"Host: {host}", f"Content-Length: {length}", "Connection: close", *headers]


# --- pages of other sites --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.5", "a@localhost", ""])  # fmt: skip
def test_a_server_of_this_machine_answers_no_other_name_on_any_path(server, host):
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/openapi.json", "/nope"):
        answer = sent(server, f"GET {path} HTTP/1.1", f"Host: {host}", "Connection: close")
        assert answer.startswith(b"HTTP/1.1 421 "), (path, answer)
        assert b'"type": "misdirected"' in answer
    assert sent(server, *post(JSON, host=host), body=BODY).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8008", "[::1]:8008", "a.localhost", "localhost."])  # fmt: skip
def test_a_server_of_this_machine_answers_its_local_names(server, host):
    assert sent(server, *post(JSON, host=host), body=BODY).startswith(b"HTTP/1.1 200 ")


def test_a_request_without_a_host_or_with_two_is_not_answered(server):
    assert sent(server, "GET /health HTTP/1.0").startswith(b"HTTP/1.1 421 ")
    twice = sent(server, "GET /health HTTP/1.1", "Host: localhost", "Host: evil.example", "Connection: close")
    assert twice.startswith(b"HTTP/1.1 4")


def test_names_are_added_by_a_setting(rm):
    with served(rm, allowed_hosts=("rewards.example.org", "*.pods.example")) as server:
        for host, status in (
            *(("rewards.example.org", 200), ("Rewards.Example.ORG:8443", 200), ("a.pods.example", 200)),
            *(("localhost", 200), ("pods.example", 421), ("evil.example", 421)),
        ):
            answer = server.client.get("/health", headers={"Host": host})
            assert answer.status_code == status, host


def test_a_server_of_other_machines_answers_every_name_unless_it_has_a_list():
    for rules, answered in ((HostRules(None), True), (HostRules(()), False), (HostRules(["a.example"]), True)):
        headers = httpx.Headers({"host": "a.example"})
        headers.getlist = headers.get_list  # type: ignore[attr-defined]
        assert (rules.rejection(headers, "10.0.0.5") is None) == answered  # type: ignore[arg-type]
        headers["host"] = "10.0.0.5:8008"  # as of a probe that knows the address alone
        assert rules.rejection(headers, "10.0.0.5") is None  # type: ignore[arg-type]
    assert is_local("[::1]")
    assert not is_local("0.0.0.0")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000", "https://localhost", "file://", ""])  # fmt: skip
def test_pages_of_other_sites_are_refused_whatever_they_send(server, origin):
    for path in ("/health", "/v1/models"):
        assert server.client.get(path, headers={"Origin": origin}).status_code == 403
    answer = server.client.post("/v1/reward", content=BODY, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "forbidden")
    assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_pages_and_listed_sites_may_send_requests(rm, server):
    assert server.client.get("/health", headers={"Origin": server.url}).status_code == 200
    site = "https://dash.example"
    preflight = {"Origin": site, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}  # fmt: skip
    with served(rm, allowed_origins=(site,), api_key="k") as listed:
        allowed = listed.client.options("/v1/reward", headers=preflight)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, site)
        refused = listed.client.post("/v1/reward", content=BODY, headers={"Origin": site})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, site)
        answer = listed.client.post("/v1/reward", content=BODY, headers={"Origin": site, "Authorization": "Bearer k"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, site)
        assert listed.client.options("/v1/reward", headers={**preflight, "Origin": "https://e.example"}).status_code == 403  # fmt: skip
    assert "access-control-allow-origin" not in server.client.get("/health", headers={"Origin": server.url}).headers


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonp"])  # fmt: skip
def test_a_body_that_is_not_called_json_is_refused(server, kind):
    for path in ("/v1/reward", "/get_reward", "/classify"):
        answer = server.client.post(path, content=BODY, headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert "application/json" in answer.json()["error"]["message"]
    assert sent(server, *post(), body=BODY).startswith(b"HTTP/1.1 415 ")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_the_names_of_json_are_accepted(server, kind):
    assert server.client.post("/v1/reward", content=BODY, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize("bad", [{"allowed_hosts": ("http://a.example",)}, {"allowed_hosts": ("a:80",)}, {"allowed_origins": ("*",)}, {"allowed_origins": ("a.example",)}])  # fmt: skip
def test_names_that_no_header_has_are_refused_as_settings(bad):
    with pytest.raises(SettingsError, match="allowed"):
        ServingSettings(**bad)


# --- ambiguous requests ----------------------------------------------------------------------------------


def test_two_ways_to_end_a_body_are_refused_and_nothing_behind_it_is_read(server):
    chunked = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = ["POST /v1/reward HTTP/1.1", "Host: localhost", JSON, "Content-Length: 5", "Transfer-Encoding: chunked"]
    answer = sent(server, *head, body=chunked + smuggled)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Length and Transfer-Encoding" in answer
    assert answer.count(b"HTTP/1.1") == 1
    assert not answer.endswith(b"<open>")


@pytest.mark.parametrize("text", ['{"query": [], "query": ["a"]}', '{"query": [{"a": 1, "b": 2, "a": 1}]}'])
def test_a_name_that_occurs_twice_in_an_object_is_refused(server, text):
    answer = server.client.post("/get_reward", content=text)
    assert answer.status_code == 400
    assert "twice in one object" in answer.json()["error"]["message"]


def test_the_connection_ends_after_a_body_that_is_too_large(rm):
    with served(rm, max_body=2000) as server, connected(server) as client:
        client.sendall("\r\n".join([*post(JSON, length=10**9)[:3], JSON, "", ""]).encode() + b"x" * 1000)
        start = time.monotonic()
        answer = received(client)  # until the server closes
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer.lower()
        assert time.monotonic() - start < 8
    with served(rm, max_body=2000) as server:  # a client that reads only after it has sent all gets the response too
        assert server.client.post("/v1/reward", content=b"x" * 500_000).status_code == 413


def test_bytes_that_are_not_http_get_an_error_of_the_usual_shape(server):
    answer = sent(server, "\x16\x03\x01 nonsense")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request"


# --- gzip ------------------------------------------------------------------------------------------------


def test_gzip_bodies_are_scored_like_plain_ones(server):
    plain = server.client.post("/v1/reward", content=BODY).json()
    packed = server.client.post("/v1/reward", content=gzip.compress(BODY), headers={"Content-Encoding": "gzip"})
    assert packed.json()["results"] == plain["results"]


def test_a_gzip_body_is_limited_by_its_unpacked_size(rm):
    headers = {"Content-Encoding": "gzip"}
    with served(rm, max_body=1 << 20) as server:
        bomb = gzip.compress(b" " * (200 << 20))
        assert len(bomb) < 1 << 20
        assert server.client.post("/v1/reward", content=bomb, headers=headers).status_code == 413
        fits = gzip.compress(b" " * ((1 << 20) - len(BODY)) + BODY)
        assert server.client.post("/v1/reward", content=fits, headers=headers).status_code == 200


def test_broken_gzip_and_other_encodings_are_refused_in_words(server):
    packed = gzip.compress(BODY)
    for content, what in (
        (BODY, "not gzip"),
        (packed[:-9], "ends early"),
        (packed + b"x", "behind its end"),
        (b"", ""),
    ):
        answer = server.client.post("/v1/reward", content=content, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 400
        assert what in answer.json()["error"]["message"]
    answer = server.client.post("/v1/reward", content=BODY, headers={"Content-Encoding": "br"})
    assert (answer.status_code, answer.headers["Accept-Encoding"]) == (415, "gzip")
    assert "expected gzip or none" in answer.json()["error"]["message"]


# --- slow clients ----------------------------------------------------------------------------------------


def test_headers_that_do_not_come_end_the_connection_and_honest_clients_are_answered_meanwhile(rm):
    with served(rm, header_seconds=1) as server, ExitStack() as stack:
        half_open = [stack.enter_context(connected(server)) for _ in range(300)]
        for client in half_open[:200]:
            client.sendall(b"POST /v1/reward HTTP/1.1\r\nHost: local")
        start = time.monotonic()
        assert server.client.post("/v1/reward", content=BODY).status_code == 200
        for client in half_open:
            answer = received(client)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert not answer.endswith(b"<open>")
        assert time.monotonic() - start > 0.5  # not at once
        assert server.client.get("/health").status_code == 200


@pytest.mark.slow
def test_headers_that_come_byte_by_byte_are_timed_from_their_first_byte(rm):
    with served(rm, header_seconds=0.6) as server, connected(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        time.sleep(0.8)  # idle between two requests, which is another limit
        start = time.monotonic()
        with pytest.raises(OSError):
            for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100:
                client.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - start < 8


def test_a_body_that_stops_coming_ends_while_one_that_comes_slowly_is_scored(rm):
    with served(rm, body_idle_seconds=0.5) as server:
        with connected(server) as client:
            client.sendall("\r\n".join([*post(JSON), "", ""]).encode() + BODY[:10])
            answer = received(client)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"no byte of the body came for 0.5 s" in answer
        with connected(server) as client:
            client.sendall("\r\n".join([*post(JSON), "", ""]).encode())
            for start in range(0, len(BODY), 25):
                time.sleep(0.12)
                client.sendall(BODY[start : start + 25])
            assert received(client).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux sockets")
def test_a_client_that_reads_no_response_is_cut_off(rm):
    with served(rm, keep_alive_seconds=1) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(15)
        address = httpx.URL(server.url)
        client.connect((address.host, address.port))
        with pytest.raises((ConnectionResetError, BrokenPipeError, ConnectionAbortedError, TimeoutError)) as cut:
            while True:  # responses of some 50 KB that nobody reads
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
                time.sleep(0.05)
        assert cut.type is not TimeoutError


def test_an_idle_connection_is_closed(rm):
    with served(rm, keep_alive_seconds=1) as server, connected(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert not received(client).endswith(b"<open>")


def test_a_new_connection_replaces_the_one_that_has_waited_longest(rm):
    with served(rm, max_connections=20, header_seconds=60) as server, ExitStack() as stack:
        idle = [stack.enter_context(connected(server)) for _ in range(60)]
        for number in range(3):
            with httpx.Client(base_url=server.url) as honest:
                assert honest.post("/v1/reward", json={"conversations": [question(number)]}).status_code == 200
        for client in idle[:30]:
            assert client.recv(1) == b""  # (not the 408 of a time limit)


def test_headers_without_end_are_refused(server):
    with connected(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000)
        assert received(client).startswith(b"HTTP/1.1 400 ")
