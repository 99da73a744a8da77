"""Encode conversations with the tokenizer's own chat template, and locate the gate position.

The gate position is the token that closes the last turn before the reply. It is found from the template for every
conversation: the prompt is rendered with a marker as its reply; the text between the end of the last prompt turn and
the marker closes that turn and opens the reply, and the first special token in it is the gate (Llama-3 `<|eot_id|>`,
ChatML `<|im_end|>`, Gemma `<end_of_turn>`, Mistral `[/INST]`, Phi `<|end|>`). If a template closes turns with
ordinary text, the gate is the last token before the reply (without white space, which may merge into the reply's
first token), and the template is flagged `forgeable`.

Rules:
- BOS occurs exactly once if the tokenizer uses one, whether or not the template writes it.
- For content without template tokens the ids equal those of `apply_chat_template` (except for a missing BOS).
- Template tokens inside content, names or tool calls are encoded as ordinary text. A private copy of the tokenizer
  knows its special tokens only under random names; only the template's own markers are renamed before encoding. No
  response can forge a turn, end itself or move the gate.
- White space, system turns, tools and reasoning blocks are rendered as the template has it (Llama-3 trims contents,
  Qwen3 drops the reasoning of earlier turns), with the additions of `backbone/message_forms.py`. Scores are of the
  rendered text up to its last token, including a trailing newline of the template. A turn that the template rejects
  is rejected with the template's own message.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from jinja2 import TemplateError as JinjaError
from tokenizers import Tokenizer

from armorm.backbone.message_forms import Messages, Reasoning, ToolForm, with_reasoning
from armorm.conversation import Conversation, Message
from armorm.errors import ConversationError, TemplateError

# Characters of the supplementary private planes replace what must not be rendered literally.
_PRIVATE = "\U000f0000-\U0010ffff"
_FIRST_MASK = 0xF0000
_PROMPT_END = "\U0010fffc"
_REPLY = "\U0010fffd"


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of one conversation."""

    ids: np.ndarray  # (t,) int32
    gate_position: int  # of the token that closes the last turn before the reply; 0 <= gate_position < t - 1
    response_tokens: int  # tokens of the response's text, without template tokens
    truncated_tokens: int = 0  # prompt tokens that the overflow policy removed

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def key(self) -> bytes:
        """16-byte key of the response feature: a hash of the ids and the gate position."""
        return blake2b(self.ids.tobytes() + self.gate_position.to_bytes(8, "little"), digest_size=16).digest()

    @cached_property
    def prompt_key(self) -> bytes:
        """16-byte key of the prompt feature: a hash of the ids up to the gate position."""
        return blake2b(self.ids[: self.gate_position + 1].tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class _Prefix:
    """A prompt rendered up to the beginning of the reply."""

    text: str  # with masked content
    prompt_end: int  # end of the content of the last prompt turn
    suffix: str  # written by the template after the reply


class ChatTemplate:
    """The chat template of one tokenizer: renders, encodes and locates the gate.

    Attributes:
        markers: id of each protected token (special tokens, and added tokens that mark turns) by its text. They never
            come from content, except the unknown token of a vocabulary that lacks a character.
        forgeable: no special token closes the last prompt turn, so content can imitate a turn.
        bos_id: id that occurs exactly once, at the start; None if the tokenizer uses none.
        reasoning: whether replies are encoded with their reasoning (`keep`) or without (`drop`).

    Raises:
        TemplateError: for a tokenizer without a chat template, with one that cannot render a plain dialogue, or
            without a fast (Rust) backend.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.reasoning: Reasoning = "keep"
        if not getattr(tokenizer, "is_fast", False):
            raise TemplateError(
                f"{type(tokenizer).__name__} has no fast backend; expected a tokenizer with a tokenizer.json"
            )
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; expected one in its files"
            )
        # Responses to one prompt come in sequence: a small cache saves two renderings of each.
        self._prefix = lru_cache(maxsize=256)(self._render_prefix)
        self._tool_form = cache(lambda with_tools: ToolForm.of(self._apply, with_tools=with_tools))
        self.markers = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special and t.content}
        self._use_markers()
        self.bos_id: int | None = tokenizer.bos_token_id
        self._adds_bos = self.bos_id is not None and tokenizer("a").input_ids[:1] == [self.bos_id]
        try:
            self.markers |= self._turn_markers()
            self._use_markers()
            prefix = self._prefix(json.dumps([[message.to_dict() for message in _SAMPLE[:-1]], ()]))
        except ConversationError as error:
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path!r} cannot render user and assistant in turn: {error}"
            ) from None
        self.forgeable = self._protected.search(prefix.text, prefix.prompt_end) is None
        start = "\ue000" + _private(str(secrets.randbelow(10**18)))
        self._name = re.compile(start)
        self._names = {text: f"{start}\ue001{_private(str(index))}\ue002" for index, text in enumerate(self.markers)}
        self._private = _private_tokenizer(tokenizer, self._names, self.markers)

    def gate_pattern(self) -> list[int]:
        """Ids from the gate to the reply that precede every reply, for callers that have only ids (as the code of
        RLHFlow/ArmoRM-Llama3-8B-v0.1 does). White space that may merge into the reply is excluded. Empty if the
        template is forgeable, since the same ids may then occur in any text."""
        if self.forgeable:
            return []
        replies = [Conversation((*_SAMPLE[:-1], Message("assistant", text))) for text in _FIRST_WORDS]
        pattern, *others = [encoded.ids[encoded.gate_position :].tolist() for encoded in self.encode(replies)]
        for other in others:
            pattern = pattern[: _common_prefix(pattern, other)]
        return pattern

    def render(self, conversation: Conversation) -> str:
        """The conversation as text."""
        return self._apply(*self._messages(conversation))

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedConversation]:
        """Encode conversations of any length; a `ConversationError` for a rejected turn, or no gate position."""
        rendered = [self._locate(conversation) for conversation in conversations]
        encodings = self._private.encode_batch([text for text, *_ in rendered], add_special_tokens=False)
        return [self._finish(encoding, *places) for encoding, places in zip(encodings, rendered, strict=True)]

    def encode_with_offsets(self, conversation: Conversation) -> tuple[EncodedConversation, np.ndarray, str, int]:
        """One encoded conversation, start and end (t, 2) of each token in the text that was encoded, that text, and
        where the reply starts in it. (Markers have other names in that text.)"""
        text, *places = self._locate(conversation)
        encoding = self._private.encode(text, add_special_tokens=False)
        encoded = self._finish(encoding, text, *places)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        missing = max(len(encoded) - len(offsets), 0)  # a BOS that the template does not write
        return encoded, np.pad(offsets, ((missing, 0), (0, 0)))[-len(encoded) :], text, places[1]

    def text_pieces(self, text: str) -> list[tuple[int, int]]:
        """Character spans of a text's tokens when encoded as ordinary text."""
        return list(self._private.encode(text, add_special_tokens=False).offsets)

    # --- rendering -------------------------------------------------------------------------------

    def _messages(self, conversation: Conversation) -> tuple[Messages, Sequence[Mapping[str, Any]]]:
        """Messages and tool definitions as the template takes them."""
        messages = [message.to_dict() for message in conversation.messages]
        messages[-1] = with_reasoning(messages[-1], self.reasoning)
        if conversation.tools or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
            return self._tool_form(bool(conversation.tools)).messages(messages, conversation.tools)
        return messages, ()

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tools=list(tools) or None, tokenize=False)
        except (JinjaError, TypeError, ValueError) as error:  # the last two: a field of a type it does not expect
            raise ConversationError(f"the chat template rejects it: {error}") from None

    def _mask(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]]
    ) -> tuple[Messages, list[dict[str, Any]], dict[int, str]]:
        """Both with each protected string replaced by a private character, and a table that restores it."""
        table: dict[str, str] = {}

        def stand_in(found: re.Match[str]) -> str:
            if found[0] not in table:
                table[found[0]] = chr(_FIRST_MASK + len(table))
            return table[found[0]]

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                return self._maskable.sub(stand_in, value)
            if isinstance(value, Mapping):
                return {masked(key): masked(entry) for key, entry in value.items()}
            if isinstance(value, (list, tuple)):
                return [masked(entry) for entry in value]
            return value

        turns = [{**masked(message), "role": message["role"]} for message in messages]
        return turns, masked(tools), {ord(private): text for text, private in table.items()}

    def _render_prefix(self, masked_prompt: str) -> _Prefix:
        prompt, tools = json.loads(masked_prompt)
        reply = {"role": "assistant", "content": _REPLY}
        plain = self._apply([*prompt, reply], tools)
        if plain.count(_REPLY) != 1:
            raise ConversationError(f"the chat template renders the reply {plain.count(_REPLY)} times; expected once")
        text, suffix = plain.split(_REPLY)
        last = prompt[-1]["content"]
        kept = last.rstrip()
        # Some templates inspect the beginning or end of a content, so the mark is tried at several places.
        for place in (len(kept), max(len(kept) - 1, 0), 0):
            marked_turn = {**prompt[-1], "content": last[:place] + _PROMPT_END + last[place:]}
            marked = self._apply([*prompt[:-1], marked_turn, reply], tools)
            before, mark, _ = marked.partition(_REPLY)[0].rpartition(_PROMPT_END)
            end = len(before.replace(_PROMPT_END, "")) + len(kept) - place
            if mark and marked.replace(_PROMPT_END, "") == plain and text[:end].endswith(kept[place:]):
                return _Prefix(text, end, suffix)
        raise ConversationError(
            "the chat template does not render the last turn before the reply, so the gate cannot be located"
        )

    def _locate(self, conversation: Conversation) -> tuple[str, int, int, int]:
        """Text for the private tokenizer, and the offsets of the prompt's end and of the reply's start and end."""
        messages, tools, table = self._mask(*self._messages(conversation))
        text = self._apply(messages, tools)
        prefix = self._prefix(json.dumps([messages[:-1], tools]))
        start = len(prefix.text) if text.startswith(prefix.text) else _common_prefix(text, prefix.text)
        for found in self._protected.finditer(text, prefix.prompt_end):
            if found.start() < start < found.end():
                start = found.start()
        if start <= prefix.prompt_end:
            raise ConversationError(
                "the chat template renders the prompt differently before this reply, so the gate cannot be located"
            )
        end = len(text) - len(prefix.suffix) if text.endswith(prefix.suffix) else len(text)
        cuts = [0, prefix.prompt_end, start, max(start, end), len(text)]
        parts = [
            self._protected.sub(lambda found: self._names[found[0]], text[a:b]).translate(table)
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        ends = np.cumsum([len(part) for part in parts])
        return "".join(parts), int(ends[0]), int(ends[1]), int(ends[2])

    # --- encoding --------------------------------------------------------------------------------

    def _finish(
        self, encoding: Any, text: str, prompt_end: int, reply_start: int, reply_end: int
    ) -> EncodedConversation:
        ids = np.asarray(encoding.ids, np.int32)
        starts, ends = np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T
        names = np.array([found.start() for found in self._name.finditer(text)], np.int64)
        markers = np.searchsorted(names, starts) < np.searchsorted(names, ends)
        between = (starts >= prompt_end) & (starts < reply_start) & (ends > prompt_end)
        closing = np.flatnonzero(between & markers)
        # (The token with the template's last word, but not the white space after it.)
        last_word = prompt_end + len(text[prompt_end:reply_start].rstrip())
        words = np.flatnonzero(between & (ends <= last_word))
        plain = np.flatnonzero(between & (ends <= reply_start))
        if not len(plain) and not len(closing):
            raise ConversationError(
                "the chat template has no token between the prompt and the reply, so the gate cannot be located"
            )
        gate = int(closing[0] if len(closing) else words[-1] if len(words) else plain[-1])
        response = (ends > reply_start) & (starts < reply_end) & (ends > starts) & ~markers
        ids, shift = self._with_one_bos(ids)
        gate += shift
        if not 0 <= gate < len(ids) - 1:
            raise ConversationError("the template ends at the gate; expected the response after it")
        return EncodedConversation(ids, gate, int(response.sum()))

    def _with_one_bos(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Ids with exactly one BOS at the start, and the shift of positions."""
        shift = 0
        if self._adds_bos and ids[0] != self.bos_id:
            ids, shift = np.concatenate([np.array([self.bos_id], np.int32), ids]), 1
        while self.bos_id is not None and len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            ids, shift = ids[1:], shift - 1
        return ids, shift

    def _use_markers(self) -> None:
        pattern = "|".join(map(re.escape, sorted(self.markers, key=len, reverse=True))) or r"(?!)"
        self._protected = re.compile(pattern)
        self._maskable = re.compile(f"{pattern}|[{_PRIVATE}]")

    def _turn_markers(self) -> dict[str, int]:
        """Added tokens that are not special but that the template writes around turns of the prompt.

        (Not those of the reply's own turn, where Qwen3 writes `<think>`, which replies may contain.)
        """
        text = self._apply([message.to_dict() for message in _SAMPLE[:-1]])
        for message in _SAMPLE:
            text = text.replace(message.content, " ")
        added = self.tokenizer.added_tokens_decoder.items()
        return {t.content: i for i, t in added if not t.special and t.content.strip() and t.content in text}


# Two exchanges, to see how both kinds of turn are closed; words that no template contains.
_SAMPLE = tuple(
    Message(role, f"zqx{index} vbk{index}") for index, role in enumerate(("user", "assistant", "user", "assistant"))
)
# Beginnings of replies with different first tokens, which merge with preceding white space in different ways.
_FIRST_WORDS = (*"aB1é今([{)\"'`#*-_<>$/\\.:!", " c", "\n\nd", "<think>a</think>b")


def _private(digits: str) -> str:
    """Digits as characters that no token contains (some tokenizers have digits as added tokens)."""
    return "".join(chr(0xE010 + int(digit)) for digit in digits)


def _private_tokenizer(tokenizer: Any, names: Mapping[str, str], markers: Mapping[str, int]) -> Tokenizer:
    """A copy of the backend that knows each marker only by its private name."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = state["post_processor"] = None
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): index for text, index in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(text, text), weight] for text, weight in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    private = Tokenizer.from_str(json.dumps(state))
    for text, index in markers.items():
        if index not in private.encode(names[text], add_special_tokens=False).ids:
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path!r} cannot tell {text!r} from text in messages"
            )
    return private


def _common_prefix(first: Any, second: Any) -> int:
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)
