"""Ratings: sets merge to one table, missing stays missing, and every fault is refused by file, row and field."""

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
from armorm.data.cells import rating_cell
from armorm.data.ratings import (
    RatedSet,
    RatingTable,
    merge_objectives,
    objective_name,
    read_ratings,
    sample_by_prompt,
)
from armorm.data.rejections import Rejections
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.objectives import Objective, ObjectiveSet
from tests.data.conftest import BENCHMARKS, RATED
from tests.helpers.conversations import chat
from tests.helpers.data_files import write_rows

SCORE = {"score": Objective.rated("s-score", 1, 5)}


def rated(location: Location, columns=SCORE, source="s", **options) -> RatedSet:
    return RatedSet(location, columns, source, **options)


def refusal(location: Location, columns=SCORE) -> DataError:
    with pytest.raises(DataError) as caught:
        read_ratings([rated(location, columns)])
    return caught.value


def refused_row(tmp_path, **row) -> DataError:
    """The refusal of a set whose second line is that row."""
    error = refusal(write_rows(tmp_path / "a.jsonl", {"messages": chat("a", "b"), "score": 3}, row))
    assert error.file == str(tmp_path / "a.jsonl")
    assert error.row == 2
    return error


def test_sets_of_different_objectives_and_scales_merge_to_one_table(tmp_path):
    first = write_rows(
        tmp_path / "one.jsonl", {"messages": chat("a", "b"), "help": 4}, {"messages": chat("c", "d"), "help": 0}
    )
    second = write_rows(tmp_path / "two.jsonl", {"prompt": "e", "response": "f", "safe": True, "style": 2.5})
    table = read_ratings(
        [
            rated(first, {"help": Objective.rated("one-help", 0, 4)}, "one"),
            rated(
                second,
                {"safe": Objective.rated("two-safe", 0, 1), "style": Objective.rated("two-style", 1, 3)},
                "two",
            ),
        ]
    )
    nan = math.nan
    assert np.array_equal(table.ratings, [[4, nan, nan], [0, nan, nan], [nan, 1, 2.5]], equal_nan=True)
    assert table.objectives.names == ["one-help", "two-safe", "two-style"]
    assert [c.key for c in table.conversations] == [
        Conversation.from_messages(chat(*texts)).key for texts in ("ab", "cd", "ef")
    ]
    assert table.sources == ["one", "one", "two"]
    assert table.origins == [(str(first.path), 1), (str(first.path), 2), (str(second.path), 1)]
    assert table.counts == {"one-help": 2, "two-safe": 1, "two-style": 1}
    assert len(table) == 3


def test_missing_ratings_stay_missing_in_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    messages = json.dumps(chat("a", "b"))
    ratings = ['"score": 3', '"score": null', '"other": 1', '"score": NaN', '"score": 5']
    path.write_text("".join(f'{{"messages": {messages}, {rating}}}\n' for rating in ratings))
    table = read_ratings([rated(Location.find(path))])
    assert np.array_equal(table.ratings[:, 0], [3, math.nan, math.nan, math.nan, 5], equal_nan=True)
    assert table.counts == {"s-score": 2}


def test_missing_ratings_stay_missing_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {
        "messages": [chat("a", "b")] * 3,
        "score": pyarrow.array([3.0, None, math.nan], pyarrow.float32()),
        "level": pyarrow.array([None, 2, 1], pyarrow.int8()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    table = read_ratings([rated(Location.find(path), SCORE | {"level": Objective.rated("s-level", 0, 2)})])
    nan = math.nan
    assert np.array_equal(table.ratings, [[3, nan], [nan, 2], [nan, 1]], equal_nan=True)


def test_like_named_columns_of_different_sources_stay_apart(tmp_path):
    sets = []
    for source, value in (("left", 1), ("right", 2)):
        location = write_rows(tmp_path / f"{source}.jsonl", {"messages": chat("a", "b"), "helpfulness": value})
        name = objective_name("helpfulness", source)
        sets.append(rated(location, {"helpfulness": Objective.rated(name, 0, 4)}, source))
    table = read_ratings(sets)
    assert table.objectives.names == ["left-helpfulness", "right-helpfulness"]
    assert np.array_equal(table.ratings, [[1, math.nan], [math.nan, 2]], equal_nan=True)


def test_the_place_of_an_objective_is_looked_up_once_for_a_set(tmp_path, monkeypatch):
    rows = [{"messages": chat("a", str(i)), "score": i % 5 + 1} for i in range(50)]
    looked_up = []
    position = ObjectiveSet.position
    monkeypatch.setattr(ObjectiveSet, "position", lambda self, name: looked_up.append(name) or position(self, name))
    table = read_ratings([rated(write_rows(tmp_path / "a.jsonl", *rows))])
    assert table.ratings[:, 0].tolist() == [row["score"] for row in rows]
    assert looked_up == ["s-score"]


def test_a_column_takes_the_name_of_its_source_unless_it_names_one():
    assert objective_name("helpfulness", "helpsteer") == "helpsteer-helpfulness"
    assert objective_name("truthfulqa-truthful", "other") == "truthfulqa-truthful"


def test_parts_of_one_source_rate_the_same_objective(tmp_path):
    parts = [rated(write_rows(tmp_path / f"{i}.jsonl", {"messages": chat("a", str(i)), "score": i})) for i in (1, 2)]
    table = read_ratings(parts)
    assert table.objectives.names == ["s-score"]
    assert table.ratings.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (Objective.rated("s-score", 0, 4), "has range 0..4 (higher, raw = 4 * reward +0, source s) here, 1..5 (higher"),
        (Objective.rated("s-score", 1, 5, direction="lower"), "range 1..5 (lower, raw = -4 * reward +5, source s)"),
        (Objective.rated("s-score", 1, 5, scale_map="bin_centre"), "raw = 5 * reward +0.5"),
        (Objective.rated("s-score", 1, 5, source="t"), "source t) here"),
    ],
)
def test_sets_that_disagree_about_the_scale_of_an_objective_are_refused(tmp_path, other, found):
    row = {"messages": chat("a", "b"), "score": 3, "rating": 3}
    first, second = write_rows(tmp_path / "1.jsonl", row), write_rows(tmp_path / "2.jsonl", row)
    with pytest.raises(DataError) as caught:
        read_ratings([rated(first), rated(second, {"rating": other})])
    assert (caught.value.file, caught.value.field) == (str(second.path), "rating")
    assert found in str(caught.value)
    assert "expected one scale, or a source of its own" in str(caught.value)


def test_two_columns_of_a_set_cannot_rate_one_objective(tmp_path):
    location = write_rows(tmp_path / "a.jsonl", {"messages": chat("a", "b"), "score": 3, "s-score": 4})
    objective = Objective.rated("s-score", 1, 5)
    with pytest.raises(DataError, match=r"a\.jsonl, field 's-score': rates objective s-score, as column 'score' does"):
        merge_objectives([rated(location, {"score": objective, "s-score": objective})])


@pytest.mark.parametrize("value", [0, 6, -1, 5.0001, 10**400, -(10**400), True])
def test_out_of_scale_rating_is_refused_with_file_row_and_field(tmp_path, value):
    error = refused_row(tmp_path, messages=chat("a", "b"), score=value)
    assert error.field == "score"
    assert error.problem.startswith("found ")
    assert error.problem.endswith(", expected a number from 1 to 5")
    assert str(error).startswith(f"{tmp_path}/a.jsonl, row 2, field 'score': found ")


@pytest.mark.parametrize("value", ["four", "n/a", "4/5", {"note": 4}])
def test_a_rating_that_is_no_number_is_refused_with_file_row_and_field(tmp_path, value):
    error = refused_row(tmp_path, messages=chat("a", "b"), score=value)
    assert error.field == "score"
    assert error.problem == f"found {value!r}, expected a number from 1 to 5"


def test_infinite_ratings_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"messages": {json.dumps(chat("a", "b"))}, "score": Infinity}}\n')
    assert "row 1, field 'score': found inf, expected a number from 1 to 5" in str(refusal(Location.find(path)))


def test_the_ends_of_a_scale_are_valid_ratings_and_booleans_are_on_their_own_scale():
    def value(found, low, high):
        return rating_cell(found, low, high).value

    assert [value(found, 1, 5) for found in (1, 5, 2.5, np.float32(2.5), np.int64(5))] == [1, 5, 2.5, 2.5, 5]
    assert [value(found, 0, 1) for found in (True, False, np.bool_(True))] == [1, 0, 1]
    assert rating_cell(True, 0, 4).fault == "found True, expected a number from 0 to 4"


@pytest.mark.parametrize(
    ("columns", "field", "found"),
    [
        ({"messages": chat("a", "")}, "messages[1].content", "found an empty response"),
        ({"messages": chat("a", " \n")}, "messages[1].content", "found an empty response"),
        ({"prompt": "a", "response": ""}, "response", "found an empty response"),
        ({"prompt": chat("a", "b", "c")[:1], "response": " "}, "response", "found an empty response"),
        ({"messages": chat("a", "b", "c")}, "messages[2].role", "found role 'user', expected 'assistant'"),
        ({"messages": chat("a", "b")[1:]}, "messages", "found a reply without a prompt"),
        ({"prompt": [], "response": "b"}, "prompt", "found a reply without a prompt"),
        ({"messages": [{"role": "human", "content": "a"}, *chat("a", "b")]}, "messages[0].role", "found role 'human'"),
        ({"prompt": [{"role": "usr", "content": "a"}], "response": "b"}, "prompt[0].role", "(did you mean user?)"),
        ({"prompt": "a", "response": chat("a", "b")[:1]}, "response.role", "found role 'user', expected 'assistant'"),
        ({"messages": "a\n\nb"}, "messages", "expected a list of messages"),
        ({"messages": []}, "messages", "found no messages"),
        ({"messages": chat("a", "b\ud800")}, "messages[1].content", "found a lone surrogate at character 1"),
        ({"prompt": "\udc00", "response": "b"}, "prompt", "found a lone surrogate at character 0"),
        ({"text": "a"}, "", "found columns ['score', 'text'], expected 'messages', or 'prompt' and 'response'"),
        ({"prompt": "a", "response": None}, "response", "found an empty cell, expected text"),
    ],
)
def test_a_conversation_out_of_order_is_refused_with_file_row_and_field(tmp_path, columns, field, found):
    error = refused_row(tmp_path, score=3, **columns)
    assert error.field == field
    assert found in error.problem


@pytest.mark.parametrize("line", [b'{"messages": [], "messages": []}', b'{"x": "\xff"}', b"{"])
def test_a_line_that_cannot_be_read_is_refused_with_file_and_row(tmp_path, line):
    location = write_rows(tmp_path / "a.jsonl", {"messages": chat("a", "b"), "score": 3})
    with location.path.open("ab") as file:
        file.write(line + b"\n")
    assert str(refusal(location)).startswith(f"{tmp_path}/a.jsonl, row 2")


def test_text_or_messages_of_a_prompt_give_the_same_conversation():
    expected = Conversation.from_messages(chat("a", "b"))
    for values in (
        {"messages": chat("a", "b")},
        {"prompt": "a", "response": "b"},
        {"prompt": chat("a", "b")[:1], "response": chat("a", "b")[1:], "messages": None},
    ):
        assert Row("x", 1, values).conversation() == expected


def test_a_column_that_no_row_rates_is_refused_with_the_nearest_right_name(tmp_path):
    location = write_rows(tmp_path / "a.jsonl", {"messages": chat("a", "b"), "helpfulness": 3})
    error = refusal(location, {"helpfullness": Objective.rated("s-help", 1, 5)})
    assert str(error) == (f"{tmp_path}/a.jsonl, field 'helpfullness': no row rates it (did you mean helpfulness?)")


def test_a_column_whose_ratings_are_all_missing_is_refused_too(tmp_path):
    location = write_rows(tmp_path / "a.jsonl", {"messages": chat("a", "b"), "score": None, "scores": 1})
    assert str(refusal(location)) == f"{tmp_path}/a.jsonl, field 'score': no row rates it"


def test_an_empty_file_is_refused_as_one_that_rates_nothing(tmp_path):
    assert "field 'score': no row rates it" in str(refusal(write_rows(tmp_path / "a.jsonl")))


def test_rows_keep_what_their_split_is_used_for(tmp_path):
    splits = ["train", "test", "validation", None, ""]
    rows = [{"messages": chat("a", "b"), "score": 3, "split": split} for split in splits]
    location = write_rows(tmp_path / "a.jsonl", *rows)
    assert read_ratings([rated(location)]).splits == ["train", "test", "other", "", ""]
    assert read_ratings([rated(location, train_split="validation")]).splits == ["other", "test", "train", "", ""]


def test_a_split_that_is_no_text_is_refused_with_file_row_and_field(tmp_path):
    error = refused_row(tmp_path, messages=chat("a", "b"), score=3, split=1)
    assert (error.field, error.problem) == ("split", "found 1, expected the name of a split")


def test_the_split_named_test_is_trained_on_only_on_request():
    row = Row("x", 1, {"split": "test"})
    assert row.split_role("train") == "test"
    assert row.split_role("test") == "train"


def test_taking_rows_takes_all_their_parts():
    table = small_table()
    part = table.take(np.array([2, 0]))
    assert [c.response for c in part.conversations] == ["r2", "r0"]
    assert np.array_equal(part.ratings, table.ratings[[2, 0]], equal_nan=True)
    assert (part.sources, part.splits, part.origins) == (["s2", "s0"], ["t2", "t0"], [("f", 2), ("f", 0)])
    table.origins = []
    assert table.take([1]).origins == []
    assert table.take([]).ratings.shape == (0, 2)


def test_a_column_is_added_without_changing_the_table():
    table = small_table()
    objective = Objective("verbosity", "computed", 0.0, 1.0, 1.0, 0.0, "neutral", "response_length")
    wider = table.with_column(objective, np.array([0.1, 0.2, 0.3]))
    assert wider.objectives.names == ["s-a", "s-b", "verbosity"]
    assert wider.ratings[:, 2].tolist() == [0.1, 0.2, 0.3]
    assert np.array_equal(wider.ratings[:, :2], table.ratings, equal_nan=True)
    assert wider.take([1]).origins == [("f", 1)]
    assert table.objectives.names == ["s-a", "s-b"]


def small_table() -> RatingTable:
    return RatingTable(
        [Conversation.from_messages(chat("p", f"r{i}")) for i in range(3)],
        np.array([[1.0, math.nan], [2.0, 3.0], [math.nan, 4.0]]),
        ObjectiveSet([Objective.rated("s-a", 1, 5), Objective.rated("s-b", 1, 5)]),
        ["s0", "s1", "s2"],
        ["t0", "t1", "t2"],
        [("f", 0), ("f", 1), ("f", 2)],
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from("abcdef")), st.one_of(st.none(), st.integers(0, 30)))
def test_a_sample_is_of_whole_prompts_and_as_small_as_the_limit_allows(keys, limit):
    rows = sample_by_prompt(keys, limit)
    assert rows == sorted(rows)
    kept = {keys[i] for i in rows}
    assert rows == [i for i, key in enumerate(keys) if key in kept]
    if limit is None or len(keys) <= limit:
        assert len(rows) == len(keys)
    elif limit:
        assert len(rows) >= limit
        assert len(rows) - max(Counter(keys)[key] for key in kept) < limit
    else:
        assert rows == []


def test_a_sample_does_not_depend_on_the_order_of_the_rows(tmp_path):
    rows = [{"messages": chat(f"p{i % 7}", f"r{i}"), "score": 3} for i in range(28)]
    forward = read_ratings([rated(write_rows(tmp_path / "a.jsonl", *rows))], limit=8)
    backward = read_ratings([rated(write_rows(tmp_path / "b.jsonl", *rows[::-1]))], limit=8)
    assert {c.key for c in forward.conversations} == {c.key for c in backward.conversations}
    assert len(forward) == 8


@pytest.mark.slow
@pytest.mark.data
def test_the_real_rated_sets_have_their_stated_rows_and_scales(real_sets):
    table = real_sets.ratings
    assert Counter(table.sources) == {name: rows for name, (rows, _) in RATED.items()}
    stated = {column: scale for _, columns in RATED.values() for column, scale in columns.items()}
    assert table.objectives.names == list(stated)
    for column, (low, high) in enumerate(stated.values()):
        ratings = table.ratings[~np.isnan(table.ratings[:, column]), column]
        assert low <= ratings.min() < ratings.max() == high
    assert np.isnan(table.ratings).mean() > 0.9
    # Rows of justeval are rated for safety, or for the five others.
    columns = [table.objectives.position(name) for name in stated if name.startswith("justeval-")]
    rated = ~np.isnan(table.ratings[np.ix_([source == "justeval" for source in table.sources], columns)])
    safety, others = rated[:, 5], rated[:, :5].any(1)
    assert (safety ^ others).all()
    assert others.sum() == pytest.approx(800, rel=0.15)


@pytest.mark.slow
@pytest.mark.data
def test_no_prompt_of_the_real_rated_sets_is_in_two_splits_or_in_a_benchmark(real_sets):
    table = real_sets.ratings
    train, test = (
        {c.prompt_key for c, split in zip(table.conversations, table.splits, strict=True) if split == wanted}
        for wanted in ("train", "test")
    )
    assert set(table.splits) == {"train", "test"}
    assert not train & test
    assert not train & {pair.prompt_key for name in BENCHMARKS for pair in real_sets.pairs[name]}


# --- doubtful cells -------------------------------------------------------------------------------


def doubtful(path) -> Location:
    """Thirty rows rated from 1 to 5, of which one has no response, one an `n/a`, one a 45."""
    rows = [{"prompt": f"q{i}", "response": f"a{i}", "score": 1 + i % 5} for i in range(30)]
    rows[3]["response"], rows[4]["score"], rows[5]["score"] = "", "n/a", 45
    return write_rows(path, *rows)


def test_a_doubtful_cell_costs_a_cell_and_an_empty_response_its_row(tmp_path):
    location, rejections = doubtful(tmp_path / "a.jsonl"), Rejections()
    table = read_ratings([rated(location)], rejections=rejections)
    assert (len(table), table.counts) == (29, {"s-score": 27})
    assert [(error.row, error.field) for error in rejections.errors] == [(4, "response"), (5, "score"), (6, "score")]
    assert list(rejections.counts.values()) == [1, 2]
    with pytest.raises(DataError, match="row 4, field 'response': found an empty response"):
        read_ratings([rated(location)], rejections=Rejections(strict=True))


def test_a_column_on_another_scale_is_refused_whatever_may_be_left_out(tmp_path):
    location = write_rows(
        tmp_path / "a.jsonl", *({"prompt": "q", "response": "a", "score": 10 * (i % 10)} for i in range(30))
    )
    with pytest.raises(DataError, match="27 of 30 cells are off this scale: check its ends"):
        read_ratings([rated(location, {"score": Objective.rated("s-score", 0, 5)})], rejections=Rejections())


def test_the_spread_between_raters_is_kept(tmp_path):
    rows = [{"prompt": "q", "response": f"a{i}", "score": [1, 3] if i else 2} for i in range(3)]
    table = read_ratings([rated(write_rows(tmp_path / "a.jsonl", *rows))])
    assert table.ratings[:, 0].tolist() == [2, 2, 2]
    assert np.isnan(table.spreads[0, 0]) and table.rater_spreads["s-score"] == pytest.approx(2**0.5)
    assert table.take([1]).rater_spreads == table.rater_spreads
