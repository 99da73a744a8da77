"""Heads on a backbone that is stored elsewhere: the same scores, and never on other weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from armorm import ArmoRM
from armorm.backbone.adapters import Adapters
from armorm.errors import CheckpointError
from armorm.evaluation.scorers import ArmoRMScorer, load_scorer
from armorm.model.modeling import HEADS
from tests.helpers.commands import exit_code
from tests.helpers.conversations import chat

ROWS = [chat("Why is the sky blue?", "It scatters. " * n) for n in (1, 4)]


@pytest.fixture(scope="module")
def heads(small_run, tmp_path_factory):
    """A trained model's folder, and one with its heads alone."""
    folder = tmp_path_factory.mktemp("heads")
    ArmoRM.from_pretrained(small_run, dtype="float32", device="cpu").save_pretrained(folder, heads_only=True)
    return small_run, folder


def test_heads_alone_score_as_the_whole_model(heads, one_layer_backbone):
    whole, alone = (ArmoRM.from_pretrained(folder, dtype="float32", device="cpu") for folder in heads)
    torch.testing.assert_close(
        torch.from_numpy(alone.score(ROWS).scores), torch.from_numpy(whole.score(ROWS).scores), atol=1e-6, rtol=0
    )
    files = {path.name for path in heads[1].iterdir()}
    assert HEADS in files and "model.safetensors" not in files and "tokenizer.json" not in files
    source = json.loads((heads[1] / "config.json").read_text())["backbone_source"]
    assert source["name"] == str(one_layer_backbone) and source["referenced"] and len(source["sha256"]) == 64
    assert isinstance(load_scorer(str(heads[1])), ArmoRMScorer)


def test_loading_reads_the_tokenizer_once(heads, monkeypatch):
    read, kept = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: read.append(a) or kept(*a, **k))
    ArmoRM.from_pretrained(heads[1], dtype="float32", device="cpu")
    assert len(read) == 1


def test_saved_whole_again_it_stands_alone(heads, tmp_path):
    alone = ArmoRM.from_pretrained(heads[1], dtype="float32", device="cpu")
    alone.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "referenced" not in config["backbone_source"]
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template
    again = ArmoRM.from_pretrained(tmp_path / "whole", dtype="float32", device="cpu")
    torch.testing.assert_close(
        torch.from_numpy(again.score(ROWS).scores), torch.from_numpy(alone.score(ROWS).scores), atol=1e-6, rtol=0
    )


def test_other_weights_are_rejected(heads, tmp_path):
    for path in heads[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_source"]["sha256"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its heads belong to .* with weights 0000.*expected the same weights"):
        ArmoRM.from_pretrained(tmp_path)


def test_missing_heads_are_named(heads, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(heads[1] / HEADS)
    tensors.pop("regression_layer.weight")
    save_file(tensors, tmp_path / HEADS)
    (tmp_path / "config.json").write_text((heads[1] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"missing regression_layer\.weight"):
        ArmoRM.from_pretrained(tmp_path)


def test_the_command_exports_heads(heads, tmp_path, capsys):
    assert exit_code("export", heads[0], tmp_path / "out", "--heads-only") == 0
    assert HEADS in capsys.readouterr().out
    assert exit_code("export", heads[0], tmp_path / "no", "--heads-only", "--layout", "released") == 1
    assert "heads alone fit only the armorm layout" in capsys.readouterr().err


def test_adapters_stand_beside_the_heads_and_are_merged_at_loading(heads, tmp_path):
    whole = ArmoRM.from_pretrained(heads[0], dtype="float32", device="cpu")
    name = "layers.0.self_attn.q_proj"
    weight = whole.model.model.state_dict()[f"{name}.weight"]
    a, b = torch.randn(2, weight.shape[1]) / 10, torch.randn(weight.shape[0], 2) / 10
    adapters = Adapters({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, alpha=4.0, backbone="x")
    plain = whole.score(ROWS).scores
    adapters.merge(whole.model.model.state_dict())
    whole.model.adapters, whole.model.config.adapters = adapters, adapters.settings()
    tuned = whole.score(ROWS).scores
    assert abs(tuned - plain).max() > 1e-4
    for folder, heads_only in ((tmp_path / "heads", True), (tmp_path / "whole", False)):
        whole.save_pretrained(folder, heads_only=heads_only)
        again = ArmoRM.from_pretrained(folder, dtype="float32", device="cpu")
        assert again.score(ROWS).scores == pytest.approx(tuned, abs=1e-5)
        again.save_pretrained(tmp_path / f"again-{heads_only}", heads_only=True)
    (tmp_path / "whole" / "adapters.safetensors").unlink()
    with pytest.raises(CheckpointError, match="fine-tuned with adapters, which are not in its folder"):
        ArmoRM.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "no", heads_only=True)
