"""Audits by hand, and against slow obvious versions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import spearmanr

from armorm.attribution import deciding
from armorm.conversation import Conversation
from armorm.evaluation.audits.bias import bias_audit, list_items, markdown_elements, quantities
from armorm.evaluation.audits.calibration import calibration
from armorm.evaluation.audits.objectives import ALL, accuracy_alone, decisions, gate
from armorm.evaluation.bootstrap import Clusters
from armorm.evaluation.examples import Item, LabelledPairs
from armorm.evaluation.scorer import Scored
from tests.helpers.scored_columns import scored

NAN = float("nan")


def compared(*pairs: tuple[int, int], weights=None) -> LabelledPairs:
    better, worse = (np.array(side, np.int64) for side in zip(*pairs, strict=True))
    return LabelledPairs(better, worse, np.arange(len(pairs)), np.ones(len(pairs)), len(pairs))


def test_every_item_counts_once_however_many_responses_it_has():
    items = [Item("a", "", "", "p", (1.0, 0.0)), Item("b", "", "", "q", (1.0, 1.0, 0.0, 0.0))]
    found = LabelledPairs.of(items, [np.array([0, 1]), np.array([2, 3, 4, -1])])
    assert list(zip(found.better, found.worse, strict=True)) == [(0, 1), (2, 4), (2, -1), (3, 4), (3, -1)]
    assert found.weight.tolist() == [1, 0.25, 0.25, 0.25, 0.25]
    # Item a wrong; of b, one of four right, two refused.
    assert found.accuracy(np.array([0, 1, 2, 0, 1.0])) == pytest.approx((0 + 1 / 4) / 2)
    assert found.item_accuracy(np.array([0, 1, 2, 0, 1.0])).tolist() == [0, 0.25]


def test_the_closest_comparison_is_the_lowest_better_against_the_highest_worse():
    items = [Item("a", "", "", "p", (1.0, 1.0, 0.0, 0.0)), Item("b", "", "", "q", (1.0, 0.0))]
    found = LabelledPairs.of(items, [np.array([0, 1, 2, 3]), np.array([4, -1])])
    closest = found.closest(np.array([5, 3, 1, 2, 9.0]))
    assert (closest.better.tolist(), closest.worse.tolist(), closest.item.tolist()) == ([1], [3], [0])


def test_bias_figures_by_hand():
    # Four pairs; the better one is longer in the first two, shorter in the third, equal in the fourth.
    length = np.array([10, 5, 8, 4, 3, 9, 6, 6.0])
    scores = np.array([2, 1, 0, 1, 4, 3, 1, 0.0])
    prompts = ["a", "a", "b", "b", "c", "c", "d", "d"]
    found = bias_audit(length, {"as served": scores}, compared((0, 1), (2, 3), (4, 5), (6, 7)), prompts)
    assert (found["examples_more_is_better"], found["examples_more_is_worse"]) == (2, 1)
    assert found["more_is_better"] == pytest.approx(2 / 3)
    figures = found["views"]["as served"]
    assert figures["more_is_better"] == pytest.approx(1 / 2)
    assert figures["more_is_worse"] == 1.0
    assert figures["more_wins"] == pytest.approx(1 / 3)  # only in the first pair
    assert figures["correlation"] == pytest.approx(spearmanr(scores, length).statistic)
    centred = [values - np.repeat(values.reshape(-1, 2).mean(1), 2) for values in (scores, length)]
    assert figures["correlation_within_prompts"] == pytest.approx(spearmanr(*centred).statistic)


def test_a_refused_response_is_wrong_on_its_side_and_in_no_correlation():
    found = bias_audit(np.array([3, 1.0]), {"v": np.array([NAN, 1.0])}, compared((0, 1)), ["a", "a"])
    assert found["views"]["v"]["more_is_better"] == 0
    assert found["views"]["v"]["more_wins"] == 0
    assert np.isnan(found["views"]["v"]["correlation"])


def test_a_debiased_view_of_a_length_judge_is_fair():
    rng = np.random.default_rng(0)
    quality, length = rng.normal(size=(2, 2000))
    pairs = [(i, i + 1) if quality[i] > quality[i + 1] else (i + 1, i) for i in range(0, 2000, 2)]
    views = {"as served": quality, "before debiasing": quality + 2 * length}
    figures = bias_audit(length, views, compared(*pairs), [str(i // 2) for i in range(2000)])["views"]
    before, after = figures["before debiasing"], figures["as served"]
    assert before["more_is_better"] - before["more_is_worse"] > 0.5
    assert after["more_is_better"] == after["more_is_worse"] == 1
    assert before["correlation_within_prompts"] > 0.8 > abs(after["correlation_within_prompts"]) + 0.7


def test_markdown_and_lists_are_counted():
    text = "# Title\n\n- one\n- **two**\n1. three\n\n| a | b |\n\n```python\nx = 1  # y\n```\nSee [this](http://x) and `z`.\n2 * 3 * 4"
    assert list_items(text) == 3
    assert markdown_elements(text) == 1 + 3 + 1 + 1 + 1 + 1 + 1  # heading, items, bold, row, block, link, code
    assert markdown_elements("A plain sentence - with a dash, 2 * 3 and a_b_c.") == 0
    found = quantities([Conversation.from_prompt("a", text), Conversation.from_prompt("a", "plain")])
    assert found["length"].tolist() == [len(text), 5]
    assert found["markdown"].tolist() == [9, 0]


contribution = st.integers(-4, 4).map(float)


@settings(deadline=None, max_examples=80)
@given(st.lists(contribution, min_size=1, max_size=6))
def test_what_decides_is_the_smallest_set_without_which_it_would_not_hold(row):
    mask = deciding(np.array([row]))[0]
    margin = sum(row)
    if margin == 0:
        assert not mask.any()
        return
    sign = 1 if margin > 0 else -1
    without = sign * (margin - sum(value for value, decides in zip(row, mask, strict=True) if decides))
    assert without <= 0
    smaller = [
        chosen
        for size in range(int(mask.sum()))
        for chosen in combinations(range(len(row)), size)
        if sign * (margin - sum(row[i] for i in chosen)) <= 0
    ]
    assert smaller == []


def model(rewards, weights, transform=None) -> Scored:
    """Every two responses share a prompt."""
    return scored(rewards, weights, scale=2, transform=transform, prompt_index=np.arange(len(rewards)) // 2)


def test_each_objective_alone_is_judged_plain_and_debiased():
    # The second objective is length: debiased, it is nothing, and the first loses what length explained.
    found = accuracy_alone(
        model([[1, 2], [0.5, 0], [0, 1], [1, 0]], [[0.75, 0.25]] * 4, [[1, 0], [-1, 0]]), compared((0, 1), (2, 3))
    )
    assert found["o0"]["reward"] == 1 / 2  # 1 > .5, 0 < 1
    assert found["o0"]["debiased"] == 0  # 1 - 2 < .5 - 0, 0 - 1 < 1 - 0
    assert found["o1"] == {"reward": 1, "debiased": pytest.approx(np.nan, nan_ok=True), "mean_weight": 0.25}
    # A tie is neither right nor wrong.
    tied = accuracy_alone(model([[1, 0], [1, 0], [2, 0], [1, 0]], [[0.5, 0.5]] * 4), compared((0, 1), (2, 3)))
    assert tied["o0"]["reward"] == 3 / 4
    assert np.isnan(tied["o1"]["reward"])


def test_decisions_are_counted_by_subset_and_outcome():
    rewards = [[3, 0], [0, 1], [0, 2], [1, 0], [1, 0], [0, 5]]
    found = decisions(model(rewards, [[0.5, 0.5]] * 6), compared((0, 1), (2, 3), (4, 5)), ["x", "x", "y"])
    assert found["x"]["wins"] == 2
    assert found["x"]["deciding_wins"] == {"o0": 0.5, "o1": 0.5}
    assert (found["y"]["losses"], found["y"]["deciding_losses"]) == (1, {"o1": 1.0})
    assert (found[ALL]["wins"], found[ALL]["losses"]) == (2, 1)


def test_the_gate_is_measured_against_its_own_mean_weights_of_the_source():
    # Within source x the right weighting alternates by prompt; within y it is always the first objective.
    rng = np.random.default_rng(0)
    n = 120
    rewards, weights, pairs, subsets = [], [], [], []
    for item in range(n):
        first = item % 2 == 0 or item >= n // 2
        gap = rng.uniform(0.5, 1)
        rewards += [[gap, -gap * 0.99] if first else [-gap * 0.99, gap], [0, 0]]
        weights += [[0.9, 0.1] if first else [0.1, 0.9]] * 2
        pairs.append((2 * item, 2 * item + 1))
        subsets.append("x" if item < n // 2 else "y")
    rows = [np.array(pair) for pair in pairs]
    where = Clusters.of_items([str(i) for i in range(n)], subsets)
    found = gate(model(rewards, weights), compared(*pairs), subsets, where, rows)
    assert found["x"]["gate"] == found["y"]["gate"] == 1
    assert found["x"]["weights"] == pytest.approx({"o0": 0.5, "o1": 0.5})
    assert found["y"]["mean_weights"] == 1
    assert found["y"]["gain"] == 0
    assert found["x"]["mean_weights"] == 1  # half of .01 of the gap still decides: equal weights are right here
    assert found["x"]["uniform"] == 1
    assert found[ALL]["prompts"] == n
    tilted = np.array(weights)
    tilted[:n:4] = tilted[1:n:4] = [0.99, 0.01]
    again = gate(model(rewards, tilted), compared(*pairs), subsets, where, rows)
    assert again["x"]["mean_weights"] == 0.5
    assert again["x"]["gain"] == 0.5
    assert again["x"]["interval"][0] > 0.3


def several_responses(rng, names):
    """40 items of a few responses, some shared by items or unscored, in subsets; their scores, pairs and rows."""
    n, k = 60, 5
    rewards = rng.normal(size=(n, k))
    rewards[n // 2 :] = rewards[: n // 2]  # ties
    rewards[rng.choice(n, 6, replace=False)] = np.nan
    of_prompt = np.where(np.isnan(rewards[:, 0]), -1, np.arange(n) // 3)
    made = scored(rewards, rng.dirichlet(np.ones(k), n), transform=rng.normal(size=(k, k)), prompt_index=of_prompt)
    items, rows = [], []
    for i in range(40):
        at = rng.choice(n, rng.integers(1, 5), replace=False)
        at[rng.random(len(at)) < 0.1] = -1
        rows.append(at)
        items.append(Item(str(i), "", str(rng.choice(names)), f"p{i // 2}", tuple(rng.integers(0, 3, len(at)) * 1.0)))
    return made, items, LabelledPairs.of(items, rows), rows


@pytest.mark.parametrize("names", [["x", "y", "z"], ["", "x"], ["all", "x"], [""]])
@pytest.mark.parametrize("seed", range(3))
def test_the_gate_by_source_is_that_of_each_source_alone(names, seed):
    made, items, pairs, rows = several_responses(np.random.default_rng(seed), names)
    subsets = [item.subset for item in items]
    found = gate(made, pairs, subsets, Clusters.of_items([item.prompt for item in items], subsets), rows)
    under_mean = np.full(len(items), np.nan)
    for name in sorted(set(subsets)):
        inside = [i for i, subset in enumerate(subsets) if subset == name]
        firsts: dict[int, int] = {}
        for row in (row for i in inside for row in rows[i] if row >= 0 and made.batch.prompt_index[row] >= 0):
            firsts.setdefault(made.batch.prompt_index[row], row)
        mean = made.batch.gating_weights[[firsts[prompt] for prompt in sorted(firsts)]].mean(0)
        if name in found and name != ALL:
            assert found[name]["weights"] == dict(zip(made.batch.names, mean.tolist(), strict=True))
        values = np.array([(rewards * mean).sum() for rewards in made.debiased])
        under_mean[inside] = pairs.take(np.isin(pairs.item, inside)).item_accuracy(values)[inside]
    views = {"gate": pairs.item_accuracy(made.scores), "mean_weights": under_mean}
    views["uniform"] = pairs.item_accuracy(made.debiased.mean(1))
    assert set(found) == {ALL, *(name for name in subsets if name or len(set(subsets)) > 1)}
    for name, entry in found.items():
        chosen = np.array([name in (ALL, subset) for subset in subsets])
        for view, values in views.items():
            assert entry[view] == values[chosen & ~np.isnan(values)].mean()
        assert entry["gain"] == entry["gate"] - entry["mean_weights"]


@pytest.mark.parametrize("names", [["x", "y", "z"], ["", "x"], ["all", "x"]])
def test_decisions_by_subset_are_those_of_each_subset_alone(names):
    made, items, pairs, _ = several_responses(np.random.default_rng(0), names)
    subsets = [item.subset for item in items]
    found = decisions(made, pairs, subsets)
    closest = pairs.closest(made.scores)
    margins, mask = closest.difference(made.scores), deciding(closest.difference(made.batch.contributions))
    assert list(found) == [ALL, *sorted({subsets[item] for item in closest.item} - {"", ALL})]
    for name, entry in found.items():
        inside = np.array([name in (ALL, subsets[item]) for item in closest.item])
        for outcome, rows in (("wins", inside & (margins > 0)), ("losses", inside & (margins < 0))):
            assert entry[outcome] == rows.sum()
            shares = dict(zip(made.batch.names, mask[rows].mean(0) if rows.any() else np.zeros(5), strict=True))
            assert entry[f"deciding_{outcome}"] == {name: share for name, share in shares.items() if share > 0}


def test_calibration_of_margins_that_are_what_they_say():
    rng = np.random.default_rng(0)
    size = rng.uniform(0, 3, 40_000)
    margins = np.where(rng.random(len(size)) < expit(size), size, -size)
    found = calibration(margins)
    assert found["expected_calibration_error"] < 0.015
    assert found["best_scale"] == pytest.approx(1, abs=0.05)
    overconfident = calibration(4 * margins)
    assert overconfident["expected_calibration_error"] > 0.1
    assert overconfident["best_scale"] == pytest.approx(0.25, abs=0.02)
    assert overconfident["log_loss_at_best_scale"] == pytest.approx(found["log_loss"], abs=1e-3)
    assert [entry["share"] for entry in found["bins"]] == pytest.approx([0.1] * 10, abs=1e-3)


def test_calibration_by_hand():
    found = calibration(np.array([1.0, -2.0, 0.0, NAN]), np.array([1.0, 1.0, 2.0, 5.0]), bins=1)
    confidence = (expit(1) + expit(2) + 2 * 0.5) / 4
    assert found["bins"] == [{"confidence": pytest.approx(confidence), "accuracy": 0.5, "share": pytest.approx(1)}]
    assert found["log_loss"] == pytest.approx((np.log1p(np.exp(-1)) + np.log1p(np.exp(2)) + 2 * np.log(2)) / 4)
    assert found["brier"] == pytest.approx((expit(-1) ** 2 + expit(2) ** 2 + 2 * 0.25) / 4)
    assert calibration(np.array([NAN])) == {"comparisons": 0}
