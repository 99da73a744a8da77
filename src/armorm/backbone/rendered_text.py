"""Read conversations from rendered text or token ids, to be rendered again by the model's own template.

If the prompt is given with the text, it is the exact prefix, and everything after it is one response. Otherwise the
text is split by the first format that matches its beginning: of the policy's tokenizer if known, the model's own, then
the families of `chat_formats`. Such text cannot tell a turn from a response that imitates one, so text with several
assistant turns is rejected unless the server is configured how to read it (`turns`). An end token that closes the reply
is removed once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from armorm.backbone.chat_formats import FAMILIES, Turn, end_of_leads, learn_format
from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.conversation import Conversation
from armorm.errors import ConversationError, shown

RenderedTurns = Literal["refuse", "single", "multi"]

# Template tokens of widespread models: a prompt that contains one was rendered by some template.
_TOKEN = re.compile(r"<[|｜][^|｜<>\s]{1,40}[|｜]>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|<bos>|<eos>")
_WHITE = re.compile(r"\s{0,4}")


class EmptyResponseError(ConversationError):
    """A response without text, which cannot be scored."""

    def __init__(self, field: str = "") -> None:
        super().__init__("found an empty response, expected text", field)


class RenderedReader:
    """Reads text that other templates rendered.

    Args:
        template: of the reward model.
        vocabulary: size of its embedding; other ids are rejected.
        turns: how to treat text with several assistant turns.
        policy_tokenizer: of the model that the text comes from, if known.
        max_characters: longer texts are rejected unread, None for no limit.
        turns_setting: what users set to `single` or `multi` to change `turns`, for errors; '' if they cannot.
    """

    def __init__(
        self,
        template: ChatTemplate,
        vocabulary: int,
        turns: RenderedTurns = "refuse",
        policy_tokenizer: Any = None,
        max_characters: int | None = None,
        turns_setting: str = "",
    ) -> None:
        self.turns_setting = turns_setting
        self.vocabulary, self.turns, self.max_characters = vocabulary, turns, max_characters
        known = {"the policy tokenizer's": policy_tokenizer, "the model's own": template.tokenizer}
        learned = (learn_format(tokenizer, name) for name, tokenizer in known.items() if tokenizer is not None)
        self.formats = [*filter(None, learned), *FAMILIES]
        self._gate_pattern = template.gate_pattern()
        sample = template.encode([Conversation.from_prompt("a", "b")])[0]
        self._bos_id = template.bos_id if sample.ids[0] == template.bos_id else None

    def conversation(self, text: object) -> Conversation:
        """The conversation in a rendered text.

        Raises:
            ConversationError: for text that no format matches, that ends without a reply, or whose turns cannot be
                told from text.
        """
        whole = self._checked(text, "text")
        for chat_format in self.formats:
            turns = chat_format.split(whole, first_reply_is_last=self.turns == "single")
            if turns is None:
                continue
            replies, last = sum(turn.role == "assistant" for turn in turns), turns[-1]
            if replies > 1 and self.turns == "refuse":
                raise ConversationError(self._several(replies))
            if last.role != "assistant":
                raise ConversationError(f"the text ends with a turn of role {last.role!r}, expected the reply last")
            return _assembled(turns[:-1], last.content)
        raise ConversationError(
            f"found no turns of a known template ({', '.join(chat_format.name for chat_format in self.formats)}); "
            "expected text rendered by one of them, or messages; --policy-tokenizer names another one"
        )

    def continuation(self, text: object, prompt: object) -> Conversation:
        """The conversation of a rendered prompt and the text after it.

        Raises:
            ConversationError: for text that does not begin with the prompt, or a prompt of an unknown template.
        """
        whole, start = self._checked(text, "query"), self._checked(prompt, "prompt")
        rest = self._after(whole, start)
        white = _WHITE.match(rest)
        space = white[0] if white else ""
        for chat_format in self.formats:
            # (Mistral's template writes a space between prompt and reply, which belongs to neither.)
            turns = chat_format.split(start + space)
            if turns is None:
                continue
            if turns[-1].role == "assistant":
                return _assembled(turns[:-1], chat_format.without_end(turns[-1].content + rest[len(space) :]))
            return _assembled(chat_format.split(start) or turns, chat_format.without_end(rest))
        if _TOKEN.search(start):
            raise ConversationError(
                "found template tokens of no known template; expected one of "
                f"{', '.join(chat_format.name for chat_format in self.formats)}; --policy-tokenizer names another one",
                "prompt",
            )
        cuts = (chat_format.without_end(rest) for chat_format in self.formats)
        return _assembled([Turn("user", start)], next((cut for cut in cuts if cut != rest), rest))

    def from_ids(self, ids: Sequence[Any]) -> EncodedConversation:
        """A conversation in the model's own token ids; a `ConversationError` for invalid ones, or without a gate."""
        for place, value in enumerate(ids):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocabulary:
                raise ConversationError(
                    f"found {shown(value)} at position {place}, expected ids from 0 to {self.vocabulary - 1}", "input"
                )
        if not self._gate_pattern:
            raise ConversationError("this model's template has no turn tokens to find the gate by; send text", "input")
        array = np.array(ids, np.int32)
        while self._bos_id is not None and len(array) > 1 and array[0] == array[1] == self._bos_id:
            array = array[1:]
        if self._bos_id is not None and len(array) and array[0] != self._bos_id:
            array = np.concatenate([np.array([self._bos_id], np.int32), array])
        size = len(self._gate_pattern)
        windows = np.lib.stride_tricks.sliding_window_view(array, size) if len(array) >= size else np.empty((0, size))
        gates = np.flatnonzero((windows == np.array(self._gate_pattern)).all(1))
        if not len(gates):
            raise ConversationError(
                f"found no gate pattern {self._gate_pattern}, expected ids rendered by the model's own template",
                "input",
            )
        if len(gates) > 1 and self.turns == "refuse":
            raise ConversationError(self._several(len(gates)), "input")
        gate = int(gates[0] if self.turns == "single" else gates[-1])
        if gate + size >= len(array):
            raise EmptyResponseError("input")
        return EncodedConversation(array, gate, len(array) - gate - size)

    def _checked(self, text: object, field: str) -> str:
        if not isinstance(text, str):
            raise ConversationError(f"found {shown(text)}, expected text", field)
        if self.max_characters is not None and len(text) > self.max_characters:
            raise ConversationError(f"found {len(text)} characters, more than this model can read", field)
        return text

    def _after(self, text: str, prompt: str) -> str:
        """The text after the prompt, ignoring differences of white space and BOS that decoding may cause."""
        if text.startswith(prompt):
            return text[len(prompt) :]
        leads = {lead for chat_format in self.formats for lead in chat_format.leads}
        i, j = end_of_leads(leads, prompt), end_of_leads(leads, text)
        if text.startswith(prompt[i:], j):
            return text[j + len(prompt) - i :]
        while i < len(prompt):
            if j < len(text) and prompt[i] == text[j]:
                i, j = i + 1, j + 1
            elif prompt[i].isspace():
                i += 1
            elif j < len(text) and text[j].isspace():
                j += 1
            else:
                raise ConversationError("found a text that does not begin with its prompt", "query")
        return text[j:]

    def _several(self, replies: int) -> str:
        """Why text or ids with several replies are rejected."""
        setting = (
            f", or start the server with {self.turns_setting} set to single or multi" if self.turns_setting else ""
        )
        return (
            f"found {replies} assistant turns, and text cannot tell a turn from a response that writes one: send "
            f"messages (or the prompt with the text){setting}"
        )


def _assembled(prompt: Sequence[Turn], reply: str) -> Conversation:
    if not prompt:
        raise ConversationError("found a reply without a prompt, expected at least one turn before it")
    if not reply.strip():
        raise EmptyResponseError
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    return Conversation.from_messages([*turns, {"role": "assistant", "content": reply}])
