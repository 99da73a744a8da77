"""The examples of docs/serving.md are what a server answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from armorm import ArmoRM
from armorm.serving.protocols import ROUTES_BY_PATH
from tests.helpers.servers import served

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
EXCHANGES = re.findall(r"```\n(GET|POST) (/\S+)\n(.*?)```\n\n```\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def embedded():
    with served(
        ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu"), name="armorm-tiny-rm"
    ) as server:
        yield server


def skeleton(text):
    """Names of fields in a JSON text, numbers and ids left out."""
    return re.findall(r'"([a-z_]+)":', text)


def test_every_route_is_shown():
    assert {path for _, path, _, _ in EXCHANGES} >= set(ROUTES_BY_PATH) | {
        "/v1/models",
        "/health",
        "/ready",
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "shown"), EXCHANGES, ids=[f"{i} {e[1]}" for i, e in enumerate(EXCHANGES)]
)
def test_what_the_page_shows_is_what_a_server_answers(embedded, method, path, body, shown):
    answer = embedded.client.request(method, path, json=json.loads(body) if body else None)
    status = re.match(r"(\d{3}) ", shown)
    assert answer.status_code == (int(status[1]) if status else 200)
    found = skeleton(json.dumps(answer.json()))
    assert set(skeleton(shown)) <= set(found)
    numbers = [
        re.findall(r'"(?:score|rewards|probs|embedding)": \[?(-?[\d.]+)', text)
        for text in (shown, json.dumps(answer.json()))
    ]
    if numbers[0]:
        expected = pytest.approx(float(numbers[0][0]), abs=1e-3)
        assert float(numbers[1][0]) == expected, "the model is another one: run tools/serving_page.py"
