"""Config files in the words of transformers 4 as well: what is added, and that nothing changes its meaning."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from armorm.model.export import make_readable, older_config, older_tokenizer_config
from tests.helpers.backbones import FAMILIES, config_of
from tests.helpers.small_models import reward_model, tokenizer


def test_plain_rotary_positions_have_a_theta():
    settings = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert older_config(settings) == settings | {"rope_theta": 5e5, "rope_scaling": None}


def test_scaled_rotary_positions_have_a_scaling():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = older_config({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, **scaling}})
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"] == scaling
    assert found["partial_rotary_factor"] == 0.5


def test_positions_by_kind_of_layer_have_two_thetas():
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    found = older_config({"model_type": "gemma3_text", "rope_parameters": rope})
    assert (found["rope_theta"], found["rope_local_base_freq"]) == (1e6, 1e4)
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_gpt_neox_has_names_of_its_own():
    rope = {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.25}
    found = older_config({"model_type": "gpt_neox", "rope_parameters": rope})
    assert (found["rotary_emb_base"], found["rotary_pct"]) == (2e4, 0.25)


@pytest.mark.parametrize(
    ("layers", "pattern"), [("sssfsssfss", 4), ("sf", 2), ("ffff", None), ("ss", None), ("sffs", None), ("", None)]
)
def test_layers_that_take_turns_have_a_pattern(layers, pattern):
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    found = older_config({"layer_types": [kinds[letter] for letter in layers]})
    assert found.get("sliding_window_pattern") == pattern


@pytest.mark.parametrize("settings", [{}, {"model_type": "gpt2"}, {"rope_theta": 5e5}, {"rope_parameters": None}])
def test_configs_without_new_names_stay_as_they_are(settings):
    assert older_config(settings) == settings


def test_a_backbone_inside_a_config_is_reached():
    rope = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    found = older_config({"model_type": "armorm", "backbone_config": rope})
    assert found["backbone_config"]["rope_theta"] == 5e5
    assert "rope_theta" not in found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_means_the_same_to_this_version(tmp_path, family):
    config = config_of(family)
    config.save_pretrained(tmp_path)
    make_readable(tmp_path)
    assert "rope_theta" in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_a_tokenizer_of_the_new_class_gets_the_old_name():
    found = older_tokenizer_config(
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|user|>"], "pad_token": "<|pad|>"}
    )
    assert found == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|user|>"],
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": "<|pad|>",
    }


def test_a_tokenizer_of_a_family_keeps_its_class():
    settings = {"tokenizer_class": "GemmaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert older_tokenizer_config(settings) == settings


def test_the_tokenizer_means_the_same_to_this_version(tmp_path):
    before = tokenizer()
    before.save_pretrained(tmp_path)
    make_readable(tmp_path)
    after = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>Name a river.<|end|><|assistant|>The Seine."
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.all_special_tokens == before.all_special_tokens
    assert after.chat_template == before.chat_template
    assert type(after) is type(before)


def test_done_twice_it_changes_nothing_more(tmp_path):
    reward_model().save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    make_readable(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_folder_without_those_files_is_left_alone(tmp_path):
    make_readable(tmp_path)
    assert list(tmp_path.iterdir()) == []
