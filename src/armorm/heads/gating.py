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

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn import functional

from armorm.errors import FitError
from armorm.heads.gate_training import Log, PairTensors, optimise

MIN_PAIRS = 20
_NEARLY_UNIFORM = 0.005


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


@dataclass(frozen=True)
class RewardPairs:
    """Preference pairs as the gate sees them.

    Attributes:
        chosen, rejected: (p, k) debiased rewards.
        chosen_prompt, rejected_prompt: (p,) rows of the prompt features; the same row, unless the
            overflow policy cut the two sides' prompts differently.
        held_out: (p,) bool, pairs whose prompts are kept for early stopping.
        margin: (p,) >= 0, how much better the chosen side is said to be, 0 where nothing is said; or None.
        weight: (p,) > 0, how much a pair counts; None for all alike.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_prompt: np.ndarray
    rejected_prompt: np.ndarray
    held_out: np.ndarray
    margin: np.ndarray | None = None
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True)
class GateSettings:
    """How the gate is trained; the defaults are the published ones (FIELD 1) but for the scale.

    Attributes:
        margin: times a pair's own margin, what the chosen score must win by.
        label_smoothing: share of pairs taken as labelled the wrong way round, 0 to 0.5.
        entropy: of the mean entropy of the weights, is taken off the loss: a gate spreads its weight.
        load_balance: of the divergence of the mean weights from uniform, is added: no objective is left out over all.
        dtype: of the network's products in training; `auto` is bfloat16 where the hardware is fast at it.
        The loss that stops training early is the plain one: no margin, smoothing or penalty, but weights.
    """

    hidden_size: int = 1024
    hidden_layers: int = 3
    temperature: float = 10.0
    dropout: float = 0.2
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    steps: int = 2000
    batch_size: int = 1024
    patience: int = 10
    logit_scale: float | Literal["fit"] = "fit"
    margin: float = 0.0
    label_smoothing: float = 0.0
    entropy: float = 0.0
    load_balance: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0


@dataclass
class GateReport:
    """How training went.

    Attributes:
        pairs, held_out_pairs: pairs trained on, and pairs for early stopping.
        best_step: step whose weights were kept.
        start_scale, logit_scale: the scale at the start and at the end.
        accuracy, loss: on held-out pairs, with the kept weights and final scale.
        uniform_accuracy: of uniform weights on the same pairs.
        mean_weights: (k,) mean gating weights over the held-out pairs' prompts.
        mean_entropy: of the gating weights, nats; log k where the gate is uniform.
        history: (step, training loss, held-out loss, held-out accuracy) at each evaluation.
        collapse: how the gate fails to read the prompt (`collapse_of`), or empty.
    """

    pairs: int
    held_out_pairs: int
    best_step: int
    start_scale: float
    logit_scale: float
    accuracy: float
    loss: float
    uniform_accuracy: float
    mean_weights: list[float]
    mean_entropy: float
    history: list[tuple[int, float, float, float]] = field(default_factory=list)
    collapse: str = ""


def fit_gate(
    prompt_features: np.ndarray,
    pairs: RewardPairs,
    settings: GateSettings | None = None,
    *,
    initial: GatingNetwork | None = None,
    device: str | torch.device = "cpu",
    log: Log | None = None,
) -> tuple[GatingNetwork, GateReport]:
    """Train the gate.

    Args:
        prompt_features: (m, d) float.
        initial: a gate for plain prompt features to go on from, of the shape of the settings; by default the gate
            starts uniform.
        device: where training runs; the network comes back on the processor.
        log: is called with the step and figures of every evaluation.

    Returns:
        the network in evaluation mode, taking plain prompt features, and its report.

    Raises:
        FitError: for fewer than `MIN_PAIRS` pairs on either side of the split, or a scale that is not positive.
    """
    settings = settings or GateSettings()
    training, held_out = np.flatnonzero(~pairs.held_out), np.flatnonzero(pairs.held_out)
    if min(len(training), len(held_out)) < MIN_PAIRS:
        raise FitError(
            f"the gate has {len(training)} pairs to train on and {len(held_out)} held out by prompt; "
            f"expected {MIN_PAIRS} of each"
        )
    fitted = settings.logit_scale == "fit"
    if not fitted and not float(settings.logit_scale) > 0:
        raise FitError(f"logit_scale {settings.logit_scale}, expected 'fit' or a number > 0")
    device = torch.device(device)
    data = PairTensors(prompt_features, pairs, training, device)
    k = pairs.chosen.shape[1]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        network = GatingNetwork(
            prompt_features.shape[1],
            k,
            hidden_size=settings.hidden_size,
            hidden_layers=settings.hidden_layers,
            temperature=settings.temperature,
            dropout=settings.dropout,
        )
        uniform = (pairs.chosen - pairs.rejected).mean(1)
        if initial is None:
            nn.init.zeros_(network.layers[-1].weight)  # type: ignore[arg-type]  # the gate starts uniform,
            nn.init.zeros_(network.layers[-1].bias)  # type: ignore[arg-type]  # where its scale is fitted
            start_scale = bradley_terry_scale(uniform[training]) if fitted else float(settings.logit_scale)
        else:
            network.load_state_dict(initial.state_dict())
            _unfold_standardisation(network, data.mean.cpu(), data.deviation.cpu())
            start_scale = float(initial.logit_scale.detach()) if fitted else float(settings.logit_scale)
        network.logit_scale.requires_grad_(False).fill_(start_scale)
        network.to(device)
        log_scale = torch.tensor(np.log(start_scale), dtype=torch.float32, requires_grad=fitted, device=device)
        best_step, history = optimise(network, log_scale, data, training, held_out, settings, log)
    network.eval()
    with torch.no_grad():
        if fitted:
            unscaled = data.margins(network, torch.ones((), device=device), held_out).cpu().double().numpy()
            network.logit_scale.fill_(bradley_terry_scale(unscaled, fallback=float(log_scale.exp())))
        network.logit_scale.requires_grad_(True)
        margins = data.margins(network, network.logit_scale, held_out)
        loss = float(data.plain_loss(margins, held_out))
        weights = network.weights(data.prompts[np.unique(pairs.chosen_prompt[held_out])]).cpu()
        entropy = float(-(weights * weights.clamp_min(1e-12).log()).sum(1).mean())
    network.cpu()
    _fold_standardisation(network, data.mean.cpu(), data.deviation.cpu())
    report = GateReport(
        pairs=len(training),
        held_out_pairs=len(held_out),
        best_step=best_step,
        start_scale=start_scale,
        logit_scale=float(network.logit_scale.detach()),
        accuracy=float((margins > 0).float().mean()),
        loss=loss,
        uniform_accuracy=float((uniform[held_out] > 0).mean()),
        mean_weights=weights.mean(0).tolist(),
        mean_entropy=entropy,
        history=history,
        collapse=collapse_of(weights.double().numpy()),
    )
    return network, report


def collapse_of(weights: np.ndarray) -> str:
    """How a gate fails to read the prompt, in words; empty where it does not.

    Args:
        weights: (m, k) gating weights of different prompts.

    Returns:
        `uniform` (entropy within 0.5 percent of the most), `one objective for all prompts` (the same one leads for 99
        percent of prompts, with nine tenths of the weight), `the same weights for every prompt` (no weight moves
        by a thousandth), or an empty text.
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


def bradley_terry_scale(margins: np.ndarray, fallback: float | None = None) -> float:
    """The s > 0 that minimises the mean of -log sigmoid(s * margin).

    Args:
        margins: (p,) score differences, chosen minus rejected.
        fallback: taken where no positive scale helps (margins that point the wrong way); by default the
            scale at which margins have unit standard deviation.
    """
    spread = float(np.sqrt(np.mean(np.square(margins))))
    if spread == 0:
        return fallback if fallback is not None else 1.0

    def loss(log_scale: float) -> float:
        return float(np.logaddexp(0.0, -np.exp(log_scale) / spread * margins).mean())

    found = minimize_scalar(loss, bounds=(-7.0, 4.0), method="bounded", options={"xatol": 1e-6})
    if found.x < -6.9:
        return fallback if fallback is not None else 1.0 / spread
    return float(np.exp(found.x) / spread)


@torch.no_grad()
def _fold_standardisation(network: GatingNetwork, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """Let the first layer take plain features: W (x - mean) / deviation + b."""
    first = network.layers[0]
    assert isinstance(first, nn.Linear)
    weight = first.weight.double() / deviation.double()
    first.bias.copy_((first.bias.double() - weight @ mean.double()).float())
    first.weight.copy_(weight.float())


@torch.no_grad()
def _unfold_standardisation(network: GatingNetwork, mean: torch.Tensor, deviation: torch.Tensor) -> None:
    """The inverse of folding: let the first layer take standardised features."""
    first = network.layers[0]
    assert isinstance(first, nn.Linear)
    weight = first.weight.double()
    first.bias.copy_((first.bias.double() + weight @ mean.double()).float())
    first.weight.copy_((weight * deviation.double()).float())
