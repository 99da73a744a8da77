"""The Hugging Face model: forward against the written formula, padding, the gate position, checkpoints, dtypes."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config

from armorm.errors import CheckpointError
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.remote_code import ArmoRMOutput, find_gate, infer_mask
from tests.helpers.conversations import chat
from tests.helpers.small_models import OBJECTIVES, llama, reward_model, tokenizer, weight_files

PAD = 0
HEADS = ("regression_layer", "gating", "reward_transform_matrix")
CONVERSATIONS = [
    chat("What is the capital of France?", "Paris, on the river Seine."),
    chat("Hi!", "Hello."),
    chat("Name a prime.", "Seven.", "And one that is larger, with a reason?", "Eleven: nothing but one divides it."),
]


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def encoded(rm):
    from armorm.conversation import Conversation

    return rm.backbone.template.encode([Conversation.from_messages(c) for c in CONVERSATIONS])


@pytest.fixture(scope="module")
def alone(rm, encoded):
    """Each conversation by itself, without padding, at its gate: what every batch must give."""
    outputs = [
        run(rm, torch.from_numpy(e.ids)[None].long(), gate_positions=torch.tensor([e.gate_position])) for e in encoded
    ]
    return torch.cat([output.score for output in outputs])


@pytest.fixture(scope="module")
def saved(rm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    rm.model.save_pretrained(folder)
    return folder


@torch.no_grad()
def run(rm, ids, **kwargs) -> ArmoRMOutput:
    return rm.model(ids, **kwargs)


def padded(encoded, side: str, pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask padded on one side, and the gate positions in the padded rows."""
    length = max(len(e) for e in encoded)
    ids = torch.full((len(encoded), length), pad)
    mask = torch.zeros(len(encoded), length, dtype=torch.long)
    gates = torch.zeros(len(encoded), dtype=torch.long)
    for row, e in enumerate(encoded):
        start = 0 if side == "right" else length - len(e)
        ids[row, start : start + len(e)] = torch.from_numpy(e.ids.astype(np.int64))
        mask[row, start : start + len(e)] = 1
        gates[row] = start + e.gate_position
    return ids, mask, gates


# --- forward -------------------------------------------------------------------------------------


def test_the_output_is_the_written_formula(rm, encoded):
    ids, mask, gates = padded(encoded, "right")
    output = run(rm, ids, attention_mask=mask, gate_positions=gates)
    model = rm.model
    with torch.no_grad():
        states = [model.model(torch.from_numpy(e.ids)[None].long()).last_hidden_state[0] for e in encoded]
    last = torch.stack([state[-1] for state in states]).double()
    prompt = torch.stack([state[e.gate_position] for state, e in zip(states, encoded, strict=True)]).double()
    rewards = last @ model.regression_layer.weight.double().T
    hidden = (prompt @ model.gating.layers[0].weight.double().T + model.gating.layers[0].bias.double()).relu()
    logits = (hidden @ model.gating.layers[1].weight.double().T + model.gating.layers[1].bias.double()) / 2.0
    gating_output = 1.7 * torch.softmax(logits, 1)
    debiased = rewards - rewards[:, 3:] * torch.tensor([0.4, -0.3, 0.1, 1.0])
    score = (gating_output * debiased).sum(1)
    for found, expected in [
        (output.hidden_state, last),
        (output.prompt_embedding, prompt),
        (output.rewards, rewards),
        (output.gating_output, gating_output),
        (output.score, score),
        (output.logits, score[:, None]),
    ]:
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert score.std() > 0.1, "the three scores should differ for the comparisons below to mean something"


def test_names_and_shapes_of_the_output(rm, encoded):
    ids, mask, _ = padded(encoded, "right")
    output = run(rm, ids, attention_mask=mask)
    shapes = {name: tuple(output[name].shape) for name in output}
    assert shapes == {
        "logits": (3, 1),
        "rewards": (3, 4),
        "gating_output": (3, 4),
        "score": (3,),
        "hidden_state": (3, 32),
        "prompt_embedding": (3, 32),
    }
    assert {field.name for field in fields(ArmoRMOutput)} == {*shapes, "loss"}  # which comes with labels only
    assert output[0] is output.logits  # what a pipeline or a trainer takes first
    assert all(output[name].dtype == torch.float32 for name in ("logits", "rewards", "gating_output", "score"))


@pytest.mark.parametrize("gate", ["given", "searched"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_score(rm, encoded, alone, side, masked, gate):
    ids, mask, gates = padded(encoded, side)
    output = run(
        rm,
        ids,
        attention_mask=mask if masked else None,
        gate_positions=gates if gate == "given" else None,
    )
    torch.testing.assert_close(output.score, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_score_where_positions_are_learned(encoded, side):
    config = GPT2Config(vocab_size=8192, n_embd=32, n_layer=1, n_head=2, n_positions=128, initializer_range=0.2)
    torch.manual_seed(0)
    backbone = AutoModel.from_config(config).eval()
    config = ArmoRMConfig(backbone_config=config, objectives=OBJECTIVES.to_dicts(), gate_pattern=[2, 5])
    model = ArmoRMForSequenceClassification.assemble(backbone, config)
    ids, mask, _ = padded(encoded, side)
    with torch.no_grad():
        alone = torch.cat([model(torch.from_numpy(e.ids)[None].long()).score for e in encoded])
        torch.testing.assert_close(model(ids, attention_mask=mask).score, alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_the_padding_does_not_matter_under_a_mask(rm, encoded, alone, side):
    ids, mask, gates = padded(encoded, side, pad=5)
    gate_in_padding = torch.where(mask == 0, torch.arange(ids.shape[1]) % 2 * 3 + 2, ids)  # 2 5 2 5: the gate pattern
    for altered in (ids, gate_in_padding):
        torch.testing.assert_close(run(rm, altered, attention_mask=mask).score, alone, atol=1e-5, rtol=0)
        output = run(rm, altered, attention_mask=mask, gate_positions=gates)
        torch.testing.assert_close(output.score, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pad_id_inside_the_text_is_text(rm, encoded, side):
    e = encoded[0]
    ids = torch.from_numpy(e.ids).long().clone()
    ids[e.gate_position + 4] = PAD
    ids[2] = PAD
    gate = torch.tensor([e.gate_position])
    expected = run(rm, ids[None], attention_mask=torch.ones(1, len(ids)), gate_positions=gate).score
    padding = torch.full((5,), PAD)
    row = torch.cat([ids, padding] if side == "right" else [padding, ids])[None]
    torch.testing.assert_close(run(rm, row).score, expected, atol=1e-5, rtol=0)
    mask = torch.cat([torch.ones(len(ids)), torch.zeros(5)])
    mask = (mask if side == "right" else mask.flip(0))[None]
    torch.testing.assert_close(run(rm, row, attention_mask=mask).score, expected, atol=1e-5, rtol=0)


def test_the_mask_is_inferred_from_the_ends_only():
    ids = torch.tensor([[0, 0, 7, 0, 8, 0], [7, 8, 9, 9, 9, 0], [0, 0, 0, 0, 0, 0]])
    assert infer_mask(ids, 0).int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6]
    assert infer_mask(ids, None).all()


def test_rows_without_a_real_token_are_refused(rm, encoded):
    ids, mask, gates = padded(encoded, "right")
    mask[1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] have no real token"):
        run(rm, ids, attention_mask=mask, gate_positions=gates)


def test_what_callers_pass_by_habit_is_taken(rm, encoded, alone):
    ids, mask, _ = padded(encoded, "right")
    output = run(rm, ids, attention_mask=mask, use_cache=True, return_dict=True, labels=None)
    torch.testing.assert_close(output.score, alone, atol=1e-5, rtol=0)


def test_gradients_reach_the_backbone_and_every_head():
    model = reward_model().model
    ids = torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])
    model(ids).logits.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


# --- the gate position ---------------------------------------------------------------------------


def test_the_last_match_of_the_gate_pattern_wins(rm, encoded):
    pattern = rm.model.config.gate_pattern
    ids = torch.from_numpy(encoded[2].ids)[None].long()
    starts = [i for i in range(ids.shape[1] - 1) if ids[0, i : i + 2].tolist() == pattern]
    assert len(starts) == 2  # two user turns
    assert find_gate(ids, torch.ones_like(ids), pattern).tolist() == [starts[-1]] == [encoded[2].gate_position]


def test_the_gate_is_searched_among_real_tokens_only():
    ids = torch.tensor([[2, 5, 9, 2, 5, 8, 2, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]).bool()
    assert find_gate(ids, torch.ones_like(mask), [2, 5]).tolist() == [6]
    assert find_gate(ids, mask, [2, 5]).tolist() == [3]


def test_rows_without_the_gate_are_named_with_the_ids_searched_for(rm, encoded):
    ids, mask, _ = padded(encoded, "right")
    ids[1][ids[1] == 5] = 9
    with pytest.raises(ValueError, match=r"rows \[1\] have no gate pattern \[2, 5\].*chat template"):
        run(rm, ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"rows of 1 tokens are shorter than the gate pattern \[2, 5\]"):
        run(rm, ids[:, :1], attention_mask=mask[:, :1])
    with pytest.raises(ValueError, match="no gate_pattern; pass gate_positions"):
        find_gate(ids, mask, [])


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [False, True])
def test_a_model_survives_its_files_bit_for_bit(tmp_path, intercept):
    rm = reward_model(intercept=intercept)
    rm.model.save_pretrained(tmp_path)
    read = ArmoRMForSequenceClassification.from_pretrained(tmp_path)
    before, after = rm.model.state_dict(), read.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert ("regression_layer.bias" in after) == intercept
    settings, read_settings = (json.loads(model.config.to_json_string()) for model in (rm.model, read))
    for parts in (settings, read_settings):
        parts["backbone_config"].pop("dtype", None)  # transformers writes down there what it was read as
    assert settings == read_settings
    ids = torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])
    with torch.no_grad():
        # Equal weights at other addresses in memory: some matrix products round differently there.
        torch.testing.assert_close(rm.model(ids).score, read(ids).score, rtol=1e-6, atol=1e-6)
    assert not read.training


def test_weights_are_written_as_safetensors_only(saved):
    assert weight_files(saved) == ["model.safetensors"]


def test_tensor_names_are_those_of_the_released_checkpoint(saved):
    names = set(load_file(saved / "model.safetensors"))
    assert {name for name in names if not name.startswith("model.")} == {
        "regression_layer.weight",
        "reward_transform_matrix",
        "gating.layers.0.weight",
        "gating.layers.0.bias",
        "gating.layers.1.weight",
        "gating.layers.1.bias",
        "gating.logit_scale",
    }
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"} <= names


def test_a_checkpoint_of_pickled_weights_is_refused(saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    torch.save(load_file(saved / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        ArmoRMForSequenceClassification.from_pretrained(tmp_path)


def altered(saved: Path, folder: Path, tensors=None, config=None) -> Path:
    """A copy of a checkpoint with its tensors or its config changed."""
    state = load_file(saved / "model.safetensors")
    settings = json.loads((saved / "config.json").read_text())
    if tensors:
        tensors(state)
    if config:
        config(settings)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "regression_layer.weight",
        "reward_transform_matrix",
        "gating.logit_scale",
        "gating.layers.0.bias",
        "model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_refused_by_name(saved, tmp_path, name):
    folder = altered(saved, tmp_path, tensors=lambda state: state.pop(name))
    with pytest.raises(CheckpointError) as caught:
        ArmoRMForSequenceClassification.from_pretrained(folder)
    assert str(caught.value) == f"{folder}: the checkpoint does not fit: missing {name}"


def test_every_fault_of_a_checkpoint_is_named(saved, tmp_path):
    def spoil(state):
        del state["gating.layers.1.bias"], state["model.norm.weight"]
        state["score.weight"] = torch.zeros(1, 32)
        state["regression_layer.weight"] = torch.zeros(5, 32)

    with pytest.raises(CheckpointError) as caught:
        ArmoRMForSequenceClassification.from_pretrained(altered(saved, tmp_path, tensors=spoil))
    message = str(caught.value)
    assert "missing gating.layers.1.bias, model.norm.weight;" in message
    assert "unexpected score.weight;" in message
    assert message.endswith("mismatched regression_layer.weight (shape [5, 32], expected [4, 32])")


def test_a_config_with_another_number_of_objectives_does_not_fit(saved, tmp_path):
    folder = altered(saved, tmp_path, config=lambda settings: settings["objectives"].pop())
    with pytest.raises(CheckpointError) as caught:
        ArmoRMForSequenceClassification.from_pretrained(folder)
    for fault in (
        "regression_layer.weight (shape [4, 32], expected [3, 32])",
        "reward_transform_matrix (shape [4, 4], expected [3, 3])",
        "gating.layers.1.weight (shape [4, 16], expected [3, 16])",
        "gating.layers.1.bias (shape [4], expected [3])",
    ):
        assert fault in str(caught.value)


def test_a_mismatch_is_refused_even_where_the_caller_would_ignore_it(saved, tmp_path):
    folder = altered(saved, tmp_path, tensors=lambda state: state.update({"gating.logit_scale": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"mismatched gating\.logit_scale"):
        ArmoRMForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_a_plain_backbone_never_gets_random_heads(saved, tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_type 'llama', expected 'armorm'"):
        ArmoRMForSequenceClassification.from_pretrained(tmp_path)
    config = ArmoRMConfig.from_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"missing gating\.layers\.0\.bias, .*regression_layer\.weight"):
        ArmoRMForSequenceClassification.from_pretrained(tmp_path, config=config)


def test_a_config_without_a_backbone_is_refused():
    with pytest.raises(CheckpointError, match="no backbone_config"):
        ArmoRMForSequenceClassification(ArmoRMConfig())


# --- dtypes --------------------------------------------------------------------------------------


def dtypes(model: ArmoRMForSequenceClassification) -> tuple[set[torch.dtype], set[torch.dtype]]:
    """Of the backbone's parameters, and of the heads."""
    state = model.state_dict()
    heads = {tensor.dtype for name, tensor in state.items() if name.startswith(HEADS)}
    return {parameter.dtype for parameter in model.model.parameters()}, heads


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, "auto", torch.float32, torch.bfloat16, torch.float16])
def test_heads_are_float32_whatever_the_backbone_is(tmp_path, stored, asked):
    model = reward_model(dtype=stored).model
    assert dtypes(model) == ({stored}, {torch.float32})
    model.save_pretrained(tmp_path)
    options = {} if asked is None else {"dtype": asked}
    read = ArmoRMForSequenceClassification.from_pretrained(tmp_path, **options)
    assert dtypes(read) == ({stored if asked in (None, "auto") else asked}, {torch.float32})
    for name, tensor in model.state_dict().items():
        if name.startswith(HEADS):
            assert torch.equal(read.state_dict()[name], tensor), name
    with torch.no_grad():
        output = read(torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]]))
    assert output.score.dtype == output.rewards.dtype == torch.float32
    assert output.score.isfinite().all()


def test_heads_stay_in_float32_under_autocast(rm, encoded):
    ids, mask, _ = padded(encoded, "right")
    plain = run(rm, ids, attention_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = rm.model.score_features(plain.hidden_state, plain.prompt_embedding)
    assert torch.equal(output.score, plain.score)


# --- one backbone, several models ----------------------------------------------------------------


def test_assembling_takes_the_backbone_as_it_is():
    backbone = llama()
    config = ArmoRMConfig(backbone_config=backbone.config, objectives=OBJECTIVES.to_dicts())
    model = ArmoRMForSequenceClassification.assemble(backbone, config)
    assert model.model is backbone
    assert not model.training
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(model.reward_transform_matrix, torch.eye(4))


def test_another_config_shares_the_weights_and_leaves_the_first_model_alone(rm, encoded):
    ids, mask, _ = padded(encoded, "right")
    before = run(rm, ids, attention_mask=mask)
    config = ArmoRMConfig.from_dict(rm.model.config.to_dict())
    config.steering = {"multiply": {"ultra-helpful": 3.0}, "drop": ["code-style"]}
    steered = rm.model.with_config(config)
    with torch.no_grad():
        output = steered(ids, attention_mask=mask)
    multiplied = before.gating_output * torch.tensor([3.0, 1.0, 0.0, 1.0])
    expected = multiplied / multiplied.sum(1, keepdim=True) * 1.7
    torch.testing.assert_close(output.gating_output, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.rewards, before.rewards, atol=0, rtol=0)
    assert steered.regression_layer.weight is rm.model.regression_layer.weight
    assert rm.model.config.steering == {}
    assert torch.equal(run(rm, ids, attention_mask=mask).score, before.score)


def test_the_text_of_a_tokenizer_is_scored_like_its_ids(rm, alone):
    """What a trainer does: render with the chat template, tokenize in a padded batch, read logits."""
    tokens = tokenizer()
    texts = tokens.apply_chat_template(CONVERSATIONS, tokenize=False)
    batch = tokens(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    output = run(rm, batch.input_ids, attention_mask=batch.attention_mask)
    torch.testing.assert_close(output.logits[:, 0], alone, atol=1e-5, rtol=0)
