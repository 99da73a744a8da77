"""vLLM's pooling, score and rerank routes: their fields, answers and errors.

`fixtures/vllm_requests.jsonl` has bodies recorded from clients of Cohere, Jina and vLLM, each with the client's version;
`fixtures/record_vllm_requests.py` records them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from armorm.conversation import Conversation
from armorm.serving.protocols.vllm import UNSUPPORTED
from tests.helpers.conversations import chat
from tests.helpers.servers import question, served
from tests.helpers.small_models import changed

RECORDED = [
    json.loads(line)
    for line in (Path(__file__).parent / "fixtures" / "vllm_requests.jsonl").read_text(encoding="utf-8").splitlines()
]
REPLIES = ["4", "5, I think.", "It is four: 2+2 = 4.", "4"]


def scores(rm, prompt="2+2?", replies=REPLIES):
    return rm.score([chat(prompt, reply) for reply in replies]).scores.tolist()


def near(values):
    return pytest.approx(values, abs=1e-5)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("recorded", RECORDED, ids=[f"{entry['client']} {entry['path']}" for entry in RECORDED])
def test_a_recorded_request_is_answered_as_the_client_reads_it(server, rm, recorded):
    body = recorded["body"]
    answer = server.client.post(recorded["path"], json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    texts = [document["text"] if isinstance(document, dict) else document for document in body["documents"]]
    expected = scores(rm, body["query"], texts)
    assert len(found["results"]) == body.get("top_n", len(texts))
    for entry in found["results"]:
        assert entry["relevance_score"] == near(expected[entry["index"]])
    assert set(recorded["reads"]) <= set(found) | set(found["results"][0])


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_by_descending_reward_with_their_places(server, rm, path):
    expected = scores(rm)
    order = sorted(range(4), key=lambda index: -expected[index])
    found = server.post(path, query="2+2?", documents=REPLIES).json()
    assert [entry["index"] for entry in found["results"]] == order
    assert [entry["relevance_score"] for entry in found["results"]] == near([expected[index] for index in order])
    assert [entry["document"] for entry in found["results"]] == [
        {"text": REPLIES[index], "multi_modal": None} for index in order
    ]
    assert set(found) == {"id", "model", "usage", "results"}
    assert set(found["usage"]) == {"prompt_tokens", "total_tokens"}
    assert found["usage"]["prompt_tokens"] > 0
    assert order.index(0) < order.index(3)  # ties keep the order of the request


def test_top_n_documents_and_none_of_their_texts_where_that_is_asked_for(server):
    whole = server.post("/rerank", query="2+2?", documents=REPLIES).json()["results"]
    for top, count in ((0, 4), (None, 4), (2, 2), (9, 4)):
        assert server.post("/rerank", query="2+2?", documents=REPLIES, top_n=top).json()["results"] == whole[:count]
    bare = server.post("/v2/rerank", query="2+2?", documents=REPLIES, return_documents=False).json()["results"]
    assert bare == [{name: entry[name] for name in ("index", "relevance_score")} for entry in whole]


def test_documents_may_be_objects_and_parts(server):
    plain = server.post("/rerank", query="2+2?", documents=["4", "5"]).json()["results"]
    for documents in (
        [{"text": "4"}, {"text": "5"}],
        [{"content": [{"type": "text", "text": "4"}]}, {"content": "5"}],
    ):
        query = {"content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}
        assert server.post("/rerank", query=query, documents=documents).json()["results"] == plain
    lone = server.post("/rerank", query="2+2?", documents="4").json()["results"]
    assert [entry["index"] for entry in lone] == [0]


def test_the_sigmoid_keeps_the_order(server, rm):
    found = server.post("/rerank", query="2+2?", documents=REPLIES, use_activation=True).json()["results"]
    expected = scores(rm)
    assert [entry["relevance_score"] for entry in found] == near([sigmoid(expected[e["index"]]) for e in found])
    pairs = server.post("/v1/score", queries="2+2?", documents=REPLIES, use_activation=True).json()["data"]
    assert [entry["score"] for entry in pairs] == near([sigmoid(value) for value in expected])


def test_a_document_without_text_is_named_and_the_others_are_ranked(server, rm):
    found = server.post("/rerank", query="2+2?", documents=["4", " ", "5"]).json()
    assert sorted(entry["index"] for entry in found["results"]) == [0, 2]
    assert [error["index"] for error in found["errors"]] == [1]
    assert "empty response" in found["errors"][0]["message"]
    assert server.post("/rerank", query="2+2?", documents=[" "]).status_code == 422
    with served(rm, empty_score=-50.0) as lenient:
        results = lenient.post("/rerank", query="2+2?", documents=["4", " "]).json()["results"]
        assert (results[-1]["index"], results[-1]["relevance_score"]) == (1, -50.0)


@pytest.mark.parametrize(
    ("first", "second"), [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_have_four_names_and_two_paths(server, rm, path, first, second):
    found = server.post(path, **{first: "2+2?", second: REPLIES}).json()
    assert [entry["score"] for entry in found["data"]] == near(scores(rm))
    each = server.post(path, **{first: ["2+2?"] * 4, second: REPLIES}).json()
    assert [entry["score"] for entry in each["data"]] == near(scores(rm))


def test_classification_has_the_same_answer_on_both_paths(server):
    text = "Human: 2+2?\n\nAssistant: 4"
    one, other = (server.post(path, input=text).json() for path in ("/classify", "/v1/classify"))
    assert one["data"] == other["data"]
    assert set(one) == set(other)


def test_a_row_that_would_lose_its_end_is_an_error_and_shorter_ones_are_scored(server, rm):
    texts = [rm.backbone.template.render(Conversation.from_messages(question(1, words=n))) for n in (3, 60)]
    length = len(rm.backbone.template.encode([Conversation.from_messages(question(1))])[0])
    for extra in ({}, {"truncation_side": "right"}):
        data = server.post("/classify", input=texts, truncate_prompt_tokens=length, **extra).json()["data"]
        assert data[0]["probs"] == near([float(rm.score([question(1)]).scores[0])])
        assert data[1]["probs"] is None
        assert f"expected at most {length}" in data[1]["error"]
    whole = server.post("/classify", input=texts, truncate_prompt_tokens=-1).json()["data"]
    assert [entry["probs"] for entry in whole] == [
        entry["probs"] for entry in server.post("/classify", input=texts).json()["data"]
    ]


@pytest.mark.parametrize("limit", [60, -1])
def test_truncation_at_the_left_shortens_the_prompt_as_the_library_does(rm, limit):
    prompt = "one two three four five " * 20
    short = changed(rm, limits={"max_length": 60, "overflow": "truncate_prompt"})
    strict = changed(rm, limits={"max_length": 60 if limit < 0 else 400, "overflow": "error"})
    expected = short.score([chat(prompt, "Yes.")]).scores.tolist()
    with served(strict) as server:
        options = {"truncate_prompt_tokens": limit, "truncation_side": "left"}
        found = server.post("/score", text_1=prompt, text_2=["Yes.", "no " * 80], **options).json()["data"]
        assert found[0]["score"] == near(expected[0])
        assert found[1]["score"] is None
        assert "error" in found[1]


def test_documents_of_a_shortened_prompt_are_compared_under_the_same_one(rm):
    prompt, documents = "one two three four five " * 20, ["Yes.", "no " * 20]
    short = changed(rm, limits={"max_length": 60, "overflow": "truncate_prompt"})
    together = short.score([chat(prompt, reply) for reply in documents], same_prompt=True).scores.tolist()
    alone = short.score([chat(prompt, reply) for reply in documents]).scores.tolist()
    assert together[0] != near(alone[0])
    with served(short) as server:
        found = server.post("/rerank", query=prompt, documents=documents).json()["results"]
        assert {entry["index"]: entry["relevance_score"] for entry in found} == near(dict(enumerate(together)))
        pairs = server.post("/score", text_1=prompt, text_2=documents).json()["data"]
        assert [entry["score"] for entry in pairs] == near(together)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_would_change_the_result_is_refused_and_its_default_is_not(server, name):
    for path, body in (
        ("/classify", {"messages": question(1)}),
        ("/pooling", {"messages": question(1)}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/rerank", {"query": "a", "documents": ["b"]}),
    ):
        assert server.post(path, **body, **{name: UNSUPPORTED[name][0]}).status_code == 200
        refused = server.post(path, **body, **{name: "token_classify"})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(f"{name}: found 'token_classify', not supported here")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/rerank", {"documents": ["a"]}, "query: Field required"),
        ("/rerank", {"query": "a", "documents": []}, "documents: found none, expected a text"),
        ("/rerank", {"query": "a", "documents": ["a", 3]}, "documents: found 3, expected a text"),
        ("/rerank", {"query": ["a", "b"], "documents": ["a"]}, "query: found 2 texts, expected one"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n: Input should be greater than"),
        ("/rerank", {"query": "a", "documents": [{"content": [{"type": "image_url"}]}]}, "documents: found"),
        ("/v1/score", {"queries": "a"}, "text_2: Field required"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "found 2 prompts and 1 responses, expected one or as many"),
        ("/v1/classify", {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens: Input should be"),
        ("/v1/classify", {"input": "a", "truncation_side": "end"}, "truncation_side: Input should be"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(server, path, body, message):
    answer = server.post(path, **body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
