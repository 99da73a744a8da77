"""Edits of replies: what they change, where, and that held-out templates stay apart."""

from __future__ import annotations

import re
from random import Random

import pytest

from armorm.data.edit_texts import HELD_OUT_SHARE, Draw, edit_data, templates, topic_of
from armorm.data.edits import EDITS, Edit

REPLY = (
    "I think Mary bought 12 apples in Paris in May. She paid $3.50 - less than before. So 12 + 4 = 16, and the color "
    "is always red."
)
PROMPT = "How many apples did Mary buy in Paris?"


def edited(name: str, reply: str = REPLY, seed: int = 0, held_out: bool = False) -> Edit:
    edit = EDITS[name](reply, Draw(Random(seed), PROMPT, held_out))
    assert edit is not None
    return edit


def pattern(template: str) -> re.Pattern[str]:
    """What a template looks like when it is filled."""
    while "{" in template:
        template = re.sub(r"\{[^{}]*\}", "\0", template)
    return re.compile(".+".join(map(re.escape, template.split("\0"))))


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_is_seeded_and_changes_the_reply(name):
    first = edited(name, seed=5)
    assert first == edited(name, seed=5)
    assert first.text != REPLY
    assert first.text.strip()


@pytest.mark.parametrize("name", EDITS)
def test_what_is_outside_the_span_is_unchanged(name):
    for seed in range(20):
        edit = edited(name, seed=seed)
        if edit.span is None or name in ("phrase looped", "confident tone"):
            continue  # a looped phrase may end the reply, hedges are taken out elsewhere
        begin, end = edit.span
        outside = edit.text[:begin].split() + edit.text[end:].split()
        words = REPLY.split()
        # (a changed number or name may be part of a word)
        assert all(any(part in word for word in words) for part in outside)
        assert 0 <= begin < end <= len(edit.text) or name == "sign changed"


@pytest.mark.parametrize(
    ("name", "share"), [("first third", 1 / 3), ("first half", 1 / 2), ("first three quarters", 3 / 4)]
)
def test_a_cut_reply_keeps_the_share_of_its_words(name, share):
    reply = " ".join(f"w{i}" for i in range(24)) + "."
    assert edited(name, reply).text.split() == [f"w{i}" for i in range(round(24 * share))]
    assert EDITS[name]("word", Draw(Random(0))) is None


def test_shuffled_words_are_the_same_words_with_the_same_gaps():
    reply = "one two\nthree  four five six"
    edit = edited("words shuffled", reply)
    assert sorted(edit.text.split()) == sorted(reply.split())
    assert re.sub(r"\S+", "", edit.text) == re.sub(r"\S+", "", reply)
    assert EDITS["words shuffled"]("too few words", Draw(Random(0))) is None


def test_a_looped_phrase_is_repeated_at_least_three_times():
    for seed in range(20):
        edit = edited("phrase looped", seed=seed)
        begin, end = edit.span
        unit = re.fullmatch(r"( .+?)\1{2,7}", edit.text[begin:end])
        assert unit is not None
        assert edit.text[:begin].endswith(unit[1].strip())


def test_an_inserted_line_is_where_it_should_be():
    assert edited("insult before").span[0] == 0
    assert edited("insult before").text.endswith(REPLY)
    assert edited("insult after").text.startswith(REPLY)
    assert edited("insult after").span[1] == len(edited("insult after").text)
    inside = edited("insult inside")
    assert 0 < inside.span[0] < inside.span[1] < len(inside.text)


@pytest.mark.parametrize(
    ("name", "reply", "others"),
    [
        ("number changed", "It costs 7 euros.", r"It costs (?!7)\d+ euros\."),
        ("number changed", "1. First item, of seven.", r"1\. First item, of (?!seven)\w+\."),
        ("number changed", "Three of us.", r"(?!Three)[A-Z]\w+ of us\."),
        ("name changed", "We met in Paris.", r"We met in (?!Paris)[A-Z]\w+\."),
        ("name changed", "On Monday.", r"On (?!Monday)\w+day\."),
        ("sign changed", "x = -5", "x = 5"),
        ("sign changed", "x=5", "x=-5"),
        ("operator changed", "3 + 4 = 7", "3 - 4 = 7"),
        ("operator changed", "if n==0:", "if n!=0:"),
        ("operator changed", "return a < b", "return a > b"),
        ("word turned to its opposite", "More is better.", "Less is better."),
        ("names of another gender", "He told Emily.", "She told James."),
        ("spelling of another dialect", "My favorite colour", "My favourite color"),
    ],
)
def test_one_fact_is_changed(name, reply, others):
    for seed in range(10):
        edit = edited(name, reply, seed)
        assert re.fullmatch(others, edit.text), edit.text


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("number changed", "No digits here."),
        ("number changed", "1. A list\n2. of items"),
        ("name changed", "nobody in particular"),
        ("sign changed", "a well-known fact, 3 - 4"),
        ("operator changed", "a well-known and/or made-up fact of 2020-10-11, **bold**"),
        ("names of another gender", "It is."),
        ("spelling of another dialect", "Nothing to change."),
        ("Markdown", "Has **some** already."),
    ],
)
def test_an_edit_that_does_not_apply_returns_none(name, reply):
    assert all(EDITS[name](reply, Draw(Random(seed))) is None for seed in range(10))


def test_a_text_instead_of_a_reply_is_short_or_about_as_long():
    reply = "A rather long reply. " * 40
    lengths = [len(edited("don't know instead", reply, seed).text) for seed in range(40)]
    assert sum(length < 200 for length in lengths) > 5
    assert sum(length > 0.7 * len(reply) for length in lengths) > 5
    assert max(lengths) < len(reply)


@pytest.mark.parametrize("kind", edit_data()["texts"])
def test_about_a_quarter_of_the_templates_of_a_kind_is_held_out(kind):
    held_out, training = templates(kind, True), templates(kind, False)
    assert {t.id for t in held_out}.isdisjoint(t.id for t in training)
    share = len(held_out) / (len(held_out) + len(training))
    assert share == pytest.approx(HELD_OUT_SHARE, abs=0.06)
    assert len(held_out) + len(training) >= 40


@pytest.mark.parametrize("kind", edit_data()["texts"])
def test_no_text_for_training_reads_like_a_held_out_one(kind):
    """Filled with another subject, or another alternative, it would be the same text."""
    for template in templates(kind, False):
        text = template.fill(Random(0), "apples")
        assert "{" not in text
        alike = [t.id for t in templates(kind, True) if pattern(t.text).fullmatch(text)]
        assert not alike, (template.id, alike)


def test_a_draw_keeps_to_its_part_of_the_templates():
    for held_out in (False, True):
        draw = Draw(Random(0), PROMPT, held_out)
        for _ in range(200):
            draw.text("insult", "excuse")
        allowed = {t.id for kind in ("insult", "excuse") for t in templates(kind, held_out)}
        assert set(draw.used) <= allowed
        assert len(set(draw.used)) > 20


def test_the_subject_of_a_prompt_is_its_longest_telling_word():
    assert topic_of("What would you tell somebody about photosynthesis?") == "photosynthesis"
    assert topic_of("Hi!") == "this"
