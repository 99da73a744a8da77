"""What people read: the numbers, signs, bars and order of an explanation."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from armorm.conversation import Conversation
from armorm.explain.explanation import Explanation, explain_row, explanations_page
from armorm.explain.text import signed, signed_bar
from armorm.objectives import Objective
from armorm.score_batch import ScoreBatch

NAMES = ["ultra-helpful", "beaver-harm", "code[style]", "verbosity"]
OBJECTIVES = [
    Objective.rated(NAMES[0], 1, 5),
    Objective.rated(NAMES[1], 0, 4, direction="lower"),
    Objective.rated(NAMES[2], 0, 10),
    Objective("verbosity", "computed", 0.0, 6.0, 6.0, 0.0, "neutral"),
]
REWARDS = np.array([0.8, 0.25, 0.5, 0.9])
WEIGHTS = np.array([0.5, 0.25, 0.2, 0.05])
COEFFICIENTS = np.array([0.85, 0.425, 0.34, -0.2])
CONTRIBUTIONS = COEFFICIENTS * REWARDS
RELATIVE = np.array([0.17, -0.34, 0.02, -0.1])
REFERENCE = {
    "score_mean": 0.5,
    "score_std": 0.2,
    "score_quantiles": list(np.linspace(0.0, 2.0, 101)),
    "gating_weights": [0.4, 0.3, 0.2, 0.1],
}


def explanation(
    reference=REFERENCE,
    objectives=OBJECTIVES,
    score=None,
    relative=RELATIVE,
    uncertainty=None,
    score_std=None,
    steered=None,
) -> Explanation:
    batch = ScoreBatch(
        scores=np.array([float("nan")]),  # normalised scores are not explained
        rewards=REWARDS[None],
        gating_weights=WEIGHTS[None],
        gating_output=WEIGHTS[None],
        coefficients=COEFFICIENTS[None],
        contributions=CONTRIBUTIONS[None] if score is None else np.array([[score, 0.0, 0.0, 0.0]]),
        relative=relative[None],
        names=[objective.name for objective in objectives],
        rows=np.array([0]),
        uncertainty=None if uncertainty is None else uncertainty[None],
        score_std=None if score_std is None else np.array([score_std]),
    )
    return explain_row(batch, 0, objectives, reference, model="small", steered=steered)


def lines_of(text: str) -> dict[str, str]:
    """The line of each objective, by its name."""
    return {name: line for line in text.splitlines() for name in NAMES if line.startswith(name)}


def headline_of(shown: Explanation) -> str:
    """The line with the score."""
    return next(line for line in str(shown).splitlines() if line.startswith("score "))


def narrow(shown: Explanation) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown)
    return console.export_text()


# --- values --------------------------------------------------------------------------------------


def test_shares_hold_what_was_measured_with_ratings_on_the_raw_scale():
    shown = explanation()
    assert [share.name for share in shown.shares] == NAMES
    assert [share.rating for share in shown.shares] == pytest.approx([4.2, 3.0, 5.0, 5.4])  # harm is flipped
    assert [(share.low, share.high) for share in shown.shares] == [(1, 5), (0, 4), (0, 10), (0, 6)]
    for field, values in [
        ("reward", REWARDS),
        ("weight", WEIGHTS),
        ("coefficient", COEFFICIENTS),
        ("contribution", CONTRIBUTIONS),
        ("relative", RELATIVE),
        ("average_weight", REFERENCE["gating_weights"]),
    ]:
        assert [getattr(share, field) for share in shown.shares] == pytest.approx(list(values))


def test_ranking_is_by_the_size_of_the_relative_contribution():
    assert [share.name for share in explanation().ranked] == [
        "beaver-harm",
        "ultra-helpful",
        "verbosity",
        "code[style]",
    ]


def test_the_score_is_placed_among_reference_scores():
    shown = explanation(score=0.9)
    assert shown.normalised == pytest.approx(2.0)
    assert shown.percentile == pytest.approx(45.0)
    assert explanation(score=-7.0).percentile == 0
    assert explanation(score=0.0).percentile == 0
    assert explanation(score=2.0).percentile == 100
    assert explanation(score=9.0).percentile == 100


def test_without_reference_there_is_no_placing_and_still_a_table():
    shown = explanation(reference={})
    assert shown.normalised is None
    assert shown.percentile is None
    assert [share.average_weight for share in shown.shares] == [None] * 4
    text = str(shown)
    assert "reference" not in text
    assert "nan" not in text
    assert list(lines_of(text)) == ["beaver-harm", "ultra-helpful", "verbosity", "code[style]"]


def test_the_dictionary_holds_everything_as_plain_json():
    shown = explanation(steered={"multiply": {"verbosity": 2.0}, "drop": []})
    for entry in (shown.to_dict(), explanation(reference={}).to_dict()):
        assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    entry = shown.to_dict()
    assert set(entry) == {"verdict", "score", "normalised", "percentile", "shares", "model", "steered", "score_std",
                          "approximate"}  # fmt: skip
    assert sum(share["contribution"] for share in entry["shares"]) == pytest.approx(entry["score"], abs=1e-12)
    assert entry["shares"][1]["name"] == "beaver-harm"
    assert entry["steered"] == {"multiply": {"verbosity": 2.0}, "drop": []}
    assert entry["model"] == "small"


# --- text ----------------------------------------------------------------------------------------


def test_the_text_shows_every_number_of_every_objective():
    text = str(explanation())
    lines = lines_of(text)
    assert list(lines) == [share.name for share in explanation().ranked]
    for share in explanation().shares:
        line = lines[share.name]
        for number in (
            f"{share.rating:.2f}",
            f"{share.low:.3g}..{share.high:.3g}",
            f"{share.weight:.1%}",
            f"{share.average_weight:.1%}",
            f"{share.relative:+.4f}",
            f"{share.contribution:+.4f}",
        ):
            assert re.search(rf"(?<!\S){re.escape(number)}(?!\S)", line), (number, line)


def test_the_last_line_sums_the_columns():
    footer = str(explanation()).rstrip().splitlines()[-1].split()
    assert footer == ["score", f"{RELATIVE.sum():+.4f}", f"{CONTRIBUTIONS.sum():+.4f}"]


def test_the_headline_places_the_score():
    headline = headline_of(explanation(score=0.9))
    assert (
        headline
        == "score +0.9000   +2.00 standard deviations from the reference mean, above 45% of reference responses"
    )
    steered = headline_of(explanation(steered={"multiply": {}, "drop": ["code[style]"]}))
    assert steered.rstrip().endswith("(steered)")
    assert "steered" not in headline


def test_bars_point_to_the_side_of_their_sign_and_the_longest_fills_it():
    lines = lines_of(str(explanation()))
    bars = {name: re.search(r"([ ▏▎▍▌▋▊▉█▕▐]{12})│([ ▏▎▍▌▋▊▉█▕▐]{12})", line).groups() for name, line in lines.items()}
    assert len({line.index("│") for line in lines.values()}) == 1, "the bars share one axis"
    assert bars["beaver-harm"] == ("█" * 12, " " * 12)
    assert bars["ultra-helpful"] == (" " * 12, "█" * 6 + " " * 6)
    left, right = bars["verbosity"]
    assert left.strip() and left.endswith("█") and not right.strip()
    left, right = bars["code[style]"]
    assert right.strip() and not right.startswith(" ") and not left.strip()


def test_a_narrow_terminal_gets_a_narrower_table():
    text = narrow(explanation())
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert set(lines_of(text)) == set(NAMES)
    assert "average" not in text.splitlines()[2]
    assert f"{CONTRIBUTIONS.sum():+.4f}" in text
    assert len({line.index("│") for line in lines_of(text).values()}) == 1


def test_equal_rewards_draw_no_bars():
    text = str(explanation(relative=np.zeros(4)))
    assert "█" not in text
    assert "+0.0000" in text


@pytest.mark.parametrize("value", [-2.0, -1.0, -0.51, -0.01, 0.0, 0.02, 0.3, 0.999, 1.0, 5.0])
@pytest.mark.parametrize("width", [12, 24])
def test_a_bar_is_as_long_as_its_value_and_never_wider_than_its_place(value, width):
    bar = signed_bar(value, width)
    left, right = bar.plain.split("│")
    assert len(left) == len(right) == width // 2
    drawn, blank = (right, left) if value >= 0 else (left, right)
    assert not blank.strip()
    full = min(abs(value), 1.0) * width / 2
    assert abs(len(drawn.strip()) - full) <= 1
    styles = {str(span.style) for span in bar.spans if bar.plain[span.start : span.end].strip(" │")}
    assert styles <= {"green" if value >= 0 else "red"}


# --- HTML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.00004, "+0.0000"), (0.0, "+0.0000"), (-0.00006, "-0.0001"), (1.5, "+1.5000")]
)
def test_nothing_is_minus_zero(value, shown):
    assert signed(value) == shown


def test_the_page_holds_the_table_in_colours_and_stands_alone():
    page = explanation().to_html()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    for name in NAMES:
        assert name in page
    for share in explanation().shares:
        assert f"{share.contribution:+.4f}" in page
    positions = [page.index(f'class="name">{share.name}') for share in explanation().ranked]
    assert positions == sorted(positions)
    widths = [float(width) for width in re.findall(r'<i(?: class="minus")? style="--v:([0-9.]+)">', page)]
    assert widths == pytest.approx([abs(share.relative) / 0.34 for share in explanation().ranked], abs=1e-3)
    assert page.count('<i class="minus"') == 2, "bars for the worse go to the left"


def test_the_page_shows_the_conversation_as_text():
    conversation = Conversation.from_prompt("Is <b>this</b> bold?", "<script>alert(1)</script>")
    page = explanation().to_html(conversation)
    assert "Is &lt;b&gt;this&lt;/b&gt; bold?" in page
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_one_page_holds_several_explanations_and_is_one_document():
    page = explanations_page([("row 1", explanation(), None), ("row 7", explanation(score=0.25), None)])
    assert page.count("<!doctype html>") == page.count("</html>") == 1
    assert page.index("row 1") < page.index("row 7") < page.index("+0.2500")


# --- the verdict first, small objectives folded ---------------------------------------------------

SMALL = np.array([0.17, -0.34, 0.002, -0.001])


def test_the_verdict_opens_text_page_and_notebook():
    shown = explanation(score=0.9)
    assert " ".join(str(shown).split()).startswith(shown.verdict)
    assert f'<h1 class="verdict">{shown.verdict}</h1>' in shown.to_html()
    assert shown.verdict in shown._repr_html_() and shown.to_dict()["verdict"] == shown.verdict
    assert "scores higher than 45% of reference responses" in shown.verdict
    assert "raised most by ultra-helpful and code[style], lowered most by beaver-harm and verbosity" in shown.verdict


def test_objectives_under_two_percent_are_one_line_unless_all_are_shown():
    shown = explanation(relative=SMALL)
    assert [share.name for share in shown.shown] == ["beaver-harm", "ultra-helpful"]
    text, rest = str(shown), sum(share.contribution for share in shown.folded)
    line = next(line for line in text.splitlines() if line.startswith("2 others, together"))
    assert line.split()[-2:] == ["+0.0010", f"{rest:+.4f}"]
    assert "code[style]" not in text and "2 others, together" in shown.to_html() + shown._repr_html_()
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in shown.lines(120, every=True):
        console.print(part)
    assert set(lines_of(console.export_text())) == set(NAMES)
    assert shown.to_html().count("code[style]") == 1, "folded objectives are on the page"
    assert "others" not in str(explanation()), "nothing is folded where all are large"


def test_a_bar_of_a_bias_without_weight_is_explained_where_it_stands():
    shown = replace(explanation(), biases=("verbosity",))
    assert shown.note == "", "its weight is 5%"
    little = [replace(share, weight=0.002) for share in shown.shares]
    shown = replace(shown, shares=little)
    assert shown.note.startswith("verbosity has hardly any weight of its own. Its bar is")
    assert shown.verdict.endswith("lowered most by beaver-harm and the correction for verbosity.")
    for text in (" ".join(str(shown).split()), shown.to_html(), shown._repr_html_()):
        assert "the part of the other rewards that varies with it is subtracted" in text
    assert replace(shown, biases=()).note == ""


def test_the_figure_has_a_bar_for_each_shown_objective_and_one_for_the_others():
    figure = explanation(relative=SMALL).plot()
    bars = figure.axes[0].containers[0]
    assert [bar.get_width() for bar in bars] == pytest.approx([-0.34, 0.17, 0.001])
    assert figure._repr_png_().startswith(b"\x89PNG")


# --- uncertainty and steering --------------------------------------------------------------------


def test_uncertainty_stands_in_raw_units_beside_the_rating():
    sure = np.array([0.1, 0.05, 0.02, 0.5])
    shown = explanation(uncertainty=sure, score_std=0.125)
    assert [share.uncertainty for share in shown.shares] == pytest.approx([0.4, 0.2, 0.2, 3.0])  # of 1..5, 0..4, 0..10
    lines = lines_of(str(shown))
    assert re.search(r"4\.20 +0\.40 +1\.\.5", lines["ultra-helpful"])
    assert "± 0.1250" in headline_of(shown)
    assert "4.20±0.40" in lines_of(narrow(shown))["ultra-helpful"]
    assert "± 0.40" in shown.to_html() and "± 0.125" in shown.to_html()
    assert shown.to_dict()["shares"][1]["uncertainty"] == pytest.approx(0.2)
    assert "±" not in str(explanation()) + explanation().to_html()


def test_a_steered_explanation_says_how():
    shown = explanation(steered={"multiply": {"verbosity": 2.0}, "drop": ["code[style]"]})
    assert "steered: verbosity is weighted 2 times; code[style] is dropped" in str(shown)
    assert "verbosity is weighted 2 times; code[style] is dropped." in shown.to_html()


# --- names ---------------------------------------------------------------------------------------


def test_names_are_text_on_the_page():
    shown = explanation(objectives=[Objective.rated("<script>alert(1)</script>", 0, 1), *OBJECTIVES[1:]])
    assert "<script>" not in shown.to_html()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown.to_html()
    assert "<script>alert(1)</script>" in str(shown)
