"""Metrics of a run, each against a slow obvious version, and against the benchmarks on the same data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from armorm.conversation import Conversation
from armorm.data.preferences import PreferencePair
from armorm.evaluation.runner import evaluate
from armorm.objectives import Objective, ObjectiveSet
from armorm.reward_model import ArmoRM
from armorm.training.evaluate import pair_metrics, rating_metrics, within_prompt_accuracy


def within_prompt_by_hand(prediction, rating, prompts) -> tuple[float, int]:
    right, count = 0.0, 0
    for i in range(len(rating)):
        for j in range(len(rating)):
            if prompts[i] == prompts[j] and rating[i] > rating[j]:
                count += 1
                right += 1.0 if prediction[i] > prediction[j] else 0.5 if prediction[i] == prediction[j] else 0.0
    return (right / count if count else math.nan), count


row = st.tuples(
    st.integers(-2, 2),
    st.one_of(st.integers(1, 4), st.just(math.nan)),
    st.integers(0, 3),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(row, max_size=15), st.booleans())
def test_within_prompt_accuracy_is_that_of_a_double_loop(rows, as_text):
    prediction, rating = (np.array([row[i] for row in rows], np.float64) for i in (0, 1))
    prompts = np.array([f"prompt {p}" if as_text else p for *_, p in rows], str if as_text else np.int64)
    accuracy, pairs = within_prompt_accuracy(prediction, rating, prompts)
    expected, count = within_prompt_by_hand(prediction, rating, prompts)
    assert pairs == count
    assert accuracy == pytest.approx(expected, nan_ok=True)


def test_only_responses_to_one_prompt_are_compared():
    # Between prompts every order is wrong, within each it is right.
    prediction, rating = np.array([5.0, 6.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 4.0])
    assert within_prompt_accuracy(prediction, rating, np.array([0, 0, 1, 1])) == (1.0, 2)
    assert within_prompt_accuracy(prediction, rating, np.zeros(4, int)) == (2 / 6, 6)


OBJECTIVES = ObjectiveSet(
    [
        Objective.rated("s-up", 1, 5),
        Objective.rated("s-down", 0, 10, direction="lower"),
        Objective.rated("s-rare", 0, 4),
        Objective.rated("s-never", 0, 1),
    ]
)


def rated_rows():
    """Rewards that follow the ratings roughly; the third objective has two ratings, the fourth none."""
    rng = np.random.default_rng(0)
    ratings = np.column_stack(
        [rng.integers(1, 6, 60), rng.integers(0, 11, 60), rng.integers(0, 5, 60), np.zeros(60)]
    ).astype(float)
    rewards = OBJECTIVES.to_reward(ratings) + 0.2 * rng.normal(size=ratings.shape)
    ratings[rng.random(ratings.shape) < 0.4] = math.nan
    ratings[2:, 2] = math.nan
    ratings[:2, 2] = [1, 3]
    ratings[:, 3] = math.nan
    return rewards, ratings, rng.integers(0, 12, 60)


def test_rating_metrics_are_those_of_each_objective_by_hand():
    rewards, ratings, prompts = rated_rows()
    metrics = rating_metrics(rewards, ratings, OBJECTIVES, prompts)
    assert list(metrics) == OBJECTIVES.names
    for column, objective in enumerate(OBJECTIVES):
        found = metrics[objective.name]
        rows = [i for i in range(60) if not math.isnan(ratings[i, column])]
        raw = [float(objective.to_raw(rewards[i, column])) for i in rows]
        given = [ratings[i, column] for i in rows]
        assert found["n"] == len(rows)
        assert found["prompts"] == len({int(prompts[i]) for i in rows})
        accuracy, pairs = within_prompt_by_hand(raw, given, [prompts[i] for i in rows])
        assert found["within_prompt"] == pytest.approx(accuracy, nan_ok=True)
        assert found["within_prompt_pairs"] == pairs
        if len(rows) < 3:
            assert math.isnan(found["spearman"])
            assert math.isnan(found["mae"])
        else:
            assert found["spearman"] == pytest.approx(spearmanr(raw, given).statistic)
            assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(raw, given, strict=True)) / len(rows))


def test_a_good_prediction_of_an_objective_of_direction_lower_has_a_positive_correlation():
    rewards, ratings, prompts = rated_rows()
    metrics = rating_metrics(rewards, ratings, OBJECTIVES, prompts)
    assert metrics["s-down"]["spearman"] > 0.7
    assert metrics["s-down"]["within_prompt"] > 0.7
    reversed_metrics = rating_metrics(1 - rewards, ratings, OBJECTIVES, prompts)
    assert reversed_metrics["s-down"]["spearman"] < -0.7


def test_errors_are_in_raw_units():
    objectives = ObjectiveSet([Objective.rated("s-a", 0, 10)])
    ratings = np.array([[2.0], [4.0], [6.0]])
    metrics = rating_metrics(objectives.to_reward(ratings) + 0.15, ratings, objectives, np.arange(3))
    assert metrics["s-a"]["mae"] == pytest.approx(1.5)
    assert metrics["s-a"]["within_prompt_pairs"] == 0
    assert math.isnan(metrics["s-a"]["within_prompt"])


def share(flags) -> float:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else math.nan


def pair(prompt: str, subset: str) -> PreferencePair:
    chosen, rejected = (Conversation.from_prompt(prompt, text) for text in ("yes", "no"))
    return PreferencePair(chosen, rejected, subset=subset)


def test_pair_metrics_are_those_of_a_loop_over_pairs():
    rng = np.random.default_rng(1)
    p, names = 40, ["s-a", "s-b", "s-c"]
    margins = rng.integers(-2, 3, p).astype(float)
    reward_margins = rng.integers(-2, 3, (p, 3)).astype(float)
    lengths = rng.integers(-2, 3, p).astype(float)
    margins[:3] = math.nan
    reward_margins[:3] = math.nan
    subsets = ["" if i % 5 == 0 else f"subset {i % 3}" for i in range(p)]
    prompts = [f"prompt {i % 7}" for i in range(p)]
    pairs = [pair(prompt, subset) for prompt, subset in zip(prompts, subsets, strict=True)]
    metrics = pair_metrics(margins, reward_margins, lengths, pairs, names)
    right = [bool(margin > 0) for margin in margins]

    assert metrics["accuracy"] == share(right)
    assert (metrics["pairs"], metrics["prompts"], metrics["refused"]) == (40, 7, 3)
    assert metrics["ties"] == sum(margin == 0 for margin in margins) > 0
    assert metrics["baselines"] == {
        "uniform_weights": share(sum(row) > 0 for row in reward_margins),
        "longer_response": share(length > 0 for length in lengths),
    }
    assert metrics["objectives"] == {
        name: share((row[i] > 0) + (row[i] == 0) / 2 for row in reward_margins) for i, name in enumerate(names)
    }
    tied = pair_metrics(margins, reward_margins * [1, 0, 1], lengths, pairs, names)["objectives"]
    assert [name for name, accuracy in tied.items() if math.isnan(accuracy)] == []
    tied = pair_metrics(margins[3:], reward_margins[3:] * [1, 0, 1], lengths[3:], pairs[3:], names)["objectives"]
    assert [name for name, accuracy in tied.items() if math.isnan(accuracy)] == ["s-b"]
    longer = [i for i in range(p) if lengths[i] > 0]
    shorter = [i for i in range(p) if lengths[i] < 0]
    assert metrics["longer_right"] == {"accuracy": share(right[i] for i in longer), "pairs": len(longer)}
    assert metrics["longer_wrong"] == {"accuracy": share(right[i] for i in shorter), "pairs": len(shorter)}
    assert len(longer) + len(shorter) < p
    assert metrics["subsets"] == {
        name: {"accuracy": share(right[i] for i in range(p) if subsets[i] == name), "pairs": subsets.count(name)}
        for name in ("subset 0", "subset 1", "subset 2")
    }


def test_no_pairs_give_no_figures_but_no_error():
    metrics = pair_metrics(np.empty(0), np.empty((0, 2)), np.empty(0), [], ["a", "b"])
    assert (metrics["pairs"], metrics["refused"], metrics["ties"], metrics["subsets"]) == (0, 0, 0, {})
    values = [metrics["accuracy"], *metrics["baselines"].values(), *metrics["objectives"].values()]
    assert all(math.isnan(value) for value in values)


@pytest.fixture(scope="module")
def trained(small_run, small_recipe):
    """The model, its metrics, its store and the folder of its data."""
    rm = ArmoRM.from_pretrained(small_run, dtype="float32")
    metrics = json.loads((small_run / "metrics.json").read_text())
    return rm, metrics["evaluation"], small_run / "work" / "features", Path(small_recipe.data_root)


@pytest.fixture
def nothing_is_computed_again(trained, monkeypatch):
    def forward(*_):
        raise AssertionError("a feature that the training run left behind was computed again")

    monkeypatch.setattr(type(trained[0].backbone), "features", forward)


def test_the_ratings_benchmark_finds_the_metrics_of_the_run(trained, nothing_is_computed_again):
    rm, metrics, store, data = trained
    files = [data / f"{name}.jsonl" for name in ("workshop", "harbour", "market")]
    results = evaluate("ratings", rm, files, features=store, quiet=True)
    figures = results.level("subsets")
    rated = {name: found for name, found in metrics["ratings"].items() if found["n"]}
    assert set(results.objectives) == set(rated)
    for name, expected in rated.items():
        spearman = figures[f"{name}: Spearman"]
        assert spearman.value == pytest.approx(expected["spearman"], abs=1e-6)
        assert (spearman.examples, spearman.prompts) == (expected["n"], expected["prompts"])
        assert figures[f"{name}: error"].value == pytest.approx(expected["mae"], abs=1e-5)
        if expected["within_prompt_pairs"]:
            assert figures[f"{name}: within prompts"].value == pytest.approx(expected["within_prompt"], abs=1e-6)


def test_the_pairs_benchmark_finds_the_metrics_of_the_run(trained, nothing_is_computed_again):
    rm, metrics, store, data = trained
    results = evaluate("pairs", rm, data / "choices.jsonl", features=store, quiet=True)
    (expected,) = metrics["pairs"].values()
    overall = results.level("overall")["accuracy"]
    assert (overall.examples, overall.prompts) == (expected["pairs"], expected["prompts"])
    assert overall.value == pytest.approx(expected["accuracy"])
    assert results.counts["ties"] == expected["ties"]
    assert results.audits["gate"]["all"]["uniform"] == pytest.approx(expected["baselines"]["uniform_weights"])
    for name, accuracy in expected["objectives"].items():
        assert results.audits["objectives"][name]["debiased"] == pytest.approx(
            math.nan if accuracy is None else accuracy, nan_ok=True
        )
