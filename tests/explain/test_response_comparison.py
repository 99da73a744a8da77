"""Two responses compared: differences that sum to the margin, what decides, and how it reads."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
from rich.console import Console

from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.explain.response_comparison import compare_responses, compare_scores
from tests.helpers.conversations import chat
from tests.helpers.small_models import reward_model

PROMPT = "How do I learn to juggle?"
A, B = chat(PROMPT, "Start with one ball, and throw it in an arc."), chat(PROMPT, "No.")


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def found(rm):
    return rm.compare(A, B)


def test_differences_of_contributions_sum_to_the_margin(rm, found):
    batch = rm.score([A, B])
    assert found.scores == pytest.approx({"A": batch.scores[0], "B": batch.scores[1]}, abs=1e-5)
    assert found.margin == pytest.approx(float(batch.scores[0] - batch.scores[1]), abs=1e-5)
    assert sum(share.difference for share in found.shares) == pytest.approx(found.margin, abs=1e-5)
    assert found.better == ("A" if found.margin > 0 else "B")
    raw = rm.objectives.to_raw(batch.rewards)
    for column, share in enumerate(found.shares):
        assert share.ratings == pytest.approx(tuple(raw[:, column]), abs=1e-4)
        difference = batch.contributions[0, column] - batch.contributions[1, column]
        assert share.difference == pytest.approx(float(difference), abs=1e-5)
        assert share.weight == pytest.approx(float(batch.gating_weights[0, column]), abs=1e-5)


def test_an_objective_decides_if_the_preference_would_not_hold_without_it_alone(found):
    for share in found.shares:
        assert share.decides == ((found.margin - share.difference) * found.margin <= 0)


def test_without_what_carries_it_the_preference_would_not_hold(found):
    sign = 1 if found.margin > 0 else -1
    deciding = [share.difference * sign for share in found.shares if share.carries]
    assert deciding and min(deciding) > 0
    assert found.margin * sign - sum(deciding) <= 1e-6
    assert len(deciding) == 1 or found.margin * sign - sum(deciding) + min(deciding) > 0


def test_turned_round_it_says_the_same(rm, found):
    other = rm.compare(B, A)
    assert other.margin == pytest.approx(-found.margin, abs=1e-6)
    assert other.decided_by == found.decided_by
    assert other.probability_of_a is None and found.likelihood is None, "the model was never calibrated"
    assert "probability" not in str(found) + found.to_html()


def test_a_probability_needs_a_calibration_and_a_model_that_is_not_steered(rm, found):
    config = copy.deepcopy(rm.model.config)
    config.calibration = {"scale": 3.0, "margin_scale": 2.0}
    calibrated = copy.copy(rm)
    calibrated.model = rm.model.with_config(config)
    both = calibrated.compare(A, B), calibrated.compare(B, A)
    assert both[0].probability_of_a == pytest.approx(1 / (1 + math.exp(-2 * found.margin)))
    assert both[1].probability_of_a == pytest.approx(1 - both[0].probability_of_a)
    stated = int(re.search(r"probability (?:of |over )?(\d+)%", both[0].verdict)[1])
    assert stated == pytest.approx(100 * both[0].likelihood, abs=1)
    assert both[0].verdict in " ".join(str(both[0]).split()) and both[1].verdict != both[0].verdict
    assert f"probability that {both[0].better} is preferred" in both[0].to_html()
    steered = calibrated.steer({"code-style": 2.0})
    assert steered.margin_scale is None and steered.compare(A, B).probability_of_a is None
    assert calibrated.steer().margin_scale == 2.0


def test_the_margin_has_the_unit_of_the_reference_scores(rm, found):
    deviation = rm.reference["score_std"]
    assert found.margin_in_std == pytest.approx(found.margin / deviation)
    assert f"({found.margin_in_std:+.2f} SD of reference scores)" in str(found)


def test_in_words_the_responses_have_other_names(rm, found):
    other = rm.compare(B, A)
    sentence = found.in_words({"A": "the long one", "B": "the short one"})
    assert sentence == other.in_words({"B": "the long one", "A": "the short one"}), "whatever the order of the two"
    assert "the long one" in sentence and found.decided_by[0] in sentence
    assert compare_scores(1.0, 2.0).in_words() == "B scores higher than A."
    assert "the same score" in rm.compare(A, A).in_words()


def test_the_same_response_is_a_tie_and_two_prompts_are_refused(rm):
    tie = rm.compare(A, A)
    assert (tie.better, tie.margin, tie.decided_by, tie.verdict) == (None, 0.0, [], "A and B get the same score.")
    assert "decides" not in str(tie)
    with pytest.raises(ConversationError, match="two prompts, expected two responses to the same one"):
        rm.compare(A, chat("Why?", "Because."))


def test_scores_alone_are_compared_too():
    assert compare_scores(2.0, -1.0, "plain").probability_of_a is None
    found = compare_scores(2.0, -1.0, "plain", margin_scale=1.0)
    assert found.verdict == "A is better than B (probability 95%)."
    assert found.probability_of_a == pytest.approx(1 / (1 + math.exp(-3)))
    assert compare_scores(-800.0, 800.0, margin_scale=1.0).probability_of_a == 0.0
    assert "contributions" not in found.to_dict()
    assert str(found).startswith("A is better") and "objective" not in str(found) + found.to_html()


def test_text_json_and_page_say_the_same(found):
    entry = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    page = found.to_html([Conversation.from_messages(side) for side in (A, B)])
    text = str(found)
    assert " ".join(text.split()).startswith(found.verdict) and f'<h1 class="verdict">{found.verdict}</h1>' in page
    assert entry["verdict"] == found.verdict and found.verdict in found._repr_html_()
    for share in found.shares:
        assert entry["contributions"][share.name] == share.difference
        assert f"{share.difference:+.4f}" in text and f"{share.difference:+.4f}" in page
        assert f"{share.ratings[0]:.2f}" in text and f"{share.ratings[1]:.2f}" in page
    assert page.count(">decides</span>") == sum(share.decides for share in found.shares) == text.count("decides")
    assert "Start with one ball" in page


def test_texts_are_text_on_the_page(rm):
    sides = [chat(PROMPT, "<script>alert(1)</script>"), chat("How do I learn to juggle?", "</div><img src=x>")]
    page = rm.compare(*sides).to_html([Conversation.from_messages(side) for side in sides])
    assert "<script" not in page and "<img" not in page and "&lt;img src=x&gt;" in page


def test_the_page_shows_the_maps_and_the_texts_that_the_comparison_knows(rm):
    found = rm.compare(PROMPT, "Start with one ball.", "No.")
    page = found.to_html()
    assert PROMPT in page and "Start with one ball." in page, "no conversations are passed"


def test_it_fits_eighty_columns(found):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text


def test_a_steered_model_says_so(rm):
    found = rm.steer({"code-style": 2.0}).compare(A, B)
    assert "steered: code-style is weighted 2 times" in str(found)
    assert "code-style is weighted 2 times" in found.to_html()
    assert compare_responses(rm.explain(A), rm.explain(B)).steered == {}
