"""Turn styles: what templates write between one content and the next.

In:  a tokenizer with a chat template; or a family's name.
Out: `TurnStyle`: splits rendered text into turns.

A style knows what may stand before the first content, between two contents (by their roles), and after the
last. It is learned from a tokenizer by rendering sample dialogues whose contents are marks: the text between
two marks is what the template writes there, a default system prompt or an empty reasoning block included.
`FAMILIES` are the styles of widespread templates, for text whose tokenizer is not at hand.

A content ends where the template's text for the next turn begins, and nowhere else: a lone end token inside
a content is text. White space alone never separates turns (Mistral writes a system turn that way; it stays
with the user's). Texts come from anywhere, so every pattern begins with a fixed string or is bounded: the
time of a search is linear in the text.
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
# Dialogues that show, between them, every pair of neighbours; s, u, a, t are the roles.
_DIALOGUES = ("suaua", "uaua", "sua", "ua", "uata")
_OPEN_DIALOGUES = ("u", "su", "uau")
_ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


@dataclass(frozen=True)
class Turn:
    """One turn of a text: its role and the text between its marks."""

    role: str
    content: str


@dataclass(frozen=True)
class TurnStyle:
    """What one template writes around contents; patterns are regular expressions.

    Attributes:
        name: for people.
        leads: what may precede the first turn any number of times: BOS, padding.
        starts: (pattern, role) of the opening of a text, best first.
        joints: (role of a turn, pattern, role of the next), best first.
        ends: what may close the last reply, best first; white space in them stands for any.
        pads: what may fill up the text after that. Leads, ends and pads are plain text.
    """

    name: str
    leads: tuple[str, ...]
    starts: tuple[tuple[str, str], ...]
    joints: tuple[tuple[str, str, str], ...]
    ends: tuple[str, ...]
    pads: tuple[str, ...] = ()

    def split(self, text: str, *, first_reply_is_last: bool = False) -> list[Turn] | None:
        """The turns of a rendered text, or None where it does not begin as this template's texts do.

        Args:
            first_reply_is_last: everything after the first opening of a reply is that reply.
        """
        lead = self._lead.match(text)
        position = lead.end() if lead else 0
        for pattern, role in self._starts:
            found = pattern.match(text, position)
            if found is not None:
                return self._split_from(text, found.end(), role, first_reply_is_last)
        return None

    def without_end(self, reply: str) -> str:
        """A reply without what closes it, once, and without padding; without either, as it is."""
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
            pattern = self._joints.get(role)
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
    def _joints(self) -> dict[str, re.Pattern[str]]:
        groups: dict[str, list[str]] = {}
        for role, pattern, following in self.joints:
            known = groups.setdefault(role, [])
            known.append(f"(?P<{following}_{len(known)}>{pattern})")
        return {role: re.compile("|".join(patterns)) for role, patterns in groups.items()}


def _rstripped(text: str, end: int) -> int:
    """Where text[:end] ends without the white space at its end."""
    while end > 0 and text[end - 1].isspace():
        end -= 1
    return end


def _before(text: str, end: int, parts: Sequence[str]) -> int | None:
    """Where parts, with any white space between them, begin if text[:end] ends with them."""
    for part in reversed(parts):
        end = _rstripped(text, end)
        if not text.endswith(part, 0, end):
            return None
        end -= len(part)
    return end


def _any(patterns: Iterable[str]) -> str:
    return "|".join(patterns)


# --- learned from a tokenizer ------------------------------------------------------------------------


def learned_style(tokenizer: Any, name: str) -> TurnStyle | None:
    """The style of a tokenizer's chat template, or None where its dialogues cannot be taken apart."""
    starts: dict[str, str] = {}
    joints: dict[tuple[str, str], str] = {}
    ends: dict[str, None] = {}
    for roles in _DIALOGUES:
        pieces = _pieces(tokenizer, roles, generate=False)
        if pieces is not None:
            _learn(pieces, roles, starts, joints)
            ends[pieces[-1].strip()] = None
    if not any(role == "user" for role in starts.values()) or "assistant" not in joints.values():
        return None
    for roles in _OPEN_DIALOGUES:
        pieces = _pieces(tokenizer, roles, generate=True)
        # (A generation prompt that opens a reasoning block leaves the block to the reply.)
        if pieces is not None and not _opens_reasoning(pieces[-1]):
            joints.setdefault((roles[-1], pieces[-1]), "assistant")
    tokens = {kind: getattr(tokenizer, f"{kind}_token", None) or "" for kind in ("bos", "eos", "pad")}
    leads = tuple(tokens[kind] for kind in ("bos", "pad") if tokens[kind])
    lead = re.compile(rf"\s*(?:(?:{_any(map(re.escape, leads))})\s*)*" if leads else r"\s*")
    opening = {text[_end_of(lead, text) :]: role for text, role in starts.items()}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = _longest_first(filter(None, added), str)
    closers = [*ends, *(_first_special(end, special) for end in ends), tokens["eos"]]
    return TurnStyle(
        name,
        leads,
        tuple((_literal(text), role) for text, role in _longest_first(opening.items(), lambda e: e[0]) if text),
        tuple(
            (_ROLES[role], _literal(text), following)
            for (role, text), following in _longest_first(joints.items(), lambda e: e[0][1])
            if text.strip()
        ),
        tuple(end for end in dict.fromkeys(_longest_first(closers, str)) if end),
        (tokens["pad"],) if tokens["pad"] else (),
    )


def _pieces(tokenizer: Any, roles: str, *, generate: bool) -> list[str] | None:
    """What the template writes before, between and after the contents of a dialogue; None where they are not
    written once each, in order."""
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


def _learn(pieces: Sequence[str], roles: str, starts: dict[str, str], joints: dict[tuple[str, str], str]) -> None:
    """Enter what one dialogue shows; where a text opens two roles (Mistral's system turn), it is the user's."""
    first = _ROLES[roles[0]]
    if first == "user" or pieces[0] not in starts:
        starts[pieces[0]] = first
    for role, following, text in zip(roles, roles[1:], pieces[1:-1], strict=False):
        known = (role, text)
        if known not in joints or _ROLES[following] == "user":
            joints[known] = _ROLES[following]


def _opens_reasoning(text: str) -> bool:
    return text.rfind("<think>") > text.rfind("</think>")


def _first_special(end: str, special: Sequence[str]) -> str:
    """The first special token of what ends a dialogue, which a generation ends with."""
    found = re.search(_any(map(re.escape, special)) or "(?!)", end)
    return found[0] if found else ""


def _literal(text: str) -> str:
    """A pattern of what a template writes; a date in it stands for any day (Llama-3.2 and others write today's)."""
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


def framed_style(
    name: str,
    frames: dict[str, tuple[str, str]],
    ends: Sequence[str],
    *,
    leads: Sequence[str] = (),
    pads: Sequence[str] = (),
) -> TurnStyle:
    """A style in which every role has its own opening and closing.

    Args:
        frames: (opening, closing) patterns by role; a dialogue may open with any role but assistant and tool. A
            reply without an opening of its own follows the user's turn only.
    """
    starts = [(opening, role) for role, (opening, _) in frames.items() if role not in ("assistant", "tool")]
    joints = [
        (role, closing + opening, following)
        for role, (_, closing) in frames.items()
        for following, (opening, _) in frames.items()
        if opening or role == "user"
    ]
    return TurnStyle(name, tuple(leads), tuple(starts), tuple(joints), tuple(ends), tuple(pads))


def _chatml_role(role: str) -> tuple[str, str]:
    return rf"<\|im_start\|>{role}\n", r"<\|im_end\|>\s*"


def _llama3_role(role: str) -> tuple[str, str]:
    return rf"<\|start_header_id\|>{role}<\|end_header_id\|>\n\n", r"<\|eot_id\|>"


_LLAMA3_PADS = ("<|finetune_right_pad_id|>", "<|end_of_text|>", "[PAD]")
FAMILIES = (
    framed_style(
        "ChatML",
        {role: _chatml_role(role) for role in ("system", "user", "assistant", "tool")},
        ("<|im_end|>", "</s>"),
        leads=("<|endoftext|>", "<|begin_of_text|>", "<s>"),
        pads=("<|endoftext|>",),
    ),
    framed_style(
        "Llama-3",
        {
            **{role: _llama3_role(role) for role in ("system", "user", "assistant")},
            "tool": _llama3_role("(?:ipython|tool)"),
        },
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        leads=("<|begin_of_text|>", *_LLAMA3_PADS),
        pads=_LLAMA3_PADS,
    ),
    framed_style(
        "Gemma",
        {
            "user": (r"<start_of_turn>user\n", r"<end_of_turn>\s*"),
            "assistant": (r"<start_of_turn>model\n", r"<end_of_turn>\s*"),
        },
        ("<end_of_turn>", "<eos>"),
        leads=("<bos>", "<pad>"),
        pads=("<pad>", "<eos>"),
    ),
    framed_style(
        "Mistral",
        {"user": (r"\[INST\] ?", r" ?\[/INST\] ?"), "assistant": ("", r" ?</s>\s*(?:<s>\s*)?")},
        ("</s>",),
        leads=("<s>", "<pad>", "<unk>"),
        pads=("<pad>", "<unk>"),
    ),
    framed_style(
        "plain (Human: / Assistant:)",
        {"user": ("Human: ?", r"\n\n"), "assistant": ("Assistant: ?", r"\n\n")},
        ("<|endoftext|>", "</s>"),
    ),
    framed_style(
        "plain (User: / Assistant:)",
        {
            "user": ("(?:User|USER): ?", r"\s{1,2}"),
            "assistant": ("(?:Assistant|ASSISTANT): ?", r"(?:</s>)?\s{1,2}"),
        },
        ("</s>",),
    ),
)
