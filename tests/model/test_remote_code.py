"""The remote-code file by itself, as it runs on machines without armorm."""

from __future__ import annotations

import ast
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from armorm.model import released, remote_code
from armorm.model.export import REMOTE_CODE
from tests.helpers.conversations import chat
from tests.helpers.small_models import llama, reward_model

ROW = [1, 4, 60, 61, 2, 5, 70, 71, 2]


def test_the_file_needs_nothing_but_torch_transformers_and_safetensors():
    nodes = [
        node for node in ast.walk(ast.parse(REMOTE_CODE.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert all(node.level == 0 for node in nodes if isinstance(node, ast.ImportFrom))
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    packages = {str(name).partition(".")[0] for name in names}
    assert packages - set(sys.stdlib_module_names) == {"torch", "transformers", "safetensors"}


def test_it_knows_the_gates_of_the_published_models():
    assert remote_code.GATE_PATTERNS == released.GATE_PATTERNS
    assert {f"{name}ForRewardModelWithGating" for name in ("Llama", "Gemma2")} == set(released.ARCHITECTURES.values())
    assert all(hasattr(remote_code, name) for name in released.ARCHITECTURES.values())


@pytest.fixture(scope="module")
def rm():
    return reward_model(intercept=True).steer({"ultra-helpful": 2.0}, drop=["code-style"])


@pytest.fixture(scope="module")
def saved(rm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    rm.save_pretrained(folder)
    return folder


def test_it_scores_as_the_model_does(rm, saved):
    model = remote_code.ArmoRMForSequenceClassification.from_pretrained(saved)
    batch = AutoTokenizer.from_pretrained(saved)(
        rm.tokenizer.apply_chat_template([chat("Hi", "Hello."), chat("Why?", "Because it is so.")], tokenize=False),
        padding=True,
        add_special_tokens=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs, expected = model(batch), rm.model(batch)
        loss = model(batch, labels=torch.tensor([0.5, 1.5])).loss
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss, ((expected.score - torch.tensor([0.5, 1.5])) ** 2).mean())


@pytest.mark.parametrize(
    "steering",
    [
        {"pin": {"ultra-helpful": 0.6}, "blend": {"share": 0.25, "weights": {"code-style": 1.0, "verbosity": 3.0}}},
        {"pin": {"ultra-helpful": 0.6, "beaver-harm": 0.4}, "debias_strength": 1.5},
        {"multiply": {"beaver-harm": 3.0}, "drop": ["code-style"], "blend": {"share": 0.5}, "debias_strength": 0.0},
    ],
)
def test_it_weighs_by_every_kind_of_steering(saved, tmp_path, steering):
    rm = reward_model(intercept=True).steer(**steering)
    rm.save_pretrained(tmp_path)
    model = remote_code.ArmoRMForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(torch.tensor(model.steering[2:]), torch.tensor(rm.model.steering[2:]))
    plain = remote_code.ArmoRMForSequenceClassification.from_pretrained(saved)
    with torch.no_grad():
        found, expected = (m(torch.tensor([ROW])) for m in (model, rm.model))
        assert abs(found.score - plain(torch.tensor([ROW])).score) > 1e-3
    torch.testing.assert_close(found.gating_output, expected.gating_output, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.score, expected.score, atol=1e-6, rtol=1e-6)


def test_a_steering_that_the_file_does_not_know_is_refused(saved):
    config = remote_code.ArmoRMConfig.from_pretrained(saved)
    config.steering = {"invert": ["ultra-helpful"]}
    with pytest.raises(ValueError, match=r"steers by \['invert'\], which this version does not support"):
        remote_code.ArmoRMForSequenceClassification(config)


def test_steering_an_unknown_objective_is_refused(saved):
    config = remote_code.ArmoRMConfig.from_pretrained(saved)
    config.steering = {"multiply": {"ultra-helpfull": 2.0}}
    with pytest.raises(ValueError, match=r"steers objectives \['ultra-helpfull'\], expected some of \['ultra-helpful'"):
        remote_code.ArmoRMForSequenceClassification(config)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casting_leaves_the_heads_in_float32(saved, cast):
    model = remote_code.ArmoRMForSequenceClassification.from_pretrained(saved)
    getattr(model, cast)()
    assert model.model.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16}[cast]
    assert {t.dtype for name, t in model.state_dict().items() if not name.startswith("model.")} == {torch.float32}
    with torch.no_grad():
        assert model(torch.tensor([ROW])).score.isfinite().all()


@pytest.mark.parametrize("asked", [None, "auto"])
def test_the_weights_decide_the_dtype_not_the_config(saved, tmp_path, asked):
    state = load_file(saved / "model.safetensors")
    narrow = {name: t.bfloat16() if name.startswith("model.") else t for name, t in state.items()}
    save_file(narrow, tmp_path / "model.safetensors", {"format": "pt"})
    settings = json.loads((saved / "config.json").read_text()) | {"dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = remote_code.ArmoRMForSequenceClassification.from_pretrained(tmp_path, dtype=asked)
    assert model.model.dtype == torch.bfloat16
    assert model.regression_layer.weight.dtype == torch.float32


def test_every_fault_of_a_checkpoint_is_named(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    del state["gating.layers.1.bias"], state["model.norm.weight"]
    state |= {"score.weight": torch.zeros(1, 32), "regression_layer.weight": torch.zeros(5, 32)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ValueError) as caught:
        remote_code.ArmoRMForSequenceClassification.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the checkpoint does not fit: missing gating.layers.1.bias, model.norm.weight; "
        "unexpected score.weight; mismatched regression_layer.weight (shape [5, 32], expected [4, 32])"
    )


def test_a_plain_backbone_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    shape = {"num_objectives": 4, "gating_temperature": 10, "gating_hidden_dim": 8, "gating_n_hidden": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings | shape))
    assert AutoModel.from_pretrained(tmp_path) is not None
    with pytest.raises(ValueError, match=r"missing gating\.layers\.0\.bias"):
        remote_code.LlamaForRewardModelWithGating.from_pretrained(tmp_path)
