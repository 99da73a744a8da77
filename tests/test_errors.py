"""Errors: one family, one printable line each, with the place of the fault."""

from __future__ import annotations

import os
import pickle

import pytest

from armorm.errors import (
    ArmormError,
    BackboneError,
    CheckpointError,
    ConversationError,
    DataError,
    FitError,
    MissingExtraError,
    RecipeError,
    StoreError,
    TemplateError,
    nearest,
    shown,
)

FAMILY = [
    ConversationError,
    DataError,
    RecipeError,
    TemplateError,
    BackboneError,
    CheckpointError,
    StoreError,
    FitError,
]


@pytest.mark.parametrize("kind", FAMILY)
def test_every_error_is_an_armorm_error_and_a_value_error(kind):
    with pytest.raises(ArmormError) as caught:
        raise kind("wrong")
    assert isinstance(caught.value, ValueError)


def test_missing_extra_is_an_import_error():
    with pytest.raises(ImportError, match="install armorm"):
        raise MissingExtraError("install armorm[serve]")


@pytest.mark.parametrize("kind", [*FAMILY, MissingExtraError])
@pytest.mark.parametrize("gap", ["\n", "\r\n\t", "\x0b", "\x85", "\u2028"])
def test_text_of_an_error_is_one_line(kind, gap):
    assert str(kind(f"found{gap}this,{gap}{gap}expected that")) == "found this, expected that"


def test_data_error_names_file_then_row_then_field_then_problem():
    error = DataError("found 7, expected 5", file="a.jsonl", row=3, field="score")
    assert str(error) == "a.jsonl, row 3, field 'score': found 7, expected 5"
    assert (error.file, error.row, error.field, error.problem) == ("a.jsonl", 3, "score", "found 7, expected 5")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({}, "wrong"),
        ({"file": "a"}, "a: wrong"),
        ({"row": 2}, "row 2: wrong"),
        ({"file": "a", "field": "b"}, "a, field 'b': wrong"),
    ],
)
def test_data_error_leaves_out_the_places_it_does_not_know(place, text):
    assert str(DataError("wrong", **place)) == text


def test_conversation_error_puts_the_field_before_the_problem():
    assert str(ConversationError("found role 'x'", "messages[0].role")) == "messages[0].role: found role 'x'"
    assert str(ConversationError("wrong")) == "wrong"


def test_errors_keep_their_places_between_processes():
    error = pickle.loads(pickle.dumps(DataError("found 7", file="a", row=3, field="b")))  # noqa: S301
    assert (str(error), error.row, error.field, error.problem) == ("a, row 3, field 'b': found 7", 3, "b", "found 7")
    error = pickle.loads(pickle.dumps(ConversationError("found 7", "messages")))  # noqa: S301
    assert (str(error), error.field, error.problem) == ("messages: found 7", "messages", "found 7")


def test_an_error_about_a_file_whose_name_is_no_text_can_be_printed():
    name = os.fsdecode(b"ratings\xff.jsonl")
    assert str(DataError("wrong", file=name)).encode() == b"ratings\\udcff.jsonl: wrong"


def test_shown_cuts_long_values_and_keeps_short_ones():
    assert shown("ab") == "'ab'"
    assert shown("a" * 100) == "'" + "a" * 56 + "..."
    assert len(shown("a" * 100)) == 60
    assert len(shown(list(range(100)), 20)) == 20
    assert shown("a" * 58) == "'" + "a" * 58 + "'"


def test_nearest_names_the_one_meant_and_is_silent_where_none_is_near():
    known = ["helpsteer-helpfulness", "helpsteer-correctness"]
    assert nearest("helpster-helpfulnes", known) == " (did you mean helpsteer-helpfulness?)"
    assert nearest("zzz", known) == ""
    assert nearest("a", []) == ""


def test_a_name_without_its_source_suggests_the_name_with_it():
    known = ["truthfulqa-truthful", "beavertails-is_safe", "verbosity"]
    assert nearest("is_safe", known) == " (did you mean beavertails-is_safe?)"
    assert nearest("is_saef", known) == " (did you mean beavertails-is_safe?)"
    assert nearest("beavertail-is_safe", known) == " (did you mean beavertails-is_safe?)"
    assert nearest("verbositi", known) == " (did you mean verbosity?)"
    assert nearest("something else", known) == ""
