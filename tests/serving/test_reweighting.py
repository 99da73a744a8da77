"""Sliders do what steering does, without the model; uploaded rows become prompts and responses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from armorm.data.rows import SUFFIXES
from armorm.errors import DataError
from armorm.serving.playground.cards import results
from armorm.serving.playground.page import FILE_TYPES, read_examples, read_prompt
from armorm.serving.playground.reweighting import Reweighter, policy_yaml
from armorm.steering import SteeringError
from tests.helpers.servers import question
from tests.helpers.small_models import reward_model

VALUES = [2.0, 0.0, 0.35, 1.5]


def reweighter_of(rm):
    return Reweighter(
        rm.objectives,
        rm.model.reward_transform_matrix.double().numpy(),
        np.array(rm.reference["reward_means"]),
        rm.model.config.debiasing["against"],
        rm.model.config.steering,
    )


@pytest.fixture(scope="module")
def model():
    return reward_model()


@pytest.fixture(scope="module")
def conversations():
    return [question(7, words=n) for n in (1, 4, 9, 16)]


def test_a_slider_gives_the_scores_of_the_steered_model(model, conversations):
    reweighted = reweighter_of(model).reweight(model.score(conversations), VALUES)
    steered = model.steer(dict(zip(model.objectives.names, VALUES, strict=True))).score(conversations)
    assert reweighted.batch.scores == pytest.approx(steered.scores, abs=1e-5)
    assert reweighted.batch.gating_weights == pytest.approx(steered.gating_weights, abs=1e-5)
    assert reweighted.batch.contributions == pytest.approx(steered.contributions, abs=1e-5)
    assert reweighted.batch.relative == pytest.approx(steered.relative, abs=1e-5)
    assert reweighted.order == np.argsort(-steered.scores).tolist()


def test_the_policy_that_is_copied_is_that_steering(model, conversations):
    reweighter = reweighter_of(model)
    reweighted = reweighter.reweight(model.score(conversations), VALUES)
    policy = yaml.safe_load(policy_yaml(reweighted.settings))
    steered = model.steer(policy.get("multiply"), drop=policy.get("drop", ())).score(conversations)
    assert reweighted.batch.scores == pytest.approx(steered.scores, abs=1e-5)


def test_sliders_on_a_steered_model_come_on_top_of_its_steering(model, conversations):
    served = model.steer({"ultra-helpful": 3.0}, drop=["code-style"])
    reweighted = reweighter_of(served).reweight(served.score(conversations), [0.5, 1.0, 1.0, 2.0])
    again = model.steer(reweighted.settings["multiply"], drop=reweighted.settings["drop"]).score(conversations)
    assert reweighted.settings == {"multiply": {"ultra-helpful": 1.5, "verbosity": 2.0}, "drop": ["code-style"]}
    assert reweighted.batch.scores == pytest.approx(again.scores, abs=1e-5)


def test_what_decides_is_what_the_first_would_not_win_without(model, conversations):
    reweighted = reweighter_of(model).reweight(model.score(conversations), [1.0] * 4)
    difference = (
        reweighted.batch.contributions[reweighted.order[0]] - reweighted.batch.contributions[reweighted.order[1]]
    )
    assert reweighted.margin == pytest.approx(difference.sum())
    assert difference.sum() - difference[reweighted.deciding].sum() <= 0 < reweighted.margin


def test_the_bias_cannot_be_dropped_nor_everything(model, conversations):
    reweighter, batch = reweighter_of(model), model.score(conversations)
    with pytest.raises(SteeringError, match="verbosity cannot be dropped"):
        reweighter.reweight(batch, [1, 1, 1, 0])


def test_results_escape_what_they_show(model, conversations):
    reweighted = reweighter_of(model).reweight(model.score(conversations), [1.0] * 4)
    batch = replace(reweighted.batch, names=["<b>one</b>", "two", "three", "four"], rejected=[(3, "<i>no</i>")])
    html = results(replace(reweighted, batch=batch), (0.0, 1.0))
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;i&gt;no" in html
    assert html.count('<article class="card') == 5


def test_rows_of_every_layout_are_read_and_others_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    rows = [
        {"prompt": "Name a river.", "responses": ["Rhine", "Elbe", "Oder", "Main", "Isar"]},
        {"prompt": "Hi", "response": "Hello"},
        {"messages": [*turns, {"role": "assistant", "content": "See you"}]},
        {"prompt": turns[:1], "chosen": turns[1:2], "rejected": [{"role": "assistant", "content": "No"}]},
        {"prompt": "Hi"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    examples, unusable = read_examples(path)
    assert unusable == 2
    assert [example.responses for example in examples] == [
        ["Rhine", "Elbe", "Oder", "Main"],
        ["Hello"],
        ["See you"],
        ["Hello", "No"],
    ]
    assert read_prompt(examples[2].prompt) == turns
    assert read_prompt("[sic] is Latin") == "[sic] is Latin"
    table = tmp_path / "rows.csv"
    table.write_text("Question,Answer A,Answer B\nHi,Hello,No\n")
    assert read_examples(table)[0][0].responses == ["Hello", "No"]
    assert all(any(suffix.endswith(kind) for suffix in SUFFIXES) for kind in FILE_TYPES)
    with pytest.raises(DataError):
        read_examples(tmp_path / "absent.jsonl")
