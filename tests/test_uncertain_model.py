"""A reward model that says how sure it is: scores, explanations, and what saving keeps of it."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from armorm import ArmoRM
from armorm.conversation import Conversation
from armorm.errors import CheckpointError
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.regression import fit_from_statistics
from armorm.heads.uncertainty import Uncertainty, fit_uncertainty
from armorm.model import remote_code as portable
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.remote_code import UNCERTAINTY_BUFFERS
from tests.helpers.conversations import chat
from tests.helpers.small_models import OBJECTIVES, reward_model

CONVERSATIONS = [chat("Hi", "Hello."), chat("Why is the sky blue?", "Light scatters."), chat("Hi", "Go away! " * 20)]
SURENESS = ("uncertainty", "predictive_std", "leverage", "score_std")
TOKENS = torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])


def measured(d: int) -> Uncertainty:
    """Of 300 generated rows; two objectives rated on the same rows, with errors that go together."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, d)).astype(np.float32)
    noise = rng.normal(size=(300, 4)) * 0.3
    noise[:, 1] += noise[:, 0]
    ratings = features @ rng.normal(size=(d, 4)) / d + noise
    ratings[:100, 2] = ratings[200:, 3] = np.nan
    folds = np.arange(300) % 3
    statistics = accumulate(blocks_of(features, ratings, folds), OBJECTIVES.names, 3, d)
    head = fit_from_statistics(statistics, alphas=(10.0,))
    intervals = np.array([True, True, False, True])
    return fit_uncertainty(statistics, head, blocks_of(features, ratings, folds), intervals)


def with_uncertainty(rm: ArmoRM, uncertainty: Uncertainty) -> ArmoRM:
    config = copy.deepcopy(rm.model.config)
    config.uncertainty = uncertainty.settings()
    model = ArmoRMForSequenceClassification.assemble(rm.model.model, config)
    model.load_state_dict(rm.model.state_dict(), strict=False)
    for name, tensor in uncertainty.tensors().items():
        getattr(model, f"uncertainty_{name}").copy_(torch.from_numpy(tensor))
    return ArmoRM(model, rm.tokenizer, "sure")


@pytest.fixture(scope="module")
def plain():
    return reward_model()


@pytest.fixture(scope="module")
def uncertainty(plain):
    return measured(plain.model.config.hidden_size)


@pytest.fixture(scope="module")
def rm(plain, uncertainty):
    return with_uncertainty(plain, uncertainty)


@pytest.fixture(scope="module")
def saved(rm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sure")
    rm.save_pretrained(folder)
    return folder


def test_what_is_said_of_a_score_is_the_formulas_on_its_features(rm, plain, uncertainty):
    batch = rm.score(CONVERSATIONS)
    np.testing.assert_array_equal(batch.scores, plain.score(CONVERSATIONS).scores)
    _, features = rm.backbone.features(
        rm.backbone.template.encode([Conversation.from_messages(messages) for messages in CONVERSATIONS])
    )
    leverage = uncertainty.leverage(np.asarray(features))
    np.testing.assert_allclose(batch.leverage, leverage, rtol=1e-4)
    inflated = uncertainty.design_effect * leverage
    np.testing.assert_allclose(batch.uncertainty, uncertainty.noise * np.sqrt(inflated), rtol=1e-4)
    np.testing.assert_allclose(batch.predictive_std, uncertainty.noise * np.sqrt(1 + inflated), rtol=1e-4)
    parts = batch.coefficients * batch.uncertainty
    expected = [np.sqrt(part @ uncertainty.correlation @ part) for part in parts]
    np.testing.assert_allclose(batch.score_std, expected, rtol=1e-4)
    assert uncertainty.correlation[0, 1] > 0.3


def test_a_model_saved_and_loaded_is_as_sure_as_before(rm, saved):
    before, after = rm.score(CONVERSATIONS), ArmoRM.from_pretrained(saved, dtype="float32").score(CONVERSATIONS)
    for name in ("scores", *SURENESS):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), rtol=1e-6, atol=1e-7, err_msg=name)
    before, after = rm.intervals(before, 0.8), ArmoRM.from_pretrained(saved).intervals(after, 0.8)
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert np.isnan(before[:, 2]).all(), "too few levels for an interval"
    assert np.isfinite(before[:, [0, 1, 3]]).all()


def test_the_file_for_other_machines_loads_it_and_keeps_the_tensors(rm, saved):
    model = portable.ArmoRMForSequenceClassification.from_pretrained(saved)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).score, rm.model(TOKENS).score, atol=1e-6, rtol=1e-6)
    for name in UNCERTAINTY_BUFFERS:
        torch.testing.assert_close(getattr(model, name), getattr(rm.model, name), atol=0, rtol=0)


def test_a_cast_leaves_the_uncertainty_in_float32(saved):
    model = ArmoRMForSequenceClassification.from_pretrained(saved).bfloat16()
    assert model.model.dtype == torch.bfloat16
    assert {getattr(model, name).dtype for name in UNCERTAINTY_BUFFERS} == {torch.float32}


def test_the_released_layout_has_no_place_for_it_and_a_steering_still_fits(rm, tmp_path):
    steered = rm.steer({"ultra-helpful": 2.0}, drop="code-style", debias_strength=0.5)
    steered.save_pretrained(tmp_path, layout="released")
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("uncertainty")]
    again = ArmoRM.from_pretrained(tmp_path, dtype="float32")
    assert again.uncertainty is None
    batch = again.score(CONVERSATIONS)
    assert batch.score_std is None
    np.testing.assert_allclose(batch.scores, steered.score(CONVERSATIONS).scores, atol=1e-5)


def test_a_lower_confidence_bound_takes_standard_deviations_off(rm):
    batch = rm.score(CONVERSATIONS)
    lowered = rm.score(CONVERSATIONS, lower_confidence=1.5)
    np.testing.assert_allclose(lowered.scores, batch.scores - 1.5 * batch.score_std, atol=1e-6)
    np.testing.assert_allclose(lowered.contributions.sum(1), batch.scores, atol=1e-5)
    mean, deviation = rm.reference["score_mean"], rm.reference["score_std"]
    normal = rm.score(CONVERSATIONS, lower_confidence=1.5, normalize=True)
    np.testing.assert_allclose(normal.scores, (lowered.scores - mean) / deviation, atol=1e-5)


def test_a_model_without_uncertainty_has_nothing_to_lower_scores_by(plain):
    assert plain.uncertainty is None
    with pytest.raises(CheckpointError, match="no uncertainty to lower scores by"):
        plain.score(CONVERSATIONS, lower_confidence=1.0)
    with pytest.raises(CheckpointError, match=r"no intervals of level 0\.8"):
        plain.intervals(plain.score(CONVERSATIONS))


def test_an_explanation_says_how_sure_it_is(rm, plain):
    batch = rm.score(CONVERSATIONS[:1])
    explanation = rm.explain(CONVERSATIONS[0])
    assert explanation.score_std == pytest.approx(float(batch.score_std[0]))
    assert f"{explanation.score:+.4f} ± {explanation.score_std:.4f}" in str(explanation)
    for i, share in enumerate(explanation.shares):
        assert share.uncertainty == pytest.approx(batch.uncertainty[0, i] * abs(OBJECTIVES[i].scale), rel=1e-5)
    assert plain.explain(CONVERSATIONS[0]).score_std is None
    assert "±" not in str(plain.explain(CONVERSATIONS[0]))
    steered = rm.steer(drop=["ultra-helpful"]).explain(CONVERSATIONS[0])
    assert steered.score_std != pytest.approx(explanation.score_std)


def test_an_explanation_says_which_standard_deviations_are_stored_approximately(rm, plain, uncertainty):
    assert uncertainty.error_bound.max() < 0.05
    assert rm.explain(CONVERSATIONS[0]).approximate is None
    assert plain.explain(CONVERSATIONS[0]).approximate is None
    bounds = np.array([0.4, 0.01, 0.02, 0.3])
    rough = with_uncertainty(plain, replace(uncertainty, error_bound=bounds)).explain(CONVERSATIONS[0])
    assert rough.approximate == {OBJECTIVES[0].name: 0.4, OBJECTIVES[3].name: 0.3}
    shown = " ".join(str(rough).split())
    for part in ("± of 2 objectives", f"by up to 40% ({OBJECTIVES[0].name})"):
        assert part in shown
        assert part in rough.to_html()
    assert "is approximate" not in rm.explain(CONVERSATIONS[0]).to_html()


def test_a_table_of_scores_has_a_column_for_each_standard_deviation(rm, plain):
    table = rm.score(CONVERSATIONS).to_pandas()
    assert {"score_std", *(f"uncertainty/{name}" for name in OBJECTIVES.names)} <= set(table.columns)
    assert not [name for name in plain.score(CONVERSATIONS).to_pandas() if "uncertainty" in name or "std" in name]
