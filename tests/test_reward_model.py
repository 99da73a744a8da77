"""The object a user holds: scores, what they are made of, steering, saving."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from armorm import ArmoRM
from armorm.errors import BackboneError, CheckpointError, ConversationError
from armorm.objectives import ObjectiveError
from armorm.reward_model import ScoreBatch
from armorm.steering import SteeringError
from tests.helpers.conversations import chat
from tests.helpers.small_models import (
    OBJECTIVES,
    PENALTIES,
    REFERENCE,
    changed,
    llama,
    reward_model,
    tokenizer,
    weight_files,
)

ARRAYS = ("scores", "rewards", "gating_weights", "gating_output", "coefficients", "contributions", "relative")
CONVERSATIONS = [
    chat("What is the capital of France?", "Paris."),
    chat("What is the capital of France?", "I believe it is Paris, which lies on the Seine, but do look it up."),
    chat("Hi", "Hello! " * 30),
    chat("Name a prime.", "Seven.", "A larger one?", "Eleven."),
    [{"role": "system", "content": "Be brief."}, *chat("How do planes fly?", "Their wings push air down.")],
    chat("Tell me about rivers. " * 20, "They flow."),
    chat("Emoji? \U0001f600", "Sure: \U0001f680\U0001f680"),
    chat("Write code", "```python\nprint('x')\n```\n"),
]


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def batch(rm):
    return rm.score(CONVERSATIONS)


def assert_same_rows(found: ScoreBatch, expected: ScoreBatch, rows, tolerance: float = 1e-5) -> None:
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name)[rows], atol=tolerance, err_msg=name)


# --- scores --------------------------------------------------------------------------------------


def test_a_batch_is_made_of_what_the_model_says(rm, batch):
    n, k = len(CONVERSATIONS), len(OBJECTIVES)
    assert len(batch) == n
    assert batch.names == OBJECTIVES.names
    assert batch.rows.tolist() == list(range(n))
    assert batch.rejected == batch.truncated == []
    assert batch.uncertainty is None
    for name in ARRAYS:
        array = getattr(batch, name)
        assert array.shape == ((n,) if name == "scores" else (n, k))
        assert array.dtype == np.float32
    for row, encoded in enumerate(rm.backbone.template.encode([conversation(c) for c in CONVERSATIONS])):
        with torch.no_grad():
            output = rm.model(
                torch.from_numpy(encoded.ids)[None].long(), gate_positions=torch.tensor([encoded.gate_position])
            )
        np.testing.assert_allclose(batch.scores[row], output.score[0], atol=1e-5)
        np.testing.assert_allclose(batch.rewards[row], output.rewards[0], atol=1e-5)
        np.testing.assert_allclose(batch.gating_output[row], output.gating_output[0], atol=1e-5)
    assert batch.scores.std() > 0.1


def conversation(messages):
    from armorm.conversation import Conversation

    return Conversation.from_messages(messages)


def test_contributions_sum_to_the_score(batch):
    np.testing.assert_allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)
    np.testing.assert_allclose(batch.coefficients * batch.rewards, batch.contributions, atol=1e-6)


def test_the_attribution_is_that_of_the_formulas(batch):
    transform = np.eye(4)
    transform[3] -= PENALTIES
    for row in range(len(batch)):
        coefficients = [sum(float(batch.gating_output[row, j]) * transform[i, j] for j in range(4)) for i in range(4)]
        np.testing.assert_allclose(batch.coefficients[row], coefficients, atol=1e-6)
        relative = [coefficients[i] * (batch.rewards[row, i] - REFERENCE["reward_means"][i]) for i in range(4)]
        np.testing.assert_allclose(batch.relative[row], relative, atol=1e-6)


def test_gating_weights_sum_to_one_and_do_not_see_the_response(batch):
    np.testing.assert_allclose(batch.gating_weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(batch.gating_weights * 1.7, batch.gating_output, atol=1e-6)
    np.testing.assert_allclose(batch.gating_weights[0], batch.gating_weights[1], atol=1e-6)
    assert np.abs(batch.gating_weights[0] - batch.gating_weights[2]).max() > 0.01
    assert abs(batch.scores[0] - batch.scores[1]) > 0.01


@pytest.mark.parametrize("batch_tokens", [1, 64, 300, 100_000])
def test_scores_do_not_depend_on_the_size_of_a_batch(rm, batch, batch_tokens):
    assert_same_rows(rm.score(CONVERSATIONS, batch_tokens=batch_tokens), batch, slice(None))


def test_scores_do_not_depend_on_company_or_order(rm, batch):
    for row, messages in enumerate(CONVERSATIONS):
        assert_same_rows(rm.score([messages]), batch, [row])
    order = [5, 0, 7, 7, 2, 4, 1, 3, 6, 0]
    assert_same_rows(rm.score([CONVERSATIONS[i] for i in order]), batch, order)


def test_messages_and_conversations_score_alike(rm, batch):
    assert_same_rows(rm.score([conversation(messages) for messages in CONVERSATIONS]), batch, slice(None), 1e-7)


def test_no_conversations_give_an_empty_batch(rm):
    empty = rm.score([])
    assert len(empty) == 0
    assert [getattr(empty, name).shape for name in ARRAYS] == [(0,), *[(0, 4)] * 6]
    assert empty.rows.shape == (0,)
    assert rm.score([], normalize=True).scores.shape == (0,)
    assert len(empty.to_pandas()) == 0
    assert rm.explanations(empty) == []


def test_normalised_scores_count_standard_deviations_from_the_reference_mean(rm, batch):
    normalised = rm.score(CONVERSATIONS, normalize=True)
    np.testing.assert_allclose(normalised.scores, (batch.scores - 0.25) / 0.5, atol=1e-5)
    assert normalised.scores.dtype == np.float32
    np.testing.assert_allclose(normalised.contributions, batch.contributions, atol=1e-5)


@pytest.mark.parametrize("reference", [{}, {"score_mean": 0.1}, {"score_mean": 0.1, "score_std": 0.0}])
def test_scores_without_reference_figures_cannot_be_normalised(rm, reference):
    rm = changed(rm, reference=reference)
    with pytest.raises(CheckpointError, match="expected numbers to normalise scores by"):
        rm.score(CONVERSATIONS[:1], normalize=True)
    batch = rm.score(CONVERSATIONS[:1])
    np.testing.assert_allclose(batch.relative, batch.contributions, atol=1e-7)  # against rewards of zero


def test_rows_become_a_frame(batch):
    frame = batch.to_pandas()
    names = OBJECTIVES.names
    assert list(frame.columns) == [
        "score",
        *(f"{label}/{n}" for label in ("reward", "weight", "contribution") for n in names),
    ]
    assert frame.index.name == "row"
    np.testing.assert_array_equal(frame["score"], batch.scores)
    np.testing.assert_array_equal(frame["reward/code-style"], batch.rewards[:, 2])
    np.testing.assert_array_equal(frame["weight/verbosity"], batch.gating_weights[:, 3])
    np.testing.assert_array_equal(frame["contribution/beaver-harm"], batch.contributions[:, 1])


def test_objectives_turn_rewards_into_ratings(rm, batch):
    raw = rm.objectives.to_raw(batch.rewards)
    np.testing.assert_allclose(raw[:, 0], 1 + 4 * batch.rewards[:, 0], atol=1e-6)
    np.testing.assert_allclose(raw[:, 1], 4 - 4 * batch.rewards[:, 1], atol=1e-6)


# --- refusals ------------------------------------------------------------------------------------

TOO_LONG = chat("Please go on. " * 40, "And so on. " * 20)
MIXED = [
    CONVERSATIONS[0],
    chat("Hi", "  "),
    CONVERSATIONS[2],
    TOO_LONG,
    [{"role": "usr", "content": "a"}],
    CONVERSATIONS[3],
]


def test_refused_rows_are_listed_and_the_others_keep_their_index(rm):
    rm = changed(rm, limits={"max_length": 200, "overflow": "error"})
    batch = rm.score(MIXED, on_refused="skip")
    assert batch.rows.tolist() == [0, 2, 5]
    assert [index for index, _ in batch.rejected] == [1, 3, 4]
    assert "empty response" in batch.rejected[0][1]
    assert "expected at most 200" in batch.rejected[1][1]
    assert "did you mean user" in batch.rejected[2][1]
    assert_same_rows(batch, rm.score([MIXED[i] for i in batch.rows]), slice(None))
    assert batch.to_pandas().index.tolist() == [0, 2, 5]
    nothing = rm.score([MIXED[1]], on_refused="skip")
    assert (len(nothing), len(nothing.rejected)) == (0, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [(1, r"^conversation 1: .*messages\[1\]\.content.*empty response"), (3, "^conversation 2: found .* at most 200")],
)
@pytest.mark.parametrize("overflow", ["error", "skip", "truncate_prompt"])
def test_a_refused_row_is_an_error_that_names_it(rm, row, message, overflow):
    rm = changed(rm, limits={"max_length": 200, "overflow": overflow})
    long = chat("Why?", "Because. " * 200)  # no policy can shorten a reply
    conversations = [MIXED[0], MIXED[1], CONVERSATIONS[2]] if row == 1 else [MIXED[0], MIXED[2], long]
    with pytest.raises(ConversationError, match=message):
        rm.score(conversations)


def test_rows_that_lost_some_of_their_prompt_are_listed(rm):
    rm = changed(rm, limits={"max_length": 200, "overflow": "truncate_prompt"})
    batch = rm.score([chat("Hi", " "), *MIXED[2:4], CONVERSATIONS[0]], on_refused="skip")
    assert batch.truncated == [2]
    assert batch.rows.tolist() == [1, 2, 3]
    assert rm.score(CONVERSATIONS[:2]).truncated == []


# --- explanations --------------------------------------------------------------------------------


def test_an_explanation_is_the_row_of_the_batch(rm, batch):
    shown = rm.explain(CONVERSATIONS[3])
    assert shown.score == pytest.approx(float(batch.scores[3]), abs=1e-5)
    assert shown.normalised == pytest.approx((float(batch.scores[3]) - 0.25) / 0.5, abs=1e-4)
    assert shown.percentile == pytest.approx(50 * (float(batch.scores[3]) + 1), abs=1e-2)
    assert shown.model == "small"
    for i, share in enumerate(shown.shares):
        assert share.name == OBJECTIVES.names[i]
        assert share.rating == pytest.approx(float(OBJECTIVES.to_raw(batch.rewards)[3, i]), abs=1e-4)
        assert share.weight == pytest.approx(float(batch.gating_weights[3, i]), abs=1e-5)
        assert share.average_weight == REFERENCE["gating_weights"][i]
        assert share.contribution == pytest.approx(float(batch.contributions[3, i]), abs=1e-5)
        assert share.relative == pytest.approx(float(batch.relative[3, i]), abs=1e-5)


def test_a_prompt_and_a_response_are_explained_as_their_conversation(rm):
    messages = chat("What is 2+2?", "4")
    found = rm.explain("What is 2+2?", "4")
    assert found.to_dict() == rm.explain(messages).to_dict()
    assert rm.explain(messages[:1], "4", tokens=True).to_dict() == rm.explain(messages, tokens=True).to_dict()
    with pytest.raises(ConversationError, match="empty response"):
        rm.explain("What is 2+2?", "")


def test_explanations_of_normalised_scores_are_of_the_plain_ones(rm, batch):
    for plain, normalised in zip(
        rm.explanations(batch), rm.explanations(rm.score(CONVERSATIONS, normalize=True)), strict=True
    ):
        assert normalised.score == pytest.approx(plain.score, abs=1e-5)
        assert normalised.percentile == pytest.approx(plain.percentile, abs=1e-2)


# --- steering ------------------------------------------------------------------------------------


def test_steering_multiplies_the_gating_weights_and_makes_them_sum_to_one(rm, batch):
    steered = rm.steer({"ultra-helpful": 4.0, "verbosity": 0.5}).score(CONVERSATIONS)
    multiplied = batch.gating_weights * np.array([4.0, 1.0, 1.0, 0.5])
    expected = multiplied / multiplied.sum(1, keepdims=True)
    np.testing.assert_allclose(steered.gating_weights, expected, atol=1e-5)
    np.testing.assert_allclose(steered.gating_output, expected * 1.7, atol=1e-5)
    np.testing.assert_allclose(steered.rewards, batch.rewards, atol=1e-5)
    debiased = batch.rewards - batch.rewards[:, 3:] * np.array(PENALTIES)
    np.testing.assert_allclose(steered.scores, (expected * 1.7 * debiased).sum(1), atol=1e-5)
    np.testing.assert_allclose(steered.contributions.sum(1), steered.scores, atol=1e-5)
    assert np.abs(steered.scores - batch.scores).max() > 0.01


def test_dropped_weight_is_shared_out_in_proportion(rm, batch):
    steered = rm.steer(drop=["beaver-harm"]).score(CONVERSATIONS)
    np.testing.assert_array_equal(steered.gating_weights[:, 1], 0)
    np.testing.assert_array_equal(steered.contributions[:, 1], 0)
    others = [0, 2, 3]
    expected = batch.gating_weights[:, others] / (1 - batch.gating_weights[:, [1]])
    np.testing.assert_allclose(steered.gating_weights[:, others], expected, atol=1e-5)


def test_a_pinned_objective_has_its_share_on_every_prompt_and_the_gate_shares_the_rest(rm, batch):
    steered = rm.steer({"verbosity": 3.0}, pin={"code-style": 0.6}).score(CONVERSATIONS)
    np.testing.assert_allclose(steered.gating_weights[:, 2], 0.6, atol=1e-6)
    rest = batch.gating_weights * np.array([1.0, 1.0, 0.0, 3.0])
    expected = 0.4 * rest / rest.sum(1, keepdims=True) + np.array([0, 0, 0.6, 0])
    np.testing.assert_allclose(steered.gating_weights, expected, atol=1e-5)
    np.testing.assert_allclose(steered.contributions.sum(1), steered.scores, atol=1e-5)


def test_a_blend_is_part_gate_and_part_fixed_weights(rm, batch):
    steered = rm.steer(blend={"share": 0.3, "weights": {"ultra-helpful": 3, "code-style": 1}}).score(CONVERSATIONS)
    expected = 0.7 * batch.gating_weights + 0.3 * np.array([0.75, 0, 0.25, 0])
    np.testing.assert_allclose(steered.gating_weights, expected, atol=1e-5)
    np.testing.assert_allclose(steered.contributions.sum(1), steered.scores, atol=1e-5)
    whole = rm.steer(pin={"ultra-helpful": 1.0}).score(CONVERSATIONS)
    np.testing.assert_allclose(whole.gating_weights, np.tile([1.0, 0, 0, 0], (len(whole), 1)), atol=1e-6)
    # "Make it all helpfulness": what is left is the one objective, debiased.
    np.testing.assert_allclose(whole.scores, 1.7 * (batch.rewards[:, 0] - 0.4 * batch.rewards[:, 3]), atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_the_strength_of_debiasing_scales_every_penalty(rm, batch, strength):
    rm = rm.steer(debias_strength=strength)
    steered = rm.score(CONVERSATIONS)
    debiased = batch.rewards - strength * batch.rewards[:, 3:] * np.array(PENALTIES)
    np.testing.assert_allclose(steered.scores, (batch.gating_output * debiased).sum(1), atol=1e-5)
    np.testing.assert_allclose(steered.contributions.sum(1), steered.scores, atol=1e-5)
    np.testing.assert_allclose(rm.transform, np.eye(4) - strength * np.outer([0, 0, 0, 1], PENALTIES), atol=1e-7)


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_the_strength_of_debiasing_leaves_the_scale_of_the_rewards(tmp_path, strength):
    scale = np.array([2.0, 0.25, 3.0, 1.0])  # as with gating.scale_rewards; a debiased bias has none
    rm = reward_model()
    rm.model.reward_transform_matrix.mul_(torch.tensor(scale, dtype=torch.float32))
    batch, steered = rm.score(CONVERSATIONS), rm.steer(debias_strength=strength)
    debiased = (batch.rewards - strength * batch.rewards[:, 3:] * np.array(PENALTIES)) * scale
    np.testing.assert_allclose(steered.score(CONVERSATIONS).scores, (batch.gating_output * debiased).sum(1), atol=1e-5)
    steered.save_pretrained(tmp_path, layout="released")
    folded = ArmoRM.from_pretrained(tmp_path, dtype="float32")
    np.testing.assert_allclose(folded.score(CONVERSATIONS).scores, steered.score(CONVERSATIONS).scores, atol=1e-5)


def test_every_kind_of_steering_is_saved_and_read_with_the_same_scores(rm, tmp_path):
    steered = rm.steer(
        {"verbosity": 2.0},
        drop=["beaver-harm"],
        pin={"code-style": 0.2},
        blend={"share": 0.5, "weights": {"ultra-helpful": 1.0}},
        debias_strength=0.5,
    )
    steered.save_pretrained(tmp_path)
    read = ArmoRM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert read.model.config.steering == steered.model.config.steering
    np.testing.assert_allclose(read.score(CONVERSATIONS).scores, steered.score(CONVERSATIONS).scores, atol=1e-5)


def test_steering_leaves_the_original_alone(rm, batch):
    config = json.loads(rm.model.config.to_json_string())
    steered = rm.steer({"code-style": 9.0}, drop=["ultra-helpful"])
    again = rm.score(CONVERSATIONS)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))
    assert json.loads(rm.model.config.to_json_string()) == config
    assert steered.model.config.steering == {"multiply": {"code-style": 9.0}, "drop": ["ultra-helpful"]}
    assert steered.model.regression_layer.weight is rm.model.regression_layer.weight
    assert steered.tokenizer is rm.tokenizer
    assert steered.name == rm.name
    assert "(steered)" in str(steered.explain(CONVERSATIONS[0]))
    assert "(steered)" not in str(rm.explain(CONVERSATIONS[0]))


def test_steering_again_starts_from_the_gate_as_trained(rm, batch):
    first = rm.steer({"code-style": 9.0}, drop=["ultra-helpful"])
    assert first.steer({"beaver-harm": 2.0}).model.config.steering == {"multiply": {"beaver-harm": 2.0}, "drop": []}
    assert_same_rows(first.steer().score(CONVERSATIONS), batch, slice(None))


def test_steering_that_makes_no_sense_is_refused(rm):
    with pytest.raises(SteeringError, match="verbosity cannot be dropped"):
        rm.steer(drop=["verbosity"])
    with pytest.raises(SteeringError, match="verbosity cannot be dropped"):
        rm.steer({"verbosity": 0.0})
    with pytest.raises(ObjectiveError, match="did you mean code-style"):
        rm.steer({"code-stile": 2.0})


def test_dropping_the_only_objective_with_weight_gives_no_nan():
    rm = reward_model()
    with torch.no_grad():
        rm.model.gating.layers[-1].bias.copy_(torch.tensor([5000.0, 1.0, 0.0, -1.0]))
    np.testing.assert_array_equal(rm.score(CONVERSATIONS).gating_weights, np.eye(4)[[0] * len(CONVERSATIONS)])
    steered = rm.steer(drop=["ultra-helpful"]).score(CONVERSATIONS)
    np.testing.assert_allclose(steered.gating_weights.sum(1), 1, atol=1e-6)
    assert (steered.gating_weights[:, 1:] > 0.05).all()
    assert np.isfinite(steered.scores).all()


# --- saving and loading --------------------------------------------------------------------------


def test_a_reward_model_survives_its_folder(rm, batch, tmp_path):
    rm.save_pretrained(tmp_path)
    assert weight_files(tmp_path) == ["model.safetensors"]
    read = ArmoRM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    again = read.score(CONVERSATIONS)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))
    assert read.objectives == rm.objectives
    assert read.reference == REFERENCE
    assert read.name == str(tmp_path)
    assert read.model.config.gate_pattern == rm.model.config.gate_pattern == [2, 5]


def test_steering_survives_the_folder(rm, tmp_path):
    steered = rm.steer({"code-style": 9.0}, drop=["ultra-helpful"])
    steered.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["steering"]
    assert written == {"multiply": {"code-style": 9.0}, "drop": ["ultra-helpful"]}
    read = ArmoRM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    np.testing.assert_array_equal(read.score(CONVERSATIONS).scores, steered.score(CONVERSATIONS).scores)
    unsteered = read.steer().score(CONVERSATIONS)
    np.testing.assert_array_equal(unsteered.scores, rm.score(CONVERSATIONS).scores)


def stored_dtypes(folder) -> dict[bool, set[torch.dtype]]:
    """dtypes in the file, of the backbone's tensors (True) and of the heads (False)."""
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found[name.startswith("model.")].add(tensor.dtype)
    return found


def test_a_bfloat16_backbone_that_was_read_as_float32_is_stored_as_bfloat16(tmp_path):
    reward_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "first")
    upcast = ArmoRM.from_pretrained(tmp_path / "first", dtype="float32", device="cpu")
    assert upcast.model.model.dtype == torch.float32
    before = upcast.score(CONVERSATIONS)
    upcast.save_pretrained(tmp_path / "second")
    assert upcast.model.model.dtype == upcast.model.config.dtype == torch.float32
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert stored_dtypes(folder) == {True: {torch.bfloat16}, False: {torch.float32}}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        assert ArmoRM.from_pretrained(folder, dtype="bfloat16", device="cpu").model.model.dtype == torch.bfloat16
        again = ArmoRM.from_pretrained(folder, dtype="float32", device="cpu").score(CONVERSATIONS)
        np.testing.assert_array_equal(again.scores, before.scores)


def test_a_float32_backbone_is_stored_as_float32(rm, tmp_path):
    rm.save_pretrained(tmp_path)
    assert stored_dtypes(tmp_path) == {True: {torch.float32}, False: {torch.float32}}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_the_dtype_may_be_asked_for_by_name_or_as_torch_has_it(rm, tmp_path):
    rm.save_pretrained(tmp_path)
    for dtype in ("bfloat16", torch.bfloat16):
        read = ArmoRM.from_pretrained(tmp_path, dtype=dtype, device="cpu")
        assert read.model.model.dtype == torch.bfloat16
        assert read.model.regression_layer.weight.dtype == read.model.reward_transform_matrix.dtype == torch.float32
        np.testing.assert_allclose(read.score(CONVERSATIONS).scores, rm.score(CONVERSATIONS).scores, atol=0.3)
    with pytest.raises((CheckpointError, BackboneError), match="dtype 'int8', expected auto, weights, float32"):
        ArmoRM.from_pretrained(tmp_path, dtype="int8")


def test_what_is_no_reward_model_is_refused_in_one_line(rm, tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    rm.save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    rm.save_pretrained(tmp_path / "pickled")
    state = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    for name in ("plain", "damaged", "pickled", "empty"):
        with pytest.raises(CheckpointError) as caught:
            ArmoRM.from_pretrained(tmp_path / name, device="cpu")
        place = "damaged/model.safetensors" if name == "damaged" else name
        assert str(caught.value).startswith(f"{tmp_path / place}: ")
        assert "\n" not in str(caught.value)


def test_a_batch_gives_some_of_its_rows(batch):
    first = np.isin(np.arange(len(batch)), [0])
    for rows in ([2, 0], np.array([2, 0]), first, slice(1, 3)):
        part = batch.take(rows)
        assert part.rows.tolist() == batch.rows[rows].tolist()
        assert_same_rows(part, batch, rows, 0)
        assert part.names == batch.names
        assert part.uncertainty is None
    assert batch.prompt_index[0] == batch.prompt_index[1] != batch.prompt_index[2]
