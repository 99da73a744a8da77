"""Preference pairs: every layout gives the same pair, every fault is refused by its place."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armorm.conversation import Conversation
from armorm.data.preferences import PreferencePair, cap_pairs, pairs_from_ratings, preference_pair, read_preferences
from armorm.data.ratings import RatingTable, split_role
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.objectives import Objective, ObjectiveError, ObjectiveSet
from tests.data.conftest import BENCHMARKS, PREFERENCES
from tests.helpers.conversations import chat
from tests.helpers.data_files import write_rows
from tests.helpers.memory import peak_bytes

TURNS = chat("a", "b", "c")
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
TRANSCRIPT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "


def pair(**values) -> PreferencePair:
    return preference_pair(Row("file", 7, values))


def refusal(**values) -> DataError:
    with pytest.raises(DataError) as caught:
        pair(**values)
    assert (caught.value.file, caught.value.row) == ("file", 7)
    return caught.value


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        # Explicit: a prompt, two replies; as text, as messages, or one of each.
        ({"prompt": "c", "chosen": "good", "rejected": "bad"}, TURNS[2:]),
        ({"prompt": "c", "chosen": [GOOD], "rejected": [BAD]}, TURNS[2:]),
        ({"prompt": "c", "chosen": GOOD, "rejected": BAD}, TURNS[2:]),
        ({"prompt": TURNS, "chosen": "good", "rejected": "bad"}, TURNS),
        ({"prompt": TURNS, "chosen": [GOOD], "rejected": "bad"}, TURNS),
        # Implicit: two whole conversations, as RLHFlow's.
        ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, TURNS),
        ({"prompt": None, "chosen": [*TURNS[2:], GOOD], "rejected": [*TURNS[2:], BAD]}, TURNS[2:]),
        # The prompt beside whole conversations: as text as UltraFeedback's, or as messages.
        ({"prompt": "c", "chosen": [*TURNS[2:], GOOD], "rejected": [*TURNS[2:], BAD]}, TURNS[2:]),
        ({"prompt": TURNS, "chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, TURNS),
        ({"prompt": TURNS, "chosen": [*TURNS, GOOD], "rejected": [BAD]}, TURNS),
        # Implicit text: transcripts, as Anthropic's.
        ({"chosen": TRANSCRIPT + "good", "rejected": TRANSCRIPT + "bad"}, TURNS),
        ({"chosen": TRANSCRIPT.lstrip() + " good\n", "rejected": TRANSCRIPT + "bad"}, TURNS),
    ],
)
def test_every_layout_gives_the_same_pair(values, prompt):
    found = pair(**values)
    assert found.chosen == Conversation.from_messages([*prompt, GOOD])
    assert found.rejected == Conversation.from_messages([*prompt, BAD])
    assert found.prompt_key == found.chosen.prompt_key == found.rejected.prompt_key
    assert (found.margin, found.split, found.subset, found.id, found.origin) == (None, "", "", "", ("file", 7))


def test_a_transcript_keeps_paragraphs_and_words_that_look_like_speakers():
    text = "\n\nHuman: Say:\n\nHuman rights. Assistant: yes?\n\nAssistant: One.\n\nTwo."
    found = pair(chosen=text, rejected=text + " No.")
    assert found.chosen.to_list() == chat("Say:\n\nHuman rights. Assistant: yes?", "One.\n\nTwo.")
    assert found.rejected.response == "One.\n\nTwo. No."


def test_margin_subset_id_and_split_of_a_row_are_kept():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2, "subset": "hard", "id": 0, "split": "dev"}
    found = preference_pair(Row("file", 7, row), "mine", "dev")
    assert (found.margin, found.subset, found.id, found.split, found.source) == (2.0, "hard", "0", "train", "mine")
    assert preference_pair(Row("file", 7, row)).split == "other"


def test_reading_a_file_keeps_order_origin_and_source(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad", "margin": None} for i in range(3)]
    location = write_rows(tmp_path / "a.jsonl", *rows)
    pairs = read_preferences(location)
    assert [p.chosen.prompt[0].content for p in pairs] == ["p0", "p1", "p2"]
    assert [p.origin for p in pairs] == [(str(location.path), number) for number in (1, 2, 3)]
    assert {p.source for p in pairs} == {str(location.path)}
    assert {p.source for p in read_preferences(location, "mine")} == {"mine"}


def test_parquet_and_saved_folders_give_the_pairs_of_the_lines(tmp_path):
    import datasets

    rows = [{"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD], "margin": margin} for margin in (0.5, None)]
    expected = read_preferences(write_rows(tmp_path / "a.jsonl", *rows), "s")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    for name in ("a.parquet", "folder"):
        pairs = read_preferences(Location.find(tmp_path / name), "s")
        assert [(p.chosen, p.rejected, p.margin) for p in pairs] == [(p.chosen, p.rejected, p.margin) for p in expected]


def test_a_limit_keeps_whole_prompts(tmp_path):
    rows = [{"prompt": f"p{i % 5}", "chosen": f"good{i}", "rejected": "bad"} for i in range(20)]
    pairs = read_preferences(write_rows(tmp_path / "a.jsonl", *rows), limit=8)
    assert sorted(Counter(p.prompt_key for p in pairs).values()) == [4, 4]


@pytest.mark.parametrize(
    ("values", "field", "found"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected", "found columns ['prompt', 'chosen'], expected 'chosen' and"),
        ({"prompt": "a", "rejected": "b"}, "chosen", "expected 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen", "found an empty cell, expected text"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen", "found an empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "rejected", "found an empty response"),
        ({"prompt": "a", "chosen": "b", "rejected": [dict(BAD, content="")]}, "rejected.content", "an empty response"),
        ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, dict(BAD, content="")]}, "rejected[3].content", "empty"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "bad"}, "chosen[3].content", "found an empty response"),
        ({"prompt": "a", "chosen": 5, "rejected": "b"}, "chosen", "found 5, expected text or a list of one message"),
        ({"chosen": 5, "rejected": "b"}, "chosen", "found 5, expected a list of messages"),
        ({"prompt": "a", "chosen": [], "rejected": "b"}, "chosen", "found 0 messages, expected one"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "prompt", "found 5, expected text or a list of messages"),
        ({"prompt": [{"role": "me", "content": "a"}], "chosen": "b", "rejected": "c"}, "prompt[0].role", "role 'me'"),
        ({"prompt": "a", "chosen": "b", "rejected": TURNS[:1]}, "rejected.role", "found role 'user', expected"),
        ({"chosen": TURNS, "rejected": [*TURNS, BAD]}, "chosen[2].role", "found role 'user', expected 'assistant'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "chosen", "found a reply without a prompt"),
        ({"chosen": "good", "rejected": "bad"}, "chosen", "found a text without a prompt"),
        (
            {"chosen": TRANSCRIPT + "good", "rejected": "bad"},
            "rejected",
            "or a transcript of 'Human:' and 'Assistant:'",
        ),
        ({"chosen": "Once.\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "chosen", "found a text without a prompt"),
        ({"chosen": TRANSCRIPT + "good\n\nHuman: more", "rejected": "c"}, "chosen[4].role", "found role 'user'"),
        ({"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, "chosen", "found a lone surrogate at character 1"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "two"},
            "margin",
            "found 'two', expected a finite number",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin", "found True"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, "margin", "found nan"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.inf}, "margin", "found inf"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "margin", "expected a finite number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "split": 3}, "split", "found 3, expected the name of a split"),
    ],
)
def test_a_pair_out_of_order_is_refused_with_file_row_and_field(values, field, found):
    error = refusal(**values)
    assert error.field == field
    assert found in error.problem


@pytest.mark.parametrize(
    "values",
    [
        {"chosen": [*TURNS, GOOD], "rejected": [*TURNS[2:], BAD]},
        {"chosen": chat("a", "good"), "rejected": chat("a ", "bad")},
        {"chosen": [{"role": "system", "content": "s"}, *chat("a", "good")], "rejected": chat("a", "bad")},
        {"chosen": TRANSCRIPT + "good", "rejected": TRANSCRIPT.replace("c", "d") + "bad"},
    ],
)
def test_sides_that_answer_different_prompts_are_refused(values):
    error = refusal(**values)
    assert error.field == "rejected"
    assert "chosen and rejected answer different prompts, expected the same turns" in error.problem


def test_whole_conversations_that_do_not_begin_with_their_prompt_are_refused():
    error = refusal(prompt="other", chosen=[*TURNS[2:], GOOD], rejected=[*TURNS[2:], BAD])
    assert error.field == "chosen"
    assert "found 2 messages that do not begin with the prompt, expected the reply alone" in error.problem
    assert refusal(prompt=TURNS, chosen=[*TURNS, GOOD], rejected=[*TURNS[2:], BAD]).field == "rejected"


def test_the_first_fault_of_a_file_is_refused_with_its_line(tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}]
    with pytest.raises(DataError, match=r"a\.jsonl, row 2, field 'rejected': found columns"):
        read_preferences(write_rows(tmp_path / "a.jsonl", *rows))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, row 1, field 'chosen': the column occurs twice"):
        read_preferences(Location.find(tmp_path / "a.jsonl"))


def test_twice_the_same_response_is_a_tie():
    assert pair(prompt="a", chosen="b", rejected="b").is_tie
    assert not pair(prompt="a", chosen="b", rejected="c").is_tie


def table(*rows: tuple[str, str, float], direction="higher") -> RatingTable:
    """Prompt, response and rating of each row."""
    return RatingTable(
        [Conversation.from_messages(chat(prompt, response)) for prompt, response, _ in rows],
        np.array([[0.0, rating] for *_, rating in rows]),
        ObjectiveSet([Objective.rated("s-other", 0, 1), Objective.rated("s-q", 0, 10, direction=direction)]),
        ["s"] * len(rows),
        ["test" if prompt == "held" else "train" for prompt, *_ in rows],
        [("file", number) for number in range(1, len(rows) + 1)],
    )


def responses(pairs: list[PreferencePair]) -> set[tuple[str, str]]:
    return {(p.chosen.response, p.rejected.response) for p in pairs}


def test_pairs_from_ratings_stay_within_a_prompt_and_respect_the_margin():
    rows = [("p", "a", 5), ("p", "b", 3), ("p", "c", 4.5), ("held", "d", 9), ("held", "e", math.nan), ("held", "f", 1)]
    pairs = pairs_from_ratings(table(*rows), "s-q", 1.0)
    assert responses(pairs) == {("a", "b"), ("c", "b"), ("d", "f")}
    by_response = {p.chosen.response: p for p in pairs}
    assert [by_response[r].margin for r in "acd"] == [2, 1.5, 8]
    assert [by_response[r].split for r in "acd"] == ["train", "train", "test"]
    assert [by_response[r].origin for r in "acd"] == [("file", 1), ("file", 3), ("file", 4)]
    assert {p.source for p in pairs} == {"s-q"}


def test_pairs_from_ratings_of_direction_lower_prefer_the_lower_rating():
    rows = [("p", "a", 5), ("p", "b", 3)]
    assert responses(pairs_from_ratings(table(*rows, direction="lower"), "s-q", 1)) == {("b", "a")}
    assert responses(pairs_from_ratings(table(*rows, direction="neutral"), "s-q", 1)) == {("a", "b")}
    assert pairs_from_ratings(table(*rows, direction="lower"), "s-q", 1)[0].margin == 2


def test_pairs_from_ratings_take_a_difference_of_exactly_the_margin():
    # 2.3 - 1.8 and 0.3 - 0.1 are a little less than a half and a fifth in floating point.
    assert responses(pairs_from_ratings(table(("p", "a", 2.3), ("p", "b", 1.8)), "s-q", 0.5)) == {("a", "b")}
    assert responses(pairs_from_ratings(table(("p", "a", 0.3), ("p", "b", 0.1)), "s-q", 0.2)) == {("a", "b")}
    assert pairs_from_ratings(table(("p", "a", 2.3), ("p", "b", 1.8)), "s-q", 0.501) == []


def test_pairs_from_ratings_never_pair_a_response_with_itself():
    assert pairs_from_ratings(table(("p", "a", 5), ("p", "a", 1)), "s-q", 1) == []


def test_pairs_from_ratings_of_an_unknown_objective_are_refused():
    with pytest.raises(ObjectiveError, match=r"unknown objective 's-Q' .did you mean s-q"):
        pairs_from_ratings(table(("p", "a", 5)), "s-Q", 1)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.sampled_from("abcd"), st.one_of(st.integers(0, 10), st.just(math.nan))),
        min_size=1,
        max_size=10,
    ),
    st.integers(1, 5),
    st.sampled_from(["higher", "lower"]),
)
def test_pairs_from_ratings_are_those_of_a_double_loop(rows, margin, direction):
    expected = Counter(
        (prompt, better, worse, abs(high - low))
        for prompt, better, high in rows
        for other, worse, low in rows
        if prompt == other and better != worse and (high - low if direction == "higher" else low - high) >= margin
    )
    pairs = pairs_from_ratings(table(*rows, direction=direction), "s-q", margin)
    assert expected == Counter(
        (p.chosen.prompt[0].content, p.chosen.response, p.rejected.response, p.margin) for p in pairs
    )
    assert all(p.chosen.prompt_key == p.rejected.prompt_key for p in pairs)


PAIRS = [pair(prompt=f"p{number % 4}", chosen=f"c{number}", rejected="r") for number in range(40)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 39), unique=True), st.integers(1, 12), st.integers(0, 5))
def test_a_cap_keeps_all_of_small_prompts_and_as_many_as_it_allows_of_others(chosen, most, seed):
    pairs = [PAIRS[i] for i in chosen]
    kept = cap_pairs(pairs, most, seed)
    before, after = (Counter(p.prompt_key for p in some) for some in (pairs, kept))
    assert after == {key: min(count, most) for key, count in before.items()}
    places = [pairs.index(p) for p in kept]
    assert places == sorted(set(places))
    assert cap_pairs(pairs, most, seed) == kept
    assert cap_pairs(pairs, None, seed) == pairs


def test_a_cap_draws_at_random_with_its_seed():
    drawn = {tuple(p.chosen.response for p in cap_pairs(PAIRS, 2, seed)) for seed in range(20)}
    assert len(drawn) > 10


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("pqr"),
            st.sampled_from("abcdefgh"),
            st.integers(0, 5),
            st.sampled_from(["train", "test", "other", ""]),
        ),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 12),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_a_cap_before_pairs_are_made_keeps_those_of_a_cap_afterwards(rows, most, seed, test_share):
    rated = table(*(row[:3] for row in rows))
    rated.splits = [split for *_, split in rows]
    by_role: dict[str, list[PreferencePair]] = {"train": [], "test": [], "other": []}
    for made in pairs_from_ratings(rated, "s-q", 1):
        by_role[split_role(made.split, made.prompt_key, test_share)].append(made)
    expected = {role: cap_pairs(by_role[role], most, seed) for role in ("train", "test")} | {"other": []}
    not_made: Counter[str] = Counter()
    found: dict[str, list[PreferencePair]] = {role: [] for role in expected}
    for kept in pairs_from_ratings(rated, "s-q", 1, most=most, seed=seed, test_share=test_share, not_made=not_made):
        found[split_role(kept.split, kept.prompt_key, test_share)].append(kept)
    assert found == expected
    assert {role: not_made[role] for role in expected} == {
        role: len(by_role[role]) - len(expected[role]) for role in expected
    }


@pytest.mark.parametrize("most", [1, 300, 10**6])
def test_a_cap_of_many_responses_keeps_those_of_a_cap_afterwards(most):
    rated = table(*((prompt, f"reply {n % 650}", n * 7919 % 11) for prompt in "pq" for n in range(700)))
    rated.splits = ["train" if n % 3 else "test" for n in range(1400)]
    made = pairs_from_ratings(rated, "s-q", 2)
    expected = {role: cap_pairs([p for p in made if p.split == role], most, 3) for role in ("train", "test")}
    found = pairs_from_ratings(rated, "s-q", 2, most=most, seed=3)
    assert {role: [p for p in found if p.split == role] for role in expected} == expected


def test_a_cap_keeps_memory_flat_in_the_number_of_pairs():
    rated = table(*(("p", f"reply {number}", number * 7919 % 11) for number in range(700)))
    assert len(pairs_from_ratings(rated, "s-q", 1, most=3)) == 3
    assert (
        peak_bytes(lambda: pairs_from_ratings(rated, "s-q", 1, most=3)) < 20e6
    )  # all 222,000 pairs take more than 40 MB


@pytest.mark.slow
@pytest.mark.data
def test_the_real_preference_sets_have_their_stated_rows(real_sets):
    assert {name: len(pairs) for name, pairs in real_sets.pairs.items()} == PREFERENCES | BENCHMARKS
    for name in PREFERENCES:
        assert {p.split for p in real_sets.pairs[name]} == {"train", "test"}
    assert len({p.prompt_key for p in real_sets.pairs["convarg"]}) == 32


@pytest.mark.slow
@pytest.mark.data
def test_the_benchmarks_have_the_subsets_and_counts_of_rewardbench(real_sets):
    assert Counter(p.subset for p in real_sets.pairs["llmbar"]) == {
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    }
    languages = ("cpp", "go", "java", "js", "python", "rust")
    assert Counter(p.subset for p in real_sets.pairs["humanevalpack"]) == {f"hep-{name}": 164 for name in languages}
    for name in BENCHMARKS:
        assert len({(p.subset, p.id) for p in real_sets.pairs[name]}) == BENCHMARKS[name]


@pytest.mark.slow
@pytest.mark.data
def test_in_alpacaeval_the_longer_response_wins_as_often_as_stated(real_sets):
    pairs = real_sets.pairs["alpacaeval"]
    longer = [len(p.chosen.response) > len(p.rejected.response) for p in pairs]
    assert np.mean(longer) == pytest.approx(0.84, abs=0.01)


@pytest.mark.slow
@pytest.mark.data
def test_no_prompt_of_the_real_preference_sets_is_in_two_splits_or_in_a_benchmark(real_sets):
    benchmarks = {p.prompt_key for name in BENCHMARKS for p in real_sets.pairs[name]}
    train, test = (
        {p.prompt_key for name in PREFERENCES for p in real_sets.pairs[name] if p.split == split}
        for split in ("train", "test")
    )
    assert train
    assert test
    assert not train & test
    assert not train & benchmarks


def test_rows_are_plain_json(tmp_path):
    # A row of every layout survives its own file: what people write is what is read.
    row = {"prompt": TURNS, "chosen": [*TURNS, GOOD], "rejected": [BAD], "margin": 0.25}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert read_preferences(Location.find(tmp_path / "a.json"))[0].margin == 0.25
