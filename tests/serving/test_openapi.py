"""The OpenAPI schema says what the server does: held against answers, and attacked by schemathesis (slow)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from armorm.serving.app import ModelList, State
from armorm.serving.protocols import ROUTES, ROUTES_BY_PATH
from armorm.serving.protocols.base import ErrorAnswer
from tests.helpers.conversations import chat
from tests.helpers.examples import examples
from tests.helpers.servers import question, served
from tests.helpers.small_models import changed

# Requests whose answers have what those to the examples lack: refused rows, parts, activations, texts of other stacks.
MORE = [
    ("/v1/reward", {"conversations": [question(1), []], "normalize": True, "include": ["ratings", "relative", "debiased_rewards"]}),
    ("/v1/reward", {"prompt": "a", "responses": ["b"], "steer": {"multiply": {"code-style": 2}, "blend": {"share": 0.5}}}),
    ("/v1/reward", {"conversations": []}),
    ("/get_reward", {"query": [], "prompts": [], "labels": []}),
    ("/get_reward", {"query": ["Human: a\n\nAssistant: b", "c"]}),
    ("/classify", {"text": ["Human: a\n\nAssistant: b", "c"]}),
    ("/classify", {"input": ["Human: a\n\nAssistant: b", "c"], "activation": True}),
    ("/pooling", {"input": ["Human: a\n\nAssistant: b", 3]}),
    ("/score", {"text_1": "a", "text_2": ["b", " "]}),
    ("/rerank", {"query": "a", "documents": ["b", " "], "return_documents": False}),
    ("/v1/reward", {"prompt": "a", "responses": ["b. c", " "], "per_token": "sentence", "policy_tokens": [["b. c", ""], None]}),
    ("/v1/reward", {"prompt": "a", "responses": ["b. c"], "per_token": "token", "include": []}),
    ("/v1/embeddings", {"input": ["Human: a\n\nAssistant: b", "c"]}),
    ("/v1/score/evaluation", {"messages": ["Human: a\n\nAssistant: b", "c"]}),
]  # fmt: skip


def types_of(path):
    return [route.response for route in ROUTES_BY_PATH[path]]


def fits(kind, body):
    try:
        TypeAdapter(kind).validate_json(body, strict=True)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(("path", "body"), [*((route.path, route.example) for route in ROUTES), *MORE])
def test_answers_are_of_the_types_that_the_schema_names(server, path, body):
    answer = server.post(path, **body)
    assert answer.status_code == 200, answer.text
    assert [fits(kind, answer.content) for kind in types_of(path)].count(True) == 1, answer.text
    refused = server.post(path)
    assert refused.status_code == 400
    assert fits(ErrorAnswer, refused.content)


def test_answers_with_shortened_prompts_and_other_parts_are_too(rm):
    short = changed(rm, limits={"max_length": 60, "overflow": "truncate_prompt"}, reference={})
    with served(short, empty_score=-1.0) as cutting:
        body = {"conversations": [chat("one two three four five " * 20, "Yes.")], "include": ["gating_output"]}
        answer = cutting.post("/v1/reward", **body)
        assert "truncated_tokens" in answer.text
        assert fits(types_of("/v1/reward")[0], answer.content)
        empty = cutting.post("/get_reward", query=["Human: a\n\nAssistant: "])
        assert fits(types_of("/get_reward")[0], empty.content)
        assert fits(ModelList, cutting.client.get("/v1/models").content)


def test_objectives_whose_reliability_was_measured_are_too(rm):
    measured = {"r2": 0.4, "signal_variance": 0.1, "epistemic_variance": None}
    first, *others = rm.objectives.to_dicts()
    with served(changed(rm, objectives=[{**first, "reliability": measured}, *others])) as server:
        answer = server.client.get("/v1/models")
        assert answer.json()["data"][0]["objectives"][0]["reliability"] == measured
        assert fits(ModelList, answer.content)


def test_states_are_of_the_types_that_the_schema_names(server):
    assert fits(ModelList, server.client.get("/v1/models").content)
    assert fits(State, server.client.get("/ready").content)
    assert fits(State, server.client.get("/health").content)


def test_the_schema_names_every_type_it_refers_to_and_the_key_where_there_is_one(server, rm):
    schema = server.client.get("/openapi.json").json()
    named = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert set(references(schema)) == named
    assert set(schema["paths"]) == set(ROUTES_BY_PATH) | {"/health", "/ready", "/metrics", "/v1/models"}
    assert "securitySchemes" not in schema["components"]
    with served(rm, api_key="k") as closed:
        assert closed.client.get("/openapi.json").status_code == 401
        keyed = closed.client.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
    assert keyed["paths"]["/score"]["post"]["security"] == [{"key": []}, {"password": []}]
    assert keyed["paths"]["/health"]["get"]["security"] == []


def references(value):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def attack(url: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent)) or shutil.which("schemathesis")
    if program is None:
        pytest.skip("schemathesis is not installed")
    command = [program, "--no-color", "run", f"{url}/openapi.json", "--seed", "1", "--request-timeout", "10", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_schemathesis_finds_no_failure_and_nothing_that_the_schema_does_not_say(rm, tmp_path):
    count = examples(20)
    with served(rm, api_key="s3cret") as closed:
        done = attack(
            *(closed.url, tmp_path, "--header", "Authorization: Bearer s3cret", "--max-examples", str(count)),
            *("--phases", "examples,coverage,fuzzing", "--max-time", str(min(500, 7 * count // 4))),
            # (What the schema allows may still be text without turns, or one that is too long: 422, by design.)
            *("--exclude-checks", "positive_data_acceptance"),
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-6000:]
        assert "Tested: 17" in done.stdout
        counts = closed.client.get("/metrics", headers={"Authorization": "Bearer s3cret"}).text
    for status in ("200", "400", "401", "405", "422"):
        assert f'status="{status}"' in counts
    assert 'status="500"' not in counts
