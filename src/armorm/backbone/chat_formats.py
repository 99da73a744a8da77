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
from collections.abc import Iterable, Sequence
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
    """What one template writes around contents; alternatives are in the order in which they are tried."""

    name: str  # for messages
    leads: tuple[str, ...]  # texts that may precede the first turn any number of times: BOS, padding
    starts: tuple[tuple[str, str], ...]  # (regular expression, role) of the beginning of a text
    separators: tuple[tuple[str, str, str], ...]  # (role of a turn, regular expression, role of the next turn)
    ends: tuple[str, ...]  # texts that may close the last reply; their white space matches any white space
    pads: tuple[str, ...] = ()  # padding texts that may follow

    def split(self, text: str, *, first_reply_is_last: bool = False) -> list[Turn] | None:
        """The turns of a rendered text, or None if it does not begin as this template's texts do.

        Args:
            first_reply_is_last: everything after the beginning of the first reply is that reply.
        """
        position = end_of_leads(self.leads, text)
        openings = ((re.compile(pattern).match(text, position), role) for pattern, role in self.starts)
        found, role = next((opening for opening in openings if opening[0]), (None, ""))
        if found is None:
            return None
        position = found.end()
        turns: list[Turn] = []
        while not (first_reply_is_last and role == "assistant"):
            pattern = self._separators.get(role)
            found = pattern.search(text, position) if pattern else None
            if found is None:
                break
            turns.append(Turn(role, text[position : found.start()]))
            position, role = found.end(), str(found.lastgroup).partition("_")[0]
        return [*turns, Turn(role, self.without_end(text[position:]))]

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


def end_of_leads(leads: Iterable[str], text: str) -> int:
    """Position in a text after its leads (BOS, padding) and white space."""
    found = re.match(rf"\s*(?:(?:{_any_of(leads)})\s*)*", text)
    return found.end() if found else 0


def _any_of(texts: Iterable[str]) -> str:
    """Pattern of any of these texts, longest first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


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
        if pieces is not None and pieces[-1].rfind("<think>") <= pieces[-1].rfind("</think>"):
            separators.setdefault((roles[-1], pieces[-1]), "assistant")
    tokens = {kind: getattr(tokenizer, f"{kind}_token", None) or "" for kind in ("bos", "eos", "pad")}
    leads = tuple(tokens[kind] for kind in ("bos", "pad") if tokens[kind])
    opening = {text[end_of_leads(leads, text) :]: role for text, role in starts.items()}
    special = _any_of(t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content)
    # (A generation ends with the first special token of the end of a dialogue.)
    closers = [*ends, *(found[0] for end in ends if (found := re.search(special, end))), tokens["eos"]]
    return ChatFormat(
        name,
        leads,
        tuple((_literal(text), opening[text]) for text in sorted(opening, key=len, reverse=True) if text),
        tuple(
            (_ROLES[role], _literal(text), separators[role, text])
            for role, text in sorted(separators, key=lambda separator: len(separator[1]), reverse=True)
            if text.strip()
        ),
        tuple(end for end in dict.fromkeys(sorted(closers, key=len, reverse=True)) if end),
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


def _literal(text: str) -> str:
    """A pattern for a template's text; a date in it matches any day (Llama-3.2 and others write today's)."""
    pieces = []
    end = 0
    for found in _DATE.finditer(text):
        pieces += [re.escape(text[end : found.start()]), next(day for day in _DAYS if re.fullmatch(day, found[0]))]
        end = found.end()
    return "".join([*pieces, re.escape(text[end:])])


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


_LLAMA3_PADS = ("<|finetune_right_pad_id|>", "<|end_of_text|>", "[PAD]")
FAMILIES = (
    framed_format(
        "ChatML",
        {role: (rf"<\|im_start\|>{role}\n", r"<\|im_end\|>\s*") for role in _ROLES.values()},
        ("<|im_end|>", "</s>"),
        leads=("<|endoftext|>", "<|begin_of_text|>", "<s>"),
        pads=("<|endoftext|>",),
    ),
    framed_format(
        "Llama-3",
        {
            role: (rf"<\|start_header_id\|>{header}<\|end_header_id\|>\n\n", r"<\|eot_id\|>")
            for role, header in zip(_ROLES.values(), ("system", "user", "assistant", "(?:ipython|tool)"), strict=True)
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
