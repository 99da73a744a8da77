"""Words and sentences of a text, as start and end of each."""

from __future__ import annotations

import re

# Scripts without spaces between words: each character counts as a word.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
# An end mark with closing quotes and brackets, then white space (none after the wide marks); or the end of a line.
_SENTENCE_END = re.compile(r"[.!?…؟।]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+[」』”）]*|\n+")
# Full stops that end no sentence, in the line up to them: numbers of a list, abbreviations, initials.
_NO_END = re.compile(r"^\s*\d{1,3}\.$|(?:^|[\s(.])(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|approx|[A-Z])\.$")


def words(text: str) -> list[tuple[int, int]]:
    """Runs of characters without white space; single characters in scripts that are written without spaces."""
    return [found.span() for found in _WORD.finditer(text)]


def sentences(text: str) -> list[tuple[int, int]]:
    """Sentences and lines, without the white space around them."""
    ends = [
        found.end()
        for found in _SENTENCE_END.finditer(text)
        if not _NO_END.search(text[text.rfind("\n", 0, found.start()) + 1 : found.end()])
    ]
    found = []
    for low, high in zip([0, *ends], [*ends, len(text)], strict=True):
        kept = text[low:high].strip()
        if kept:
            start = low + text[low:high].index(kept)
            found.append((start, start + len(kept)))
    return found
