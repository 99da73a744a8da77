"""Options of the gate's training: each changes the loss by what is written by hand here; and collapse, said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from armorm.heads.gate_training import GateSettings, PairTensors, RewardPairs, collapse_of, fit_gate
from armorm.model.remote_code import GatingNetwork
from tests.heads.test_gating import SETTINGS, task

P, K, D, PROMPTS = 60, 3, 5, 12


@pytest.fixture(scope="module")
def batch():
    """Features, pairs with margins and weights, a gate that is not uniform, all pairs as one batch."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, PROMPTS, P)
    chosen, rejected = rng.normal(size=(2, P, K))
    pairs = RewardPairs(
        chosen, rejected, prompt, prompt, np.zeros(P, bool), margin=rng.random(P), weight=rng.choice([0.5, 1.0, 3.0], P)
    )
    features = rng.normal(size=(PROMPTS, D)).astype(np.float32)
    torch.manual_seed(0)
    network = GatingNetwork(D, K, hidden_size=8, hidden_layers=1, temperature=0.3).eval()
    return PairTensors(features, pairs, np.arange(P), torch.device("cpu")), pairs, network


def by_hand(batch, *, margin=0.0, label_smoothing=0.0, entropy=0.0, load_balance=0.0, scale=2.0, weight=True) -> float:
    data, pairs, network = batch
    weights = network.weights(data.prompts).detach().double().numpy()
    total = 0.0
    mean_weight = pairs.weight.mean()
    for i in range(P):
        g = weights[pairs.chosen_prompt[i]]
        difference = scale * (g @ pairs.chosen[i] - g @ pairs.rejected[i]) - margin * pairs.margin[i]
        right, wrong = -np.log(1 / (1 + np.exp(-difference))), -np.log(1 / (1 + np.exp(difference)))
        loss = (1 - label_smoothing) * right + label_smoothing * wrong
        total += (pairs.weight[i] / mean_weight if weight else 1.0) * loss / P
    used = weights[np.unique(pairs.chosen_prompt)]
    total -= entropy * np.mean([-sum(w * np.log(w) for w in row) for row in used])
    mean = used.mean(0)
    return total + load_balance * sum(m * np.log(m * K) for m in mean)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 1.5},
        {"label_smoothing": 0.2},
        {"entropy": 0.7},
        {"load_balance": 0.9},
        {"margin": 0.5, "label_smoothing": 0.1, "entropy": 0.2, "load_balance": 0.3},
    ],
)
def test_the_loss_is_that_written_by_hand(batch, options):
    data, _, network = batch
    found = data.training_loss(network, torch.tensor(2.0), np.arange(P), GateSettings(**options))
    assert found.item() == pytest.approx(by_hand(batch, **options), abs=1e-5)
    if options:
        assert abs(by_hand(batch, **options) - by_hand(batch)) > 1e-3


def test_pairs_count_by_their_weight(batch):
    data, pairs, network = batch
    assert abs(by_hand(batch) - by_hand(batch, weight=False)) > 1e-3
    margins = data.margins(network, torch.tensor(2.0), np.arange(P)).detach().double().numpy()
    expected = np.average(np.logaddexp(0, -margins), weights=pairs.weight)
    assert float(data.plain_loss(torch.from_numpy(margins).float(), np.arange(P))) == pytest.approx(expected, abs=1e-5)


def test_weights_of_sources_decide_between_pairs_that_disagree():
    features, pairs = task()
    turned = np.arange(len(pairs)) % 2 == 1
    both = replace(
        pairs,
        chosen=np.where(turned[:, None], pairs.rejected, pairs.chosen),
        rejected=np.where(turned[:, None], pairs.chosen, pairs.rejected),
        held_out=pairs.held_out & ~turned,
        weight=np.where(turned, 0.02, 1.0),
    )
    settings = SETTINGS.model_copy(update={"steps": 100})
    assert fit_gate(features, both, settings)[1].accuracy > 0.85
    assert fit_gate(features, replace(both, weight=None), settings)[1].accuracy < 0.8


def test_an_entropy_term_spreads_the_weights():
    features, pairs = task()
    settings = SETTINGS.model_copy(update={"steps": 100})
    plain, spread = (fit_gate(features, pairs, settings.model_copy(update={"entropy": e}))[1] for e in (0.0, 0.5))
    assert spread.mean_entropy > plain.mean_entropy + 0.1


def test_figures_of_every_evaluation_are_logged():
    lines = []
    _, report = fit_gate(
        *task(pairs=600), SETTINGS.model_copy(update={"steps": 100}), log=lambda *line: lines.append(line)
    )
    assert [step for step, _ in lines] == [step for step, *_ in report.history] == [0, 50, 100]
    for (_, figures), (_, _, loss, accuracy) in zip(lines, report.history, strict=True):
        assert (figures["held_out_loss"], figures["held_out_accuracy"]) == (loss, accuracy)
        assert figures["logit_scale"] > 0
    assert lines[0][1]["learning_rate"] == SETTINGS.learning_rate > lines[-1][1]["learning_rate"]


def test_a_gate_is_trained_on_from_another_one():
    features, pairs = task()
    first, _ = fit_gate(features, pairs, SETTINGS)
    _, report = fit_gate(features, pairs, SETTINGS.model_copy(update={"steps": 1}), initial=first)
    assert report.history[0][3] > 0.95, "it starts where the other one ended"
    _, fresh = fit_gate(features, pairs, SETTINGS.model_copy(update={"steps": 1}))
    assert fresh.history[0][3] < 0.8


# --- collapse ------------------------------------------------------------------------------------


def test_collapse_has_a_name():
    rng = np.random.default_rng(0)
    healthy = rng.dirichlet(np.ones(4), 50)
    assert collapse_of(healthy) == ""
    assert collapse_of(np.full((50, 4), 0.25)) == "uniform"
    assert collapse_of(np.tile([0.97, 0.01, 0.01, 0.01], (50, 1))) == "one objective for all prompts"
    assert collapse_of(np.tile([0.5, 0.3, 0.1, 0.1], (50, 1))) == "the same weights for every prompt"
    assert collapse_of(np.ones((50, 1))) == "", "one objective leaves a gate nothing to say"


def test_a_gate_that_learned_nothing_says_so():
    features, pairs = task(pairs=300)
    rng = np.random.default_rng(3)
    blind = replace(pairs, chosen=rng.random((300, 4)), rejected=rng.random((300, 4)))
    _, report = fit_gate(features, blind, SETTINGS.model_copy(update={"steps": 1, "learning_rate": 1e-6}))
    assert report.collapse == "uniform"
    assert fit_gate(*task(), SETTINGS.model_copy(update={"steps": 100}))[1].collapse == ""
