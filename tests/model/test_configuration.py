"""The config keeps everything but the weights, and refuses to be read from another model's file."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from armorm.errors import CheckpointError
from armorm.model.configuration import ArmoRMConfig
from tests.helpers.small_models import OBJECTIVES, REFERENCE, llama

SETTINGS = {
    "objectives": OBJECTIVES.to_dicts(),
    "gating_temperature": 3.0,
    "gating_hidden_dim": 64,
    "gating_n_hidden": 2,
    "regression_bias": True,
    "gate_pattern": [2, 5],
    "limits": {"max_length": 512, "overflow": "skip"},
    "reference": REFERENCE,
    "debiasing": {"against": ["verbosity"], "metric": "pearson", "level": "pooled", "penalties": [0.1, 0.2, 0.3, 1.0]},
    "steering": {"multiply": {"code-style": 2.0}, "drop": ["beaver-harm"]},
    "provenance": {"backbone": "b", "recipe_hash": "h"},
}


def test_everything_survives_the_file(tmp_path):
    config = ArmoRMConfig(backbone_config=LlamaConfig(hidden_size=64), pad_token_id=7, **SETTINGS)
    config.save_pretrained(tmp_path)
    read = ArmoRMConfig.from_pretrained(tmp_path)
    for name, value in SETTINGS.items():
        assert getattr(read, name) == value, name
    assert read.pad_token_id == 7
    assert isinstance(read.backbone_config, LlamaConfig)
    assert read.hidden_size == read.backbone_config.hidden_size == 64
    assert read.objective_set == OBJECTIVES
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "armorm"
    assert written["backbone_config"]["model_type"] == "llama"
    read.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written


def test_the_backbone_config_may_be_a_dictionary_which_stays_as_it_was():
    settings = {"model_type": "llama", "hidden_size": 96}
    config = ArmoRMConfig(backbone_config=settings)
    assert isinstance(config.backbone_config, LlamaConfig)
    assert config.hidden_size == 96
    assert settings == {"model_type": "llama", "hidden_size": 96}


def test_it_announces_one_score_and_no_classes():
    config = ArmoRMConfig(backbone_config=LlamaConfig())
    assert config.num_labels == 1
    assert config.problem_type == "regression"
    assert ArmoRMConfig.from_dict(config.to_dict()).num_labels == 1


def test_a_config_without_arguments_exists_for_transformers_to_compare_with():
    config = ArmoRMConfig()
    assert config.backbone_config is None
    assert config.pad_token_id is None
    assert len(config.objective_set) == 0
    assert config.steering == config.reference == config.limits == {}


def test_configs_do_not_share_their_dictionaries():
    reference = dict(REFERENCE)
    first, second = ArmoRMConfig(reference=reference), ArmoRMConfig(reference=reference)
    first.reference["rows"] = 1
    assert second.reference["rows"] == reference["rows"] == 500


def test_the_config_of_another_model_is_refused_by_name(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        ArmoRMConfig.from_pretrained(tmp_path)
    assert f"{tmp_path}: model_type 'llama', expected 'armorm'" in str(caught.value)
