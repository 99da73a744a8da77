"""A language model as judge, behind a real chat server with a small real model."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("httpx")

from armorm import evaluate
from armorm.client import RewardServerError
from armorm.conversation import Conversation
from armorm.evaluation.judge import parse_rating, parse_verdict
from armorm.evaluation.scorer import ScorerError
from armorm.evaluation.scorers import load_scorer
from tests.helpers.chat_server import chat_served
from tests.helpers.commands import run
from tests.helpers.marked_scorer import FIXTURES

CONVERSATIONS = [Conversation.from_prompt("How much is 2+2?", reply) for reply in ("4, of course.", "5 {or} so", "4")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("ARMORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def asked(body):
    return body["messages"][-1]["content"]


def rating(body):
    """10 for a reply with a 4, 2 for one with a 5, none for the bare number."""
    reply = asked(body).split("[Reply to rate]\n")[1].split("\n[End of reply]")[0]
    return "" if reply == "4" else f"Rating: {10 if '4' in reply else 2}"


def first_if_longer(body):
    """The longer reply is better."""
    text = asked(body)
    a, b = (text.split(f"[Reply {name}]\n")[1].split(f"\n[End of reply {name}]")[0] for name in "AB")
    return "Verdict: tie" if len(a) == len(b) else f"**Verdict:** {'A' if len(a) > len(b) else 'B'}"


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Fine. Rating: 7", 7),
        ("rating: **8.5**", 8.5),
        ("Rating: 3\nRating: 4/10", 4),
        ("Rating: 11", None),
        ("7", None),
    ],
)
def test_the_last_rating_from_1_to_10_counts(answer, value):
    assert parse_rating(answer) == value


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("Verdict: A", "A>B"), ("verdict: **B**", "B>A"), ("Verdict: tie", "A=B"), ("Verdict: always", None), ("A", None)],
)
def test_the_last_verdict_counts(answer, verdict):
    assert parse_verdict(answer) == verdict


def test_ratings_are_scores_and_an_answer_without_one_is_counted(cache):
    with chat_served(rating) as served:
        judge = load_scorer(f"judge:{served.url},max_tokens=4")
        scored = judge.score(CONVERSATIONS)
        assert scored.scores[:2].tolist() == [10.0, 2.0]
        assert np.isnan(scored.scores[2])
        assert "no rating" in scored.unscored[2]
        assert scored.answers == (3, 1)
        assert judge.describe()["name"] == "small-chat"
        # Answers are kept, without the texts; another limit of tokens is another request.
        text = "".join(path.read_text() for path in cache.rglob("*.jsonl"))
        assert "2+2" not in text
        assert len(text.splitlines()) == 3
        again = load_scorer(f"judge:{served.url},max_tokens=4").score(CONVERSATIONS)
        np.testing.assert_equal(again.scores, scored.scores)
        assert len(served.requests) == 3
        load_scorer(f"judge:{served.url},max_tokens=3").score(CONVERSATIONS[:1])
        assert len(served.requests) == 4


def test_an_answer_that_a_killed_run_left_unfinished_is_asked_again(cache):
    with chat_served(rating) as served:
        load_scorer(f"judge:{served.url},max_tokens=4").score(CONVERSATIONS[:2])
        (path,) = cache.rglob("*.jsonl")
        path.write_text(path.read_text()[:-20])
        assert load_scorer(f"judge:{served.url},max_tokens=4").score(CONVERSATIONS[:2]).scores.tolist() == [10.0, 2.0]
        assert len(served.requests) == 3


def test_pairs_are_judged_in_both_orders(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [("a long reply", "no"), ("yes", "a long reply"), ("same", "size")]
    path.write_text(
        "".join(json.dumps({"prompt": f"q{i}", "chosen": a, "rejected": b}) + "\n" for i, (a, b) in enumerate(rows))
    )
    with chat_served(first_if_longer) as served:
        results = evaluate("pairs", f"judge:{served.url},mode=pairs,max_tokens=2", path, quiet=True)
        assert len(served.requests) == 6
    assert [entry["margin"] for entry in results.examples] == [1.0, -1.0, 0.0]
    assert results.counts["answers"] == 6
    assert results.counts["unparsed"] == 0
    assert results.model["kind"] == "judge, pairs in both orders"
    with chat_served(lambda body: "Verdict: A") as served:  # a judge that always prefers the first
        results = evaluate("pairs", f"judge:{served.url},mode=pairs,max_tokens=2", path, quiet=True)
    assert [entry["margin"] for entry in results.examples] == [0.0, 0.0, 0.0]
    with chat_served(lambda body: "") as served:
        results = evaluate("pairs", f"judge:{served.url},mode=pairs,max_tokens=2", path, quiet=True)
    assert results.counts["unparsed"] == 6
    assert results.counts["refused_examples"] == 3


def test_a_judge_of_pairs_plays_the_double_game_and_refuses_more_than_two_responses():
    with chat_served(first_if_longer) as served:
        name = f"judge:{served.url},mode=pairs,max_tokens=2"
        results = evaluate("judgebench-double", name, FIXTURES / "judgebench", quiet=True)
        assert results.level("overall")
        with pytest.raises(ScorerError, match="expected two for a judge of pairs"):
            evaluate("rewardbench2", name, FIXTURES / "rewardbench2.jsonl", quiet=True)
        with pytest.raises(ScorerError, match="expected a judge of pairs"):
            evaluate("judgebench-double", f"judge:{served.url}", FIXTURES / "judgebench", quiet=True)
        with pytest.raises(ScorerError, match="did you mean pairs"):
            load_scorer(f"judge:{served.url},mode=pair")


def test_rank_refuses_a_judge_of_pairs(capsys, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "Name a fruit.", "responses": ["4 plums.", "5 plums."]}) + "\n")
    with chat_served(rating) as served:
        name = f"judge:{served.url},max_tokens=2"
        code, out, _ = run(capsys, "rank", path, "--model", name)
        assert code == 0
        assert json.loads(out)["order"] == [0, 1]
        code, _, err = run(capsys, "rank", path, "--model", f"{name},mode=pairs")
        assert code == 2
        assert "compares two responses" in " ".join(err.replace("│", " ").split())


def test_the_key_is_sent_and_a_wrong_one_is_one_line(monkeypatch):
    monkeypatch.setenv("RIGHT", "k1")
    monkeypatch.setenv("WRONG", "k2")
    with chat_served(rating, key="k1") as served:
        options = "model=small-chat,max_tokens=2,retries=0"
        scored = load_scorer(f"judge:{served.url},{options},api_key_env=RIGHT").score(CONVERSATIONS[:1])
        assert scored.scores.tolist() == [10.0]
        with pytest.raises(RewardServerError, match="401, no valid API key"):
            load_scorer(f"judge:{served.url},{options}", api_key_env="WRONG").score(CONVERSATIONS[1:])


def test_several_models_of_different_kinds_are_measured_in_one_command(capsys, tmp_path):
    output = tmp_path / "r.json"
    with chat_served(lambda body: f"Rating: {1 + len(asked(body)) % 10}") as served:
        code, out, err = run(
            capsys,
            *("evaluate", "pairs", "-d", FIXTURES / "pairs.jsonl", "-o", output),
            *("--scorer", "tests.helpers.marked_scorer:marked"),
            *("--against", "tests.helpers.marked_scorer:longer", "--against", f"judge:{served.url},max_tokens=2"),
        )
    assert code == 0, err
    assert "3 models, 5 shared examples" in out
    assert "small-chat" in out
    assert json.loads((tmp_path / "r.against-2.json").read_text())["model"]["kind"] == "judge, ratings"
    assert max(len(line) for line in out.splitlines()) <= 80
