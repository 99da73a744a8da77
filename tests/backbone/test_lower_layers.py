from __future__ import annotations

import pytest
import torch

from armorm.backbone.lower_layers import layer_list, lower_layers_fault, lower_states, skip_lower_layers
from armorm.backbone.readout import cut_layers
from tests.helpers.backbones import backbone_of, families

IDS = {"input_ids": torch.randint(5, 8000, (2, 24), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("family", families("llama", "gemma2", "gemma3", "gpt_neox", "gpt2", "qwen3", "mistral"))
def test_upper_layers_on_stored_states_are_the_whole_model(family):
    model = backbone_of(family)
    assert lower_layers_fault(model, 1, IDS) == ""
    with torch.no_grad():
        whole = model(**IDS).last_hidden_state
        states = lower_states(model, 1, IDS)
        entry = skip_lower_layers(model, 1)
        entry.states = states
        torch.testing.assert_close(model(**IDS).last_hidden_state, whole, atol=1e-5, rtol=1e-5)
        entry.states = states.roll(1, 0)
        assert not torch.allclose(model(**IDS).last_hidden_state, whole, atol=1e-2)


def test_lower_states_are_the_hidden_states_of_that_layer():
    model = backbone_of("llama")
    with torch.no_grad():
        expected = model(**IDS, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(lower_states(model, 1, IDS), expected, atol=0, rtol=0)
    assert len(layer_list(model)) == 2 and type(layer_list(model)[1]).__name__ == "LlamaDecoderLayer"
    cut_layers(model, 1)
    assert len(layer_list(model)) == 1


def test_a_decoder_whose_layers_take_more_than_states_is_found_out():
    model = backbone_of("llama")
    layer = layer_list(model)[0]
    forward = layer.forward

    def turning(hidden_states, *args, position_embeddings, **kwargs):
        for part in position_embeddings:
            part.mul_(0.5)  # which the layers above see as well
        return forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)

    layer.forward = turning
    assert "differ by" in lower_layers_fault(model, 1, IDS)
