"""The first layers of a decoder apart from the others: their states are computed once, the layers above run on them.

Layers that are not computed are replaced by ones that pass states on, so positions, masks and rotary embeddings remain
the model's own business, and every layer keeps its index. Whether a decoder can be run in this way is tested on a
sample of the work (`lower_layers_fault`), like prefix sharing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from armorm.backbone.prefix_forward import sharing_fault
from armorm.backbone.readout import decoder_layers


class SkippedLayer(nn.Module):
    """Stands for a layer that is not computed: returns its input, or `states` if they are set."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # (no submodule: it is neither trained, nor moved, nor counted)
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # some decoders ask their layers for the kind of attention
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.states is None else self.states.to(hidden_states)


def layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a decoder's layers.

    Raises:
        BackboneError: if there is none.
    """
    holder, name = decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    layers: nn.ModuleList = getattr(holder, name)
    return layers


def skip_lower_layers(model: PreTrainedModel, count: int) -> SkippedLayer:
    """Replace the first `count` >= 1 layers for good; the states that the others start from are set in the result."""
    layers = layer_list(model)
    for index in range(count):
        layers[index] = SkippedLayer(layers[index])
    last = layers[count - 1]
    assert isinstance(last, SkippedLayer)
    return last


@contextmanager
def _skipped(model: PreTrainedModel, indices: range) -> Iterator[nn.ModuleList]:
    layers = layer_list(model)
    whole = list(layers)
    for index in indices:
        layers[index] = SkippedLayer(whole[index])
    try:
        yield layers
    finally:
        for index in indices:
            layers[index] = whole[index]


@torch.no_grad()
def lower_states(model: PreTrainedModel, count: int, inputs: dict[str, Tensor]) -> Tensor:
    """States (B, t, d) after the first `count` >= 1 layers; only these are computed."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    with _skipped(model, range(count, len(layer_list(model)))) as layers:
        hook = layers[count - 1].register_forward_hook(keep)
        try:
            model(**inputs, use_cache=False)
        finally:
            hook.remove()
    return states[0]


def lower_layers_fault(model: PreTrainedModel, count: int, inputs: dict[str, Tensor]) -> str:
    """Why the layers above the first `count` cannot run on states that were computed before; empty if they can."""

    @torch.no_grad()
    def apart() -> list[Any]:
        states = lower_states(model, count, inputs)
        with _skipped(model, range(count)) as layers:
            layers[count - 1].states = states
            return flat(model(**inputs, use_cache=False).last_hidden_state)

    def flat(states: Tensor) -> list[Any]:
        return [states.flatten(0, -2).float().cpu().numpy()]

    with torch.no_grad():
        together = flat(model(**inputs, use_cache=False).last_hidden_state)
    return sharing_fault(apart, together, next(model.parameters()).dtype)
