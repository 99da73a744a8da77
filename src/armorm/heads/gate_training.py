"""Stage 2: training of the gate, which weights the objectives by the prompt, from preference pairs.

    g(x) = softmax(MLP(f(x)) / temperature)    over the k objectives             (arXiv 2406.12845, section 3.2)
    R    = logit_scale * g(x)^T r'
    loss = mean over pairs of w * [(1 - e) softplus(-(s - m)) + e softplus(s - m)] - a H(g) + b KL(mean g | uniform)

with s = R_chosen - R_rejected, w the pair's weight, m its margin, e the label smoothing. The gate sees the prompt only,
and rewards are already debiased, as at inference. Rewards are data, computed once; a step runs each distinct prompt of
its batch through the network once, both sides of a pair together, which halves the work. Objectives whose rewards are
poorly known are discounted (heads/discount.py), by an exponent of their reliability that is chosen on stopping pairs.

`logit_scale` is positive: it starts at the fit to the weights before training (`armorm.heads.calibration`), is learned
as its logarithm, and is fitted again at the end. (If it starts at 1, as published, rewards in [0, 1] give margins so
small that the gate hardly moves.) Prompt features are standardised for training, and the scaling is folded into the
first layer.

Held-out pairs are divided by prompt: one half stops the training, and the other, which decided nothing, fits the scale
and gives the reported accuracy and loss. Halves of fewer than `MIN_HALF` pairs decide nothing reliably: then all
held-out pairs serve both purposes, which the report's `stopping_pairs` and `calibration_pairs` show. In training, early
stopping and calibration, pairs are weighted by set and prompt (heads/pair_weights.py). All randomness is seeded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Optional, Union

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import nn
from torch.nn import functional

from armorm.backbone.decoder import resolve_dtype
from armorm.errors import FitError
from armorm.heads.calibration import divided_prompts, fit_scale
from armorm.heads.discount import discount_of, discounted, fold_discount
from armorm.heads.pair_weights import Balance, pair_weights
from armorm.model.remote_code import GatingNetwork
from armorm.progress import progress

Log = Callable[[int, Mapping[str, float]], None]
EVALUATE_EVERY = 50
MIN_PAIRS = 20
MIN_HALF = 10
_CONSTANT = 1e-6
_NEARLY_UNIFORM = 0.005


class PairTensors:
    """Standardised prompt features and pair rewards, as tensors."""

    def __init__(
        self, prompt_features: np.ndarray, pairs: RewardPairs, training: np.ndarray, device: torch.device
    ) -> None:
        used = np.unique(np.concatenate([pairs.chosen_prompt[training], pairs.rejected_prompt[training]]))
        features = torch.from_numpy(prompt_features.astype(np.float32))
        self.mean = features[used].double().mean(0).float()
        deviation = features[used].double().std(0, correction=0).float()
        # Features that are constant in training are not informative; dividing them by their rounding noise would let
        # them dominate on a prompt where they differ.
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
        """Weighted Bradley-Terry loss of score differences."""
        weight = self.weight[torch.as_tensor(rows, device=self.weight.device)]
        return (weight * functional.softplus(-margins)).sum() / weight.sum()

    def training_loss(
        self, network: GatingNetwork, scale: torch.Tensor, rows: np.ndarray, settings: GateSettings
    ) -> torch.Tensor:
        """The loss of a batch of pairs."""
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
    seed: int = 0,
    log: Log | None = None,
) -> tuple[int, list[tuple[int, float, float, float]]]:
    """AdamW with a cosine schedule; leaves the best held-out weights in the network.

    Returns:
        the step of the best weights; (step, training loss, held-out loss, held-out accuracy) at each evaluation.
    """
    device = data.prompts.device
    narrow = resolve_dtype(settings.dtype, device) == torch.bfloat16
    generator = np.random.default_rng(seed)
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


@dataclass(frozen=True)
class RewardPairs:
    """Preference pairs as the gate sees them.

    Attributes:
        chosen, rejected: (p, k) debiased rewards.
        chosen_prompt, rejected_prompt: (p,) rows of the prompt features; the same row unless the overflow policy
            truncated the two prompts differently.
        held_out: (p,) bool, pairs whose prompts are held out for early stopping and calibration.
        margin: (p,) >= 0, rated advantage of the chosen side, 0 if unknown; or None.
        weight: (p,) > 0, of its set; None for equal weights.
        sources: (p,) code of each pair's set; None for a single one.
        groups: (p,) code of each pair's prompt, one for all near-duplicates; by default `chosen_prompt`.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_prompt: np.ndarray
    rejected_prompt: np.ndarray
    held_out: np.ndarray
    margin: np.ndarray | None = None
    weight: np.ndarray | None = None
    sources: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: np.ndarray) -> RewardPairs:
        """Some of the pairs."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        taken: dict[str, Any] = {name: None if array is None else array[rows] for name, array in arrays.items()}
        return RewardPairs(**taken)

    @property
    def prompts(self) -> np.ndarray:
        """Code (p,) of each pair's prompt."""
        return self.chosen_prompt if self.groups is None else self.groups


class GateSettings(BaseModel, extra="forbid", frozen=True):
    """Hyperparameters of the gate; defaults of the optimiser and the network are those of the published code.

    Early stopping uses the loss without margin, smoothing and penalties, but with weights.
    """

    hidden_size: int = Field(1024, ge=1, description="width of the hidden layers")
    hidden_layers: int = Field(3, ge=0, description="number of hidden layers; 0 is a linear gate")
    temperature: float = Field(10.0, gt=0, description="divides the logits before the softmax")
    logit_scale: Union[Literal["fit"], Annotated[float, Field(gt=0)]] = Field(
        "fit", description="factor of the gating weights: fitted, or a fixed number"
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout of the hidden layers")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW, with a cosine schedule")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    steps: int = Field(2000, ge=1, description="maximum optimiser steps")
    batch_size: int = Field(1024, ge=1, description="pairs per step")
    patience: int = Field(10, ge=1, description="evaluations (every 50 steps) without improvement before stopping")
    margin: float = Field(0.0, ge=0, description="factor of a pair's margin, which is relative to its source's mean")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of pairs with swapped labels")
    entropy: float = Field(0.0, ge=0, description="weight of an entropy bonus, which spreads the gating weights")
    load_balance: float = Field(0.0, ge=0, description="weight of a penalty on mean gating weights far from uniform")
    prompt_cap: Optional[Annotated[float, Field(ge=1)]] = Field(
        3.0, description="most pairs that one prompt counts as, its pairs sharing their weight; null for no limit"
    )
    balance: Balance = Field(
        "root", description="the pairs of a set together count as many as they are, the root of that, or as any set"
    )
    reliability: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (1.0, 2.0, 4.0),
        min_length=1,
        description="powers of the objectives' reliability to discount their weights by, chosen on validation prompts; "
        "[0] for none",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of matrix products in training; auto is bfloat16 on hardware that is fast at it"
    )


@dataclass
class GateReport:
    """Result of training.

    Attributes:
        pairs, held_out_pairs: pairs for training, and pairs held out by prompt.
        stopping_pairs, calibration_pairs: of the latter, those that stopped the training, and those that fitted the
            scale and gave accuracy and loss; each is all of them if they are too few to divide.
        best_step: step of the best weights.
        stopping_loss: weighted loss on the stopping pairs at that step.
        start_scale, logit_scale: the scale at the start and at the end.
        accuracy, loss: on the calibration pairs, weighted, with the best weights and final scale.
        uniform_accuracy: of uniform weights on the same pairs.
        calibration: `Calibration.to_dict` of the final scale; None if it was given, or fitted on the pairs that stopped
            the training.
        mean_weights: (k,) mean gating weights over the prompts of held-out pairs.
        mean_entropy: of the gating weights, nats; log k for a uniform gate.
        history: (step, training loss, loss and accuracy on the stopping pairs) at each evaluation.
        collapse: how the gate ignores the prompt (`collapse_of`), or empty.
        exponent: chosen power of the reliability; 0 for no discount.
        exponent_losses: loss on the stopping pairs of constant weights, reliability to each power, by power.
        weak: of the sets marked weak, `sets`, `pairs`, `loss_without`, `loss_with` (stopping losses of a gate trained
            without and with them) and `used`; None without such sets.
    """

    pairs: int
    held_out_pairs: int
    stopping_pairs: int
    calibration_pairs: int
    best_step: int
    stopping_loss: float
    start_scale: float
    logit_scale: float
    accuracy: float
    loss: float
    uniform_accuracy: float
    calibration: dict[str, Any] | None
    mean_weights: list[float]
    mean_entropy: float
    history: list[tuple[int, float, float, float]] = field(default_factory=list)
    collapse: str = ""
    exponent: float = 0.0
    exponent_losses: dict[str, float] = field(default_factory=dict)
    weak: dict[str, Any] | None = None


def fit_gate(
    prompt_features: np.ndarray,
    pairs: RewardPairs,
    settings: GateSettings | None = None,
    *,
    reliability: np.ndarray | None = None,
    seed: int = 0,
    initial: GatingNetwork | None = None,
    device: str | torch.device = "cpu",
    log: Log | None = None,
) -> tuple[GatingNetwork, GateReport]:
    """Train the gate.

    Args:
        prompt_features: (m, d) float.
        reliability: (k,) of the objectives, 0 to 1, NaN where unknown; None for no discount.
        initial: a trained gate to continue from, of the shape of the settings; by default the gate starts at the same
            weights for every prompt, uniform ones discounted by the reliability.
        device: for training; the network is returned on the CPU.
        log: called with the step and metrics of every evaluation.

    Returns:
        the network in evaluation mode, for prompt features that are not standardised, and its report.

    Raises:
        FitError: for fewer than `MIN_PAIRS` pairs on either side of the split, or a scale that is not positive.
    """
    settings = settings or GateSettings()
    training, held_out = np.flatnonzero(~pairs.held_out), np.flatnonzero(pairs.held_out)
    if min(len(training), len(held_out)) < MIN_PAIRS:
        raise FitError(
            f"the gate has {len(training)} training pairs and {len(held_out)} held out by prompt, "
            f"expected at least {MIN_PAIRS} of each"
        )
    fitted = settings.logit_scale == "fit"
    if not fitted and not float(settings.logit_scale) > 0:
        raise FitError(f"logit_scale {settings.logit_scale}, expected 'fit' or a number > 0")
    device = torch.device(device)
    prompts, equal = pairs.prompts, np.ones(len(pairs))
    weight = pair_weights(
        equal if pairs.weight is None else pairs.weight,
        prompts,
        equal if pairs.sources is None else pairs.sources,
        settings.prompt_cap,
        settings.balance,
    )
    stopping, calibrating = _halves(held_out, prompts, seed)
    data = PairTensors(prompt_features, replace(pairs, weight=weight), training, device)
    difference, k = pairs.chosen - pairs.rejected, pairs.chosen.shape[1]
    known = np.ones(k) if reliability is None else reliability
    losses = {
        power: _constant_loss(difference @ discount_of(known, power), weight, prompts, training, stopping)
        for power in (settings.reliability if reliability is not None else ())
    }
    exponent = min(losses, key=losses.__getitem__, default=0.0)
    discount = discount_of(known, exponent)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = GatingNetwork(
            prompt_features.shape[1],
            k,
            hidden_size=settings.hidden_size,
            hidden_layers=settings.hidden_layers,
            temperature=settings.temperature,
            dropout=settings.dropout,
        )
        if initial is None:
            nn.init.zeros_(network.layers[-1].weight)  # type: ignore[arg-type]  # the gate starts constant,
            nn.init.zeros_(network.layers[-1].bias)  # type: ignore[arg-type]  # where its scale is fitted
            constant = difference[training] @ (discount / discount.sum())
            start_scale = (
                _start_scale(constant, weight[training], prompts[training]) if fitted else float(settings.logit_scale)
            )
        else:
            network.load_state_dict(initial.state_dict())
            _unfold_standardisation(network, data.mean.cpu(), data.deviation.cpu())
            start_scale = float(initial.logit_scale.detach()) if fitted else float(settings.logit_scale)
        discounted(network, discount, keep=initial is not None)
        network.logit_scale.requires_grad_(False).fill_(start_scale)
        network.to(device)
        log_scale = torch.tensor(np.log(start_scale), dtype=torch.float32, requires_grad=fitted, device=device)
        best_step, history = optimise(network, log_scale, data, training, stopping, settings, seed, log)
    network.eval()
    with torch.no_grad():
        unscaled = data.margins(network, torch.ones((), device=device), calibrating).cpu().double().numpy()
        calibration = fit_scale(unscaled, weight[calibrating], prompts[calibrating])
        if fitted:
            network.logit_scale.fill_(calibration.scale)
        network.logit_scale.requires_grad_(True)
        scale = float(network.logit_scale.detach())
        weights = network.weights(data.prompts[np.unique(pairs.chosen_prompt[held_out])]).cpu()
        entropy = float(-(weights * weights.clamp_min(1e-12).log()).sum(1).mean())
    network.cpu()
    fold_discount(network)
    _fold_standardisation(network, data.mean.cpu(), data.deviation.cpu())
    report = GateReport(
        pairs=len(training),
        held_out_pairs=len(held_out),
        stopping_pairs=len(stopping),
        calibration_pairs=len(calibrating),
        best_step=best_step,
        stopping_loss=min(loss for _, _, loss, _ in history),
        start_scale=start_scale,
        logit_scale=scale,
        accuracy=calibration.accuracy,
        loss=float(np.average(np.logaddexp(0.0, -scale * unscaled), weights=weight[calibrating])),
        uniform_accuracy=float(np.average(difference[calibrating].mean(1) > 0, weights=weight[calibrating])),
        calibration=calibration.to_dict() if fitted and len(stopping) < len(held_out) else None,
        mean_weights=weights.mean(0).tolist(),
        mean_entropy=entropy,
        history=history,
        collapse=collapse_of(weights.double().numpy()),
        exponent=exponent,
        exponent_losses={f"{power:g}": loss for power, loss in losses.items()},
    )
    return network, report


def collapse_of(weights: np.ndarray) -> str:
    """How a gate ignores the prompt, from gating weights (m, k) of different prompts; empty if it does not.

    Returns:
        `uniform` (entropy within 0.5 percent of the maximum), `one objective for all prompts` (one leads for 99
        percent of prompts, with 0.9 of the weight on average), `the same weights for every prompt` (no weight has a
        standard deviation of 0.001), or an empty text.
    """
    m, k = weights.shape
    if k < 2 or not m:
        return ""
    entropy = -(weights * np.log(np.clip(weights, 1e-12, None))).sum(1).mean()
    if entropy >= (1 - _NEARLY_UNIFORM) * np.log(k):
        return "uniform"
    leader = int(np.bincount(weights.argmax(1), minlength=k).argmax())
    if (weights.argmax(1) == leader).mean() >= 0.99 and weights[:, leader].mean() >= 0.9:
        return "one objective for all prompts"
    if m > 1 and weights.std(0).max() < 1e-3:
        return "the same weights for every prompt"
    return ""


def _halves(held_out: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Held-out pairs for early stopping and for calibration: two halves by prompt, or all of them twice if too few."""
    second = divided_prompts(prompts[held_out], seed)
    stopping, calibrating = held_out[~second], held_out[second]
    if min(len(stopping), len(calibrating)) < MIN_HALF:
        return held_out, held_out
    return stopping, calibrating


def _constant_loss(
    margins: np.ndarray, weights: np.ndarray, prompts: np.ndarray, training: np.ndarray, stopping: np.ndarray
) -> float:
    """Loss on the stopping pairs of margins (p,) at constant weights, their scale fitted on the training pairs."""
    scale = _start_scale(margins[training], weights[training], prompts[training])
    return float(np.average(np.logaddexp(0.0, -scale * margins[stopping]), weights=weights[stopping]))


def _start_scale(margins: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> float:
    """The scale that training starts at; where constant weights are wrong on average, margins of unit size."""
    if np.average(margins, weights=weights) > 0:
        return fit_scale(margins, weights, prompts).scale
    spread = float(np.sqrt(np.average(margins**2, weights=weights)))
    return 1 / spread if spread else 1.0


@torch.no_grad()
def _fold_standardisation(network: GatingNetwork, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Make the first layer accept features that are not standardised: W (x - mean) / deviation + b."""
    first = network.layers[0]
    assert isinstance(first, nn.Linear)
    weight = first.weight.double() / deviation.double()
    first.bias.copy_((first.bias.double() - weight @ mean.double()).float())
    first.weight.copy_(weight.float())


@torch.no_grad()
def _unfold_standardisation(network: GatingNetwork, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """The inverse: make the first layer accept standardised features."""
    first = network.layers[0]
    assert isinstance(first, nn.Linear)
    weight = first.weight.double()
    first.bias.copy_((first.bias.double() + weight @ mean.double()).float())
    first.weight.copy_((weight * deviation.double()).float())
