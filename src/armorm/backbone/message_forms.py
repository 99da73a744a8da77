"""Messages in the form that a chat template takes: tools, arguments of calls, and the reasoning of the reply.

Rules:
- Tool definitions, calls and results are rendered as the template has it. What a template leaves out or rejects is
  written as text: definitions as `<tools>` at the end of the system turn (of the first user turn where there are no
  system turns), calls as `<tool_call>` after the content of their turn, results as `<tool_response>` in a user turn.
  What a template renders is found by rendering a sample dialogue.
- Arguments of calls are objects, as transformers asks for; those that are JSON text (OpenAI) are decoded. A template
  that accepts text only gets text.
- Reasoning is a `<think>` block at the start of the reply, or its `reasoning_content`. With `keep` the template gets
  all of it, with `drop` only the answer. A reply that closes a block that it does not open began after a prefilled
  `<think>`, which is added. Reasoning of earlier turns is left to the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from armorm.errors import ConversationError

Reasoning = Literal["keep", "drop"]
Messages = list[dict[str, Any]]
_OPEN, _CLOSE = "<think>", "</think>"
# Words that no template contains.
_TOOL, _CALL, _RESULT, _SYSTEM = "zqxtool", "vbkcall", "zqxresult", "vbksystem"
_DEFINITION = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"first": {"type": "string", "description": "A text."}}},
    },
}
_USER, _REPLY = {"role": "user", "content": "zqx0"}, {"role": "assistant", "content": "vbk1"}


@dataclass(frozen=True)
class ToolForm:
    """What a chat template renders by itself; the rest is written as text."""

    definitions: bool
    calls: bool
    results: bool
    system_turns: bool
    text_arguments: bool  # arguments of calls have to be text

    @classmethod
    def of(
        cls, render: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str], *, with_tools: bool
    ) -> ToolForm:
        """What the template renders of a sample.

        Args:
            render: renders messages with tool definitions; a ConversationError if the template rejects them.
            with_tools: the conversation defines tools: some templates render calls of defined tools only.
        """

        def shows(messages: Messages, tools: Sequence[Mapping[str, Any]], *marks: str) -> bool:
            try:
                text = render(messages, tools)
            except ConversationError:
                return False
            return all(mark in text for mark in marks)

        def result(plain: bool) -> dict[str, Any]:
            content = {"role": "user", "content": _RESULT} if plain else {"role": "tool", "content": _RESULT}
            return content if plain else {**content, "tool_call_id": "zqxvbk123", "name": _CALL}

        def call(text_arguments: bool) -> dict[str, Any]:
            arguments: Any = '{"first": "a"}' if text_arguments else {"first": "a"}
            made = {"id": "zqxvbk123", "type": "function", "function": {"name": _CALL, "arguments": arguments}}
            return {"role": "assistant", "content": "", "tool_calls": [made]}

        definitions = shows([_USER, _REPLY], [_DEFINITION], _TOOL)
        tools = [_DEFINITION] if definitions and with_tools else []
        system = shows([{"role": "system", "content": _SYSTEM}, _USER, _REPLY], [], _SYSTEM)
        for results in (True, False):
            for text in (False, True):
                dialogue = [_USER, call(text), result(plain=not results), _REPLY]
                if shows(dialogue, tools, _CALL, _RESULT):
                    return cls(definitions, True, results, system, text)
        results = shows([_USER, _REPLY, result(plain=False), _REPLY], tools, _RESULT)
        return cls(definitions, False, results, system, False)

    def messages(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Messages, Sequence[Mapping[str, Any]]]:
        """Messages and tool definitions for the template."""
        turns: Messages = []
        after_result = False
        for message in messages:
            turn = dict(message)
            if turn.get("tool_calls"):
                turn = self._with_calls(turn)
            plain_result = turn["role"] == "tool" and not self.results
            if plain_result:
                text = f"<tool_response>\n{turn['content']}\n</tool_response>"
                # Results of one turn's calls are one turn: user and assistant may have to alternate.
                if after_result:
                    text = f"{turns.pop()['content']}\n{text}"
                turn = {"role": "user", "content": text}
            turns.append(turn)
            after_result = plain_result
        if tools and not self.definitions:
            return self._with_definitions(turns, tools), ()
        return turns, tools

    def _with_calls(self, turn: dict[str, Any]) -> dict[str, Any]:
        calls = [_with_arguments(call, text=self.calls and self.text_arguments) for call in turn["tool_calls"]]
        if self.calls:
            return {**turn, "tool_calls": calls}
        blocks = [f"<tool_call>\n{_json(call.get('function', call))}\n</tool_call>" for call in calls]
        rest = {name: value for name, value in turn.items() if name != "tool_calls"}
        return {**rest, "content": "\n".join([turn["content"], *blocks] if turn["content"] else blocks)}

    def _with_definitions(self, turns: Messages, tools: Sequence[Mapping[str, Any]]) -> Messages:
        lines = "\n".join(_json(tool.get("function", tool)) for tool in tools)
        text = f"You can call these functions:\n<tools>\n{lines}\n</tools>"
        if turns[0]["role"] == "system":
            return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}".lstrip()}, *turns[1:]]
        if self.system_turns or turns[0]["role"] != "user":
            return [{"role": "system", "content": text}, *turns]
        return [{**turns[0], "content": f"{text}\n\n{turns[0]['content']}"}, *turns[1:]]


def valid_reasoning(value: str) -> Reasoning:
    """The value, if it is one of `Reasoning`; else a ValueError."""
    if value not in ("keep", "drop"):
        raise ValueError(f"reasoning: found {value!r}, expected 'keep' or 'drop'")
    return value  # type: ignore[return-value]


def with_reasoning(reply: Mapping[str, Any], reasoning: Reasoning) -> dict[str, Any]:
    """The reply with its whole reasoning, or without any.

    Raises:
        ConversationError: if nothing is left of the reply without its reasoning.
    """
    turn, content = dict(reply), str(reply["content"])
    head, closing, answer = content.partition(_CLOSE)
    opened = content.lstrip().startswith(_OPEN)
    if reasoning == "keep":
        prefilled = closing and _OPEN not in head
        return {**turn, "content": f"{_OPEN}\n{content}"} if prefilled else turn
    turn.pop("reasoning_content", None)
    if closing and (opened or _OPEN not in head):
        turn["content"] = answer.lstrip()
    elif opened:
        turn["content"] = ""
    if not turn["content"].strip() and not turn.get("tool_calls"):
        raise ConversationError("found no answer after the reasoning, expected text")
    return turn


def _with_arguments(call: Mapping[str, Any], *, text: bool) -> dict[str, Any]:
    """A call whose arguments are an object, or text; what is neither stays as it is."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], text=text)}
    arguments = call.get("arguments")
    if text and isinstance(arguments, Mapping):
        return {**call, "arguments": _json(arguments)}
    if not text and isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            decoded = None
        if isinstance(decoded, dict):
            return {**call, "arguments": decoded}
    return dict(call)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
