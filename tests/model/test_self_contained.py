"""Folders with a remote-code file: what is written, and that armorm itself still reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from armorm import ArmoRM
from armorm.errors import CheckpointError
from armorm.model.export import REMOTE_CODE, make_self_contained
from armorm.model.modeling import ArmoRMForSequenceClassification
from tests.helpers.small_models import reward_model

ROW = [1, 4, 60, 61, 2, 5, 70, 71, 2]


@pytest.fixture(scope="module")
def rm():
    return reward_model()


@pytest.fixture(scope="module")
def folder(rm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("self-contained")
    rm.save_pretrained(folder, self_contained=True)
    return folder


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def score(model) -> float:
    return float(model(torch.tensor([ROW])).score)


def test_the_file_is_copied_word_for_word_and_the_config_points_to_it(folder, rm, tmp_path):
    assert (folder / "modeling_armorm.py").read_bytes() == REMOTE_CODE.read_bytes()
    assert settings(folder)["auto_map"] == {
        "AutoConfig": "modeling_armorm.ArmoRMConfig",
        "AutoModelForSequenceClassification": "modeling_armorm.ArmoRMForSequenceClassification",
    }
    rm.save_pretrained(tmp_path, layout="released", self_contained=True)
    assert (tmp_path / "modeling_custom.py").read_bytes() == REMOTE_CODE.read_bytes()
    assert settings(tmp_path)["auto_map"] == {
        "AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"
    }


def test_nothing_is_added_unless_asked_for(rm, tmp_path):
    rm.save_pretrained(tmp_path)
    assert "auto_map" not in settings(tmp_path)
    assert list(tmp_path.glob("*.py")) == []


def test_gemma_2_has_a_class_of_its_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    make_self_contained(tmp_path, "released")
    assert settings(tmp_path)["auto_map"] == {
        "AutoModelForSequenceClassification": "modeling_custom.Gemma2ForRewardModelWithGating"
    }


@pytest.mark.parametrize(("layout", "family"), [("armorm", "llama"), ("released", "qwen2"), ("released", "armorm")])
def test_a_config_of_another_layout_is_refused_and_left_alone(tmp_path, layout, family):
    text = json.dumps({"model_type": family})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"model_type '{family}', expected"):
        make_self_contained(tmp_path, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("layout", ["armorm", "released"])
def test_armorm_reads_it_and_saves_it_without_a_trace(rm, tmp_path, layout):
    rm.save_pretrained(tmp_path / "with", layout=layout, self_contained=True)
    read = ArmoRM.from_pretrained(tmp_path / "with", dtype="float32", device="cpu")
    assert type(read.model) is ArmoRMForSequenceClassification
    assert score(read.model) == pytest.approx(score(rm.model), abs=1e-6)
    read.save_pretrained(tmp_path / "without", layout=layout)
    read.model.save_pretrained(tmp_path / "the model alone")
    assert "auto_map" not in settings(tmp_path / "without") | settings(tmp_path / "the model alone")
    assert list((tmp_path / "without").glob("*.py")) == []
    read.save_pretrained(tmp_path / "again", layout=layout, self_contained=True)
    assert settings(tmp_path / "again")["auto_map"] == settings(tmp_path / "with")["auto_map"]


PROGRAM = """
import sys
import torch
import armorm
from transformers import AutoModelForSequenceClassification

for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], **options)
    assert type(model) is armorm.ArmoRMForSequenceClassification, (options, type(model))
    with torch.no_grad():
        print(float(model(torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])).score))
"""


@pytest.mark.slow
def test_the_auto_class_takes_armorm_where_it_is_imported(folder, rm):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [float(line) for line in done.stdout.split()] == pytest.approx([score(rm.model)] * 3, abs=1e-6)
