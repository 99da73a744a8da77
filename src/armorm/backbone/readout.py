"""Where features are read: after which layer, and over which tokens.

    response feature   last        state of the last token                                             (d,)
                       mean        mean over the response's tokens                                     (d,)
                       last+mean   both, one after the other                                           (2d,)
    prompt feature     gate        state at the gate position                                          (d,)
                       mean        mean over the prompt's tokens up to the gate, without the first     (d,)

The response's tokens are those after the gate pattern (the ids from the gate to the reply), up to the last token of the
rendered conversation: the end of the turn is one of them, and a trailing newline of the template too (and, of Qwen3's
template, the end of the empty block of reasoning that it opens). The first token is left out of the prompt because
models park attention there: its norm may be a hundred times that of the others.

Layers are counted as in `hidden_states` of transformers: 0 is the embeddings, n the output of layer n, before any norm;
the last one is the final state after the final norm, as `last_hidden_state` is. A backbone that is read below its last
layer loses the layers above it and the final norm (`cut_layers`): every forward pass stops there, and what is saved is
smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from armorm.errors import BackboneError

Pooling = Literal["last", "mean", "last+mean"]
PromptPooling = Literal["gate", "mean"]
# Names of the norm after the last layer; `armorm.model.remote_code` has the same.
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm", "ln_out")
# Lists in a config with an entry for each layer.
_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
_CUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Readout:
    """How features are read from a backbone.

    Attributes:
        pooling: of the response.
        prompt: of the prompt.
        layer: number of layers that are computed; None for all, with the final norm.
        layers: number of layers that the backbone had.
    """

    pooling: Pooling = "last"
    prompt: PromptPooling = "gate"
    layer: int | None = None
    layers: int | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Readout:
        """Inverse of `settings`."""
        known = {name: settings[name] for name in ("pooling", "prompt", "layer", "layers") if name in settings}
        return cls(**known)

    def settings(self) -> dict[str, Any]:
        """As a model's config holds it: empty for the last token of the last layer."""
        return {} if self == LAST_TOKEN else {**asdict(self), "normed": self.layer is None}

    @property
    def parts(self) -> int:
        """Width of a response feature, in hidden sizes."""
        return 2 if self.pooling == "last+mean" else 1

    @property
    def is_mean(self) -> bool:
        """Whether states of other tokens than the gate and the last are needed."""
        return self.pooling != "last" or self.prompt == "mean"

    def response(self, last: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
        """Response features (n, parts * d) of the states (n, d) of the last tokens, and their means over responses."""
        if self.pooling == "last":
            return last
        assert mean is not None
        return mean if self.pooling == "mean" else torch.cat([last, mean], -1)

    def split(self, wide: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The parts (..., d) of a tensor (..., parts * d) that act on the last token and on the mean; None for none."""
        if self.parts == 1:
            return (wide, None) if self.pooling == "last" else (None, wide)
        last, mean = wide.chunk(2, -1)
        return last, mean


LAST_TOKEN = Readout()


def mean_states(states: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Means (n, d) float32 of states (n, t, d) over the tokens from `first` to `last` (n,), both included."""
    places = torch.arange(states.shape[1], device=states.device)
    inside = ((places >= first[:, None]) & (places <= last[:, None])).float()
    return torch.einsum("nt,ntd->nd", inside / inside.sum(1, keepdim=True), states.float())


def resolve_layer(layer: int | float | None, layers: int, name: str = "") -> int | None:
    """Number of layers to compute; None for all of them.

    Args:
        layer: an index as in `hidden_states`, or a fraction of the layers (a float up to 1).
        layers: of the model.

    Raises:
        BackboneError: for a layer that the model does not have.
    """
    if layer is None:
        return None
    found = round(layer * layers) if isinstance(layer, float) else layer
    if not 0 <= found <= layers or (isinstance(layer, float) and not 0 <= layer <= 1):
        raise BackboneError(f"backbone {name}: layer {layer}, expected 0 to {layers}, or a fraction from 0.0 to 1.0")
    return None if found == layers else found


def decoder_layers(model: nn.Module, count: int) -> tuple[nn.Module, str]:
    """The module that holds a decoder's list of layers, and the name of the list in it.

    Raises:
        BackboneError: if there is no list of `count` layers.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise BackboneError(f"{type(model).__name__} has no list of {count} layers: the layer cannot be chosen")


@torch.inference_mode()
def cut_layers(model: PreTrainedModel, layer: int) -> None:
    """Make `last_hidden_state` the state after `layer` layers, before any norm, and drop what is above.

    Raises:
        BackboneError: for a model whose layers cannot be cut, or that then gives other states.
    """
    config = model.config.get_text_config()
    total = config.num_hidden_layers
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]], device=model.device)
    expected = model(input_ids=ids, output_hidden_states=True).hidden_states[layer].float()
    holder, name = decoder_layers(model, total)
    setattr(holder, name, nn.ModuleList(list(getattr(holder, name))[:layer]))
    drop_final_norm(holder)
    config.num_hidden_layers = layer
    for key in _BY_LAYER:
        if isinstance(values := vars(config).get(key), (list, tuple)):
            setattr(config, key, list(values)[:layer])
    found = model(input_ids=ids).last_hidden_state.float()
    far = float((found - expected).norm() / expected.norm())
    if not far <= _CUT_TOLERANCE.get(model.dtype, 3e-2):
        raise BackboneError(
            f"{type(model).__name__}: cut after layer {layer} its states differ by {far:.1%}; "
            "expected a decoder of which the first layers can be computed alone"
        )


def drop_final_norm(holder: nn.Module) -> None:
    """Remove the norm after the last layer."""
    for name in FINAL_NORMS:
        if isinstance(getattr(holder, name, None), nn.Module):
            setattr(holder, name, nn.Identity())
