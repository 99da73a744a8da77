"""Words and sentences of a text, as start and end of each."""

from __future__ import annotations

import re

# Scripts without spaces between words: each character counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
# An end mark with closing quotes and brackets, then white space (none after the wide marks); or the end of a line.
# (A run of marks is tried from its first one only: `.....x` would otherwise take time by the square of its length.)
_SENTENCE_END = re.compile(r"(?<![.!?…؟।])[.!?…؟।]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+[」』”）]*|\n+")
# Full stops that end no sentence: of a number that starts a line; of abbreviations and initials, at the end of a text.
_LIST_NUMBER = re.compile(r"[^\S\n]*\d{1,3}\.")
_ABBREVIATION = re.compile(r"(?:^|[\s(.])(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|approx|[A-Z])\.$")
_LONGEST = len("(approx.\n")  # that `_ABBREVIATION` can match, with the character before it and an end of line


def words(text: str) -> list[tuple[int, int]]:
    """Runs of characters without white space; single characters in scripts that are written without spaces."""
    return [found.span() for found in _WORD.finditer(text)]


def sentences(text: str) -> list[tuple[int, int]]:
    """Sentences and lines, without the white space around them."""
    ends, line, number = [], 0, _LIST_NUMBER.match(text)
    for mark in _SENTENCE_END.finditer(text):
        start, end = mark.span()
        stop = end - (text[end - 1] == "\n")  # one end of line may follow the full stop
        is_number = number is not None and number.end() in (stop, end)
        # Only the last characters of the line: its whole length for every mark would be quadratic.
        if not is_number and not _ABBREVIATION.search(text[max(line, end - _LONGEST) : end]):
            ends.append(end)
        if text[start] == "\n":
            line, number = end, _LIST_NUMBER.match(text, end)
    found = []
    for low, high in zip([0, *ends], [*ends, len(text)], strict=True):
        kept = text[low:high].strip()
        if kept:
            start = low + text[low:high].index(kept)
            found.append((start, start + len(kept)))
    return found
