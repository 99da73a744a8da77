"""Further studies of the ablation: each answers one question with the same features and the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ablations.corpus import Rated
from ablations.methods import Bench
from armorm.correlation import spearman
from armorm.heads.bradley_terry import fit_bradley_terry
from armorm.heads.debiasing import no_debiasing
from armorm.heads.quantiles import fit_quantiles, half_width, has_quantiles, pinball, share_below
from armorm.heads.regression import RegressionHead
from armorm.training.dataset import HELD_OUT_PAIRS, held_out_prompts
from armorm.training.evaluate import within_prompt_accuracy

MIN_PAIRS = 200
MOST_PAIRS_PER_PROMPT = 8
MIN_TEST_RATINGS = 100
QUANTILE_LEVELS = (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975)
INTERVALS = {"50%": (0.25, 0.75), "80%": (0.1, 0.9), "95%": (0.025, 0.975)}


def gate_forms(bench: Bench, seeds: Sequence[int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Architecture of the gate: constant, linear, one to three hidden layers; and a softmax of temperature 1."""
    forms: dict[str, dict[str, Any]] = {
        "same for every prompt": {"constant": True},
        "linear": {"hidden_layers": 0},
        "1 hidden layer": {"hidden_layers": 1},
        "2 hidden layers": {"hidden_layers": 2},
        "3 hidden layers": {"hidden_layers": 3},
        "2 hidden layers, temperature 1": {"hidden_layers": 2, "temperature": 1.0},
    }
    margins: dict[str, np.ndarray] = {}
    notes: dict[str, Any] = {}
    for name, changes in forms.items():
        constant = bool(changes.get("constant"))
        runs = []
        for seed in seeds[:1] if constant else seeds:
            network, report = bench.gate(bench.rewards, bench.debiasing, seed=seed, **changes)
            runs.append(bench.gated(network, bench.rewards, bench.debiasing, constant))
            notes.setdefault(name, []).append(
                {"loss": report.loss, "entropy": report.mean_entropy, "best_step": report.best_step}
            )
        margins[name] = np.stack(runs)
    return margins, notes


def references(bench: Bench) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reference data of the debiasing: penalties, remaining correlation on other data, and accuracy.

    Remaining correlations are means over objectives of |Spearman| with predicted length, of the training rows of each
    rated set and of the responses of the training pairs, all by out-of-fold rewards.
    """
    corpus, rewards = bench.corpus, bench.rewards
    responses = np.vstack([rewards.chosen, rewards.rejected])
    both = np.concatenate([corpus.pairs.prompts, corpus.pairs.prompts])
    places = {name: np.flatnonzero(corpus.train.sources == name) for name in dict.fromkeys(corpus.train.sources)}
    on: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "all rating rows": (rewards.reference, corpus.train.prompts),
        "both sides of the pairs": (responses, both),
        **{name: (rewards.reference[rows], corpus.train.prompts[rows]) for name, rows in places.items()},
    }
    choices: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in on}
    choices["all rating rows, within prompts"] = ("all rating rows", {"level": "within_prompt"})
    choices["all rating rows, Pearson"] = ("all rating rows", {"metric": "pearson"})
    margins: dict[str, np.ndarray] = {}
    table: dict[str, Any] = {}
    others = [i for i in range(len(bench.names)) if i != corpus.bias]
    for name, (data, options) in {"none": ("", {}), **choices}.items():
        debiasing = bench.debias(*on[data], **options) if data else no_debiasing(len(bench.names))
        network, _ = bench.gate(rewards, debiasing)
        margins[name] = bench.gated(network, rewards, debiasing)[None]
        left = {}
        for place, (values, _) in on.items():
            debiased = debiasing.apply(values)
            left[place] = float(np.mean([abs(spearman(debiased[:, i], values[:, corpus.bias])) for i in others]))
        table[name] = {"penalties": np.atleast_2d(debiasing.penalties).sum(0).tolist(), "left": left}
    return margins, table


def domains(bench: Bench) -> dict[str, Any]:
    """For each source: the gate trained on it, one trained without it, uniform weights, and the mean gating weights.

    Empty if all pairs come from one source.
    """
    if len(set(bench.corpus.pairs.sources.tolist())) < 2:
        return {}
    corpus, rewards, debiasing = bench.corpus, bench.rewards, bench.debiasing
    network, _ = bench.gate(rewards, debiasing)
    seen = bench.gated(network, rewards, debiasing) > 0
    uniform = debiasing.apply(rewards.test_chosen - rewards.test_rejected).mean(1) > 0
    table: dict[str, Any] = {}
    for source in dict.fromkeys(corpus.test_pairs.sources.tolist()):
        rows = np.flatnonzero(bench.sets == source)
        kept = np.flatnonzero(corpus.pairs.sources != source)
        same = set(corpus.pairs.prompts[corpus.pairs.sources == source].tolist())
        kept = kept[[key not in same for key in corpus.pairs.prompts[kept]]]
        apart, _ = bench.gate(rewards, debiasing, rows=kept)
        unseen = bench.gated(apart, rewards, debiasing) > 0
        weights = bench.weights(network, bench.tests.chosen[rows]).mean(0)
        table[source] = {
            "rows": rows.tolist(),
            "right": {"gate": seen[rows], "gate that never saw it": unseen[rows], "uniform weights": uniform[rows]},
            "weights": dict(zip(bench.names, weights.tolist(), strict=True)),
        }
    return table


def ratings_against_pairs(bench: Bench) -> dict[str, Any]:
    """Absolute ratings against the same ratings turned into pairs, by objective, with the same rows and features.

    Pairs within prompts correspond to preference data; pairs across prompts give a pairwise head the full order. For a
    fine-tuned backbone, both start without the weights that were learned with it.
    """
    corpus = bench.corpus
    train, test = corpus.train, corpus.test
    rewards = bench.plain_head.predict(corpus.responses(test.rows))
    table: dict[str, Any] = {}
    for column, name in enumerate(bench.names):
        rated = train.take(np.flatnonzero(~np.isnan(train.ratings[:, column])))
        tested = np.flatnonzero(~np.isnan(test.ratings[:, column]))
        within = _pairs_within(rated, column)
        if column == corpus.bias or len(within) < MIN_PAIRS or len(tested) < MIN_TEST_RATINGS:
            continue
        truth, prompts = test.ratings[tested, column], test.prompts[tested]
        features = corpus.responses(test.rows[tested]).astype(np.float64)
        entry: dict[str, Any] = {"rows": len(rated), "pairs": len(within), "test": len(tested)}
        predictions = {"ratings": rewards[tested, column]}
        for label, chosen in (
            ("pairs within prompts", within),
            ("pairs across prompts", _pairs_across(rated, column, len(within))),
        ):
            held_out = held_out_prompts(rated.prompts[chosen[:, 0]].tolist(), HELD_OUT_PAIRS)
            better, worse = (corpus.responses(rated.rows[chosen[:, side]]) for side in (0, 1))
            predictions[label] = features @ fit_bradley_terry(better, worse, held_out)
        for label, prediction in predictions.items():
            accuracy, count = within_prompt_accuracy(prediction, truth, prompts)
            entry[label] = {"spearman": spearman(prediction, truth), "within_prompt": accuracy}
            entry["test_pairs"] = count
        table[name] = entry
    return table


def held_out_ratings(bench: Bench, head: RegressionHead) -> dict[str, Any]:
    """Spearman and within-prompt accuracy of a head's rewards, of objectives with enough test ratings."""
    test = bench.corpus.test
    rewards = head.predict(bench.corpus.responses(test.rows))
    table = {}
    for column, name in enumerate(bench.names):
        rows = np.flatnonzero(~np.isnan(test.ratings[:, column]))
        if column != bench.corpus.bias and len(rows) >= MIN_TEST_RATINGS:
            truth = test.ratings[rows, column]
            accuracy, pairs = within_prompt_accuracy(rewards[rows, column], truth, test.prompts[rows])
            table[name] = {
                "spearman": spearman(rewards[rows, column], truth),
                "within_prompt": accuracy,
                "test_pairs": pairs,
            }
    return table


def quantiles(bench: Bench) -> dict[str, Any]:
    """Quantile heads on held-out prompts: calibration, coverage, pinball loss, and use as a reward.

    Baselines: one spread around the reward for all responses, and the quantiles of the training ratings regardless of
    the response. As a reward, the mean of the quantiles is compared with the ridge reward by Spearman correlation.
    Empty if no objective has enough levels and ratings.
    """
    corpus = bench.corpus
    train, test = corpus.train, corpus.test
    if not any(has_quantiles(column) for column in train.ratings.T):
        return {}
    rewards = bench.rewards.reference
    features = corpus.responses(train.rows)
    fit = lambda penalties: fit_quantiles(  # noqa: E731
        features, train.ratings, rewards, train.folds, bench.names, levels=QUANTILE_LEVELS, penalties=penalties
    )
    head = fit((1e-3, 1e-2, 1e-1, float("inf")))
    constant = fit((float("inf"),))
    tested = corpus.responses(test.rows)
    served = bench.head.predict(tested)
    found = {"quantile heads": head.predict(tested, served), "one spread": constant.predict(tested, served)}
    levels = np.array(QUANTILE_LEVELS)
    table: dict[str, Any] = {}
    for place, column in enumerate(head.columns):
        rows = np.flatnonzero(~np.isnan(test.ratings[:, column]))
        if len(rows) < 30:
            continue
        truth = test.ratings[rows, column]
        rated = train.ratings[~np.isnan(train.ratings[:, column]), column]
        half = half_width(rated)
        entry: dict[str, Any] = {"test": len(rows), "penalty": head.reports[place].penalty}
        ways = {label: values[rows, place] for label, values in found.items()}
        ways["training ratings"] = np.broadcast_to(np.quantile(rated, levels), (len(rows), len(levels)))
        for label, values in ways.items():
            below = share_below(truth[:, None], values, half)
            inside = {
                name: float((below[:, levels == high] - below[:, levels == low]).mean())
                for name, (low, high) in INTERVALS.items()
            }
            entry[label] = {
                "below": below.mean(0).tolist(),
                "coverage": inside,
                "pinball": float(pinball(truth[:, None] - values, levels, half).mean()),
            }
        entry["spearman"] = {
            "reward": spearman(served[rows, column], truth),
            "mean of quantiles": spearman(ways["quantile heads"].mean(1), truth),
        }
        table[bench.names[column]] = entry
    return table


def _pairs_within(rated: Rated, column: int, seed: int = 0) -> np.ndarray:
    """Row pairs (p, 2) within prompts, better first, at most `MOST_PAIRS_PER_PROMPT` per prompt."""
    generator = np.random.default_rng(seed)
    values = rated.ratings[:, column]
    order = np.argsort(rated.prompts, kind="stable")
    bounds = np.flatnonzero(rated.prompts[order][1:] != rated.prompts[order][:-1]) + 1
    found = []
    for rows in np.split(order, bounds):
        better, worse = np.nonzero(values[rows][:, None] > values[rows][None, :])
        if len(better) > MOST_PAIRS_PER_PROMPT:
            drawn = generator.choice(len(better), MOST_PAIRS_PER_PROMPT, replace=False)
            better, worse = better[drawn], worse[drawn]
        found.append(np.stack([rows[better], rows[worse]], 1))
    return np.concatenate(found)


def _pairs_across(rated: Rated, column: int, count: int, seed: int = 0) -> np.ndarray:
    """Up to `count` random row pairs (p, 2) with different ratings, across prompts."""
    generator = np.random.default_rng(seed)
    values = rated.ratings[:, column]
    drawn = generator.integers(0, len(values), (8 * count, 2))
    drawn = drawn[values[drawn[:, 0]] != values[drawn[:, 1]]][:count]
    swap = values[drawn[:, 0]] < values[drawn[:, 1]]
    drawn[swap] = drawn[swap][:, ::-1]
    return drawn
