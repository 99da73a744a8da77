"""The gate on a task whose answer is known: the prompt decides which objective matters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from armorm.errors import FitError
from armorm.heads.calibration import divided_prompts, fit_scale, prompt_capped
from armorm.heads.gate_training import GateSettings, RewardPairs, _fold_standardisation, fit_gate
from armorm.model.remote_code import GatingNetwork

K, D, PROMPTS = 4, 6, 300
SETTINGS = GateSettings(
    hidden_size=32, hidden_layers=1, temperature=1.0, dropout=0.1, learning_rate=2e-2, steps=200, batch_size=128
)


def task(seed: int = 0, pairs: int = 1600) -> tuple[np.ndarray, RewardPairs]:
    """Pairs decided by the one objective that the prompt's first feature points to; rewards in 0..1.

    Uniform weights see the deciding objective among four of equal spread: 67% of pairs.
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(PROMPTS, D)) * np.array([1.0, 50.0, 0.1, 1.0, 1.0, 1.0]) + 5
    deciding = np.where(features[:, 0] > 5, 0, 2)
    prompt = rng.integers(0, PROMPTS, pairs)
    first, second = rng.random((2, pairs, K))
    rows = np.arange(pairs)
    wins = (first[rows, deciding[prompt]] > second[rows, deciding[prompt]])[:, None]
    return features.astype(np.float32), RewardPairs(
        chosen=np.where(wins, first, second),
        rejected=np.where(wins, second, first),
        chosen_prompt=prompt,
        rejected_prompt=prompt,
        held_out=prompt < PROMPTS // 5,
    )


@pytest.fixture(scope="module")
def trained():
    features, pairs = task()
    return features, pairs, *fit_gate(features, pairs, SETTINGS)


def margins(network: GatingNetwork, features: np.ndarray, pairs: RewardPairs, rows: np.ndarray) -> np.ndarray:
    """Score differences by the plain formula, on plain prompt features."""
    with torch.no_grad():
        output = network(torch.from_numpy(features)).double().numpy()
    return (output[pairs.chosen_prompt] * pairs.chosen - output[pairs.rejected_prompt] * pairs.rejected).sum(1)[rows]


def loss_of(margin: np.ndarray, weights: np.ndarray | None = None) -> float:
    return float(np.average(np.logaddexp(0, -margin), weights=weights))


def calibrating(pairs: RewardPairs, seed: int = 0) -> np.ndarray:
    """Rows of the held-out pairs that are for calibration."""
    rows = np.flatnonzero(pairs.held_out)
    return rows[divided_prompts(pairs.chosen_prompt[rows], seed)]


def weights_of(pairs: RewardPairs, most: float | None = 3.0) -> np.ndarray:
    """Weights (p,) with which a prompt counts as at most three pairs, as by default."""
    return prompt_capped(np.ones(len(pairs)), pairs.chosen_prompt, most)


# --- what is learned -----------------------------------------------------------------------------


def test_the_gate_learns_which_objective_the_prompt_asks_for(trained):
    features, _, network, report = trained
    assert report.accuracy > 0.95
    assert report.uniform_accuracy < 0.8
    weights = network.weights(torch.from_numpy(features)).detach().numpy()
    first = features[:, 0] > 5
    assert weights[first, 0].mean() > 0.7
    assert weights[~first, 2].mean() > 0.7
    fresh_features, fresh = task(seed=1)
    assert (margins(network, fresh_features, fresh, np.arange(len(fresh))) > 0).mean() > 0.93


def test_weights_are_a_softmax_over_objectives(trained):
    features, _, network, _ = trained
    x = torch.from_numpy(features[:50])
    weights = network.weights(x)
    assert weights.shape == (50, K)
    np.testing.assert_allclose(weights.sum(1).detach(), 1, atol=1e-6)
    assert (weights >= 0).all()
    hidden = x.double()
    for layer in network.layers[:-1]:
        hidden = (hidden @ layer.weight.double().T + layer.bias.double()).relu()
    logits = (hidden @ network.layers[-1].weight.double().T + network.layers[-1].bias.double()) / network.temperature
    exponentials = logits.exp()
    np.testing.assert_allclose(weights.detach(), (exponentials / exponentials.sum(1, keepdim=True)).detach(), atol=1e-5)
    torch.testing.assert_close(network(x), weights * network.logit_scale)
    alone = torch.cat([network.weights(row[None]) for row in x])
    torch.testing.assert_close(alone, weights, atol=1e-5, rtol=0)


def test_temperature_flattens_the_weights():
    torch.manual_seed(0)
    sharp = GatingNetwork(D, K, hidden_size=8, hidden_layers=1, temperature=1.0)
    flat = GatingNetwork(D, K, hidden_size=8, hidden_layers=1, temperature=1000.0)
    flat.load_state_dict(sharp.state_dict())
    x = torch.randn(5, D) * 10
    torch.testing.assert_close(flat.weights(x), torch.full((5, K), 1 / K), atol=0.01, rtol=0)
    assert sharp.weights(x).max() > 0.4


def test_tensor_names_are_those_of_the_released_checkpoint():
    network = GatingNetwork(8, 19, hidden_size=16)
    names = {f"layers.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")} | {"logit_scale"}
    assert set(network.state_dict()) == names
    assert network.layers[3].weight.shape == (19, 16)
    assert network.logit_scale.shape == (1,)


def test_a_prompt_goes_through_the_gate_once_for_all_its_pairs():
    features, pairs = task(pairs=400)
    few = replace(pairs, chosen_prompt=pairs.chosen_prompt % 10, rejected_prompt=pairs.rejected_prompt % 10)
    few = replace(few, held_out=few.chosen_prompt < 3)
    rows = []

    def record(module, inputs, output):
        if isinstance(module, nn.Linear) and module.in_features == D:
            rows.append(len(output))

    handle = nn.modules.module.register_module_forward_hook(record)
    try:
        fit_gate(features, few, SETTINGS.model_copy(update={"steps": 60}))
    finally:
        handle.remove()
    assert len(rows) > 60
    assert max(rows) <= 7


def test_sides_may_have_prompts_of_their_own():
    features, pairs = task()
    doubled = np.concatenate([features, features])
    apart = replace(pairs, rejected_prompt=pairs.rejected_prompt + PROMPTS)
    network, report = fit_gate(doubled, apart, SETTINGS.model_copy(update={"dropout": 0.0}))
    assert report.accuracy > 0.93
    rows = calibrating(apart)
    margin = margins(network, doubled, apart, rows)
    assert report.loss == pytest.approx(loss_of(margin, weights_of(apart)[rows]), abs=1e-5)


def test_zero_hidden_layers_is_a_linear_gate():
    features, pairs = task()
    network, report = fit_gate(features, pairs, SETTINGS.model_copy(update={"hidden_layers": 0, "learning_rate": 0.05}))
    assert [tuple(layer.weight.shape) for layer in network.layers] == [(K, D)]
    assert report.accuracy > 0.9


# --- the figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_layers", [0, 1, 2])
def test_the_returned_gate_takes_plain_features_and_gives_the_reported_figures(hidden_layers):
    features, pairs = task()
    network, report = fit_gate(
        features, pairs, SETTINGS.model_copy(update={"hidden_layers": hidden_layers, "steps": 100})
    )
    held_out, rows = np.flatnonzero(pairs.held_out), calibrating(pairs)
    margin, used = margins(network, features, pairs, rows), weights_of(pairs)[rows]
    assert not network.training
    assert (report.pairs, report.held_out_pairs) == (len(pairs) - len(held_out), len(held_out))
    assert (report.stopping_pairs, report.calibration_pairs) == (len(held_out) - len(rows), len(rows))
    assert report.loss == pytest.approx(loss_of(margin, used), abs=1e-5)
    assert report.accuracy == pytest.approx(np.average(margin > 0, weights=used), abs=2 / len(rows))
    uniform = (pairs.chosen - pairs.rejected).mean(1)[rows]
    assert report.uniform_accuracy == pytest.approx(np.average(uniform > 0, weights=used))
    prompts = features[np.unique(pairs.chosen_prompt[held_out])]
    weights = network.weights(torch.from_numpy(prompts)).detach().double().numpy()
    np.testing.assert_allclose(report.mean_weights, weights.mean(0), atol=1e-5)
    assert report.mean_entropy == pytest.approx(-(weights * np.log(weights)).sum(1).mean(), abs=1e-4)


def test_folding_equals_standardising_by_hand():
    torch.manual_seed(0)
    plain = GatingNetwork(D, K, hidden_size=16, hidden_layers=2, temperature=1.0)
    folded = GatingNetwork(D, K, hidden_size=16, hidden_layers=2, temperature=1.0)
    folded.load_state_dict(plain.state_dict())
    mean, deviation = torch.randn(D) * 3, torch.rand(D) * 5 + 0.1
    _fold_standardisation(folded, mean, deviation)
    x = torch.randn(40, D) * deviation + mean
    torch.testing.assert_close(folded(x), plain((x - mean) / deviation), atol=1e-5, rtol=0)
    assert (folded(x) - plain(x)).abs().max() > 0.01


def test_a_feature_that_never_varied_in_training_does_not_drown_the_others():
    features, pairs = task()
    features[:, 3] = 0.7
    network, report = fit_gate(features, pairs, SETTINGS)
    assert report.accuracy > 0.95
    moved = features.copy()
    moved[:, 3] += 0.01
    before, after = (network.weights(torch.from_numpy(x)) for x in (features, moved))
    assert (before - after).abs().max() < 0.05


# --- the scale -----------------------------------------------------------------------------------


def test_the_scale_is_fitted_at_the_start_and_again_at_the_end(trained):
    features, pairs, network, report = trained
    training, rows = np.flatnonzero(~pairs.held_out), calibrating(pairs)
    stopping = np.setdiff1d(np.flatnonzero(pairs.held_out), rows)
    uniform, weights, prompts = (pairs.chosen - pairs.rejected).mean(1), weights_of(pairs), pairs.chosen_prompt
    start = fit_scale(uniform[training], weights[training], prompts[training])
    assert report.start_scale == pytest.approx(start.scale, rel=1e-6)
    first = loss_of(report.start_scale * uniform[stopping], weights[stopping])
    assert report.history[0][2] == pytest.approx(first, abs=1e-6)
    assert report.logit_scale == float(network.logit_scale.detach()) > 0
    unscaled = margins(network, features, pairs, rows) / report.logit_scale
    found = fit_scale(unscaled, weights[rows], prompts[rows])
    assert report.logit_scale == pytest.approx(found.scale, rel=1e-4)
    assert report.calibration == pytest.approx(found.to_dict(), rel=1e-3)


def test_pairs_of_the_calibration_decide_nothing_but_the_scale_and_the_figures(trained):
    features, pairs, network, report = trained
    rows = calibrating(pairs)
    chosen, rejected = pairs.chosen.copy(), pairs.rejected.copy()
    chosen[rows[::3]], rejected[rows[::3]] = pairs.rejected[rows[::3]], pairs.chosen[rows[::3]]
    other, turned = fit_gate(features, replace(pairs, chosen=chosen, rejected=rejected), SETTINGS)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]) == (name != "logit_scale")
    assert turned.history == report.history
    assert turned.accuracy < report.accuracy - 0.2
    assert turned.logit_scale < report.logit_scale / 2


def test_the_scale_counts_pairs_by_their_weight():
    features, pairs = task()
    rows = calibrating(pairs)[::3]
    chosen, rejected, weight = pairs.chosen.copy(), pairs.rejected.copy(), np.ones(len(pairs))
    chosen[rows], rejected[rows], weight[rows] = pairs.rejected[rows], pairs.chosen[rows], 0.02
    turned = replace(pairs, chosen=chosen, rejected=rejected)
    settings = SETTINGS.model_copy(update={"steps": 50})
    light, heavy = (fit_gate(features, one, settings)[1] for one in (replace(turned, weight=weight), turned))
    assert light.logit_scale > 2 * heavy.logit_scale
    assert light.accuracy > heavy.accuracy + 0.2


def test_a_prompt_with_many_pairs_does_not_outvote_the_others():
    features, pairs = task(pairs=600)
    rng = np.random.default_rng(4)
    one = int(pairs.chosen_prompt[~pairs.held_out][0])
    first, second = rng.random((2, 1500, K))
    wins = (first[:, 1] > second[:, 1])[:, None]  # decided by another objective than all others
    many = RewardPairs(
        chosen=np.concatenate([pairs.chosen, np.where(wins, first, second)]),
        rejected=np.concatenate([pairs.rejected, np.where(wins, second, first)]),
        chosen_prompt=np.concatenate([pairs.chosen_prompt, np.full(1500, one)]),
        rejected_prompt=np.concatenate([pairs.rejected_prompt, np.full(1500, one)]),
        held_out=np.concatenate([pairs.held_out, np.zeros(1500, bool)]),
    )
    features[:, 1:] = 0  # the gate cannot tell this prompt from others
    capped = fit_gate(features, many, SETTINGS)[1]
    free = fit_gate(features, many, SETTINGS.model_copy(update={"prompt_cap": None}))[1]
    assert capped.mean_weights[1] < 0.2
    assert free.mean_weights[1] > 2 * capped.mean_weights[1]


def test_near_duplicates_of_a_prompt_are_in_one_half_and_count_as_one_prompt():
    features, pairs = task()
    groups = pairs.chosen_prompt // 6
    settings = SETTINGS.model_copy(update={"steps": 50})
    report = fit_gate(features, replace(pairs, groups=groups), settings)[1]
    rows = np.flatnonzero(pairs.held_out)
    rows = rows[divided_prompts(groups[rows], 0)]
    assert report.calibration_pairs == len(rows)
    assert report.calibration["prompts"] == len(set(groups[rows])) < len(set(pairs.chosen_prompt[rows])) / 2


def test_few_held_out_pairs_stop_and_calibrate_alike_and_the_report_says_so():
    features, pairs = task()
    rows = np.concatenate([np.flatnonzero(~pairs.held_out)[:100], np.flatnonzero(pairs.held_out)[:20]])
    few = RewardPairs(*(values[rows] for values in vars(pairs).values() if values is not None))
    report = fit_gate(features, few, SETTINGS.model_copy(update={"steps": 50}))[1]
    assert (report.stopping_pairs, report.calibration_pairs) == (10, 10)
    assert report.calibration is not None
    together = few.chosen_prompt.copy()
    together[few.held_out] = 0
    alone = replace(few, chosen_prompt=together, rejected_prompt=together)
    report = fit_gate(features, alone, SETTINGS.model_copy(update={"steps": 50}))[1]
    assert (report.held_out_pairs, report.stopping_pairs, report.calibration_pairs) == (20, 20, 20)
    assert report.calibration is None, "a scale of the pairs that stopped the training is no calibration"


def test_a_given_scale_stays():
    features, pairs = task()
    network, report = fit_gate(features, pairs, SETTINGS.model_copy(update={"logit_scale": 2.5, "steps": 100}))
    assert network.logit_scale.item() == report.logit_scale == report.start_scale == 2.5
    assert network.logit_scale.requires_grad
    assert report.calibration is None


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(FitError, match="expected 'fit' or a number > 0"):
        fit_gate(*task(), SETTINGS.model_copy(update={"logit_scale": scale}))


# --- training ------------------------------------------------------------------------------------


def noise() -> tuple[np.ndarray, RewardPairs]:
    """Pairs with nothing to learn about: every step past the first few makes the held-out loss worse."""
    features, pairs = task(pairs=300)
    rng = np.random.default_rng(7)
    flip = rng.random(len(pairs)) < 0.4
    chosen = np.where(flip[:, None], pairs.rejected, pairs.chosen)
    rejected = np.where(flip[:, None], pairs.chosen, pairs.rejected)
    return rng.normal(size=features.shape).astype(np.float32), replace(pairs, chosen=chosen, rejected=rejected)


def test_early_stopping_keeps_the_best_weights():
    features, pairs = noise()
    settings = SETTINGS.model_copy(update={"logit_scale": 8.0, "steps": 2000, "patience": 3, "dropout": 0.0})
    network, report = fit_gate(features, pairs, settings)
    steps, _, losses, accuracies = zip(*report.history, strict=True)
    best = int(np.argmin(losses))
    assert report.best_step == steps[best]
    assert steps[-1] == report.best_step + 3 * 50 < 2000
    assert losses[-1] > losses[best] + 0.01
    stopping = np.setdiff1d(np.flatnonzero(pairs.held_out), calibrating(pairs))
    margin = margins(network, features, pairs, stopping)
    assert loss_of(margin, weights_of(pairs)[stopping]) == pytest.approx(losses[best], abs=1e-5)
    assert (margin > 0).mean() == pytest.approx(accuracies[best], abs=1e-6)


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state():
    features, pairs = task(pairs=600)
    settings = SETTINGS.model_copy(update={"steps": 20})
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 5)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        network, report = fit_gate(features, pairs, settings, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append((network.state_dict(), report))
    (first, first_report), (second, second_report), (third, _) = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first_report == second_report
    assert first_report.best_step > 0
    assert not torch.equal(first["layers.0.weight"], third["layers.0.weight"])


def test_dropout_belongs_to_training():
    torch.manual_seed(0)
    network = GatingNetwork(D, K, hidden_size=64, temperature=1.0, dropout=0.5)
    x = torch.randn(8, D)
    assert not torch.equal(network.weights(x), network.weights(x))
    network.eval()
    assert torch.equal(network.weights(x), network.weights(x))


@pytest.mark.parametrize(("training", "held_out"), [(19, 30), (30, 19)])
def test_too_few_pairs_are_refused(training, held_out):
    features, pairs = task()
    rows = np.concatenate([np.flatnonzero(~pairs.held_out)[:training], np.flatnonzero(pairs.held_out)[:held_out]])
    few = RewardPairs(*(values[rows] for values in vars(pairs).values() if values is not None))
    with pytest.raises(
        FitError, match=f"{training} training pairs and {held_out} held out .* expected at least 20 of each"
    ):
        fit_gate(features, few, SETTINGS)


# --- factors -------------------------------------------------------------------------------------


def test_factors_multiply_the_weights_before_they_are_normalised(trained):
    features, _, network, _ = trained
    x = torch.from_numpy(features[:20])
    factors = torch.tensor([2.0, 0.0, 0.5, 1.0])
    multiplied = network.weights(x) * factors
    expected = multiplied / multiplied.sum(1, keepdim=True)
    torch.testing.assert_close(network.weights(x, factors), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(network(x, factors), expected * network.logit_scale, atol=1e-5, rtol=0)


def test_weight_that_vanishes_in_float32_is_still_shared_out():
    network = GatingNetwork(1, 3, hidden_layers=0, temperature=1.0)
    with torch.no_grad():
        network.layers[0].weight.zero_()
        network.layers[0].bias.copy_(torch.tensor([1000.0, 1.0, 0.0]))
    assert network.weights(torch.zeros(1, 1))[0].tolist() == [1, 0, 0]
    shared = network.weights(torch.zeros(1, 1), torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(shared[0], functional.softmax(torch.tensor([-torch.inf, 1.0, 0.0]), dim=0))
