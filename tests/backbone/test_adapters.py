from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from armorm.backbone.adapters import FILE, Adapters, LoraLinear, adapters_of, add_adapters
from armorm.backbone.decoder import Backbone
from armorm.backbone.lower_layers import layer_list
from armorm.errors import BackboneError, CheckpointError
from tests.helpers.small_models import llama

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def trained(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Adapters]:
    """A decoder whose second layer has adapters that are not zero."""
    model = llama(dtype=dtype).requires_grad_(False)
    add_adapters(layer_list(model)[1:], 4, 8.0)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            torch.nn.init.normal_(module.lora_B, std=0.2)
    return model, adapters_of(model, "hash")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_merged_at_loading_give_the_states_of_training(dtype, tmp_path):
    model, adapters = trained(dtype)
    adapters.write(tmp_path)
    read = Adapters.read(tmp_path)
    assert read.settings() == {"rank": 4, "alpha": 8.0, "backbone": "hash"}
    merged = llama(dtype=dtype)
    before = merged(IDS).last_hidden_state
    read.merge(merged.state_dict())
    after = merged(IDS).last_hidden_state
    assert torch.equal(after, model(IDS).last_hidden_state)
    assert float((after - before).norm() / before.norm()) > 0.05
    state = {f"model.{name}": tensor.clone() for name, tensor in llama(dtype=dtype).state_dict().items()}
    read.merge(state, "model.")
    assert all(tensor.equal(state[f"model.{name}"]) for name, tensor in merged.state_dict().items())


def test_gradients_are_those_of_the_written_out_product():
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(6, 5), 3, 6.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 6, requires_grad=True)
    target = torch.randn(2, 4, 5)
    plain_x = x.detach().clone().requires_grad_()
    a, b = (part.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    down = functional.linear(functional.linear(plain_x, a), b)
    expected = functional.linear(plain_x, layer.linear.weight, layer.linear.bias) + 2.0 * down
    found = layer(x)
    torch.testing.assert_close(found, expected)
    (found * target).sum().backward()
    (expected * target).sum().backward()
    for parameter, other in ((x, plain_x), (layer.lora_A, a), (layer.lora_B, b)):
        torch.testing.assert_close(parameter.grad, other.grad)
    assert layer.linear.weight.grad is None


def test_dropped_ranks_change_training_and_nothing_else():
    layer = LoraLinear(torch.nn.Linear(6, 5), 8, 8.0, dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_adapters_of_another_backbone_are_rejected_and_merge_nothing(tmp_path):
    _, adapters = trained()
    state = llama().state_dict()
    lacking = {name: tensor.clone() for name, tensor in state.items() if name != "layers.1.mlp.down_proj.weight"}
    with pytest.raises(BackboneError, match=r"no matrix 'layers\.1\.mlp\.down_proj'"):
        adapters.merge(lacking)
    lacking["layers.1.mlp.down_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(BackboneError, match=r"down_proj has shapes .*expected factors of \[3, 3\]"):
        adapters.merge(lacking)
    assert all(lacking[name].equal(state[name]) for name in lacking if "down_proj" not in name)
    (tmp_path / FILE).write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors: damaged"):
        Adapters.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"elsewhere: no adapters\.safetensors"):
        Adapters.read(tmp_path / "elsewhere")
    with pytest.raises(BackboneError, match=r"no torch\.nn\.Linear"):
        add_adapters([torch.nn.LayerNorm(4)], 4, 8.0)


def test_a_backbone_is_loaded_with_its_adapters(llama_folder, tmp_path):
    _, adapters = trained()
    adapters.write(tmp_path)
    plain = Backbone.load(llama_folder, dtype="float32", device="cpu")
    adapted = Backbone.load(llama_folder, dtype="float32", device="cpu", layer=2, adapters=tmp_path)
    assert plain.fingerprint != adapted.fingerprint
    changed = {
        name for name, tensor in adapted.model.state_dict().items() if not tensor.equal(plain.model.state_dict()[name])
    }
    assert changed == {f"{name.removesuffix('.lora_A.weight')}.weight" for name in adapters.tensors if "lora_A" in name}
