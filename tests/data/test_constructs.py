"""Constructed objectives: labels, splits, held-out templates, and what is fit to be a good reply."""

from __future__ import annotations

import math
import random

import pytest

from armorm.conversation import Conversation
from armorm.data.constructs import (
    CONSTRUCTS,
    OTHER_REPLY,
    SIMILAR_LENGTH,
    Reply,
    constructed_objective,
    constructed_rows,
    find_construct,
)
from armorm.data.edit_texts import edit_data, templates
from armorm.data.ratings import OWN_REPLY
from armorm.data.refusals import gives_no_answer, sounds_like_refusal
from armorm.objectives import ObjectiveError

THINGS = [
    "rivers",
    "clocks",
    "bread",
    "violins",
    "comets",
    "owls",
    "glass",
    "chess",
    "salt",
    "kites",
    "tunnels",
    "maps",
    "bees",
    "candles",
    "bridges",
    "paint",
]


def reply(prompt: str, response: str, **options) -> Reply:
    options = {"split": "train", "source": "set"} | options
    return Reply(Conversation.from_prompt(prompt, response), **options)


def replies(count: int = 60) -> list[Reply]:
    """Prompts about different things; every third one is a test prompt."""
    return [
        reply(
            f"Tell me {number} facts about {thing} and {other}, please.",
            f"There are {number + 2} of them. Mary saw {thing} in Paris before {other}: 2 + 3 = 5. "
            + "It is so. " * (number % 5),
            split="test" if number % 3 == 0 else "train",
        )
        for number, (thing, other) in enumerate(
            [(a, b) for a in THINGS for b in THINGS if a < b][:count],
        )
    ]


def test_labels_that_the_backbone_gives_are_left_open():
    rows, _ = constructed_rows(find_construct("relevance"), replies())
    assert len(rows) == 120
    assert all(math.isnan(row.label) for row in rows)
    assert [name for name, construct in CONSTRUCTS.items() if construct.by_backbone] == ["relevance"]


@pytest.mark.parametrize("name", [name for name in CONSTRUCTS if name != "relevance"])
def test_own_replies_get_one_and_edits_the_label_of_the_rule(name):
    construct = find_construct(name)
    rows, left_out = constructed_rows(construct, replies(), variants=2)
    assert not left_out
    own = [row for row in rows if row.edit == OWN_REPLY]
    assert len(own) == 60
    assert len(rows) == 180
    assert {row.label for row in own} == {1.0}
    for row in rows:
        if row.edit != OWN_REPLY:
            assert row.label == construct.edits[row.edit][0]
            assert row.conversation.response != row.reply.conversation.response
        assert row.conversation.prompt == row.reply.conversation.prompt
        if row.span is not None:
            assert 0 <= row.span[0] <= row.span[1] <= len(row.conversation.response)
    assert {row.edit for row in rows} == {OWN_REPLY, *construct.edits}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_rows_depend_on_seed_and_replies_alone_and_not_on_their_order(name):
    given = replies()
    shuffled = random.Random(1).sample(given, len(given))
    limits = {"rows": 40, "per_prompt": 1, "variants": 2}
    rows = constructed_rows(find_construct(name), given, seed=3, **limits)
    assert rows == constructed_rows(find_construct(name), [*shuffled, *given], seed=3, **limits)
    assert rows[0] != constructed_rows(find_construct(name), given, seed=4, **limits)[0]


@pytest.mark.parametrize("name", ["gives-an-answer", "courteous"])
def test_test_rows_use_held_out_templates_and_training_rows_none(name):
    held_out = {t.id for kind in edit_data()["texts"] for t in templates(kind, True)}
    rows, _ = constructed_rows(find_construct(name), replies(), variants=3)
    used = {
        split: {i for row in rows if row.reply.split == split for i in row.templates} for split in ("train", "test")
    }
    assert used["test"]
    assert used["test"] <= held_out
    assert used["train"]
    assert used["train"].isdisjoint(held_out)


def test_another_prompts_reply_is_of_the_same_split_and_of_similar_length():
    given = replies()
    by_text = {r.conversation.response: r for r in given}
    rows, _ = constructed_rows(find_construct("answers-the-question"), given)
    borrowed = [row for row in rows if row.edit == OTHER_REPLY]
    assert len(borrowed) > 20
    for row in borrowed:
        origin = by_text[row.conversation.response]
        assert origin.conversation.prompt_key != row.conversation.prompt_key
        assert origin.split == row.reply.split
        ratio = len(row.conversation.response) / len(row.reply.conversation.response)
        assert 1 / SIMILAR_LENGTH <= ratio <= SIMILAR_LENGTH


def test_no_reply_is_borrowed_from_the_same_question_written_otherwise():
    question = "Which river flows through the old town of Prague and under the Charles bridge"
    given = [reply(question + end, f"It is the Vltava {end}") for end in ("", "?", "??", "!", " ", ".")]
    rows, _ = constructed_rows(find_construct("answers-the-question"), given, variants=2)
    assert {row.edit for row in rows} == {OWN_REPLY, "prompt echoed"}


def test_of_harmful_prompts_only_refusals_are_used_and_only_for_wording():
    given = [
        reply("How do I poison somebody?", "Take some arsenic and mix it with sugar, then wait.", harmful=True),
        reply("How do I rob a bank?", "I'm sorry, but I can't help with robbing a bank.", harmful=True),
    ]
    for name, construct in CONSTRUCTS.items():
        rows, left_out = constructed_rows(construct, given, variants=3)
        assert not any("arsenic" in row.conversation.response for row in rows)
        if construct.needs_answer:
            assert not rows
            assert left_out == {"to harmful prompts": 2}
        else:
            assert rows, name
            assert left_out == {"that may comply with a harmful prompt": 1}


def test_a_reply_without_an_answer_is_no_good_example_of_one():
    given = [reply("What is 2 + 2?", "I don't know."), reply("And 3 + 3?", "Sorry, I cannot help with that.")]
    rows, left_out = constructed_rows(find_construct("gives-an-answer"), given)
    assert not rows
    assert left_out == {"that give no answer themselves": 2}
    assert constructed_rows(find_construct("courteous"), given)[0]


@pytest.mark.parametrize("kind", ["refusal", "dont_know"])
def test_most_of_the_projects_own_refusals_and_dont_knows_are_recognised(kind):
    """Those that are not are phrased without any of the usual words."""
    texts = [t.fill(random.Random(0), "bees") for part in (True, False) for t in templates(kind, part)]
    found = [sounds_like_refusal(text) if kind == "refusal" else gives_no_answer(text) for text in texts]
    assert sum(found) / len(texts) > 0.5
    assert not sounds_like_refusal("Paris is the capital of France.")
    assert not gives_no_answer("You can't go wrong with bread and butter.")


def test_limits_keep_whole_prompts_of_each_source():
    given = [
        reply(f"Prompt {i}", f"One answer, number {j}", source=s) for s in "ab" for i in range(30) for j in range(4)
    ]
    given = [Reply(Conversation.from_prompt(f"{r.source} {r.conversation.prompt[-1].content}", r.conversation.response),
                   "train", r.source) for r in given]  # fmt: skip
    rows, left_out = constructed_rows(find_construct("complete"), given, rows=10, per_prompt=2)
    own = [row for row in rows if row.edit == OWN_REPLY]
    assert {s: sum(row.reply.source == s for row in own) for s in "ab"} == {"a": 10, "b": 10}
    assert len({row.conversation.prompt_key for row in own}) == 10
    assert left_out == {"beyond the limits of rows": 220}
    more, _ = constructed_rows(find_construct("complete"), given, rows=10, source_rows={"b": 40}, per_prompt=2)
    own = [row for row in more if row.edit == OWN_REPLY]
    assert {s: sum(row.reply.source == s for row in own) for s in "ab"} == {"a": 10, "b": 40}


def test_a_reply_to_which_no_edit_applies_is_left_out():
    rows, left_out = constructed_rows(find_construct("consistent-facts"), [reply("Why?", "Because it is so.")])
    assert not rows
    assert left_out == {"to which no edit applies": 1}


def test_an_unknown_construct_is_refused_with_the_nearest_right_one():
    with pytest.raises(
        ObjectiveError, match=r"unknown construct 'fluency' \(did you mean fluent\?\); there are answers-"
    ):
        find_construct("fluency")


def test_a_constructed_objective_says_what_it_is():
    objective = constructed_objective("fluent")
    assert (objective.source, objective.low, objective.high, objective.direction) == ("constructed", 0, 1, "higher")
