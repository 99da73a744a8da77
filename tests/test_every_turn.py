"""Scores of every assistant turn: in Python, on the command line and from a server."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.features.engine import Engine
from armorm.reward_model import ArmoRM
from tests.helpers.commands import exit_code
from tests.helpers.conversations import chat
from tests.helpers.small_models import changed, reward_model

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"first": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
DIALOGUE = chat("What is 2+2?", "It is 4.", "And 4+4?", "That is 8, twice as much.", "Thank you.", "You are welcome.")
TRAJECTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]
GREETED = [{"role": "assistant", "content": "Hello!"}, *chat("Hi", "How can I help?")]


@cache
def small() -> ArmoRM:
    return reward_model()


def alone(rm: ArmoRM, messages: list[dict], turn: int, **row: object) -> float:
    return float(rm.score([{"messages": messages[: turn + 1], **row}]).scores[0])


def test_every_turn_has_the_score_of_the_conversation_that_ends_there():
    rm = small()
    batch = rm.score([DIALOGUE, {"messages": TRAJECTORY, "tools": TOOLS}, GREETED], turns="all")
    assert batch.rows.tolist() == [0, 0, 0, 1, 1, 2]
    assert batch.turns is not None and batch.turns.tolist() == [1, 3, 5, 2, 4, 2]
    given = [(DIALOGUE, {}), (TRAJECTORY, {"tools": TOOLS}), (GREETED, {})]
    expected = [alone(rm, given[r][0], t, **given[r][1]) for r, t in zip(batch.rows, batch.turns, strict=True)]
    np.testing.assert_allclose(batch.scores, expected, rtol=0, atol=1e-5)
    assert len(set(expected)) == len(expected)
    assert batch.scores[2] == pytest.approx(float(rm.score(DIALOGUE).scores[0]), abs=1e-5)
    table = batch.to_pandas()
    assert table["turn"].tolist() == batch.turns.tolist() and table.index.tolist() == batch.rows.tolist()
    assert batch.take([1, 3]).turns.tolist() == [3, 2]


def test_the_turns_of_a_conversation_are_one_pass_over_its_tokens(monkeypatch):
    rm, passes = small(), []
    rm.score(DIALOGUE, turns="all")  # whether the model can share prefixes is tested once
    features = Engine.features

    def counted(self, rows, *arguments):
        passes.append((self.mechanism, sum(len(row) for row in rows)))
        return features(self, rows, *arguments)

    monkeypatch.setattr(Engine, "features", counted)
    batch = rm.score(DIALOGUE, turns="all")
    assert [mechanism for mechanism, _ in passes] == ["tree"]
    assert len(batch) == 3


def test_a_turn_that_cannot_be_scored_is_named_and_the_others_are_scored():
    messages = [*DIALOGUE[:3], {"role": "assistant", "content": " "}, *DIALOGUE[4:]]
    with pytest.raises(ConversationError, match=r"conversation 0.*messages\[3\].*empty response"):
        small().score(messages, turns="all")
    batch = small().score([messages, "no conversation"], turns="all", on_refused="skip")
    assert batch.turns.tolist() == [1, 5]
    assert [index for index, _ in batch.rejected] == [0, 1]
    assert "messages[3]" in batch.rejected[0][1]
    second = small().backbone.template.encode([Conversation.from_messages(DIALOGUE[:4])])[0]
    limited = changed(small(), limits={"max_length": len(second) - 1, "overflow": "error"})
    batch = limited.score([DIALOGUE], turns="all", on_refused="skip")
    assert batch.turns.tolist() == [1]
    assert [reason.partition(":")[0] for _, reason in batch.rejected] == ["messages[3]", "messages[5]"]
    assert all("expected at most" in reason for _, reason in batch.rejected)


def test_turns_that_are_neither_last_nor_all_are_refused():
    with pytest.raises(ValueError, match="turns: found 'every', expected 'last' or 'all'"):
        small().score(DIALOGUE, turns="every")
    with pytest.raises(ValueError, match="different prompts"):
        small().score(DIALOGUE, turns="all", same_prompt=True)


def test_explanations_of_turns_show_the_conversation_up_to_them():
    rm = small()
    batch = rm.score([DIALOGUE], turns="all")
    shown = rm.explanations(batch, [DIALOGUE], tokens=False)
    assert [explanation.conversation.response for explanation in shown] == [m["content"] for m in DIALOGUE[1::2]]


def test_a_model_trained_without_reasoning_scores_without_it():
    kept, changed_model = small(), changed(small(), limits={"reasoning": "drop"})
    dropped = ArmoRM(changed_model.model, changed_model.tokenizer)
    answer, thought = chat("2+2?", "It is 4."), chat("2+2?", "<think>\ntwo and two\n</think>\n\nIt is 4.")
    assert dropped.score(thought).scores == dropped.score(answer).scores == kept.score(answer).scores
    assert kept.score(thought).scores != kept.score(answer).scores


def test_the_server_scores_every_turn_as_python_does():
    pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from armorm.client import RewardClient
    from tests.helpers.servers import served

    rm = small()
    agent = Conversation.from_messages(TRAJECTORY, TOOLS)
    blank = [*DIALOGUE[:3], {"role": "assistant", "content": " "}, *DIALOGUE[4:]]
    given = [DIALOGUE, agent, "no conversation", blank]
    expected = rm.score(given, turns="all", on_refused="skip")
    with served(rm) as server:
        sent = [DIALOGUE, {"messages": TRAJECTORY, "tools": TOOLS}, [], blank]
        body = server.post("/v1/reward", conversations=sent, turns="all", include=[]).json()
        places = [(entry["index"], entry.get("turn")) for entry in body["results"]]
        assert places == [(0, 1), (0, 3), (0, 5), (1, 2), (1, 4), (2, None), (3, 1), (3, 3), (3, 5)]
        scores = [entry["score"] for entry in body["results"] if "score" in entry]
        np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=1e-5)
        common = server.post("/v1/reward", conversations=[TRAJECTORY], tools=TOOLS).json()["results"][0]["score"]
        assert common == pytest.approx(float(expected.scores[4]), abs=1e-5)
        plain = server.post("/v1/reward", conversations=[TRAJECTORY]).json()["results"][0]["score"]
        assert plain != pytest.approx(common, abs=1e-5)
        refused = server.post("/v1/reward", conversations=[DIALOGUE], turns="every")
        assert refused.status_code in (400, 422)
        for size in (64, 1, 2):
            with RewardClient(server.url, rows_per_request=size) as client:
                batch = client.score([DIALOGUE, agent, DIALOGUE[:2], blank], turns="all", on_refused="skip")
                assert batch.rows.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
                assert batch.turns is not None and batch.turns.tolist() == [1, 3, 5, 2, 4, 1, 1, 5]
                assert [row for row, _ in batch.rejected] == [3]
                assert client.score([agent]).scores[0] == pytest.approx(common, abs=1e-5)


def test_the_command_writes_a_row_for_every_turn(tmp_path):
    folder, data, output = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    small().save_pretrained(folder)
    rows = [{"messages": DIALOGUE, "id": "a"}, {"messages": TRAJECTORY, "tools": TOOLS, "id": "b"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["score", str(data), "--model", str(folder), "--every-turn", "--no-texts", "-o", str(output)]
    assert exit_code(*arguments) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["row"], line["turn"], line["id"]) for line in lines] == [
        (1, 1, "a"), (1, 3, "a"), (1, 5, "a"), (2, 2, "b"), (2, 4, "b"),
    ]  # fmt: skip
    expected = small().score(rows, turns="all").scores
    np.testing.assert_allclose([line["score"] for line in lines], expected, rtol=0, atol=1e-5)
    assert exit_code(*arguments, "--force", "--reasoning", "some") == 2
