"""`per_token` of `POST /v1/reward` and of the clients: scores as sums over tokens of the policy."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from armorm.backbone.readout import Readout
from armorm.client import AsyncRewardClient, RewardClient, RewardServerError
from armorm.errors import ConversationError
from armorm.explain.dense_rewards import PolicyTokenizer, align_rewards
from armorm.explain.text_spans import sentences
from tests.helpers.conversations import chat
from tests.helpers.forward_passes import before_each_pass
from tests.helpers.servers import question, served
from tests.helpers.small_models import reward_model
from tests.helpers.tokenizers import chatml

# Two pairs of identical rows, a shared prompt, an emoji, and white space at both ends.
CONVERSATIONS = [
    *(question(i, words=2 + 5 * i) for i in range(4)),
    question(2, words=12),
    chat("Say hello.", "  Hello 🙂 there.\n\nGood  day!  "),
    *(chat("A prompt that is long enough to be shared, since its tokens are many.", f"{i} it is. {i}!") for i in "abc"),
]


@pytest.fixture(scope="module", params=["last", "mean", "last+mean"])
def pooled(request):
    rm = reward_model(readout=Readout(pooling=request.param))
    with served(rm, policy_tokenizer=chatml()) as server:
        yield rm, server


def characters(conversation):
    return [*conversation[-1]["content"], ""]


@pytest.mark.parametrize("normalize", [False, True])
def test_own_tokens_are_those_of_the_library_whether_the_prompt_is_shared_or_not(pooled, normalize):
    rm, server = pooled
    expected = rm.score(CONVERSATIONS, per_token=True, normalize=normalize)
    with RewardClient(server.url) as client:
        for _ in range(3):  # from the second time on, behind a cached prompt
            found = client.score(CONVERSATIONS, per_token="token", normalize=normalize)
            for ours, theirs in zip(found.token_scores, expected.token_scores, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
            for ours, theirs in zip(found.token_spans, expected.token_spans, strict=True):
                assert ours.tolist() == theirs.tolist()
    if rm.backbone.readout.pooling == "last":
        assert found.exact_share.tolist() == [0] * len(CONVERSATIONS)
        assert all(np.ptp(values[:-1]) < 1e-6 for values in found.token_scores)  # all of the score is at the end
    else:
        shares = [shown.tokens.exact_share for shown in rm.explanations(expected, CONVERSATIONS)]
        assert found.exact_share == pytest.approx(shares, abs=1e-5)


def test_a_request_by_token_takes_one_pass_and_changes_no_score(pooled):
    rm, server = pooled
    plain = server.post("/v1/reward", conversations=[question(71, words=30)]).json()["results"][0]
    passes = []
    asked = {"conversations": [question(71, words=30)], "per_token": "token", "include": []}
    with before_each_pass(rm.backbone.model, passes.append):
        found = server.post("/v1/reward", **asked).json()["results"][0]
    assert len(passes) == 1
    assert found["score"] == pytest.approx(plain["score"], abs=1e-6)
    assert sum(found["per_token"]["rewards"]) == pytest.approx(found["score"], abs=1e-6)


def test_every_form_of_the_policys_tokens_gives_the_librarys_numbers_moved_by_characters(pooled):
    rm, server = pooled
    policy = PolicyTokenizer(chatml())
    own, texts = rm.score(CONVERSATIONS, per_token=True), [c[-1]["content"] for c in CONVERSATIONS]
    offsets = [policy.spans(text).tolist() for text in texts]
    counts = [[len(text)] for text in texts]
    for given, spans in (
        ("tokenizer", offsets),
        (offsets, offsets),
        (counts, [[[0, len(text)]] for text in texts]),
        ([characters(c) for c in CONVERSATIONS], [[[i, min(i + 1, len(t))] for i in range(len(t) + 1)] for t in texts]),
    ):
        with RewardClient(server.url, rows_per_request=4) as client:
            found = client.score(CONVERSATIONS, per_token="token", policy_tokens=given)
        for row, (values, text) in enumerate(zip(found.token_scores, texts, strict=True)):
            assert found.token_spans[row].tolist() == spans[row]
            moved = own.token_scores[row].copy()
            moved[-1] -= found.rest[row]
            expected = align_rewards(moved, own.token_spans[row], np.array(spans[row]), text)
            expected[-1] += found.rest[row]
            assert values == pytest.approx(expected, abs=1e-5)
            assert values.sum() == pytest.approx(float(own.scores[row]), abs=1e-5)


def test_sentences_have_their_tokens_and_the_place_where_the_policy_ends_them(pooled):
    rm, server = pooled

    async def ask():
        async with AsyncRewardClient(server.url) as client:
            tokens = [None, *map(characters, CONVERSATIONS[1:])]
            return await client.score(CONVERSATIONS[1:], per_token="sentence", policy_tokens=tokens[1:])

    found = asyncio.run(ask())
    for row, conversation in enumerate(CONVERSATIONS[1:]):
        text = conversation[-1]["content"]
        spans = sentences(text)
        assert found.token_spans[row].tolist() == [list(span) for span in spans]
        assert found.last_tokens[row].tolist() == [*(end - 1 for _, end in spans[:-1]), len(text)]
        assert found.token_scores[row].sum() == pytest.approx(float(found.scores[row]), abs=1e-5)
    assert found.take([4]).last_tokens[0].tolist() == found.last_tokens[4].tolist()
    parts = rm.explain(CONVERSATIONS[5], tokens=True).tokens if rm.backbone.readout.pooling == "mean" else None
    if parts is not None:
        exact = [part.contributions.sum() for part in parts.sentences()]
        assert found.token_scores[4][:-1] == pytest.approx(exact[:-1], abs=1e-5)


def test_steering_is_that_of_the_request_and_others_of_the_same_text_are_answered_together(pooled):
    rm, server = pooled
    conversation = question(80, words=20)
    steer = {"multiply": {"code-style": 5.0}}
    bodies = [
        {"per_token": "token"},
        {},
        {"per_token": "token", "steer": steer},
        {"steer": steer},
        {"per_token": "sentence", "normalize": True},
    ] * 3
    found = server.together(
        [lambda b=b: server.post("/v1/reward", conversations=[conversation], **b).json()["results"][0] for b in bodies]
    )
    plain, steered = (
        rm.score([conversation], per_token=True),
        rm.steer({"code-style": 5.0}).score([conversation], per_token=True),
    )
    for body, result in zip(bodies, found, strict=True):
        batch = steered if "steer" in body else plain
        if body.get("per_token") == "token":
            assert result["per_token"]["rewards"] == pytest.approx(batch.token_scores[0].tolist(), abs=1e-5)
        if "per_token" in body:
            assert sum(result["per_token"]["rewards"]) == pytest.approx(result["score"], abs=1e-6)
        else:
            assert "per_token" not in result
            assert result["score"] == pytest.approx(float(batch.scores[0]), abs=1e-5)


def test_a_row_whose_tokens_do_not_fit_has_its_error_and_the_others_their_rewards(server):
    rows = [question(1), question(2), chat("Q", " "), question(3)]
    tokens = [characters(rows[0]), ["other"], ["x"], None]
    results = server.post("/v1/reward", conversations=rows, per_token="token", policy_tokens=tokens).json()["results"]
    assert ["per_token" in result for result in results] == [True, False, False, True]
    assert "policy_tokens: joined they differ from the response at character 0" in results[1]["error"]
    assert "empty response" in results[2]["error"]
    with RewardClient(server.url) as client:
        with pytest.raises(ConversationError, match="conversation 1: policy_tokens: joined they differ"):
            client.score(rows, per_token="token", policy_tokens=tokens)
        found = client.score(rows, per_token="token", policy_tokens=tokens, on_refused="skip")
    assert found.rows.tolist() == [0, 3]
    assert len(found.token_scores[0]) == len(tokens[0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"policy_tokens": [["a"]]}, "policy_tokens: expected per_token with them"),
        ({"per_token": "token", "policy_tokens": []}, "policy_tokens: found 0 rows, expected 1"),
        ({"per_token": "token", "policy_tokens": "tokenizer"}, "no fast tokenizer of the policy (--policy-tokenizer)"),
        ({"per_token": "word"}, "per_token: Input should be 'token' or 'sentence'"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(server, body, message):
    answer = server.post("/v1/reward", conversations=[question(1)], **body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_prompt_that_was_shortened_leaves_the_tokens_of_the_reply_in_place():
    rm = reward_model(readout=Readout(pooling="mean"))
    rm.model.config.limits = {"max_length": 60, "overflow": "truncate_prompt"}
    messages = chat("one two three four five " * 20, "Yes. It is.")
    with served(rm) as server, RewardClient(server.url) as client:
        found = client.score([messages], per_token="token", policy_tokens=[characters(messages)])
    expected = rm.score([messages], per_token=True)
    assert found.truncated == [0]
    assert found.token_scores[0].sum() == pytest.approx(float(expected.scores[0]), abs=1e-5)


def test_a_client_refuses_rewards_that_do_not_sum_to_the_score(server, monkeypatch):
    from armorm.explain.dense_rewards import DenseReward, Division

    real = Division.reward

    def wrong(self, *given):
        found = real(self, *given)
        return DenseReward(found.rewards + 1, found.spans, found.rest, found.exact_share)

    monkeypatch.setattr(Division, "reward", wrong)
    with RewardClient(server.url) as client, pytest.raises(RewardServerError, match="conversation 0: rewards sum to"):
        client.score([question(1)], per_token="token")
