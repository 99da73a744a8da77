"""Ratings in the playground: a line for each, off by default, and on this machine only."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("gradio")
pytest.importorskip("fastapi")

from armorm import ArmoRM
from armorm.data.ratings import RatedSet, read_ratings
from armorm.data.sources import Location
from armorm.serving.engine import ScoringEngine
from armorm.serving.playground.page import Playground
from armorm.serving.settings import ServingSettings
from tests.helpers.commands import run


@pytest.fixture(scope="module")
def rm():
    return ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu")


def page(rm, **settings):
    return Playground(ScoringEngine(rm, ServingSettings(ui=True, **settings)))


def rated_objective(rm):
    return next(objective for objective in rm.objectives if not objective.compute)


def buttons(page):
    return {block.value for block in page.blocks().blocks.values() if type(block).__name__ == "Button"}


def test_a_rating_is_a_row_that_training_reads(rm, tmp_path):
    path, objective = tmp_path / "ratings.jsonl", rated_objective(rm)
    playground = page(rm, ratings=path)
    turns = json.dumps(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "2+2?"},
        ]
    )
    assert "Saved" in playground.on_rate(
        "How do I mow?", "Slowly.", "Fast.", "", "", "B", objective.name, objective.high
    )
    assert "Saved" in playground.on_rate(turns, "4", "", "", "", "A", objective.name, objective.low)
    table = read_ratings([RatedSet(Location.find(str(path)), {objective.name: replace(objective)}, "ours")])
    assert table.ratings[:, 0].tolist() == [objective.high, objective.low]
    assert table.conversations[0].response == "Fast."
    assert [message.role for message in table.conversations[1].messages] == ["user", "assistant", "user", "assistant"]


def test_what_is_no_rating_is_not_saved(rm, tmp_path):
    path, objective = tmp_path / "ratings.jsonl", rated_objective(rm)
    playground = page(rm, ratings=path)
    for letter, name, value, said in (
        ("A", objective.name, objective.high + 1, f"expected a number from {objective.low:g} to {objective.high:g}"),
        ("A", objective.name, None, "expected a number"),
        ("C", objective.name, objective.low, "empty response"),
        ("A", "no-objective", objective.low, "unknown objective"),
    ):
        shown = playground.on_rate("q", "a", "b", "", "", letter, name, value)
        assert "Not saved" in shown and said in shown
    assert not path.exists()


def test_the_button_is_there_only_with_a_file(rm, tmp_path):
    assert "Save rating" not in buttons(page(rm))
    assert "Save rating" in buttons(page(rm, ratings=tmp_path / "ratings.jsonl"))


@pytest.mark.parametrize("more", [("--ui", "--host", "0.0.0.0"), ()])
def test_a_file_of_ratings_needs_the_page_on_this_machine(capsys, tmp_path, more):
    code, _, err = run(capsys, "serve", "--model", "armorm-tiny-rm", "--ratings", tmp_path / "r.jsonl", *more)
    assert code == 2
    assert "--host 127.0.0.1" in " ".join(err.replace("│", " ").split())
