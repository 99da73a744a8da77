"""Chat formats: what templates write around contents, to split rendered text back into turns.

A format describes the text before the first content, between two contents (by their roles) and after the last one. It
is learned from a tokenizer by rendering sample dialogues whose contents are marks: the text between two marks is what
the template writes, including a default system prompt or an empty reasoning block. `FAMILIES` are the formats of
widespread templates, for text whose tokenizer is not available.

A content ends where the template's text for the next turn begins and nowhere else: a lone end token inside a content
is text. White space alone never separates turns (Mistral writes a system turn that way; it stays part of the user's).
Texts are untrusted, so every pattern begins with a fixed string or is bounded, and search time is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError as JinjaError

_GENERATED = {"role": "assistant", "content": ""}
_DAYS = (r"\d{1,2} [A-Z][a-z]{2} \d{4}", r"\d{4}-\d{2}-\d{2}", r"[A-Z][a-z]{2,8} \d{1,2}, \d{4}")
_DATE = re.compile("|".join(_DAYS))
# Dialogues that together contain every pair of neighbouring roles: system, user, assistant, tool.
_DIALOGUES = ("suaua", "uaua", "sua", "ua", "uata")
_OPEN_DIALOGUES = ("u", "su", "uau")
_ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


@dataclass(frozen=True)
class Turn:
    """One turn of a rendered text."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """What one template writes around contents.

    Attributes:
        name: for messages.
        leads: texts that may precede the first turn any number of times: BOS, padding.
        starts: (regular expression, role) of the beginning of a text, best first.
        separators: (role of a turn, regular expression of the separator, role of the next turn), best first.
        ends: texts that may close the last reply, best first; their white space matches any white space.
        pads: padding texts that may follow.
    """

    name: str
    leads: tuple[str, ...]
    starts: tuple[tuple[str, str], ...]
    separators: tuple[tuple[str, str, str], ...]
    ends: tuple[str, ...]
    pads: tuple[str, ...] = ()

    def split(self, text: str, *, first_reply_is_last: bool = False) -> list[Turn] | None:
        """The turns of a rendered text, or None if it does not begin as this template's texts do.

        Args:
            first_reply_is_last: everything after the beginning of the first reply is that reply.
        """
        lead = self._lead.match(text)
        position = lead.end() if lead else 0
        for pattern, role in self._starts:
            found = pattern.match(text, position)
            if found is not None:
                return self._split_from(text, found.end(), role, first_reply_is_last)
        return None

    def without_end(self, reply: str) -> str:
        """A reply without padding and without the text that closes it, removed once."""
        end = _rstripped(reply, len(reply))
        unpadded = end
        while (pad := next((p for p in self.pads if reply.endswith(p, 0, unpadded)), None)) is not None:
            unpadded = _rstripped(reply, unpadded - len(pad))
        for closer in self.ends:
            for place in (end, unpadded):
                start = _before(reply, place, closer.split())
                if start is not None:
                    return reply[:start]
        return reply if unpadded == end else reply[:unpadded]

    def _split_from(self, text: str, position: int, role: str, first_reply_is_last: bool) -> list[Turn]:
        turns: list[Turn] = []
        while not (first_reply_is_last and role == "assistant"):
            pattern = self._separators.get(role)
            found = pattern.search(text, position) if pattern else None
            if found is None:
                break
            turns.append(Turn(role, text[position : found.start()]))
            position, role = found.end(), str(found.lastgroup).partition("_")[0]
        turns.append(Turn(role, self.without_end(text[position:])))
        return turns

    @cached_property
    def _lead(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:(?:{_any(map(re.escape, self.leads))})\s*)*" if self.leads else r"\s*")

    @cached_property
    def _starts(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(pattern), role) for pattern, role in self.starts]

    @cached_property
    def _separators(self) -> dict[str, re.Pattern[str]]:
        groups: dict[str, list[str]] = {}
        for role, pattern, following in self.separators:
            known = groups.setdefault(role, [])
            known.append(f"(?P<{following}_{len(known)}>{pattern})")
        return {role: re.compile("|".join(patterns)) for role, patterns in groups.items()}


def _rstripped(text: str, end: int) -> int:
    """End of text[:end] without trailing white space."""
    while end > 0 and text[end - 1].isspace():
        end -= 1
    return end


def _before(text: str, end: int, parts: Sequence[str]) -> int | None:
    """Start of `parts`, separated by any white space, if text[:end] ends with them."""
    for part in reversed(parts):
        end = _rstripped(text, end)
        if not text.endswith(part, 0, end):
            return None
        end -= len(part)
    return end


def _any(patterns: Iterable[str]) -> str:
    return "|".join(patterns)


# --- learned from a tokenizer ------------------------------------------------------------------------


def learn_format(tokenizer: Any, name: str) -> ChatFormat | None:
    """The format of a tokenizer's chat template, or None if its dialogues cannot be split."""
    starts: dict[str, str] = {}
    separators: dict[tuple[str, str], str] = {}
    ends: dict[str, None] = {}
    for roles in _DIALOGUES:
        pieces = _pieces(tokenizer, roles, generate=False)
        if pieces is not None:
            _learn(pieces, roles, starts, separators)
            ends[pieces[-1].strip()] = None
    if not any(role == "user" for role in starts.values()) or "assistant" not in separators.values():
        return None
    for roles in _OPEN_DIALOGUES:
        pieces = _pieces(tokenizer, roles, generate=True)
        # (A reasoning block that the generation prompt opens belongs to the reply.)
        if pieces is not None and not _opens_reasoning(pieces[-1]):
            separators.setdefault((roles[-1], pieces[-1]), "assistant")
    tokens = {kind: getattr(tokenizer, f"{kind}_token", None) or "" for kind in ("bos", "eos", "pad")}
    leads = tuple(tokens[kind] for kind in ("bos", "pad") if tokens[kind])
    lead = re.compile(rf"\s*(?:(?:{_any(map(re.escape, leads))})\s*)*" if leads else r"\s*")
    opening = {text[_end_of(lead, text) :]: role for text, role in starts.items()}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = _longest_first(filter(None, added), str)
    closers = [*ends, *(_first_special(end, special) for end in ends), tokens["eos"]]
    return ChatFormat(
        name,
        leads,
        tuple((_literal(text), role) for text, role in _longest_first(opening.items(), lambda e: e[0]) if text),
        tuple(
            (_ROLES[role], _literal(text), following)
            for (role, text), following in _longest_first(separators.items(), lambda e: e[0][1])
            if text.strip()
        ),
        tuple(end for end in dict.fromkeys(_longest_first(closers, str)) if end),
        (tokens["pad"],) if tokens["pad"] else (),
    )


def _pieces(tokenizer: Any, roles: str, *, generate: bool) -> list[str] | None:
    """What the template writes before, between and after the contents of a dialogue; None unless it writes each
    content once, in order."""
    marks = [f"\ue200{index}\ue201" for index in range(len(roles))]
    messages = [{"role": _ROLES[role], "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except (JinjaError, TypeError, ValueError):
        return None
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, text = text.split(mark)
        pieces.append(before)
    return [*pieces, text]


def _learn(pieces: Sequence[str], roles: str, starts: dict[str, str], separators: dict[tuple[str, str], str]) -> None:
    """Add what one dialogue shows; a text that opens two roles (Mistral's system turn) is the user's."""
    first = _ROLES[roles[0]]
    if first == "user" or pieces[0] not in starts:
        starts[pieces[0]] = first
    for role, following, text in zip(roles, roles[1:], pieces[1:-1], strict=False):
        known = (role, text)
        if known not in separators or _ROLES[following] == "user":
            separators[known] = _ROLES[following]


def _opens_reasoning(text: str) -> bool:
    return text.rfind("<think>") > text.rfind("</think>")


def _first_special(end: str, special: Sequence[str]) -> str:
    """The first special token of the end of a dialogue, with which a generation ends."""
    found = re.search(_any(map(re.escape, special)) or "(?!)", end)
    return found[0] if found else ""


def _literal(text: str) -> str:
    """A pattern for a template's text; a date in it matches any day (Llama-3.2 and others write today's)."""
    pieces = []
    end = 0
    for found in _DATE.finditer(text):
        pieces += [re.escape(text[end : found.start()]), next(day for day in _DAYS if re.fullmatch(day, found[0]))]
        end = found.end()
    return "".join([*pieces, re.escape(text[end:])])


def _longest_first(entries: Iterable[Any], text: Callable[[Any], str]) -> list[Any]:
    return sorted(entries, key=lambda entry: -len(text(entry)))


def _end_of(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    return found.end() if found else 0


# --- known families ----------------------------------------------------------------------------------


def framed_format(
    name: str,
    frames: dict[str, tuple[str, str]],
    ends: Sequence[str],
    *,
    leads: Sequence[str] = (),
    pads: Sequence[str] = (),
) -> ChatFormat:
    """A format in which every role has its own opening and closing.

    Args:
        frames: (opening, closing) patterns by role. A dialogue may begin with any role but assistant and tool; a reply
            without an opening only follows the user's turn.
    """
    starts = [(opening, role) for role, (opening, _) in frames.items() if role not in ("assistant", "tool")]
    separators = [
        (role, closing + opening, following)
        for role, (_, closing) in frames.items()
        for following, (opening, _) in frames.items()
        if opening or role == "user"
    ]
    return ChatFormat(name, tuple(leads), tuple(starts), tuple(separators), tuple(ends), tuple(pads))


def _chatml_role(role: str) -> tuple[str, str]:
    return rf"<\|im_start\|>{role}\n", r"<\|im_end\|>\s*"


def _llama3_role(role: str) -> tuple[str, str]:
    return rf"<\|start_header_id\|>{role}<\|end_header_id\|>\n\n", r"<\|eot_id\|>"


_LLAMA3_PADS = ("<|finetune_right_pad_id|>", "<|end_of_text|>", "[PAD]")
FAMILIES = (
    framed_format(
        "ChatML",
        {role: _chatml_role(role) for role in ("system", "user", "assistant", "tool")},
        ("<|im_end|>", "</s>"),
        leads=("<|endoftext|>", "<|begin_of_text|>", "<s>"),
        pads=("<|endoftext|>",),
    ),
    framed_format(
        "Llama-3",
        {
            **{role: _llama3_role(role) for role in ("system", "user", "assistant")},
            "tool": _llama3_role("(?:ipython|tool)"),
        },
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        leads=("<|begin_of_text|>", *_LLAMA3_PADS),
        pads=_LLAMA3_PADS,
    ),
    framed_format(
        "Gemma",
        {
            "user": (r"<start_of_turn>user\n", r"<end_of_turn>\s*"),
            "assistant": (r"<start_of_turn>model\n", r"<end_of_turn>\s*"),
        },
        ("<end_of_turn>", "<eos>"),
        leads=("<bos>", "<pad>"),
        pads=("<pad>", "<eos>"),
    ),
    framed_format(
        "Mistral",
        {"user": (r"\[INST\] ?", r" ?\[/INST\] ?"), "assistant": ("", r" ?</s>\s*(?:<s>\s*)?")},
        ("</s>",),
        leads=("<s>", "<pad>", "<unk>"),
        pads=("<pad>", "<unk>"),
    ),
    framed_format(
        "plain (Human: / Assistant:)",
        {"user": ("Human: ?", r"\n\n"), "assistant": ("Assistant: ?", r"\n\n")},
        ("<|endoftext|>", "</s>"),
    ),
    framed_format(
        "plain (User: / Assistant:)",
        {
            "user": ("(?:User|USER): ?", r"\s{1,2}"),
            "assistant": ("(?:Assistant|ASSISTANT): ?", r"(?:</s>)?\s{1,2}"),
        },
        ("</s>",),
    ),
)
