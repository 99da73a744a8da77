"""JudgeBench: the single game of reward models, the double game of judges."""

from __future__ import annotations

import numpy as np
import pytest

from armorm.conversation import Conversation
from armorm.evaluation.benchmarks.judgebench import FILES, POOLED, double_game, file_of, single_game, source_of
from armorm.evaluation.runner import evaluate
from armorm.evaluation.scorer import PairJudge, ScorerError
from tests.helpers.marked_scorer import FIXTURES, evaluated, marked, values


def test_the_counts_are_the_published_ones():
    assert {name: sum(counts.values()) for name, counts in FILES.items()} == {"GPT-4o": 350, "Claude": 270}


def test_a_tie_is_the_verdict_b_and_a_refused_answer_is_wrong():
    first, second = np.array([2, 1, 1, 1, np.nan, 1]), np.array([1, 2, 1, 1, 0, np.nan])
    labels = np.array([True, True, True, False, True, False])
    assert single_game(first, second, labels).tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("verdict", "exchanged", "correct"),
    [
        ("A>B", "B>A", True),
        ("A>B", "A=B", True),
        ("A=B", "B>A", True),
        ("A>B", None, True),
        ("A>B", "A>B", False),
        ("B>A", "A>B", False),
        ("A=B", "A=B", False),
        (None, None, False),
    ],
)
def test_the_double_game_sums_two_verdicts(verdict, exchanged, correct):
    pair = [Conversation.from_prompt("q", "a"), Conversation.from_prompt("q", "b")]
    scores = PairJudge(lambda pairs: [verdict, exchanged]).score(pair).scores
    assert double_game(scores[:1], scores[1:], np.array([True])).tolist() == [correct]
    # The same with the two answers exchanged, label and all.
    scores = PairJudge(lambda pairs: [exchanged, verdict]).score(pair[::-1]).scores
    assert double_game(scores[:1], scores[1:], np.array([False])).tolist() == [correct]


def test_a_judge_sees_both_answers_in_both_orders_and_plays_the_double_game():
    asked = []

    def first_place(pairs):
        asked.extend(pairs)
        return ["A>B"] * len(pairs)

    found = evaluate("judgebench-double", first_place, FIXTURES / "judgebench", quiet=True)
    assert values(found, "overall") == {POOLED: 0.0}  # a preference for the first place is worth nothing
    assert [(a["A"], a["B"]) for a in asked[::2]] == [(b["B"], b["A"]) for b in asked[1::2]]
    assert asked[0]["prompt"][0]["role"] == "user"

    def marks(pairs):
        found = [marked([[{"content": pair[side]}] for side in "AB"]) for pair in pairs]
        return ["A>B" if a > b else "B>A" if b > a else "A=B" for a, b in found]

    found = evaluate("judgebench-double", marks, FIXTURES / "judgebench", quiet=True)
    # As in the single game, but that a tie is right for neither label.
    assert values(found, "sections") == pytest.approx({"GPT-4o": 1 / 4, "Claude": 1 / 2})
    assert {figure.baselines["chance"] for figure in found.level("sections").values()} == {0.25}


def test_a_verdict_that_is_none_and_a_judge_that_is_none_are_errors():
    with pytest.raises(ScorerError, match=r"returned 'A', expected 'A>B', 'B>A', 'A=B' or None"):
        evaluate("judgebench-double", lambda pairs: ["A"] * len(pairs), FIXTURES / "judgebench", quiet=True)
    with pytest.raises(ScorerError, match=r"expected a judge of pairs: a function \(--scorer MODULE:FUNCTION\)"):
        evaluate("judgebench-double", "armorm-tiny-rm", FIXTURES / "judgebench", quiet=True)


def test_the_fixture_scores_as_worked_out_by_hand():
    results = evaluated("judgebench", "judgebench")
    assert values(results, "subsets") == pytest.approx(
        {
            "GPT-4o mmlu-pro": 2 / 3,  # right; a tie, labelled B>A; a tie, labelled A>B
            "GPT-4o livebench-reasoning": 0,
            "Claude livebench-math": 0,  # labelled B>A, but B was refused
            "Claude livecodebench": 1,
        }
    )
    assert values(results, "sections") == pytest.approx({"GPT-4o": 2 / 4, "Claude": 1 / 2})
    assert values(results, "overall") == {POOLED: pytest.approx(3 / 6)}
    assert results.counts["ties"] == 2


def test_a_model_that_scores_all_alike_gets_the_share_of_labels_b():
    sections = evaluated("judgebench", "judgebench").level("sections")
    assert {name: figure.baselines["prompt_only"] for name, figure in sections.items()} == {
        "GPT-4o": 2 / 4,
        "Claude": 1 / 2,
    }


def test_one_file_alone_is_not_pooled():
    name = "judgebench/dataset=judgebench,response_model=gpt-4o-2024-05-13.jsonl"
    results = evaluated("judgebench", name)
    assert (values(results, "overall"), values(results, "sections")) == ({}, {"GPT-4o": 0.5})


def test_sources_and_files_are_known_by_how_they_begin():
    assert source_of("mmlu-pro-computer science") == "mmlu-pro"
    assert source_of("gsm8k") is None
    assert (file_of("claude-3-5-sonnet-20240620"), file_of("gpt-4o-2024-05-13"), file_of("o1")) == (
        "Claude",
        "GPT-4o",
        None,
    )
