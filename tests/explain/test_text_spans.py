"""Spans of words and sentences, against slow obvious versions."""

from __future__ import annotations

import random
import re

import pytest

from armorm.explain.text_spans import sentences

END = re.compile(r"[.!?…؟।]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+[」』”）]*|\n+")
NO_END = re.compile(r"^\s*\d{1,3}\.$|(?:^|[\s(.])(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|approx|[A-Z])\.$")
PIECES = [
    *(
        "\n",
        "\n\n",
        " ",
        "   ",
        "\t",
        "\r",
        "\u2028",
        ".",
        "..",
        "!",
        "?!",
        "…",
        "।",
        "。",
        "！」",
        '."',
        ".)",
        ".*",
        "(",
    ),
    *("e.g.", "i.e", "approx.", "approx", "Prof.", "Mr.", "No.", "A.", "B", "x", "word", "1.", "12.", "123.", "1234."),
    *("٣.", "3", "4.5", "”"),
]


def slow_sentences(text: str) -> list[tuple[int, int]]:
    """Every mark with the whole line before it."""
    ends = []
    for mark in END.finditer(text):
        line = text[: mark.start()].rpartition("\n")[2] + mark.group()
        if not NO_END.search(line):
            ends.append(mark.end())
    spans = []
    for low, high in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[low:high]
        if part.strip():
            spans.append((low + len(part) - len(part.lstrip()), low + len(part.rstrip())))
    return spans


@pytest.mark.parametrize("seed", range(20))
def test_sentences_end_where_the_whole_line_says_so(seed):
    drawn = random.Random(seed)
    for _ in range(300):
        text = "".join(drawn.choices(PIECES, k=drawn.randrange(14)))
        assert sentences(text) == slow_sentences(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "1.\n",
        "1.\n\nA. b.",
        "  12. One. 3. Two.",
        "See approx.\nNext. approx. Last.",
        "x approx. y",
        "xapprox. y",
        "(approx.\n\nNext",
        "One..... Two.....x Three.",
        " \n 5. Five.",
        'He said "No." Then left (e.g. Dr. A. B.). End',
    ],
)
def test_sentences_of_lists_abbreviations_and_ends_of_lines(text):
    assert sentences(text) == slow_sentences(text)
