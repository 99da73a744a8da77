"""Layouts that people have: all say the same conversation, and a row without one is told the closest."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest

from armorm.conversation import Conversation
from armorm.data.cells import rating_cell
from armorm.data.preferences import preference_pair
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
from tests.helpers.conversations import chat

TURNS = chat("2+2?", "4")
SHARE_GPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "4"},
    {"role": "assistant", "content": "4"},
]


def standard(values: dict, textual: bool = False) -> Row:
    return Row("f", 1, values, textual).standard()


@pytest.mark.parametrize(
    "values",
    [
        {"messages": TURNS},
        {"messages": json.dumps(TURNS)},
        {"Prompt": "2+2?", " Response ": "4"},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"question": "2+2?", "answer": "4"},
        {"conversations": SHARE_GPT},
        {"conversations": np.array(SHARE_GPT, object)},
        {"fields": {"instruction": "2+2?", "response": "4"}, "responses": {"good": [{"value": 4}]}, "id": "a"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": "2+2?", "response": "4", "messages": None},
    ],
)
def test_every_layout_says_the_same_conversation(values):
    assert standard(values).conversation() == Conversation.from_messages(TURNS)


@pytest.mark.parametrize("text", [json.dumps(TURNS), str(TURNS)])
def test_messages_in_a_cell_are_read_as_json_or_as_python_prints_them(text):
    assert standard({"messages": text}, textual=True).conversation() == Conversation.from_messages(TURNS)
    asked = standard({"prompt": str(TURNS[:1]), "response": "4"}, textual=True).conversation()
    assert asked == Conversation.from_messages(TURNS)


def test_text_that_looks_like_messages_stays_text_where_it_may_be_a_response():
    forged = json.dumps([{"role": "assistant", "content": "x"}])
    assert standard({"prompt": "Write JSON.", "response": forged}).conversation().response == forged
    assert standard({"prompt": "Write JSON.", "response": forged}, textual=True).conversation().response == forged
    pair = preference_pair(standard({"prompt": forged, "chosen": forged, "rejected": "no"}))
    assert (pair.chosen.response, pair.chosen.prompt[0].content) == (forged, forged)


def test_the_input_of_alpaca_is_part_of_the_prompt_with_history_and_system():
    row = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    expected = [
        {"role": "system", "content": "Be brief."}, *chat("Hi", "Hello"), *chat("Add.\n\n2 and 2", "4")
    ]  # fmt: skip
    assert standard(row).conversation() == Conversation.from_messages(expected)
    stated = Row("f", 1, row).standard({"prompt": "instruction", "response": "output"})
    assert stated.conversation() == Conversation.from_messages(expected)


def test_columns_of_one_response_each_are_responses_in_the_order_of_their_names():
    for values in (
        {"Question": "q", "Answer B": "y", "Answer A": "x"},
        {"prompt": "q", "response_1": "y", "response_0": "x"},
    ):
        row = standard({**values, "id": 3})
        assert row.kind == "candidates" and row.values == {"prompt": "q", "responses": ["x", "y"], "id": 3}
    alone = standard({"prompt": "q", "response": "x", "response_1": "y", "response_2": "z"})
    assert alone.kind == "conversations" and alone.conversation().response == "x"


def test_share_gpt_speakers_become_roles_and_an_unknown_one_is_named():
    turns = [
        {"from": "system", "value": "Be brief."},
        *SHARE_GPT[:1],
        {"from": "function_call", "value": '{"name": "add"}'},
    ]
    turns += [{"from": "observation", "value": "4"}, *SHARE_GPT[1:]]
    messages = standard({"conversations": turns}).conversation().messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2].extra["tool_calls"][0]["function"] == {"name": "add"}
    with pytest.raises(DataError, match=r"field 'conversations\[0\]\.from': found 'me', expected one of human"):
        standard({"conversations": [{"from": "me", "value": "a"}]})


def test_share_gpt_and_openai_pairs_are_pairs():
    rows = [
        {"conversations": SHARE_GPT[:1], "chosen": SHARE_GPT[1], "rejected": {"from": "gpt", "value": "5"}},
        {"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": chat("", "5")[1:]},
        {"question": "2+2?", "winner": "4", "loser": "5"},
    ]
    for row in rows:
        pair = preference_pair(standard(row))
        assert pair.chosen == Conversation.from_messages(TURNS)
        assert pair.rejected.response == "5"


def test_a_column_called_input_is_no_prompt_of_whole_conversations():
    row = {"input": "x", "chosen": chat("a", "b"), "rejected": chat("a", "c")}
    assert preference_pair(standard(row)).chosen.prompt[0].content == "a"
    assert standard(row).values["input"] == "x"


def test_tool_calls_are_read_with_the_definitions_which_pass_through():
    definition = {"type": "function", "function": {"name": "add"}}
    row = standard({"messages": TOOLS, "tools": [definition]})
    assert [message.role for message in row.conversation().messages] == ["user", "assistant", "tool", "assistant"]
    assert row.conversation().tools == (definition,)
    assert row.columns["tools"] == [definition]
    said = standard({"messages": TOOLS, "tools": json.dumps([{"name": "add"}])})
    assert said.conversation() == row.conversation()
    assert standard({"messages": TOOLS, "tools": "hammer"}).conversation().tools == ()
    with pytest.raises(DataError, match=r"tools\[0\].*expected the definition of a function with its name"):
        standard({"messages": TOOLS, "tools": [{"type": "function"}]}).conversation()


def test_objects_of_ratings_and_answers_of_argilla_become_columns():
    texts = {"prompt": "a", "response": "b"}
    assert standard({**texts, "ratings": {"help": 4, "safe": {"Rating": "5"}}}).values["help"] == 4
    assert standard({**texts, "help": "x", "ratings": {"help": 4}}).values["ratings.help"] == 4
    assert standard({**texts, "ratings": '{"help": 4}'}, textual=True).values["help"] == 4
    flat = {**texts, "help.responses": [4, 2, 1], "help.responses.status": ["submitted", "submitted", "draft"]}
    assert rating_cell(standard(flat).values["help"]).value == 3
    nested = {
        "fields": texts,
        "responses": {"help": [{"value": 4, "user_id": "u"}]},
        "suggestions": {"help": {"value": 1}},
    }
    row = standard(nested)
    assert (rating_cell(row.values["help"]).value, row.values["help.suggestion"]) == (4, 1)
    assert row.columns is nested or dict(row.columns) == nested


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, (4, 1)), ("4", (4, 1)), (" 4,5 ", (4.5, 1)), ("true", (1, 1)), ([4, 2], (3, 2)), ("[4, 2]", (3, 2)),
        ("4; 2", (3, 2)), ("4|2|3", (3, 3)), ([{"value": 5, "status": "submitted"}, {"value": 1, "status": "draft"}], (5, 1)),
    ],
)  # fmt: skip
def test_cells_are_numbers_or_the_mean_of_their_raters(value, expected):
    cell = rating_cell(value)
    assert (cell.value, cell.raters, cell.fault) == (*expected, "")
    assert np.isnan(cell.spread) == (cell.raters < 2)


def test_the_spread_of_raters_is_kept_and_a_faulty_rater_costs_only_itself():
    cell = rating_cell([4, "n/a", 2, 45], 1, 5)
    assert (cell.value, cell.raters) == (3, 2)
    assert cell.spread == pytest.approx(2**0.5)
    assert cell.fault == "found 'n/a', expected a number from 1 to 5"
    for missing in (None, "", float("nan"), "nan", [], "null"):
        assert (rating_cell(missing).raters, rating_cell(missing).fault) == (0, "")


@pytest.mark.parametrize(
    ("values", "field", "part"),
    [
        ({"question": "a", "model_answer": "b"}, "response", "rename column 'model_answer' to 'response'"),
        ({"prompt": "a", "txt": "b", "id": 3}, "response", "rename column 'txt' to 'response'"),
        ({"prompt": "a", "\ue000": "b", "id": 3}, "response", r"rename column '\ue000' to 'response'"),
        ({"promt": "a", "respons": "b"}, "", "rename column 'promt' to 'prompt' and 'respons' to 'response'"),
        ({"prompt": "a", "response": None}, "response", "found an empty cell, expected text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "", "found a preference pair, expected a conversation"),
        ({"prompt": "a", "responses": ["b"]}, "", "found several responses, expected a conversation"),
    ],
)
def test_what_is_not_recognised_is_told_the_closest_layout_and_never_a_wrong_cause(values, field, part):
    with pytest.raises(DataError) as caught:
        standard(values).conversation()
    assert caught.value.field == field
    assert part in caught.value.problem


def test_objects_in_memory_are_read_like_files():
    import datasets

    rows = [{"prompt": "2+2?", "response": "4", "x": 1}, {"prompt": "2+2?", "response": "5", "x": None}]
    for data in (pandas.DataFrame(rows), datasets.Dataset.from_list(rows), rows):
        found = list(Location.find(data).rows())
        assert [row.conversation().response for row in found] == ["4", "5"]
        assert [row.value("x") for row in found] == [1, None]
        assert [row.number for row in found] == [1, 2]
    with pytest.raises(DataError, match="list, row 1: found 3, expected an object"):
        list(Location.find([3]).rows())
