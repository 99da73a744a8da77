"""Stage 2: the gate weighs the objectives by the prompt, learned from preference pairs.

In:  prompt features (m, d); of each pair the debiased rewards of both sides and the rows of their prompts.
Out: `GatingNetwork`, and `GateReport` on how its training went.

    g(x) = softmax(MLP(f(x)) / temperature)    over the k objectives             (paper: sec. 3.2)
    R    = logit_scale * g(x)^T r'
    loss = -log sigmoid(R_chosen - R_rejected)                                   (Bradley-Terry)

The softmax runs over objectives, the gate sees the prompt alone, and rewards enter already debiased: the
ones that will be served. `logit_scale` is positive: it starts at the one-dimensional Bradley-Terry
fit at uniform weights, is learned as its logarithm, and is fitted once more at the end on held-out
pairs. (Started at 1, as published, rewards in [0, 1] give margins so small that the gate hardly moves.)
Prompt features are standardised for training; the scaling is folded into the first layer, so the
network takes plain features. Early stopping by prompt; the best weights are kept; every draw is seeded.
Steps are those of `heads/gate_training.py`; `collapse_of` says where a trained gate does not read the prompt.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class GatingNetwork(nn.Module):
    """A shallow ReLU MLP over the prompt feature.

    Tensor names are those of the released checkpoint (FIELD 3): `layers.N.weight`, `layers.N.bias`, `logit_scale`.

    Args:
        in_features: d.
        out_features: k.
        hidden_size, hidden_layers: width and number of hidden layers; 0 layers is a linear gate.
        temperature: divides the logits before the softmax.
        dropout: share of hidden units dropped in training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_size: int = 1024,
        hidden_layers: int = 3,
        temperature: float = 10.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [in_features, *[hidden_size] * hidden_layers, out_features]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature
        self.dropout = dropout

    def weights(self, prompt_features: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Gating weights (n, k): non-negative, each row sums to 1.

        Args:
            factors: (k,) >= 0, multiply the weights before they are normalised; taken in as logarithms, so that
                weight which vanishes in float32 is still shared out.
        """
        hidden = prompt_features
        for layer in self.layers[:-1]:
            hidden = functional.dropout(functional.relu(layer(hidden)), self.dropout, self.training)
        logits = self.layers[-1](hidden) / self.temperature
        return torch.softmax(logits if factors is None else logits + factors.log(), dim=-1)

    def forward(self, prompt_features: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Gating output (n, k): weights times logit_scale, as released."""
        return self.weights(prompt_features, factors) * self.logit_scale
