"""Conversations: the unit that is read, scored and explained.

Rules: roles are system, user, assistant and tool. The last message is the assistant's reply, which is scored and may
not be blank unless it calls tools; at least one message precedes it. Content is text or a list of text parts (joined);
a turn that calls tools may have none. Other fields (`tool_calls`, `tool_call_id`, `name`, `reasoning_content`) are
passed to the chat template; an empty list of tool calls counts as none. So are the definitions of the tools, a list of
objects in OpenAI's form or of the functions alone. An assistant turn `<think>` before the reply, which a prompt ends
with whose reasoning is prefilled, is the beginning of the reply.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Union

from armorm.errors import ConversationError, nearest, shown

ROLES = ("system", "user", "assistant", "tool")
EXTRA_FIELDS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
_EXTRA = frozenset(EXTRA_FIELDS)
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Message:
    """One turn, with a role of `ROLES` and optional fields of `EXTRA_FIELDS`."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        return {"role": self.role, "content": self.content, **self.extra}


MessageLike = Union[Message, Mapping[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """A prompt and the response to it.

    Example:
        >>> conversation = Conversation.from_messages(
        ...     [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
        ... )
        >>> conversation.response
        '4'

    Attributes:
        messages: all turns, the last one the assistant's reply.
        tools: definitions of the tools that the assistant may call; empty for none.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @classmethod
    def from_messages(
        cls, messages: Conversation | Iterable[MessageLike], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Conversation:
        """Validate a list of messages, and definitions of tools.

        Raises:
            ConversationError: naming the field (`messages[i].role`), what was found and what was expected.
        """
        if isinstance(messages, Conversation):
            return messages
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
            raise ConversationError(f"found {shown(messages)}, expected a list of messages", "messages")
        turns = tuple(_message(entry, f"messages[{index}]") for index, entry in enumerate(messages))
        definitions = _definitions(tools)
        if not turns:
            raise ConversationError("found no messages, expected a prompt and a reply", "messages")
        last = f"messages[{len(turns) - 1}]"
        if turns[-1].role != "assistant":
            raise ConversationError(
                f"found role {turns[-1].role!r}, expected 'assistant': the last message is the reply that is scored",
                f"{last}.role",
            )
        if not turns[-1].content.strip() and "tool_calls" not in turns[-1].extra:
            raise ConversationError("found an empty response, expected text", f"{last}.content")
        if len(turns) == 1:
            raise ConversationError("found a reply without a prompt, expected at least one turn before it", "messages")
        return cls(_with_prefill(turns), definitions)

    @classmethod
    def from_prompt(
        cls,
        prompt: str | Iterable[MessageLike],
        response: str | Iterable[MessageLike],
        name: str = "response",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Conversation:
        """A conversation from a prompt (text of one user turn, or messages) and a response (text, or one message).

        Args:
            name: of the response in error messages, such as its column.
            tools: definitions of tools.

        Raises:
            ConversationError: naming the field (`prompt[i].role`, `response`), what was found and what was expected.
        """
        turns, reply = prompt_messages(prompt), response_messages(response, name)
        try:
            return cls.from_messages([*turns, *reply], tools)
        except ConversationError as error:
            if error.field.startswith("tools"):
                raise
            found = re.fullmatch(r"messages\[(\d+)\](.*)", error.field)
            if found is None or int(found[1]) < len(turns):
                place = "prompt" if found is None or isinstance(prompt, str) else f"prompt[{found[1]}]{found[2]}"
            else:
                place = name if isinstance(response, str) else name + found[2]
            raise ConversationError(error.problem, place) from None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the reply."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """Text of the reply."""
        return self.messages[-1].content

    @cached_property
    def key(self) -> str:
        """32 hex digits, a hash of the conversation's content."""
        return content_key(self.messages, self.tools)

    @cached_property
    def prompt_key(self) -> str:
        """32 hex digits, a hash of the prompt's content; all splits are by this key."""
        return content_key(self.prompt, self.tools)

    @property
    def turns(self) -> list[int]:
        """Places in `messages` of the assistant's turns that answer something: those after the first user turn."""
        first = next((place for place, message in enumerate(self.messages) if message.role == "user"), 0)
        return [place for place, message in enumerate(self.messages) if message.role == "assistant" and place > first]

    def until(self, turn: int) -> Conversation:
        """The conversation up to an assistant's turn, which is its reply.

        Args:
            turn: place in `messages`.

        Raises:
            ConversationError: for a turn that is blank, or not the assistant's.
        """
        return Conversation.from_messages(self.messages[: turn + 1], self.tools)

    def with_messages(self, messages: Iterable[Message]) -> Conversation:
        """A conversation with other messages and the same tools; the messages are not validated."""
        return Conversation(tuple(messages), self.tools)

    def to_list(self) -> list[dict[str, Any]]:
        """The messages as plain dictionaries."""
        return [message.to_dict() for message in self.messages]


ConversationLike = Union[Conversation, Sequence[MessageLike]]


def several(given: Sequence[ConversationLike] | ConversationLike) -> Sequence[ConversationLike]:
    """The conversations, or the one that was given alone as a list of one: a `Conversation`, a list of messages, or an
    object with the columns of a row."""
    if isinstance(given, (Conversation, Mapping)):
        return [given]
    first = given[0] if isinstance(given, Sequence) and given else None
    if isinstance(first, Message) or (isinstance(first, Mapping) and not first.keys().isdisjoint({"role", "content"})):
        return [given]  # type: ignore[list-item]
    return given  # type: ignore[return-value]


def two_responses(*compared: Any) -> list[Conversation]:
    """Two conversations with one prompt, from two conversations, or a prompt and two responses as in `from_prompt`.

    Raises:
        ConversationError: for two prompts, or an invalid conversation.
    """
    if len(compared) == 3:
        conversations = [Conversation.from_prompt(compared[0], reply) for reply in compared[1:]]
    elif len(compared) == 2:
        conversations = [Conversation.from_messages(messages) for messages in compared]
    else:
        raise TypeError(f"found {len(compared)} arguments, expected two conversations, or a prompt and two responses")
    if conversations[0].prompt_key != conversations[1].prompt_key:
        raise ConversationError("found two prompts, expected two responses to the same one")
    return conversations


def content_key(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """32 hex digits of the content of messages and tools (BLAKE2b of their canonical JSON)."""
    content: list[Any] = [message.to_dict() for message in messages]
    text = _CANONICAL.encode([content, list(tools)] if tools else content)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def prompt_messages(prompt: str | Iterable[MessageLike]) -> list[MessageLike]:
    """The messages of a prompt; text is one user turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise ConversationError(f"found {shown(prompt)}, expected text or a list of messages", "prompt")
    return list(prompt)


def response_messages(response: str | Iterable[MessageLike], name: str = "response") -> list[MessageLike]:
    """The reply as a list of one message, from text, a message, or such a list."""
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    if isinstance(response, (Message, Mapping)):
        return [response]
    if not isinstance(response, Iterable):
        raise ConversationError(f"found {shown(response)}, expected text or a list of one message", name)
    turns = list(response)
    if len(turns) != 1:
        raise ConversationError(f"found {len(turns)} messages, expected one assistant message", name)
    return turns


def _message(entry: object, place: str) -> Message:
    if isinstance(entry, Message):
        entry = entry.to_dict()
    if not isinstance(entry, Mapping):
        raise ConversationError(f"found {shown(entry)}, expected an object with role and content", place)
    role = entry.get("role")
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise ConversationError(f"found role {shown(role)}, expected one of {', '.join(ROLES)}{hint}", f"{place}.role")
    extra = {} if _EXTRA.isdisjoint(entry) else _extra(entry, place)
    content = _content(entry.get("content"), extra, f"{place}.content")
    _check_unicode(content, f"{place}.content")
    return Message(role, content, extra)


def _with_prefill(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns with a reply that begins in an assistant turn `<think>` of the prompt as one."""
    if len(turns) < 3 or turns[-2].role != "assistant" or turns[-2].content.strip() != "<think>":
        return turns
    return (*turns[:-2], replace(turns[-1], content=turns[-2].content + turns[-1].content))


def _definitions(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise ConversationError(f"found {shown(tools)}, expected a list of objects", "tools")
    found = []
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConversationError(f"found {shown(tool)}, expected the definition of a function with its name", place)
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
        _check_json(found[-1], place)
    return tuple(found)


def _check_json(value: Any, place: str) -> None:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConversationError(f"found a value that is not JSON: {error}", place) from None
    _check_unicode(text, place)


def _extra(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    extra = {name: entry[name] for name in EXTRA_FIELDS if entry.get(name) is not None}
    for name, value in extra.items():
        field = f"{place}.{name}"
        if name != "tool_calls":
            if not isinstance(value, str):
                raise ConversationError(f"found {shown(value)}, expected text", field)
            _check_unicode(value, field)
            continue
        if not (isinstance(value, Sequence) and all(isinstance(call, Mapping) for call in value)):
            raise ConversationError(f"found {shown(value)}, expected a list of objects", field)
        _check_json(value, field)
    if not extra.get("tool_calls"):
        extra.pop("tool_calls", None)
    return extra


def _check_unicode(text: str, place: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConversationError(
                f"found a lone surrogate at character {error.start}, expected valid Unicode", place
            ) from None


def _content(content: object, extra: Mapping[str, Any], place: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and "tool_calls" in extra:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        texts = []
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise ConversationError(f"found part {shown(part)}, expected text parts only", place)
            texts.append(part["text"])
        return "".join(texts)
    raise ConversationError(f"found {shown(content)}, expected text", place)
