"""Models on servers, over real sockets: their results are those of the model in this process."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("fastapi")

from armorm import evaluate
from armorm.client import PoolingClient, RewardClient, RewardServerError, connect
from armorm.conversation import Conversation
from armorm.evaluation.scorer import ScorerError
from armorm.evaluation.scorer_names import ScorerName
from armorm.evaluation.scorers import load_scorer
from armorm.evaluation.server_scorer import template_encoder
from tests.helpers.commands import run
from tests.helpers.local_http import QuietHandler, local_server
from tests.helpers.marked_scorer import FIXTURES
from tests.helpers.servers import question, served
from tests.helpers.small_models import reward_model


@pytest.fixture(scope="module")
def small():
    return reward_model()


@pytest.fixture(scope="module")
def server(small):
    with served(small) as found:
        yield found


def comparable(results):
    """What must be equal whether a model is local or served."""
    found = results.to_dict()
    for name in ("model", "data", "armorm_version"):
        del found[name]
    return json.loads(json.dumps(found))


def assert_close(ours, theirs, place=""):
    """Equal values, numbers up to float32."""
    if isinstance(ours, dict):
        assert set(ours) == set(theirs), place
        for key in ours:
            assert_close(ours[key], theirs[key], f"{place}/{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), place
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(a, b, f"{place}/{number}")
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, abs=2e-5, rel=1e-4), place
    else:
        assert ours == theirs, place


@pytest.mark.parametrize("benchmark", ["pairs", "rewardbench2"])
def test_a_served_model_has_the_results_of_the_local_one_audits_included(small, server, benchmark):
    data = FIXTURES / f"{benchmark}.jsonl"
    local = evaluate(benchmark, small, data, quiet=True)
    remote = evaluate(benchmark, server.url, data, quiet=True)
    assert remote.model["kind"] == "armorm server"
    assert "objectives" in remote.audits
    assert_close(comparable(local), comparable(remote))


def test_ratings_of_a_served_model_are_those_of_the_local_one(small, server, tmp_path):
    path = tmp_path / "rated.jsonl"
    rows = [{"messages": question(i, 1 + i % 5), "code-style": float(i % 11), "split": "test"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    local, remote = (evaluate("ratings", model, path, quiet=True) for model in (small, server.url))
    assert_close(local.examples, remote.examples)
    assert remote.raw


@pytest.mark.parametrize("api", ["classify", "pooling"])
@pytest.mark.parametrize("tokenizer", ["", ",tokenizer=armorm-tiny"])
def test_vllm_routes_give_the_scores_of_the_local_model(small, server, api, tokenizer):
    conversations = [Conversation.from_messages(question(i, 1 + i % 7)) for i in range(70)]
    scorer = load_scorer(f"{server.url},api={api}{tokenizer},rows_per_request=16,connections=4")
    found = scorer.score(conversations)
    assert not found.unscored
    np.testing.assert_allclose(found.scores, small.score(conversations).scores, atol=1e-5)
    assert scorer.describe()["api"] == api


def test_a_server_is_detected(server):
    assert isinstance(connect(server.url), RewardClient)


def vllm(routes, status=404):
    """A server that answers as vLLM 0.32 does: `routes` by path, 404 for others, 400 for a text with 'too long'."""
    received = []

    class Handler(QuietHandler):
        def do_GET(self):
            card = {"id": "rm", "object": "model", "owned_by": "vllm", "root": "/models/rm", "max_model_len": 64}
            self.send(200, {"object": "list", "data": [card]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, body))
            if self.path not in routes:
                self.send(404, {"detail": "Not Found"})
                return
            if "too long" in json.dumps(body.get("messages", "")):
                message = "This model's maximum context length is 64 tokens"
                self.send(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
                return
            count = len(body["input"]) if "input" in body else 1
            self.send(200, {"data": [{"index": i, **routes[self.path]} for i in range(count)]})

        def send(self, status, value):
            self.answer(status, json.dumps(value).encode())

    return Handler, received


def named(score):
    """The entry of armorm's plugin for a conversation."""
    return {
        "score": score,
        "rewards": {"clear": 2.0, "safe": 0.5},
        "contributions": {"safe": 0.1, "clear": score - 0.1},
    }


def plugin(received, refused="too long"):
    """A vLLM server with armorm's plugin, whose scores are the lengths of the responses."""

    class Handler(QuietHandler):
        def do_GET(self):
            self.answer(200, json.dumps({"data": [{"id": "rm", "owned_by": "vllm"}]}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((self.path, body))
            conversations = body["data"]["conversations"]
            if refused in json.dumps(conversations):
                self.answer(400, json.dumps({"error": {"message": "data, conversation 0: is too long"}}).encode())
                return
            data = [named(float(len(messages[-1]["content"]))) for messages in conversations]
            self.answer(200, json.dumps({"data": data}).encode())

    return Handler


def test_the_plugin_of_vllm_is_detected_and_sends_named_parts():
    received = []
    conversations = [Conversation.from_prompt(f"Why {i}?", "a" * (i + 1)) for i in range(5)]
    conversations.insert(2, Conversation.from_prompt("Why?", "too long"))
    with local_server(plugin(received)) as url:
        client = connect(url, rows_per_request=3)
        assert client.api == "plugin"
        received.clear()
        batch = client.score(conversations, on_refused="skip")
    assert {path for path, _ in received} == {"/pooling"}
    assert batch.rows.tolist() == [0, 1, 3, 4, 5]
    assert batch.scores.tolist() == [1, 2, 3, 4, 5]
    assert "too long" in batch.rejected[0][1]
    assert batch.names == ["clear", "safe"]
    assert batch.rewards.tolist() == [[2.0, 0.5]] * 5
    np.testing.assert_allclose(batch.contributions.sum(1), batch.scores, rtol=1e-6)
    assert batch.gating_weights.shape == (5, 0)


def test_details_of_a_vllm_server_need_the_plugin(capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": "Why?", "response": "So."}) + "\n")
    with local_server(plugin([])) as url:
        code, out, _ = run(capsys, "score", source, "--server", url, "--details")
        assert code == 0
        entry = json.loads(out)
        assert entry["rewards"] == {"clear": 2.0, "safe": 0.5}
        assert sum(entry["contributions"].values()) == pytest.approx(entry["score"])
        assert "gating_weights" not in entry
        code, _, err = run(capsys, "score", source, "--server", f"{url},api=classify", "--details")
    assert code == 2
    assert "plugin" in err


def test_vllm_without_the_plugin_or_with_a_tokenizer_is_classified():
    handler, received = vllm({"/classify": {"probs": [0.5]}, "/pooling": {"data": [0.5]}})
    with local_server(handler) as url:
        assert connect(url).api == "classify"
        assert "data" in received[0][1]
    received = []
    with local_server(plugin(received)) as url, pytest.raises(RewardServerError, match="expected no tokenizer"):
        connect(url, "plugin", encode=template_encoder("armorm-tiny"))


def test_parts_of_the_plugin_that_do_not_fit_are_an_error():
    class Handler(plugin([])):
        def answer(self, status, body, **headers):
            super().answer(status, body.replace(b'"safe": 0.1, ', b""), **headers)

    with local_server(Handler) as url, pytest.raises(RewardServerError, match="invalid part of a response"):
        PoolingClient(url, "plugin").score([Conversation.from_messages(question(1))])


def test_vllm_is_detected_by_its_routes():
    for path, entry in (("/classify", {"probs": [0.5], "label": "LABEL_0"}), ("/pooling", {"data": [0.5]})):
        handler, received = vllm({path: entry})
        with local_server(handler) as url:
            client = connect(url)
            assert isinstance(client, PoolingClient)
            assert client.api == path[1:]
            found = client.score([Conversation.from_messages(question(1))])
        assert found.scores.tolist() == [0.5]
        body = received[-1][1]
        assert body["use_activation"] is False
        assert "activation" not in body  # vLLM has removed this spelling, and rejects it
        assert body["model"] == "rm"


def test_a_conversation_that_vllm_rejects_is_rejected_alone():
    handler, _ = vllm({"/classify": {"probs": [0.5]}})
    long = Conversation.from_prompt("too long", "yes")
    with local_server(handler) as url:
        scored = load_scorer(f"{url},api=classify").score([Conversation.from_messages(question(1)), long])
        assert scored.scores[0] == 0.5
        assert np.isnan(scored.scores[1])
        assert "maximum context length is 64 tokens" in scored.unscored[1]
        with pytest.raises(RewardServerError, match="maximum context length"):
            load_scorer(f"{url},api=classify").score([long])


def test_token_ids_over_the_servers_length_are_not_sent():
    handler, received = vllm({"/classify": {"probs": [0.5]}})
    conversations = [Conversation.from_messages(question(1)), Conversation.from_messages(question(2, 200))]
    with local_server(handler) as url:
        found = PoolingClient(url, encode=template_encoder("armorm-tiny")).score(conversations, on_refused="skip")
    assert found.rows.tolist() == [0]
    assert "expected at most 64" in found.rejected[0][1]
    assert [len(body["input"]) for _, body in received] == [1]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"probs": [0.1, 0.9]}, "expected one score"),
        ({"probs": "YWJj"}, "expected one score"),
        ({"data": [0.5]}, "expected one score"),
        ({"probs": [0.5], "index": 7}, "missing or out of order"),
    ],
)
def test_what_is_no_score_is_an_error(entry, fault):
    handler, _ = vllm({"/classify": entry})
    with local_server(handler) as url, pytest.raises(RewardServerError, match=fault):
        PoolingClient(url).score([Conversation.from_messages(question(1))])


def test_score_and_rank_take_a_server(capsys, small, server, tmp_path):
    source, local, remote = (tmp_path / name for name in ("in.jsonl", "local.jsonl", "remote.jsonl"))
    source.write_text("".join(json.dumps({"messages": question(i)}) + "\n" for i in range(5)) + '{"messages": []}\n')
    small.save_pretrained(tmp_path / "model")
    for arguments in (
        ("--model", tmp_path / "model", "--dtype", "float32", "-o", local),
        ("--server", server.url, "-o", remote),
    ):
        code, _, err = run(capsys, "score", source, *arguments, "--details", "--normalize")
        assert code == 0
        assert "scored 5 rows, rejected 1" in err
    ours, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in (local, remote))
    for entry in ours:
        del entry["length"]  # a server sends the tokens of the conversation, not of its response
    assert_close(ours, theirs)
    source.write_text(json.dumps({"prompt": "Name a fruit.", "responses": ["Plum.", "A plum is a fruit."]}) + "\n")
    found = [
        run(capsys, "rank", source, *option)[1]
        for option in (("-m", tmp_path / "model", "--dtype", "float32"), ("--server", server.url))
    ]
    assert_close(*map(json.loads, found))
    code, _, err = run(capsys, "score", source, "--server", f"{server.url},api=classify", "--details")
    assert code == 2
    assert "--details" in err


def test_evaluate_compares_a_server_with_a_model_and_a_model_with_a_server(capsys, small, server, tmp_path):
    folder, pairs = tmp_path / "model", FIXTURES / "pairs.jsonl"
    small.save_pretrained(folder)
    expected = evaluate("pairs", small, pairs, quiet=True).level("overall")["accuracy"].value
    for chosen, other in ((("--server", server.url), folder), (("--model", folder), server.url)):
        arguments = (*chosen, "--against", other, "--include-seen", "--dtype", "float32", "--json")
        code, out, err = run(capsys, "evaluate", "pairs", "-d", pairs, *arguments)
        assert code == 0, err
        comparison = json.loads(out)["against"]
        assert {comparison["first"], comparison["second"]} == {str(folder), "small"}  # the name that the server gives
        accuracy = comparison["overall"]["accuracy"]
        assert (accuracy["first"], accuracy["second"]) == (expected, expected)


def test_a_key_comes_from_the_environment_alone(capsys, small, tmp_path, monkeypatch):
    monkeypatch.delenv("ARMORM_API_KEY", raising=False)
    pairs = ("evaluate", "pairs", "-d", FIXTURES / "pairs.jsonl", "--server")
    with served(small, api_key="secret-key") as found:
        code, _, err = run(capsys, *pairs, found.url)
        assert code == 1
        assert "401" in err
        monkeypatch.setenv("MY_KEY", "secret-key")
        output = tmp_path / "r.json"
        code, out, err = run(capsys, *pairs, found.url, "--api-key-env", "MY_KEY", "-o", output)
        assert code == 0
        assert "secret-key" not in out + err + output.read_text()
        assert run(capsys, *pairs, f"{found.url},api_key_env=MY_KEY", "--json")[0] == 0
        with_key = found.url.replace("http://", "http://any:secret-key@")
        code, _, err = run(capsys, *pairs, with_key)
        assert code == 1
        assert "holds a key" in err
        assert "secret-key" not in err
    code, _, err = run(capsys, *pairs, "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_VARIABLE")
    assert code == 1
    assert "NO_SUCH_VARIABLE is empty or absent" in err


def test_failures_are_one_line(capsys):
    class Other(QuietHandler):
        def do_GET(self):
            self.answer(404, b"{}")

        def do_POST(self):
            self.answer(404, b"{}")

    with local_server(Other) as other:
        for server, code, part in (
            ("http://127.0.0.1:9,retries=0", 1, "ConnectError"),
            (other, 1, "answers neither /v1/reward, /classify nor /pooling"),
            ("rewards:8008", 2, "expected a URL"),
            (f"{other},api=clasify", 1, "did you mean classify"),
            (f"{other},connection=4", 1, "did you mean connections"),
            (f"{other},connections=four", 1, "expected a number"),
        ):
            arguments = ("evaluate", "pairs", "-d", FIXTURES / "pairs.jsonl", "--server", server)
            found, _, err = run(capsys, *arguments)
            assert (found, part in " ".join(err.replace("│", " ").split())) == (code, True), (server, err)
            assert "Traceback" not in err


def test_a_name_is_parsed():
    found = ScorerName.parse("judge:http://h:1/v1,model=m,mode=pairs,max_tokens=9")
    assert (found.kind, found.target, found.judges_pairs) == ("judge", "http://h:1/v1", True)
    assert found.options == {"model": "m", "mode": "pairs", "max_tokens": 9}
    for plain in ("owner/model", "armorm-tiny-rm", "module:function", "./folder,with,commas"):
        assert ScorerName.parse(plain) is None
    with pytest.raises(ScorerError, match="reference"):
        ScorerName.parse("dpo:policy")
