"""The committed nginx configuration before two workers: TLS, both at work, one full or gone (slow; skipped without nginx)."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")

from armorm.client import RewardClient  # noqa: E402
from tests.helpers.forward_passes import before_each_pass  # noqa: E402
from tests.helpers.servers import question, served  # noqa: E402

pytestmark = pytest.mark.slow

CONFIGURATION = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
TEMPORARY = (
    "client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path a; uwsgi_temp_path b; scgi_temp_path c;"
)


def changed(text: str, old: str, new: str) -> str:
    assert old in text, old
    return text.replace(old, new)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate and its key, signed by itself."""
    openssl = shutil.which("openssl")
    if NGINX is None or openssl is None:
        pytest.skip("no nginx or no openssl here")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "tls.crt", folder / "tls.key"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]),
        ],
        check=True,
        capture_output=True,
    )
    return files


@contextmanager
def nginx(folder: Path, certificate: tuple[Path, Path], workers: list[str]) -> Iterator[str]:
    """nginx with the committed configuration; ports, certificate and folders are those of the test."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    text = changed(CONFIGURATION, "listen 8443", f"listen 127.0.0.1:{port}")
    for place, url in zip(("127.0.0.1:8008", "127.0.0.1:8009"), workers, strict=True):
        text = changed(text, place, url.removeprefix("http://"))
    for place, file in zip(("/etc/armorm/tls.crt", "/etc/armorm/tls.key"), certificate, strict=True):
        text = changed(text, place, str(file))
    text = changed(text, "http {\n", f"http {{\n    {TEMPORARY}\n")
    (folder / "nginx.conf").write_text(f"user root;\n{text}" if (folder.owner() == "root") else text)
    process = subprocess.Popen(
        [str(NGINX), "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log", "-g", f"daemon off; pid {folder}/pid;"],
    )  # fmt: skip
    try:
        for _ in range(200):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "error.log").read_text()
            time.sleep(0.05)
        yield f"https://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def trusting(certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


def rows_of(worker) -> float:
    lines = worker.client.get("/metrics", headers={"Authorization": "Bearer k"}).text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("armorm_rows_total"))


def test_two_workers_share_the_work_over_tls_and_one_that_is_gone_is_passed_by(rm, certificate, trusting, tmp_path):
    conversations = [question(n) for n in range(48)]
    expected = pytest.approx(rm.score(conversations).scores, abs=1e-5)
    with ExitStack() as stack:
        first, second = (stack.enter_context(served(rm, api_key="k")) for _ in range(2))
        with nginx(tmp_path, certificate, [first.url, second.url]) as url:
            settings = {"api_key": "k", "verify": trusting, "rows_per_request": 1, "connections": 16}
            with RewardClient(url, **settings) as client:
                assert client.score(conversations).scores == expected
                counts = rows_of(first), rows_of(second)
                assert sum(counts) == 48
                assert min(counts) > 0
                second.engine.batcher.stop()  # it says 503 from now on
                assert client.score(conversations).scores == expected
            with httpx.Client(base_url=url, verify=trusting, timeout=30) as plain:
                assert plain.post("/score", json={"text_1": "a", "text_2": "b"}).status_code == 401
                hidden = plain.get("/metrics", headers={"Authorization": "Bearer k"})
                assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, 404)
                large = plain.post("/get_reward", content=b" " * (17 << 20))
                assert (large.status_code, large.json()["error"]["type"]) == (413, "too_large")
            with pytest.raises(httpx.ConnectError), httpx.Client(verify=True) as strange:
                strange.get(f"{url}/health")


def test_a_worker_that_has_died_is_passed_by_and_without_any_the_refusal_is_json(rm, certificate, trusting, tmp_path):
    conversations = [question(n) for n in range(12)]
    with ExitStack() as stack:
        first = stack.enter_context(served(rm))
        with served(rm) as second:
            url = stack.enter_context(nginx(tmp_path, certificate, [second.url, first.url]))
        with httpx.Client(base_url=url, verify=trusting, timeout=30) as client:
            for conversation, score in zip(conversations, rm.score(conversations).scores, strict=True):
                answer = client.post("/v1/reward", json={"conversations": [conversation]})
                assert answer.json()["results"][0]["score"] == pytest.approx(score, abs=1e-5)
    with nginx(tmp_path, certificate, [first.url, second.url]) as url, httpx.Client(verify=trusting) as client:
        answer = client.get(f"{url}/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["Retry-After"]) == (503, 503, "5")


def test_a_full_worker_passes_requests_on_and_two_full_ones_say_429(rm, certificate, trusting, tmp_path):
    opened = threading.Event()
    with before_each_pass(rm.backbone.model, lambda ids: opened.wait(20)), ExitStack() as stack:
        tiny, large = (stack.enter_context(served(rm, max_waiting_rows=n, batch_tokens=20)) for n in (1, 6))
        url = stack.enter_context(nginx(tmp_path, certificate, [tiny.url, large.url]))
        client = stack.enter_context(httpx.Client(base_url=url, verify=trusting, timeout=30))

        def ask(number: int):
            answer = client.post("/v1/reward", json={"conversations": [question(number)], "include": []})
            return number, answer

        with ThreadPoolExecutor(24) as pool:
            calls = [pool.submit(ask, number) for number in range(24)]
            while sum(call.done() for call in calls) < 15:  # (1 + 6 wait, and one is under way at each)
                time.sleep(0.02)
            time.sleep(0.3)
            refused = [call.result() for call in calls if call.done()]
            opened.set()
            answers = [call.result() for call in calls]
        assert len(refused) == 15
        for _, answer in refused:
            assert (answer.status_code, answer.json()["error"]["type"]) == (429, "overloaded")
            assert int(answer.headers["Retry-After"]) >= 1
        scored = [
            (number, answer.json()["results"][0]["score"]) for number, answer in answers if answer.status_code == 200
        ]
        assert len(scored) == 9
        expected = rm.score([question(number) for number, _ in scored]).scores
        assert [score for _, score in scored] == pytest.approx(expected.tolist(), abs=1e-5)
        # A worker that was full is not taken for dead.
        assert ask(50)[1].status_code == 200
