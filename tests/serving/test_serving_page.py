"""The examples of docs/serving.md are what a server answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from armorm import ArmoRM
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.serving.protocols import ROUTES_BY_PATH
from tests.helpers.servers import served

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
EXCHANGES = re.findall(r"```\n(GET|POST) (/\S+)\n(.*?)```\n\n```\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def default(small_backbone_path):
    rm = ArmoRM.from_pretrained(DEFAULT_REWARD_MODEL, dtype="float32", device="cpu")
    with served(rm, name=rm.name) as server:
        yield server


def skeleton(text):
    """Names of fields in a JSON text, numbers and ids left out."""
    return re.findall(r'"([a-z_]+)":', text)


def test_every_route_is_shown():
    shown = {path for _, path, _, _ in EXCHANGES} | set(re.findall(r"^### .*", PAGE, re.MULTILINE))
    for path in {*ROUTES_BY_PATH, "/v1/models", "/health", "/ready"}:
        assert path in shown or any(f"`{path}`" in heading for heading in shown), path


exchanges = pytest.mark.parametrize(
    ("method", "path", "body", "shown"), EXCHANGES, ids=[f"{i} {e[1]}" for i, e in enumerate(EXCHANGES)]
)


@exchanges
def test_answers_of_another_model_have_the_fields_that_the_page_shows(server, method, path, body, shown):
    given = json.loads(body) if body else None
    if given and "steer" in given:
        given["steer"] = {"drop": ["code-style"]}  # (objectives of this model)
    answer = server.client.request(method, path, json=given)
    missing = set(skeleton(shown)) - set(skeleton(json.dumps(answer.json())))
    assert missing <= {"multiply", "uncertainty", "reliability", "signal_variance", "epistemic_variance"}


@pytest.mark.slow
@exchanges
def test_what_the_page_shows_is_what_the_default_model_answers(default, method, path, body, shown):
    answer = default.client.request(method, path, json=json.loads(body) if body else None)
    status = re.match(r"(\d{3}) ", shown)
    assert answer.status_code == (int(status[1]) if status else 200)
    found = skeleton(json.dumps(answer.json()))
    assert set(skeleton(shown)) <= set(found)
    numbers = [
        re.findall(r'"(?:score|relevance_score|rewards|probs|embedding)": \[?(-?[\d.]+)', text)
        for text in (shown, json.dumps(answer.json()))
    ]
    if numbers[0]:
        expected = pytest.approx(float(numbers[0][0]), abs=1e-3)
        assert float(numbers[1][0]) == expected, "the model is another one: run tools/serving_page.py"
