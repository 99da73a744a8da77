"""Conversations: what is accepted, what is refused and by which words, and what the keys address."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from armorm.conversation import Conversation, Message, content_key, prompt_messages, response_messages
from armorm.errors import ConversationError
from tests.helpers.conversations import chat

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def refusal(messages) -> ConversationError:
    with pytest.raises(ConversationError) as caught:
        Conversation.from_messages(messages)
    return caught.value


def user(content="hi", **extra):
    return {"role": "user", "content": content, **extra}


def assistant(content="hello", **extra):
    return {"role": "assistant", "content": content, **extra}


def test_the_last_reply_is_the_response_and_all_before_it_the_prompt():
    conversation = Conversation.from_messages([{"role": "system", "content": "Be brief."}, *chat("a", "b", "c", "d")])
    assert conversation.response == "d"
    assert [(m.role, m.content) for m in conversation.prompt] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_messages_round_trip_through_plain_dictionaries():
    messages = [
        user("What is the weather?", name="Kim"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "4 degrees", "tool_call_id": "t1", "name": "weather"},
        assistant("Cold.", reasoning_content="4 is little"),
    ]
    assert Conversation.from_messages(messages).to_list() == messages


def test_a_conversation_and_its_message_objects_are_taken_as_they_are():
    conversation = Conversation.from_messages(chat("a", "b"))
    assert Conversation.from_messages(conversation) is conversation
    assert Conversation.from_messages(conversation.messages) == conversation
    assert Conversation.from_messages(iter(chat("a", "b"))) == conversation


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert Conversation.from_messages([user(parts), assistant()]).prompt[0].content == "one two"


def test_unknown_fields_of_a_message_are_not_handed_to_the_template():
    messages = [user(weight=0, name=None), assistant(loss_mask=1)]
    assert Conversation.from_messages(messages).to_list() == [user(), assistant()]


def test_conversations_are_immutable_and_can_be_collected_in_sets():
    messages = [user(), assistant("", tool_calls=[CALL])]
    first, second = Conversation.from_messages(messages), Conversation.from_messages(messages)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.messages = ()
    assert len({first, second, Conversation.from_messages(chat("a", "b"))}) == 2
    assert first != Conversation.from_messages([user(), assistant("", tool_calls=[CALL, CALL])])


@pytest.mark.parametrize(
    ("messages", "field", "found"),
    [
        ("hello", "messages", "found 'hello', expected a list of messages"),
        (None, "messages", "found None, expected a list"),
        ({"role": "user", "content": "x"}, "messages", "expected a list of messages"),
        ([], "messages", "found no messages, expected a prompt and a reply"),
        ([assistant()], "messages", "found a reply without a prompt"),
        (["hi", assistant()], "messages[0]", "found 'hi', expected an object with role and content"),
        ([user(), "hello"], "messages[1]", "found 'hello'"),
        ([{"content": "hi"}, assistant()], "messages[0].role", "found role None"),
        ([{"role": "human", "content": "hi"}, assistant()], "messages[0].role", "system, user, assistant, tool"),
        ([user(), {"role": ["assistant"], "content": "x"}], "messages[1].role", "found role ['assistant']"),
        ([user()], "messages[0].role", "found role 'user', expected 'assistant'"),
        ([user(), assistant(), user("bye")], "messages[2].role", "found role 'user', expected 'assistant'"),
        ([user(), assistant("")], "messages[1].content", "found an empty response, expected text"),
        ([user(), assistant(" \n\t")], "messages[1].content", "found an empty response"),
        ([user(), assistant([])], "messages[1].content", "found an empty response"),
        ([user(), assistant("", tool_calls=[])], "messages[1].content", "found an empty response"),
        ([user(), assistant(None)], "messages[1].content", "found None, expected text"),
        ([user(None), assistant()], "messages[0].content", "found None, expected text"),
        ([user(5), assistant()], "messages[0].content", "found 5, expected text"),
        ([user(b"hi"), assistant()], "messages[0].content", "found b'hi', expected text"),
        ([user([{"type": "image"}]), assistant()], "messages[0].content", "expected text parts only"),
        ([user(["hi"]), assistant()], "messages[0].content", "found part 'hi', expected text parts only"),
        ([user("a\ud800"), assistant()], "messages[0].content", "lone surrogate at character 1"),
        ([user(), assistant("\udfff")], "messages[1].content", "lone surrogate at character 0"),
        ([user(name="\ud800"), assistant()], "messages[0].name", "lone surrogate"),
        ([user(name=5), assistant()], "messages[0].name", "found 5, expected text"),
        ([user(), assistant(reasoning_content="é\ud800")], "messages[1].reasoning_content", "surrogate at character 1"),
        ([user(), assistant(tool_calls="call")], "messages[1].tool_calls", "found 'call', expected a list of objects"),
        ([user(), assistant(tool_calls=CALL)], "messages[1].tool_calls", "expected a list of objects"),
        ([user(), assistant(tool_calls=[{"name": b"x"}])], "messages[1].tool_calls", "a value that is not JSON"),
        ([user(), assistant(tool_calls=[{"name": "\ud800"}])], "messages[1].tool_calls", "lone surrogate"),
    ],
)
def test_a_conversation_out_of_order_is_refused_with_its_place(messages, field, found):
    error = refusal(messages)
    assert error.field == field
    assert found in error.problem


def test_an_unknown_role_is_refused_with_the_nearest_right_one():
    assert "(did you mean assistant?)" in str(refusal([user(), {"role": "asistant", "content": "x"}]))


def test_a_refusal_does_not_quote_a_whole_text():
    assert len(str(refusal([{"role": "secret" * 50, "content": "x"}, assistant()]))) < 160


def test_an_empty_reply_is_accepted_where_it_calls_tools():
    for content in ("", None):
        conversation = Conversation.from_messages([user(), assistant(content, tool_calls=[CALL])])
        assert conversation.response == ""
        assert conversation.messages[-1].extra == {"tool_calls": [CALL]}


def test_an_empty_list_of_tool_calls_is_none():
    assert (
        Conversation.from_messages([user(), assistant(tool_calls=[])]).key
        == Conversation.from_messages([user(), assistant()]).key
    )


def test_a_blank_user_turn_is_not_refused():
    assert Conversation.from_messages(chat("", "b")).prompt[0].content == ""


def test_a_prompt_and_a_response_make_a_conversation_from_text_messages_or_one_message():
    expected = Conversation.from_messages(chat("a", "b"))
    prompts = ["a", [user("a")], (Message("user", "a"),)]
    responses = ["b", assistant("b"), Message("assistant", "b"), [assistant("b")]]
    for prompt in prompts:
        for response in responses:
            assert Conversation.from_prompt(prompt, response) == expected


@pytest.mark.parametrize(
    ("prompt", "response", "field"),
    [
        ("a", "", "response"),
        ("a", " ", "response"),
        ("a\ud800", "b", "prompt"),
        ("a", "b\ud800", "response"),
        ([], "b", "prompt"),
        (7, "b", "prompt"),
        (user("a"), "b", "prompt"),
        ([user("a"), {"role": "bot", "content": "b"}], "b", "prompt[1].role"),
        ([user(3)], "b", "prompt[0].content"),
        ("a", user("b"), "response.role"),
        ("a", [assistant("")], "response.content"),
        ("a", 7, "response"),
        ("a", [], "response"),
        ("a", [assistant("b"), assistant("c")], "response"),
    ],
)
def test_a_fault_of_a_prompt_or_a_response_is_named_by_the_side_it_is_in(prompt, response, field):
    with pytest.raises(ConversationError) as caught:
        Conversation.from_prompt(prompt, response)
    assert caught.value.field == field


def test_a_fault_of_a_response_is_named_by_the_column_it_came_from():
    for response, field in (("", "chosen"), (assistant(""), "chosen.content"), (7, "chosen")):
        with pytest.raises(ConversationError) as caught:
            Conversation.from_prompt("a", response, "chosen")
        assert caught.value.field == field


def test_prompt_and_response_messages_of_text():
    assert prompt_messages("a") == [user("a")]
    assert response_messages("b") == [assistant("b")]


def test_keys_address_conversation_and_prompt_by_content():
    first, second = Conversation.from_messages(chat("a", "b")), Conversation.from_messages(chat("a", "c"))
    other = Conversation.from_messages(chat("A", "b"))
    assert first.prompt_key == second.prompt_key != other.prompt_key
    assert len({first.key, second.key, other.key, first.prompt_key, other.prompt_key}) == 5
    text = '[{"content": "a", "role": "user"}]'
    assert first.prompt_key == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def test_keys_tell_turns_apart_that_read_the_same_when_joined():
    texts = [chat("a", "b", "c", "d"), chat("a", "bc", "", "d"), chat("ab", "", "c", "d")]
    assert len({Conversation.from_messages(messages).key for messages in texts}) == 3
    with_system = Conversation.from_messages([{"role": "system", "content": "a"}, *chat("a", "b")])
    assert with_system.prompt_key != Conversation.from_messages(chat("a", "b")).prompt_key


def test_keys_see_tool_calls_and_reasoning_but_not_the_order_of_fields():
    plain = Conversation.from_messages([user(), assistant()])
    thought = Conversation.from_messages([user(), assistant(reasoning_content="hm")])
    named = Conversation.from_messages([user(name="Kim"), assistant()])
    assert len({plain.key, thought.key, named.key}) == 3
    assert plain.prompt_key == thought.prompt_key != named.prompt_key
    reordered = Conversation.from_messages(
        [{"content": "hi", "role": "user"}, {"content": "hello", "role": "assistant"}]
    )
    assert reordered.key == plain.key


def test_content_key_takes_text_beyond_ascii():
    messages = [Message("user", "naïve 語 🙂")]
    text = json.dumps([{"content": "naïve 語 🙂", "role": "user"}], ensure_ascii=False)
    assert content_key(messages) == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
