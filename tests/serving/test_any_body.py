"""Whatever a body holds, the answer is an answer or a refusal of one sentence, never a fault of the server."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armorm.serving.protocols import ROUTES, ROUTES_BY_PATH
from tests.helpers.conversations import chat
from tests.helpers.examples import examples

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 10**20)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "a", "\ud800", "Human: a\n\nAssistant: b", "<|user|>Q<|end|><|assistant|>A<|end|>", "user", "assistant", "drop"])
    | st.just(chat("Q", "A")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "multiply", "type", "text"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = sorted(
    {name for route in ROUTES for name in route.request.model_fields} | {"use_activation", "documents", "task"}
)


@pytest.mark.parametrize("path", list(ROUTES_BY_PATH))
@settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_makes_the_server_fail(server, path, data):
    known = [name for route in ROUTES_BY_PATH[path] for name in route.request.model_fields]
    names = data.draw(st.lists(st.sampled_from(known) | st.sampled_from(FIELDS), max_size=4, unique=True))
    answer = server.post(path, **{name: data.draw(VALUES) for name in names})
    assert answer.status_code in (200, 400, 422)
    found = json.loads(answer.content, parse_constant=pytest.fail)
    if answer.status_code != 200:
        assert set(found["error"]) == {"message", "type", "code"}
        assert found["error"]["message"].strip()
        assert "\n" not in found["error"]["message"]
