"""Two replicas behind Ray Serve answer as one server does (slow)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from tests.helpers.servers import question
from tests.helpers.small_models import reward_model

pytestmark = pytest.mark.slow


def test_two_replicas_answer_every_request_with_the_scores_of_the_model(tmp_path, monkeypatch):
    ray, serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    from armorm.serving.ray_serve import Arguments, app
    from armorm.serving.server import address_of, bound_socket

    rm = reward_model()
    rm.save_pretrained(tmp_path / "small")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with bound_socket("127.0.0.1", 0) as sock:
        url = address_of(sock)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(url.rsplit(":", 1)[1])})
        arguments = Arguments(model=str(tmp_path / "small"), replicas=2, dtype="float32", device="cpu")
        serve.run(app(arguments), name="armorm", route_prefix="/")
        conversations = [question(number) for number in range(40)]

        def score(conversation):
            answer = httpx.post(f"{url}/v1/reward", json={"conversations": [conversation]}, timeout=60)
            return answer.status_code, answer.json()["results"][0]["score"]

        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(score, conversations))
        assert {status for status, _ in found} == {200}
        np.testing.assert_allclose([value for _, value in found], rm.score(conversations).scores, atol=1e-4)

        with ThreadPoolExecutor(16) as pool:
            started = set(pool.map(lambda _: httpx.get(f"{url}/v1/models", timeout=60).text, range(60)))
        replicas = serve.status().applications["armorm"].deployments["armorm"].replica_states
        assert {str(getattr(state, "value", state)): count for state, count in replicas.items()} == {"RUNNING": 2}
        assert all("ultra-helpful" in text for text in started)
        assert httpx.post(f"{url}/v1/reward", json=[], timeout=60).status_code == 400
    finally:
        serve.shutdown()
        ray.shutdown()
