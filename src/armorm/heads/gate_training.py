"""The steps of the gate's training: pairs as tensors, the loss, the optimiser.

In:  a `GatingNetwork`, pairs, settings (`heads/gating.py`).
Out: the network with its best held-out weights, and the history of its evaluations.

    loss = mean over pairs of w * [(1 - e) softplus(-(s - m)) + e softplus(s - m)] - a H(g) + b KL(mean g | uniform)

with s the score difference, w the pair's weight, m its margin, e the label smoothing. Rewards are data, computed
once; a step runs each distinct prompt of its batch through the network once, both sides of a pair together, which
halves the work of a step that runs the prompt for either side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from armorm.backbone.decoder import resolve_dtype
from armorm.progress import progress

if TYPE_CHECKING:
    from armorm.heads.gating import GateSettings, GatingNetwork, RewardPairs

Log = Callable[[int, Mapping[str, float]], None]
EVALUATE_EVERY = 50
_CONSTANT = 1e-6


class PairTensors:
    """Standardised prompt features and pair rewards, as tensors."""

    def __init__(
        self, prompt_features: np.ndarray, pairs: RewardPairs, training: np.ndarray, device: torch.device
    ) -> None:
        used = np.unique(np.concatenate([pairs.chosen_prompt[training], pairs.rejected_prompt[training]]))
        features = torch.from_numpy(prompt_features.astype(np.float32))
        self.mean = features[used].double().mean(0).float()
        deviation = features[used].double().std(0, correction=0).float()
        # What is constant in training carries nothing to learn; dividing by its rounding noise would let a
        # prompt on which it differs drown all else.
        self.deviation = torch.where(deviation > _CONSTANT, deviation, torch.ones(()))
        self.prompts = ((features - self.mean) / self.deviation).to(device)
        weight = np.ones(len(pairs)) if pairs.weight is None else pairs.weight / pairs.weight[training].mean()
        margin = np.zeros(len(pairs)) if pairs.margin is None else pairs.margin
        self.chosen, self.rejected, self.weight, self.margin = (
            torch.from_numpy(values.astype(np.float32)).to(device)
            for values in (pairs.chosen, pairs.rejected, weight, margin)
        )
        self.chosen_prompt, self.rejected_prompt = (
            torch.from_numpy(rows.astype(np.int64)).to(device) for rows in (pairs.chosen_prompt, pairs.rejected_prompt)
        )

    def margins(self, network: GatingNetwork, scale: torch.Tensor, rows: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Score differences (len(rows),); each distinct prompt goes through the network once."""
        return self.margins_and_weights(network, scale, rows)[0]

    def margins_and_weights(
        self, network: GatingNetwork, scale: torch.Tensor, rows: np.ndarray | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score differences (len(rows),), and the gating weights of the rows' distinct prompts."""
        rows = torch.as_tensor(rows, device=self.prompts.device)
        both = torch.cat([self.chosen_prompt[rows], self.rejected_prompt[rows]])
        distinct, index = torch.unique(both, return_inverse=True)
        weights = network.weights(self.prompts[distinct]).float()
        chosen, rejected = index[: len(rows)], index[len(rows) :]
        scores = (weights[chosen] * self.chosen[rows]).sum(1) - (weights[rejected] * self.rejected[rows]).sum(1)
        return scale * scores, weights

    def plain_loss(self, margins: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """The Bradley-Terry loss of score differences, by the pairs' weights."""
        weight = self.weight[torch.as_tensor(rows, device=self.weight.device)]
        return (weight * functional.softplus(-margins)).sum() / weight.sum()

    def training_loss(
        self, network: GatingNetwork, scale: torch.Tensor, rows: np.ndarray, settings: GateSettings
    ) -> torch.Tensor:
        """The loss above, of a batch of pairs."""
        margins, weights = self.margins_and_weights(network, scale, rows)
        at = torch.as_tensor(rows, device=self.weight.device)
        margins = margins - settings.margin * self.margin[at]
        smoothing = settings.label_smoothing
        losses = functional.softplus(-margins)
        if smoothing:
            losses = (1 - smoothing) * losses + smoothing * functional.softplus(margins)
        loss = (self.weight[at] * losses).mean()
        if settings.entropy:
            loss = loss + settings.entropy * (weights * weights.clamp_min(1e-12).log()).sum(1).mean()
        if settings.load_balance:
            mean = weights.mean(0)
            loss = loss + settings.load_balance * (mean * (mean.clamp_min(1e-12) * len(mean)).log()).sum()
        return loss


def optimise(
    network: GatingNetwork,
    log_scale: torch.Tensor,
    data: PairTensors,
    training: np.ndarray,
    held_out: np.ndarray,
    settings: GateSettings,
    log: Log | None = None,
) -> tuple[int, list[tuple[int, float, float, float]]]:
    """AdamW with a cosine schedule; leaves the best held-out weights in the network.

    Returns:
        the step of the best weights; (step, training loss, held-out loss, held-out accuracy) at each evaluation.
    """
    device = data.prompts.device
    narrow = resolve_dtype(settings.dtype, device) == torch.bfloat16
    generator = np.random.default_rng(settings.seed)
    parameters = [p for p in network.parameters() if p.requires_grad]
    learned = [*parameters, log_scale] if log_scale.requires_grad else parameters
    optimiser = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    order = np.empty(0, np.int64)
    history: list[tuple[int, float, float, float]] = []
    best_loss, best_step, best = float("inf"), 0, copy.deepcopy(network.state_dict())
    best_log_scale = log_scale.detach().clone()
    size = min(settings.batch_size, len(training))
    running = float("nan")
    with progress("gate", settings.steps, "steps") as advance:
        for step in range(settings.steps + 1):
            if step % EVALUATE_EVERY == 0 or step == settings.steps:
                network.eval()
                with torch.no_grad():
                    margins = data.margins(network, log_scale.exp(), held_out)
                    loss = float(data.plain_loss(margins, held_out))
                history.append((step, loss if step == 0 else running, loss, float((margins > 0).float().mean())))
                if log is not None:
                    named = dict(zip(("loss", "held_out_loss", "held_out_accuracy"), history[-1][1:], strict=True))
                    rate = float(schedule.get_last_lr()[0])
                    log(step, named | {"logit_scale": float(log_scale.detach().exp()), "learning_rate": rate})
                if loss < best_loss:
                    best_loss, best_step, best = loss, step, copy.deepcopy(network.state_dict())
                    best_log_scale = log_scale.detach().clone()
                elif step - best_step >= settings.patience * EVALUATE_EVERY:
                    break
            if step == settings.steps:
                break
            network.train()
            if len(order) < size:
                order = generator.permutation(training)
            rows, order = order[:size], order[size:]
            with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
                batch_loss = data.training_loss(network, log_scale.exp(), rows, settings)
            optimiser.zero_grad(set_to_none=True)
            batch_loss.backward()
            optimiser.step()
            schedule.step()
            running = float(batch_loss.detach())
            advance(1)
    network.load_state_dict(best)
    with torch.no_grad():
        log_scale.copy_(best_log_scale)
    return best_step, history
