"""Best of n and preference rows, scored by marks; and what decides, with a real model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import expit

from armorm.conversation import Conversation
from armorm.data.candidates import read_candidates
from armorm.data.preferences import read_preferences
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import DataError
from armorm.evaluation.best_of_n import LeftOut, PairRule, preference_row, rank
from armorm.evaluation.scorer import CallableScorer, ScorerError
from armorm.explain.verdict import too_close
from tests.helpers.marked_scorer import marked

SCORER = CallableScorer(marked)


def rows(*values):
    return [Row("file", number, entry) for number, entry in enumerate(values, 1)]


def ranked(*values):
    return rank(SCORER, list(read_candidates(rows(*values))))


def test_responses_are_put_in_order_and_equal_ones_keep_theirs():
    (found,) = ranked({"id": "q", "prompt": "a", "responses": ["x <1>", "y <3>", "z <1>", "w <2>"]})
    assert found.order == [1, 3, 0, 2]
    expected = {"row": 1, "id": "q", "best": 1, "order": [1, 3, 0, 2], "scores": [1.0, 3.0, 1.0, 2.0]}
    assert found.to_dict() == {**expected, "verdict": "Response 1 scores higher than response 3."}


def test_one_response_a_row_is_grouped_by_prompt():
    first = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x <1>"}]}
    found = ranked(first, {"prompt": "b", "response": "y <0>"}, {"prompt": "a", "response": "z <2>"})
    assert [(entry.row, entry.order) for entry in found] == [(1, [1, 0]), (2, [0])]


def test_a_refused_response_has_no_rank_and_a_reason():
    (found,) = ranked({"prompt": "a", "responses": ["x <1>", " ", "z <2>"]})
    assert found.order == [2, 0]
    assert np.isnan(found.scores[1])
    assert "responses[1]" in found.unscored[1]
    assert found.to_dict()["refused"].keys() == {"1"}


def test_pairs_are_best_against_worst_in_the_explicit_layout(tmp_path):
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
    found = ranked({"prompt": prompt, "responses": ["x <1>", "y <3.5>", "z <2>"]})
    row = preference_row(found[0], PairRule())
    assert row == {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": "y <3.5>"}],
        "rejected": [{"role": "assistant", "content": "x <1>"}],
        "margin": 2.5,
        "chosen_gives_no_answer": False,
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (pair,) = read_preferences(Location.find(path))
    assert (pair.chosen.response, pair.margin) == ("y <3.5>", 2.5)


def test_prompts_without_a_margin_give_no_pair():
    for responses, reason in (
        (["x <1>"], LeftOut.ONE_RESPONSE),
        (["x <1>", ""], LeftOut.ONE_RESPONSE),
        (["x <1>", "y <1>"], LeftOut.NOISE),
    ):
        assert preference_row(ranked({"prompt": "a", "responses": responses})[0], PairRule()) is reason
    (found,) = ranked({"prompt": "a", "responses": ["x <1>", "y <2>"]})
    assert preference_row(found, PairRule(1.0)) is LeftOut.NOISE
    assert isinstance(preference_row(found, PairRule(0.9)), dict)


class Calibrated(CallableScorer):
    margin_scale, score_std = 2.0, 8.0


class Referenced(CallableScorer):
    score_std = 8.0


def test_by_default_a_margin_is_beyond_the_noise_as_verdicts_define_it():
    calibrated, referenced = Calibrated(marked), Referenced(marked)
    for scorer in (calibrated, referenced):
        least = PairRule.of(scorer).least
        scale = getattr(scorer, "margin_scale", None)
        for margin in (0.99 * least, 1.01 * least):
            close = too_close(
                margin,
                probability=None if scale is None else float(expit(scale * margin)),
                margin_in_std=margin / scorer.score_std,
            )
            assert close == (margin < least)
    assert PairRule.of(SCORER).least == 0


def test_a_minimum_margin_or_probability_replaces_the_default():
    scorer = Calibrated(marked)
    assert PairRule.of(scorer, min_margin=0.01).least == 0.01
    assert expit(2 * PairRule.of(scorer, min_probability=0.9).least) == pytest.approx(0.9)
    assert PairRule.of(scorer, min_margin=5.0, min_probability=0.9).least == 5.0
    with pytest.raises(ScorerError, match="armorm calibrate"):
        PairRule.of(Referenced(marked), min_probability=0.9)


@pytest.mark.parametrize("reply", ["I don't know. <3>", "I'm sorry, but I can't help with that. <3>", "No idea. <3>"])
def test_a_chosen_response_that_gives_no_answer_is_marked_or_left_out(reply):
    (found,) = ranked({"prompt": "a", "responses": ["Paris. <1>", reply]})
    assert found.to_dict()["no_answer"] == [1]
    assert preference_row(found, PairRule())["chosen_gives_no_answer"] is True
    assert preference_row(found, PairRule(answers_only=True)) is LeftOut.NO_ANSWER
    (found,) = ranked({"prompt": "a", "responses": ["Paris. <4>", reply]})
    assert preference_row(found, PairRule(answers_only=True))["chosen_gives_no_answer"] is False


def test_rows_of_no_known_layout_are_refused_by_row():
    for entry, fault in (
        ({"responses": ["x"]}, "expected 'prompt'"),
        ({"prompt": "a", "responses": "x"}, "field 'responses'"),
        ({"prompt": "a", "responses": []}, "field 'responses'"),
        ({"prompt": 3, "responses": ["x"]}, "field 'prompt'"),
        ({"prompt": "a"}, "row 1"),
    ):
        with pytest.raises(DataError, match=fault):
            list(read_candidates(rows(entry)))


def test_the_deciding_objectives_turn_the_order_of_the_first_two():
    from armorm.evaluation.scorers import ArmoRMScorer
    from tests.helpers.small_models import reward_model

    scorer = ArmoRMScorer(reward_model())
    responses = ["Start with one ball.", "No.", "Practise every day, and do not give up when it falls."]
    (found,) = rank(scorer, list(read_candidates(rows({"prompt": "How do I juggle?", "responses": responses}))))
    scored = scorer.score([Conversation.from_prompt("How do I juggle?", text) for text in responses])
    np.testing.assert_allclose(found.scores, scored.scores)
    best, second = found.order[:2]
    margin = scored.scores[best] - scored.scores[second]
    assert found.deciding
    assert margin - sum(value for _, value in found.deciding) <= 1e-5
    assert margin - sum(value for _, value in found.deciding[:-1]) > 0 or len(found.deciding) == 1
