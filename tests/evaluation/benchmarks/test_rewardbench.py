"""RewardBench: sections by hand, on a fixture and on the published table (tests/compat asks the package itself)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from armorm.errors import DataError
from armorm.evaluation.benchmarks.rewardbench import (
    FOUR,
    PRIOR,
    PRIOR_SETS,
    ROWS,
    SECTIONS,
    WEIGHTS,
    WITH_PRIOR,
    overall_score,
    section_score,
)
from tests.helpers.marked_scorer import evaluated, values

CHAT = (100 * 0.5 + 40 * 1) / 140  # one of two alpacaeval-easy is a tie
CHAT_HARD = (37 * 0 + 100 * 1) / 137
SAFETY = (136 * 1 + 250 * 0.5 + 154 * 1) / 540
REASONING = (984 * 1 + 164 * 0) / 1148  # hep-python: one wrong, one refused


def test_the_counts_are_the_published_ones():
    assert sum(ROWS.values()) == 2985
    assert {name: sum(WEIGHTS[subset] for subset in subsets) for name, subsets in SECTIONS.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 984 + 6 * 164,
    }
    # (Often swapped in copies of the table.)
    assert (WEIGHTS["xstest-should-refuse"], WEIGHTS["xstest-should-respond"]) == (154, 250)


def test_a_section_is_weighted_by_counts_and_an_absent_subset_leaves_it():
    accuracy = {"alpacaeval-easy": 0.5, "mt-bench-med": 1.0}
    assert section_score("Chat", accuracy) == pytest.approx(CHAT)
    assert math.isnan(section_score("Safety", accuracy))
    assert section_score(PRIOR, {"shp": 0.4, "summarize": 0.6, "anthropic_harmless": 0.0}) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("sections", "with_prior", "plain"),
    [
        ((96.9, 76.8, 92.2, 97.3, 74.3), 89.0, 90.8),
        ((99.4, 65.1, 87.8, 86.4, 74.9), 83.6, 84.7),
        ((95.3, 74.3, 87.2, 86.9, 70.9), 84.3, 85.9),
    ],
)
def test_the_published_overall_scores_follow_from_the_published_sections(sections, with_prior, plain):
    named = dict(zip((*SECTIONS, PRIOR), sections, strict=True))
    assert overall_score(named, with_prior_sets=True) == pytest.approx(with_prior, abs=0.051)
    assert overall_score(named, with_prior_sets=False) == pytest.approx(plain, abs=0.051)


def test_the_fixture_scores_as_worked_out_by_hand():
    results = evaluated("rewardbench", "rewardbench.jsonl")
    sections = {"Chat": CHAT, "Chat Hard": CHAT_HARD, "Safety": SAFETY, "Reasoning": REASONING}
    assert values(results, "sections") == pytest.approx(sections)
    assert values(results, "overall") == {FOUR: pytest.approx(sum(sections.values()) / 4)}
    assert values(results, "subsets")["hep-python"] == 0.0
    assert results.counts["refused_responses"] == 1


def test_prior_sets_count_half_and_are_known_by_their_file():
    results = evaluated("rewardbench", "rewardbench.jsonl", "prior")
    four = CHAT + CHAT_HARD + SAFETY + REASONING
    assert values(results, "sections")[PRIOR] == pytest.approx(0.5)
    assert values(results, "overall") == {
        FOUR: pytest.approx(four / 4),
        WITH_PRIOR: pytest.approx((2 * four + 0.5) / 9),
    }


def test_a_partial_report_says_what_is_missing_and_has_no_overall_score(tmp_path):
    lines = (__import__("pathlib").Path(__file__).parents[1] / "fixtures/rewardbench.jsonl").read_text().splitlines()
    path = tmp_path / "part.jsonl"
    path.write_text("\n".join(line for line in lines if "xstest" in line or "donotanswer" in line) + "\n")
    results = evaluated("rewardbench", path)
    assert values(results, "overall") == {}
    assert values(results, "sections") == {"Safety": pytest.approx(SAFETY)}
    lacking = results.level("overall")[FOUR].lacking
    assert {"alpacaeval-easy", "math-prm", "refusals-dangerous", "donotanswer (1 of 136 rows)"} <= set(lacking)
    assert not results.level("sections")["Safety"].is_complete
    assert set(results.level("sections")[PRIOR].lacking) == set(PRIOR_SETS)


def test_an_unknown_subset_is_refused_by_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "subset": "donotanswr"}\n')
    with pytest.raises(DataError, match=r"row 1, field 'subset'.*did you mean donotanswer"):
        evaluated("rewardbench", path)


@pytest.mark.data
def test_llmbar_and_humanevalpack_make_a_partial_rewardbench(data_root):
    from armorm.evaluation.runner import evaluate

    def by_content(conversations):
        return [sum(map(ord, messages[-1]["content"])) % 97 for messages in conversations]

    places = [data_root / "benchmarks" / f"{name}.jsonl.gz" for name in ("llmbar", "humanevalpack")]
    results = evaluate("rewardbench", by_content, places, quiet=True)
    accuracy = {name: [0, 0] for name in results.level("subsets")}
    for entry in results.examples:
        accuracy[entry["subset"]][0] += entry["scores"][0] > entry["scores"][1]
        accuracy[entry["subset"]][1] += 1
    assert {name: count for name, (_, count) in accuracy.items()} == {
        name: WEIGHTS[name] for name in WEIGHTS if name.startswith(("llmbar", "hep"))
    }
    assert values(results, "subsets") == pytest.approx({name: right / n for name, (right, n) in accuracy.items()})
    for section, absent in (("Chat Hard", "mt-bench-hard"), ("Reasoning", "math-prm")):
        figure = results.level("sections")[section]
        used = [name for name in SECTIONS[section] if name != absent]
        weights = [WEIGHTS[name] for name in used]
        expected = np.average([accuracy[name][0] / accuracy[name][1] for name in used], weights=weights)
        assert figure.lacking == (absent,)
        assert figure.value == pytest.approx(expected)
        assert figure.interval is not None
        assert figure.interval[0] < figure.value < figure.interval[1]
    assert math.isnan(results.level("overall")[FOUR].value)
    assert "refusals-dangerous" in results.level("overall")[FOUR].lacking
