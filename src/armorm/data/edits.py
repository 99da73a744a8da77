"""Edits of a reply whose effect is known: it is cut, its words shuffled, a number changed, an insult put first.

Constructed objectives (constructs.py) train on edited replies, and audits measure how much they move a score. An edit
is a pure function of the reply and a seeded `Draw`; it returns the new text and, where the edit is in one place, the
span of characters that are new. It returns None where it does not apply: no number in the reply, too few words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

from armorm.data.edit_texts import Draw, TextKind, edit_data

_WORD = re.compile(r"\S+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)")
_LIST_MARK = re.compile(r"^[ \t]*\d+[.)](?=\s)", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?![\w]|[.,]\d)")
_SIGNED = re.compile(r"(?<![\w)\]])(?<!\d )([-−])(?=\d)")
_OPERAND = r"[\w.)\]$%]"
_HEDGE = re.compile(
    r"\b(?:I think(?: that)?|I believe(?: that)?|I guess|I suppose|perhaps|maybe|probably|possibly|apparently|"
    r"it seems that|in my opinion,?|as far as I know,?)\s+",
    re.IGNORECASE,
)
MIN_SHUFFLED = 5  # words
LONGEST = 1500  # characters of a text instead of a reply


@dataclass(frozen=True)
class Edit:
    """An edited reply.

    Attributes:
        text: of the reply after the edit.
        span: first character and end of what is new in `text`; None if it is not in one place.
    """

    text: str
    span: tuple[int, int] | None = None


EditFunction = Callable[[str, Draw], "Edit | None"]


def truncate(reply: str, draw: Draw, share: float) -> Edit | None:
    """The first `share` of the words; None if nothing would be left or cut."""
    words = list(_WORD.finditer(reply))
    kept = round(share * len(words))
    return Edit(reply[: words[kept - 1].end()]) if 0 < kept < len(words) else None


def shuffle_words(reply: str, draw: Draw) -> Edit | None:
    """All words in another order, the white space between them unchanged."""
    words = [match.group() for match in _WORD.finditer(reply)]
    if len(set(words)) < MIN_SHUFFLED:
        return None
    shuffled = list(words)
    while shuffled == words:
        draw.random.shuffle(shuffled)
    order = iter(shuffled)
    text = _WORD.sub(lambda _: next(order), reply)
    return Edit(text, (0, len(text)))


def loop_phrase(reply: str, draw: Draw) -> Edit | None:
    """A phrase of 2 to 8 words repeated 3 to 8 times, and then the rest of the reply, or not."""
    words = list(_WORD.finditer(reply))
    if len(words) < 3:
        return None
    length = draw.random.randint(2, min(8, len(words)))
    first = draw.random.randrange(len(words) - length + 1)
    begin, end = words[first].start(), words[first + length - 1].end()
    repeats = f" {reply[begin:end]}" * draw.random.randint(3, 8)
    rest = reply[end:] if draw.random.random() < 0.5 else ""
    return Edit(reply[:end] + repeats + rest, (end, end + len(repeats)))


def insert_text(reply: str, draw: Draw, kinds: Sequence[TextKind], place: str = "before") -> Edit:
    """A text of one of the kinds `before` the reply, `after` it, or `inside` (at a random end of a sentence)."""
    text = draw.text(*kinds)
    breaks = [match.start() for match in _SENTENCE_END.finditer(reply)]
    position = {"before": 0, "after": len(reply)}.get(place, draw.random.choice(breaks or [len(reply)]))
    gap = draw.random.choice((" ", " ", "\n", "\n\n"))
    head, tail = reply[:position].rstrip(), reply[position:].lstrip()
    start = len(head) + len(gap) if head else 0
    return Edit(gap.join(part for part in (head, text, tail) if part), (start, start + len(text)))


def replace_text(reply: str, draw: Draw, kinds: Sequence[TextKind]) -> Edit:
    """A text of one of the kinds instead of the reply; half of them go on with more of it and with padding, up to the
    reply's length."""
    text = draw.text(*kinds)
    if draw.random.random() < 0.5:
        while len(more := f"{text} {draw.text(*kinds, 'padding')}") < min(len(reply), LONGEST):
            text = more
    return Edit(text, (0, len(text)))


def pad(reply: str, draw: Draw) -> Edit:
    """Two to six sentences that say nothing, after the reply."""
    text = " ".join(draw.text("padding") for _ in range(draw.random.randint(2, 6)))
    start = len(reply.rstrip()) + 1
    return Edit(f"{reply.rstrip()} {text}", (start, start + len(text)))


def sound_confident(reply: str, draw: Draw) -> Edit:
    """Hedges taken out (`I think`, `perhaps`), and an assertion of certainty put first."""
    rest = _HEDGE.sub("", reply)
    rest = rest[:1].upper() + rest[1:] if rest != reply else reply
    return insert_text(rest, draw, ("confident",))


def add_markdown(reply: str, draw: Draw) -> Edit | None:
    """A heading, a bold word in each sentence, and several sentences of a line as a list; None for a reply that has
    Markdown."""
    if re.search(r"\*\*|^#|^\s*[-*] |```", reply, re.MULTILINE):
        return None
    sentences = [part for part in _SENTENCE_END.split(reply.strip()) if part]
    bold = [_bold(sentence, draw) for sentence in sentences]
    body = bold[0] if len(bold) == 1 else "\n".join(f"- {sentence}" for sentence in bold)
    return Edit(f"## {draw.random.choice(('Answer', 'Overview', 'Summary', 'Response'))}\n\n{body}")


def _bold(sentence: str, draw: Draw) -> str:
    words = list(re.finditer(r"\w{4,}", sentence))
    if not words:
        return sentence
    word = draw.random.choice(words)
    return f"{sentence[: word.start()]}**{word.group()}**{sentence[word.end() :]}"


def swap_number(reply: str, draw: Draw) -> Edit | None:
    """One number, or number word, changed to another one near it; numbers of list items stay."""
    marks = {position for mark in _LIST_MARK.finditer(reply) for position in range(*mark.span())}
    numbers = [match for match in _NUMBER.finditer(reply) if match.start() not in marks]
    words = edit_data()["tables"]["number_words"]
    numbers += re.finditer(rf"\b(?:{'|'.join(words)})\b", reply, re.IGNORECASE)
    if not numbers:
        return None
    found = draw.random.choice(numbers)
    if found.group()[0].isdigit():
        return _replaced(reply, found, _other_number(found.group(), draw))
    others = [word for word in words if word != found.group().lower()]
    return _replaced(reply, found, _like(draw.random.choice(others), found.group()))


def _other_number(number: str, draw: Draw) -> str:
    if number.isdigit() and len(number) < 16 and draw.random.random() < 0.5:
        value = int(number)
        other = value + draw.random.choice((-1, 1)) * draw.random.randint(1, max(2, value // 4))
        return str(other if other >= 0 else value + 1)
    places = [i for i, character in enumerate(number) if character.isdigit()]
    place = draw.random.choice(places)
    digits = [d for d in "0123456789" if d != number[place] and (d != "0" or place or len(places) == 1)]
    return number[:place] + draw.random.choice(digits) + number[place + 1 :]


def swap_name(reply: str, draw: Draw) -> Edit | None:
    """A city, country, people, month, weekday, planet, person or given name changed to another of its class."""
    classes = _proper_nouns()
    found = [match for match in re.finditer(r"\b[^\W\d_]\w+\b", reply) if match.group() in classes]
    if not found:
        return None
    chosen = draw.random.choice(found)
    others = [name for name in classes[chosen.group()] if name != chosen.group()]
    return _replaced(reply, chosen, draw.random.choice(others))


@cache
def _proper_nouns() -> dict[str, list[str]]:
    """The names of its class by each name; a word of two classes (May, March) belongs to neither given names."""
    tables = edit_data()["tables"]
    groups = [names for origin in tables["names"].values() for names in origin.values()]
    groups += tables["classes"].values()
    return {name: group for group in groups for name in group}


def swap_sign(reply: str, draw: Draw) -> Edit | None:
    """A minus sign before a number taken away, or one put before the result of an equation."""
    found = [(match, "") for match in _SIGNED.finditer(reply)]
    found += [(match, "-") for match in re.finditer(r"(?<==)(?<![=!<>]=) ?(?=\d)", reply)]
    if not found:
        return None
    match, sign = draw.random.choice(found)
    return _replaced(reply, match, match.group() + sign if sign else sign)


def swap_operator(reply: str, draw: Draw) -> Edit | None:
    """An operator of arithmetic or comparison changed to its counterpart: + and -, * and /, == and !=, < and >."""
    found = [match for pattern in _operators() for match in pattern.finditer(reply)]
    if not found:
        return None
    chosen = draw.random.choice(found)
    pairs = edit_data()["tables"]["operators"]
    return _replaced(reply, chosen, {a: b for pair in pairs for a, b in (pair, pair[::-1])}[chosen.group()])


@cache
def _operators() -> tuple[re.Pattern[str], ...]:
    """Operators between operands: with a space on each side, or, where no dash, date or markup looks so, without."""
    every = sorted((op for pair in edit_data()["tables"]["operators"] for op in pair), key=len, reverse=True)
    spaced = "|".join(map(re.escape, every))
    return (
        re.compile(rf"(?<={_OPERAND} )(?:{spaced})(?= [\w.($-])"),
        re.compile(r"(?<=[\w)\]])(?:==|!=|<=|>=)(?=[\w(\[-])"),
        re.compile(r"(?<=\d)[+*×÷](?=\d)"),
    )


def swap_opposite(reply: str, draw: Draw) -> Edit | None:
    """A word changed to its opposite: more and less, before and after, always and never."""
    return _swap_one(reply, draw, "opposites")


def swap_gender(reply: str, draw: Draw) -> Edit | None:
    """Names, pronouns and nouns of one gender changed to those of the other, all of them."""
    names = edit_data()["tables"]["names"]
    swaps = dict(_both_ways("gendered"))
    for origin in names.values():
        swaps |= {a: b for pair in zip(origin["female"], origin["male"], strict=False) for a, b in (pair, pair[::-1])}
    return _swap_all(reply, swaps)


def swap_origin(reply: str, draw: Draw) -> Edit | None:
    """Given names changed to names of the same gender and another origin, all of them."""
    names = edit_data()["tables"]["names"]
    swaps: dict[str, str] = {}
    for gender in ("female", "male"):
        for origin, table in names.items():
            other = draw.random.choice([name for name in names if name != origin])
            targets = names[other][gender]
            shift = draw.random.randrange(len(targets))
            swaps |= {name: targets[(i + shift) % len(targets)] for i, name in enumerate(table[gender])}
    return _swap_all(reply, swaps)


def swap_spelling(reply: str, draw: Draw) -> Edit | None:
    """American spellings changed to British ones, or the other way, all of them."""
    return _swap_all(reply, dict(_both_ways("spellings")))


def _both_ways(table: str) -> Iterator[tuple[str, str]]:
    for a, b in reversed(edit_data()["tables"][table]):  # the first pair of a word decides
        yield from ((a, b), (b, a))


def _swap_one(reply: str, draw: Draw, table: str) -> Edit | None:
    swaps = dict(_both_ways(table))
    found = [match for match in re.finditer(r"\b[\w-]+\b", reply) if match.group().lower() in swaps]
    if not found:
        return None
    chosen = draw.random.choice(found)
    return _replaced(reply, chosen, _like(swaps[chosen.group().lower()], chosen.group()))


def _swap_all(reply: str, swaps: dict[str, str]) -> Edit | None:
    """Every word that is a key replaced; lower-case keys match words of any case."""

    def swapped(found: re.Match[str]) -> str:
        word = found.group()
        return swaps.get(word) or (_like(swaps[word.lower()], word) if word.lower() in swaps else word)

    text = re.sub(r"\b\w+\b", swapped, reply)
    return None if text == reply else Edit(text)


def _like(word: str, model: str) -> str:
    """A word in the case of another one."""
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


def _replaced(reply: str, found: re.Match[str], new: str) -> Edit:
    return Edit(reply[: found.start()] + new + reply[found.end() :], (found.start(), found.start() + len(new)))


def echo_prompt(reply: str, draw: Draw) -> Edit | None:
    """The prompt instead of the reply."""
    same = not draw.prompt.strip() or draw.prompt.strip() == reply.strip()
    return None if same else Edit(draw.prompt, (0, len(draw.prompt)))


# By name. What is put `instead` of a reply keeps nothing of it.
EDITS: dict[str, EditFunction] = {
    "first third": partial(truncate, share=1 / 3),
    "first half": partial(truncate, share=1 / 2),
    "first three quarters": partial(truncate, share=3 / 4),
    "words shuffled": shuffle_words,
    "phrase looped": loop_phrase,
    "prompt echoed": echo_prompt,
    "insult before": partial(insert_text, kinds=("insult",)),
    "insult inside": partial(insert_text, kinds=("insult",), place="inside"),
    "insult after": partial(insert_text, kinds=("insult",), place="after"),
    "insult instead": partial(replace_text, kinds=("insult",)),
    "dismissal before": partial(insert_text, kinds=("dismissal",)),
    "dismissal after": partial(insert_text, kinds=("dismissal",), place="after"),
    "dismissal instead": partial(replace_text, kinds=("dismissal",)),
    "don't know instead": partial(replace_text, kinds=("dont_know",)),
    "excuse instead": partial(replace_text, kinds=("excuse",)),
    "refusal instead": partial(replace_text, kinds=("refusal",)),
    "opening before": partial(insert_text, kinds=("opening",)),
    "number changed": swap_number,
    "name changed": swap_name,
    "sign changed": swap_sign,
    "operator changed": swap_operator,
    "word turned to its opposite": swap_opposite,
    "padding": pad,
    "Markdown": add_markdown,
    "confident tone": sound_confident,
    "flattery": partial(insert_text, kinds=("flattery",)),
    "names of another gender": swap_gender,
    "names of another origin": swap_origin,
    "spelling of another dialect": swap_spelling,
}
