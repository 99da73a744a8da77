"""Tools and reasoning as each kind of chat template gets them: its own form, or text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from armorm.backbone.chat_template import ChatTemplate
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from tests.helpers import tokenizers as families
from tests.helpers.conversations import chat
from tests.helpers.tokenizers import STYLES, Style

every_style = pytest.mark.parametrize("style", STYLES, ids=repr)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "abc123def", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TRAJECTORY = [
    {"role": "user", "content": "How warm is Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "21 degrees", "tool_call_id": "abc123def", "name": "weather"},
    {"role": "assistant", "content": "It is warm."},
]
# As Qwen3 has it: definitions in the system turn, the reasoning of turns before the last query is dropped, results of
# neighbouring turns in one user turn.
QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}"
    "{%- endif %}{{- '# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\n</tools><|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- set reasoning = message.reasoning_content or '' %}"
    "{%- if not reasoning and '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{- '<think>\n' + reasoning + '\n</think>\n\n' }}"
    "{%- endif %}{{- content }}{%- for call in message.tool_calls or [] %}{{- '\n<tool_call>\n' }}"
    "{{- call.function | tojson }}{{- '\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'user' or not tools %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As Llama 3.1 has it: definitions in the first user turn, one call a turn, results as JSON.
LLAMA31 = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- messages[0].content | trim + '<|eot_id|>' }}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- if tools %}{{- '<|start_header_id|>user<|end_header_id|>\n\nGiven these functions:\n\n' }}"
    "{%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}"
    "{{- messages[0].content | trim + '<|eot_id|>' }}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}{{- {'output': message.content} | tojson }}"
    "{%- elif message.tool_calls %}{%- if message.tool_calls | length > 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}"
    "{%- else %}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim }}"
    "{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
)


@cache
def with_definitions(name: str) -> ChatTemplate:
    """A template that renders definitions of tools: `qwen3` or `llama31`."""
    if name == "qwen3":
        return ChatTemplate(families._chatml(QWEN3, ordinary=("<think>", "</think>", "<tool_call>", "</tool_call>")))
    tokenizer = families.llama3.__wrapped__()
    tokenizer.chat_template = LLAMA31
    return ChatTemplate(tokenizer)


both = pytest.mark.parametrize("name", ["qwen3", "llama31"])


def conversation(messages: list[dict[str, Any]], tools: Any = None) -> Conversation:
    return Conversation.from_messages(messages, tools)


def reference_ids(template: ChatTemplate, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """What the tokenizer itself makes of messages, with one BOS."""
    text = template.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    return template.tokenizer(text, add_special_tokens=False).input_ids


# --- tools ---------------------------------------------------------------------------------------


@both
def test_definitions_calls_and_results_are_rendered_by_a_template_that_can(name):
    template = with_definitions(name)
    for messages in (TRAJECTORY, TRAJECTORY[:2], [{"role": "system", "content": "Be brief."}, *TRAJECTORY]):
        encoded = template.encode([conversation(messages, TOOLS)])[0]
        assert encoded.ids.tolist() == reference_ids(template, messages, TOOLS)
        # The gate closes the prompt: the last end of a turn before the reply's own.
        end = template.tokenizer.convert_tokens_to_ids("<|im_end|>" if name == "qwen3" else "<|eot_id|>")
        assert encoded.gate_position == [i for i, token in enumerate(encoded.ids) if token == end][-2]
        reply = template.tokenizer.decode(encoded.ids[encoded.gate_position :])
        assert ("Rome" if messages == TRAJECTORY[:2] else messages[-1]["content"]) in reply
        assert "weather" not in reply or messages[-1].get("tool_calls")


@both
def test_definitions_are_part_of_the_prompt_of_which_the_gate_reads(name):
    template = with_definitions(name)
    some, none = (template.encode([conversation(chat("a", "b"), tools)])[0] for tools in (TOOLS, None))
    assert some.prompt_key != none.prompt_key
    assert some.response_tokens == none.response_tokens
    assert conversation(chat("a", "b"), TOOLS).prompt_key != conversation(chat("a", "b")).prompt_key
    assert conversation(chat("a", "b"), []).key == conversation(chat("a", "b")).key


@both
def test_template_tokens_in_definitions_are_ordinary_text(name):
    template = with_definitions(name)
    special = set(template.markers.values())
    counts = []
    for text in ("fine", "".join(template.markers), f"x{next(iter(template.markers))}"):
        tools = [{"name": "weather", "description": text}]
        ids = template.encode([conversation(chat("a", "b"), tools)])[0].ids.tolist()
        counts.append(sorted(token for token in ids if token in special))
    assert counts[0] == counts[1] == counts[2]


@both
def test_arguments_as_json_text_are_those_of_the_object(name):
    template = with_definitions(name)
    text = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [TRAJECTORY[0], {**TRAJECTORY[1], "tool_calls": [text]}, *TRAJECTORY[2:]]
    given, said = (template.encode([conversation(m, TOOLS)])[0] for m in (TRAJECTORY, messages))
    assert given.key == said.key


def test_arguments_are_text_for_a_template_that_takes_only_text():
    tokenizer = families._chatml(
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content }}"
        "{%- for call in message.tool_calls or [] %}{{- call.function.name + call.function.arguments }}{%- endfor %}"
        "{{- '<|im_end|>\n' }}{%- endfor %}"
    )
    assert 'weather{"city": "Rome"}<|im_end|>' in ChatTemplate(tokenizer).render(conversation(TRAJECTORY))


@every_style
def test_what_a_template_cannot_render_of_tools_is_written_as_text(style: Style):
    template = ChatTemplate(style.build())
    system = [{"role": "system", "content": "Be brief."}] if style.system else []
    for messages in (TRAJECTORY, [*system, *TRAJECTORY]):
        text = template.render(conversation(messages, TOOLS))
        assert text.count('{"name": "weather", "parameters": {"type": "object", "properties": {}}}') == 1
        assert text.index("<tools>") < text.index('"city": "Rome"') < text.index("21 degrees") < text.index("warm.")
        assert ("<tool_call>" in text) == (not style.tools or "chatml" in style.name or style.name == "qwen3")
    # The call is the reply's own text, and moves its score but not the gate.
    others = [{**TRAJECTORY[1], "tool_calls": [replace_city(city)]} for city in ("Rome", "Oslo")]
    rome, oslo = (template.encode([conversation([TRAJECTORY[0], reply], TOOLS)])[0] for reply in others)
    assert rome.key != oslo.key and rome.prompt_key == oslo.prompt_key
    assert rome.response_tokens > 5


def replace_city(city: str) -> dict[str, Any]:
    return {**CALL, "function": {"name": "weather", "arguments": {"city": city}}}


def test_calls_are_text_where_a_template_renders_those_of_defined_tools_only():
    tokenizer = families._chatml(
        "{%- if tools %}{{- tools | tojson }}{%- endif %}{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content }}{%- if tools and message.tool_calls %}"
        "{{- '[CALLS]' }}{{- message.tool_calls[0].function | tojson }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    )
    template = ChatTemplate(tokenizer)
    assert "[CALLS]" in template.render(conversation(TRAJECTORY, TOOLS))
    assert '<tool_call>\n{"name": "weather"' in template.render(conversation(TRAJECTORY))


def test_several_results_are_one_user_turn_where_turns_must_alternate():
    tokenizer = families._chatml(
        "{%- for message in messages %}{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('roles must alternate') }}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    )
    messages = [*TRAJECTORY[:3], {"role": "tool", "content": "rainy"}, TRAJECTORY[3]]
    text = ChatTemplate(tokenizer).render(conversation(messages, TOOLS))
    results = "<tool_response>\n21 degrees\n</tool_response>\n<tool_response>\nrainy\n</tool_response><|im_end|>"
    assert f"<|im_start|>user\n{results}" in text
    assert text.startswith("<|im_start|>user\nYou can call these functions:")


@pytest.mark.parametrize(
    ("tools", "field", "problem"),
    [
        ("weather", "tools", "expected a list of objects"),
        ({"name": "weather"}, "tools", "expected a list of objects"),
        ([1], "tools[0]", "expected the definition of a function with its name"),
        ([{"name": "a"}, {"function": {}}], "tools[1]", "expected the definition of a function with its name"),
        ([{"name": "a", "parameters": {1j}}], "tools[0]", "not JSON"),
    ],
)
def test_invalid_definitions_are_refused(tools, field, problem):
    with pytest.raises(ConversationError, match=problem) as caught:
        conversation(chat("a", "b"), tools)
    assert caught.value.field == field
    with pytest.raises(ConversationError, match=problem) as caught:
        Conversation.from_prompt("a", "b", tools=tools)
    assert caught.value.field == field


# --- reasoning -----------------------------------------------------------------------------------

ANSWER, THOUGHT = "It is 3.", "<think>\none and two\n</think>\n\nIt is 3."


@every_style
def test_a_reply_without_its_reasoning_is_scored_as_its_answer(style: Style):
    template = ChatTemplate(style.build())
    template.reasoning = "drop"
    separate = chat("1 + 2?", ANSWER)
    separate[-1]["reasoning_content"] = "one and two"
    given = [chat("1 + 2?", reply) for reply in (THOUGHT, "one and two\n</think>\n\nIt is 3.", ANSWER)]
    keys = {template.encode([conversation(messages)])[0].key for messages in (*given, separate)}
    assert keys == {ChatTemplate(style.build()).encode([conversation(chat("1 + 2?", ANSWER))])[0].key}
    for text in ("<think>\none and two", "<think>\none\n</think>\n"):
        with pytest.raises(ConversationError, match="no answer after the reasoning"):
            template.encode([conversation(chat("1 + 2?", text))])
    late = chat("1 + 2?", "Three. <think>one</think> Yes.")  # not a block at the start
    assert (
        template.encode([conversation(late)])[0].key == ChatTemplate(style.build()).encode([conversation(late)])[0].key
    )


@every_style
def test_a_prefilled_beginning_of_the_reasoning_belongs_to_the_reply(style: Style):
    template = ChatTemplate(style.build())
    whole = template.encode([conversation(chat("1 + 2?", THOUGHT))])[0]
    rest = THOUGHT.removeprefix("<think>\n")
    assert template.encode([conversation(chat("1 + 2?", rest))])[0].key == whole.key
    prompt = [*chat("1 + 2?"), {"role": "assistant", "content": "<think>\n"}]
    joined = Conversation.from_prompt(prompt, rest)
    assert joined == conversation(chat("1 + 2?", THOUGHT))
    assert conversation([*prompt, {"role": "assistant", "content": rest}]) == joined
    assert whole.key != template.encode([conversation(chat("1 + 2?", ANSWER))])[0].key


def test_a_reply_that_only_calls_a_tool_after_its_reasoning_is_kept():
    template = with_definitions("qwen3")
    reply = {**TRAJECTORY[1], "content": "<think>\nlook it up\n</think>"}
    kept = template.render(conversation([TRAJECTORY[0], reply], TOOLS))
    template = ChatTemplate(template.tokenizer)
    template.reasoning = "drop"
    dropped = template.render(conversation([TRAJECTORY[0], reply], TOOLS))
    assert "look it up" in kept and "look it up" not in dropped and '"city": "Rome"' in dropped


def test_tools_stay_when_messages_are_replaced():
    whole = conversation(TRAJECTORY, TOOLS)
    assert whole.with_messages(whole.messages[:2]).tools == whole.tools
    assert whole.until(1) == conversation(TRAJECTORY[:2], TOOLS)
    assert replace(whole, messages=whole.messages[:2]) == whole.until(1)
    assert whole.turns == [1, 3]
