"""The gate's discount of objectives whose rewards are poorly known.

    g(x)_i proportional to rho_i^gamma exp(rho_i^gamma u(x)_i / temperature),    rho_i the reliability of objective i

where u is the network. The factor outside is a prior: before anything is learned, an objective's weight is its
reliability to the power gamma. The factor inside scales what can be learned: without it, Adam, whose steps do not
depend on the size of a gradient, moves the logit of a discounted objective as fast as any other, and an objective that
is known to +-1.03 on a range of 1 comes back, because its errors are the same on training and validation prompts and
its direction in feature space is as good as any for fitting preferences. Both factors are constants, folded into the
last layer when the gate is trained, so a model file needs nothing new. The reliability is of all prompts together: an
objective that is known on its own kind of prompts only is discounted on these as well.

`gamma` is chosen on validation prompts, of a few positive values; 0 is no discount. Without any pairs, `constant_gate`
has the weights rho^gamma for every prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from armorm.model.remote_code import GatingNetwork

LEAST = 1e-4  # reliability of an objective about which nothing is known


class DiscountedLinear(nn.Linear):
    """The last layer of a gate in training: gain * (W x + b) + offset.

    Args:
        layer: (d -> k), which provides W and b.
        discount: (k,) 0 < rho^gamma <= 1.
        temperature: of the gate.
    """

    def __init__(self, layer: nn.Linear, discount: np.ndarray, temperature: float) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")  # draws no random numbers
        self.weight, self.bias = nn.Parameter(layer.weight.clone()), nn.Parameter(layer.bias.clone())
        gain = torch.from_numpy(np.asarray(discount, np.float32))
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("offset", temperature * gain.log(), persistent=False)
        self.gain: torch.Tensor
        self.offset: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Discounted logits (n, k)."""
        return self.gain * functional.linear(input, self.weight, self.bias) + self.offset


def discount_of(reliability: np.ndarray, exponent: float) -> np.ndarray:
    """rho^gamma (k,), relative to the most reliable objective; of reliability (k,), 0 to 1, NaN if unknown, which
    counts as the mean of the others."""
    known = reliability[~np.isnan(reliability)]
    filled = np.where(np.isnan(reliability), known.mean() if len(known) else 1.0, reliability)
    return (np.maximum(filled, LEAST) / max(filled.max(), LEAST)) ** exponent


@torch.no_grad()
def constant_gate(features: int, weights: np.ndarray, **shape: Any) -> GatingNetwork:
    """A gate with the same weights for every prompt, and logit scale 1.

    Args:
        features: d.
        weights: (k,) > 0, up to a factor.
        shape: `hidden_size`, `hidden_layers`, `temperature` of the network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GatingNetwork(features, len(weights), **shape)
    last = network.layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight.zero_()
    last.bias.copy_(torch.from_numpy(network.temperature * np.log(weights)).float())
    return network.eval()


@torch.no_grad()
def discounted(network: GatingNetwork, discount: np.ndarray, *, keep: bool = False) -> None:
    """Make a gate discount in training.

    Args:
        discount: (k,) > 0.
        keep: of a trained gate, whose weights stay what they are; by default they are multiplied by the discount.
    """
    last = network.layers[-1]
    assert isinstance(last, nn.Linear)
    layer = DiscountedLinear(last, discount, network.temperature)
    if keep:
        layer.weight.div_(layer.gain[:, None])
        layer.bias.sub_(layer.offset).div_(layer.gain)
    network.layers[-1] = layer


@torch.no_grad()
def fold_discount(network: GatingNetwork) -> None:
    """Make the last layer a plain one that computes the same."""
    last = network.layers[-1]
    assert isinstance(last, DiscountedLinear)
    plain = skip_init(nn.Linear, last.in_features, last.out_features)
    plain.weight.copy_(last.gain[:, None] * last.weight)
    plain.bias.copy_(last.gain * last.bias + last.offset)
    network.layers[-1] = plain
