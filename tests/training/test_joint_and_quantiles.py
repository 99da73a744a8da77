"""Joint and quantile heads as stages of a run: what they make is in the model, and the score stays an exact sum."""

from __future__ import annotations

import json

import numpy as np
import pytest

from armorm import ArmoRM, Recipe, train
from armorm.errors import CheckpointError, RecipeError
from armorm.features.store import KEY, FeatureStore, shard_name
from armorm.heads import quantiles as quantile
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.regression import fit_from_statistics
from armorm.heads.uncertainty import fit_uncertainty
from armorm.model import remote_code as portable
from armorm.training.extend import extend
from armorm.training.featurize import RatedRows
from armorm.training.schema import JointSection, RegressionSection
from armorm.training.stages import heads_from_arrays, heads_to_arrays, train_joint_heads
from tests.heads.test_joint import FOLDS, corpus
from tests.heads.test_uncertainty import leverage_without_fold
from tests.helpers.small_models import sets_to_add
from tests.training.test_recipe import MINIMAL

CONVERSATIONS = [
    [{"role": "user", "content": "How do I learn to juggle?"}, {"role": "assistant", "content": text}]
    for text in ("Start with one ball.", "No idea. " * 9, "Throw two, then three; practise daily.")
]
LEVELS = [0.1, 0.5, 0.9]


@pytest.fixture(scope="module")
def run(small_recipe, small_run, tmp_path_factory):
    """The small run with joint heads and quantile heads on the market's ratings from 1 to 10."""
    patch = pytest.MonkeyPatch()
    patch.setattr(quantile, "MIN_RATINGS", 40)  # the corpus is small
    values = small_recipe.model_dump(mode="json", exclude_none=True)
    values |= {"joint": {"pair_weights": [1.0], "r2_price": 10.0}, "quantiles": {"levels": LEVELS}}
    folder = tmp_path_factory.mktemp("beyond")
    train(Recipe.from_dict(values), folder, features=small_run / "work" / "features", quiet=True)
    yield folder
    patch.undo()


@pytest.mark.slow
def test_quantiles_are_stored_with_the_model_and_the_score_stays_a_sum(run):
    model = ArmoRM.from_pretrained(run, dtype="float32")
    batch = model.score(CONVERSATIONS)
    np.testing.assert_allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)
    settings = model.model.config.quantiles
    assert settings["levels"] == LEVELS
    assert batch.quantile_levels == tuple(LEVELS)
    assert "market-overall" in settings["objectives"]
    assert batch.quantiles.shape == (3, len(model.objectives), 3)
    has = [name in settings["objectives"] for name in model.objectives.names]
    assert np.isnan(batch.quantiles[:, ~np.array(has)]).all()
    inside = batch.quantiles[:, has]
    assert np.isfinite(inside).all()
    assert (np.diff(inside, axis=2) >= 0).all()


@pytest.mark.slow
def test_quantiles_are_the_reward_and_what_it_leaves_open(run):
    model = ArmoRM.from_pretrained(run, dtype="float32")
    encoded = model.backbone.template.encode([_conversation(c) for c in CONVERSATIONS])
    states = model.backbone.features(encoded)[1].astype(np.float64)
    layer = model.model.quantile_layer
    column = model.model.config.quantiles["objectives"].index("market-overall")
    rows = slice(3 * column, 3 * column + 3)
    open_part = states @ layer.weight[rows].double().detach().numpy().T + layer.bias[rows].double().detach().numpy()
    batch = model.score(CONVERSATIONS)
    place = model.objectives.position("market-overall")
    expected = np.sort(batch.rewards[:, place, None] + open_part, axis=1)
    np.testing.assert_allclose(batch.quantiles[:, place], expected, atol=1e-4)


@pytest.mark.slow
def test_the_heads_were_trained_jointly(run, small_run):
    report = json.loads((run / "metrics.json").read_text())["joint"]
    joint, plain = (ArmoRM.from_pretrained(folder, dtype="float32") for folder in (run, small_run))
    moved = (joint.model.regression_layer.weight - plain.model.regression_layer.weight).detach().abs().max()
    assert (report["pair_weight"] == 1.0) == (float(moved) > 1e-4)
    assert report["losses"][report["pair_weights"].index(report["pair_weight"])] == min(report["losses"])


def test_joint_heads_say_how_sure_they_are_by_their_own_errors(tmp_path):
    features, ratings, folds, pairs = corpus(n=1200, p=600)
    ratings[600:, 2] = ratings[600:, 2] > 0.5  # two levels
    keys = np.array([number.to_bytes(16, "little") for number in range(1, 1201)], KEY)
    store = FeatureStore(tmp_path, fingerprint={"weights": "one"}, hidden_size=features.shape[1])
    store.write_shard(shard_name("0123", 0), keys, features, [], np.empty((0, features.shape[1])))
    rows = RatedRows(store, keys, ratings, folds, ["a", "b", "c"])
    features = rows.features()
    statistics = accumulate(blocks_of(features, ratings, folds), ["a", "b", "c"], FOLDS, features.shape[1])
    head = fit_from_statistics(statistics, alphas=[3.0])
    before = fit_uncertainty(statistics, head, rows.blocks(), np.ones(3, bool))
    section, regression = JointSection(pair_weights=(30.0,), r2_price=10.0), RegressionSection(folds=FOLDS)
    joint, uncertainty, report = train_joint_heads(head, before, rows, pairs, section, regression)
    joint, uncertainty = heads_from_arrays(*heads_to_arrays(joint, uncertainty))
    assert report.pair_weight == 30.0
    errors = ratings - joint.predict_out_of_fold(features, folds)
    held_out = leverage_without_fold(features, ratings, folds, alpha=3.0)
    np.testing.assert_array_equal(uncertainty.design_effect, before.design_effect)
    inflated = 1 + uncertainty.design_effect * held_out
    np.testing.assert_allclose(uncertainty.noise**2, np.nansum(errors**2, 0) / np.nansum(inflated, 0), rtol=1e-3)
    assert (uncertainty.noise > 1.02 * before.noise).any()
    first, second = errors[:600, 0], errors[:600, 1]
    alike = first @ second / np.sqrt((first @ first) * (second @ second))
    assert uncertainty.correlation[0, 1] == pytest.approx(alike, abs=1e-3)
    widths = np.abs(errors) / uncertainty.predictive_std(held_out)
    for column in (0, 1):
        smallest = np.sort(widths[~np.isnan(ratings[:, column]), column])
        assert uncertainty.conformal[0.8][column] == pytest.approx(
            smallest[480], rel=0.0025
        )  # ceil(601 * 0.8)-th of 600
    assert np.isnan(uncertainty.conformal[0.8][2])  # two levels


def test_objectives_that_are_not_rated_again_keep_their_uncertainty(small_recipe, small_run, tmp_path):
    """The run has a penalty of its own, which `extend` would not choose."""
    values = small_recipe.model_dump(mode="json", exclude_none=True)
    values["regression"] |= {"alphas": [3.0], "weights": {"workshop-help": 2.0}}
    run, path = tmp_path / "run", tmp_path / "more.jsonl"
    before = train(Recipe.from_dict(values), run, features=small_run / "work" / "features", quiet=True)
    rows = [{"prompt": f"What is {n}?", "response": "It is. " * (1 + n % 7), "length": 1.0 + n % 7} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extend(run, sets_to_add(run, path, "length=1:7"), tmp_path / "extended", quiet=True)
    after = ArmoRM.from_pretrained(tmp_path / "extended", dtype="float32")
    first, second = (model.score(CONVERSATIONS) for model in (before, after))
    old = len(before.objectives)
    for name in ("leverage", "uncertainty", "predictive_std"):
        np.testing.assert_allclose(getattr(second, name)[:, :old], getattr(first, name), rtol=1e-3)
    np.testing.assert_allclose(after.intervals(second)[:, :old], before.intervals(first), rtol=1e-3)
    assert np.isfinite(after.intervals(second)[:, old]).all()


def test_a_few_more_ratings_of_an_objective_do_not_take_its_intervals(small_run, tmp_path):
    """Too few for a 95% interval, and of fewer than five levels."""
    path = tmp_path / "more.jsonl"
    rows = [{"prompt": f"Is {n} odd?", "response": "It is. " * (1 + n % 3), "overall": 3.0 + n % 3} for n in range(12)]
    path.write_text("".join(json.dumps({"market-overall": row.pop("overall"), **row}) + "\n" for row in rows))
    before = ArmoRM.from_pretrained(small_run, dtype="float32")
    after = extend(small_run, sets_to_add(small_run, path, "market-overall=1:10"), tmp_path / "extended", quiet=True)
    column = before.objectives.position("market-overall")
    assert np.isfinite([factors[column] for factors in before.uncertainty.conformal.values()]).all()
    for level, factors in after.uncertainty.conformal.items():
        assert factors[column] == before.uncertainty.conformal[level][column]
    assert str(after.uncertainty.usual_leverage[column]) == str(before.uncertainty.usual_leverage[column])


@pytest.mark.slow
def test_a_model_with_them_is_extended_and_what_is_left_behind_is_said(run, tmp_path, capsys):
    rows = [
        {"prompt": f"What is {number}?", "response": "It is. " * (1 + number % 7), "length": float(1 + number % 7)}
        | {"market-overall": float(1 + number % 7)}
        for number in range(60)
    ]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = ArmoRM.from_pretrained(run, dtype="float32")
    extend(run, sets_to_add(run, path, "length=1:7", "market-overall=1:10"), tmp_path / "extended")
    after = ArmoRM.from_pretrained(tmp_path / "extended", dtype="float32")
    told = " ".join(capsys.readouterr().err.split())
    assert "quantile heads (" in told and "not carried over" in told
    assert "trained on pairs as well; market-overall will be fitted to ratings alone" in told
    assert after.objectives.names == [*before.objectives.names, "more-length"]
    old, new = (model.score(CONVERSATIONS).rewards for model in (before, after))
    same = [i for i, name in enumerate(before.objectives.names) if name != "market-overall"]
    np.testing.assert_allclose(new[:, same], old[:, same], atol=1e-5)
    position = before.objectives.position("market-overall")
    assert not np.allclose(new[:, position], old[:, position], atol=1e-3)


@pytest.mark.slow
def test_the_card_says_what_they_brought(run):
    card, metrics = (run / "README.md").read_text(), json.loads((run / "metrics.json").read_text())
    row = next(line for line in card.splitlines() if line.startswith("| market-overall | 0") and line.count("|") == 5)
    head = next(h for h in metrics["quantiles"]["heads"] if h["objective"] == "market-overall")
    assert row == "| market-overall | " + " | ".join(f"{share:.3f}" for share in head["below"]) + " | "
    assert f"pair loss {metrics['joint']['losses'][0]:.4f} ->" in card


@pytest.mark.slow
def test_a_run_with_them_resumes_to_the_same_model(run, small_run, tmp_path):
    before = (run / "model.safetensors").read_bytes()
    (run / "work" / "gate.safetensors").unlink()
    train(Recipe.from_yaml(run / "recipe.yaml"), run, features=small_run / "work" / "features", quiet=True)
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_machines_without_armorm_load_such_a_model(run):
    model = portable.ArmoRMForSequenceClassification.from_pretrained(run)
    ours = ArmoRM.from_pretrained(run, dtype="float32")
    np.testing.assert_array_equal(
        model.quantile_layer.weight.detach().numpy(), ours.model.quantile_layer.weight.detach().numpy()
    )
    assert model.bfloat16().quantile_layer.weight.dtype == ours.model.bfloat16().quantile_layer.weight.dtype
    assert str(model.quantile_layer.weight.dtype) == "torch.float32"


@pytest.mark.slow
def test_the_released_layout_refuses_quantile_heads(run, tmp_path):
    with pytest.raises(CheckpointError, match="quantile heads"):
        ArmoRM.from_pretrained(run, dtype="float32").save_pretrained(tmp_path, layout="released")


def test_a_model_without_quantile_heads_has_none(small_run):
    batch = ArmoRM.from_pretrained(small_run, dtype="float32").score(CONVERSATIONS)
    assert batch.quantiles is None
    assert batch.quantile_levels == ()


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ("quantiles: {levels: [0.9, 0.1]}", ["quantiles.levels", "ascending"]),
        ("quantiles: {levels: [0, 0.1]}", ["quantiles.levels", "between 0 and 1"]),
        ("quantiles: {level: [0.1]}", ["quantiles.level", "did you mean levels?"]),
        ("joint: {pair_weights: [-1]}", ["joint.pair_weights", "greater than or equal to 0"]),
        ("joint: {r2_prize: 1}", ["joint.r2_prize", "did you mean r2_price?"]),
    ],
)
def test_a_faulty_section_is_refused_by_its_path(section, parts):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(MINIMAL + section)
    for part in parts:
        assert part in str(caught.value)


def _conversation(messages):
    from armorm.conversation import Conversation

    return Conversation.from_messages(messages)
