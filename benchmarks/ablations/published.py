"""The gate as trained by the published script, errors included, for comparison only.

Source: `stage-2_train.py` of github.com/RLHFlow/RLHF-Reward-Modeling, folder `armo-rm`.

    gating = softmax(MLP(prompt feature of both sides) / temperature, axis 1 of (batch, 2, k)) * logit_scale

Axis 1 is chosen against rejected instead of the objectives. Both sides have the same prompt, so without dropout every
weight is exactly 0.5: a uniform gate. The loss uses raw rewards, not debiased ones. AdamW at
1e-3, cosine decay, batches of 1024, temperature 10, dropout 0.2, three hidden layers of 1024, scale learned from 1.
`axis=-1` is the same script with the softmax over the objectives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from armorm.model.remote_code import GatingNetwork
from armorm.progress import progress

BATCH, LEARNING_RATE, TEMPERATURE, DROPOUT, HIDDEN, LAYERS = 1024, 1e-3, 10.0, 0.2, 1024, 3


@dataclass
class PublishedGate:
    """A gate whose softmax runs over `axis` of (pairs, 2, k)."""

    network: GatingNetwork
    axis: int

    @torch.no_grad()
    def weights(self, prompt_features: np.ndarray) -> np.ndarray:
        """Gating output (p, 2, k) of the prompts of p pairs, in evaluation mode."""
        self.network.eval()
        features = torch.from_numpy(prompt_features)[:, None].expand(-1, 2, -1)
        return _gating(self.network, features, self.axis).numpy()


def fit_published(
    prompt_features: np.ndarray,
    prompt_rows: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    axis: int,
    steps: int,
    seed: int = 0,
) -> PublishedGate:
    """Train as the published script does.

    Args:
        prompt_rows: (p,) row of each pair's prompt feature.
        chosen, rejected: (p, k) raw rewards.
        axis: 1 as published, -1 over the objectives.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        d, k = prompt_features.shape[1], chosen.shape[1]
        network = GatingNetwork(
            d, k, hidden_size=HIDDEN, hidden_layers=LAYERS, temperature=TEMPERATURE, dropout=DROPOUT
        )
        optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        rewards = torch.from_numpy(np.stack([chosen, rejected], 1).astype(np.float32))
        features = torch.from_numpy(prompt_features)
        generator = np.random.default_rng(seed)
        network.train()
        with progress(f"published gate, axis {axis}", steps, "steps") as advance:
            for _ in range(steps):
                rows = generator.integers(0, len(chosen), BATCH)
                both = features[prompt_rows[rows]][:, None].expand(-1, 2, -1)
                scores = (_gating(network, both, axis) * rewards[rows]).sum(-1)
                loss = -functional.logsigmoid(scores[:, 0] - scores[:, 1]).mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                advance(1)
    return PublishedGate(network.eval(), axis)


def _gating(network: GatingNetwork, features: torch.Tensor, axis: int) -> torch.Tensor:
    hidden = features
    for layer in network.layers[:-1]:
        hidden = functional.dropout(functional.relu(layer(hidden)), network.dropout, network.training)
    return torch.softmax(network.layers[-1](hidden) / network.temperature, dim=axis) * network.logit_scale
