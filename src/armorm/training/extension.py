"""The pieces of an extended model: rows of W, columns of the transform, outputs of the gate, the card.

In:  the model as it was, what was fitted on new ratings.
Out: arrays for k objectives, the old ones first; a gate; Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armorm.conversation import Conversation
from armorm.errors import FitError
from armorm.heads.debiasing import fit_debiasing
from armorm.heads.gating import GatingNetwork
from armorm.heads.regression import RegressionHead
from armorm.reward_model import ArmoRM


def rows_of_w(
    rm: ArmoRM, head: RegressionHead, rated_now: Sequence[str], k: int
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """W (k, d) and intercepts (k,): old rows as they are, those of the objectives rated now from the fit."""
    layer = rm.model.regression_layer
    old = layer.weight.detach().cpu().double().numpy()
    weight, bias = np.zeros((k, old.shape[1])), np.zeros(k)
    weight[: len(old)] = old
    if layer.bias is not None:
        bias[: len(old)] = layer.bias.detach().cpu().double().numpy()
    fresh = [name for name in rated_now if name not in rm.objectives.names]
    order, reports = [*rm.objectives.names, *fresh], []
    for position, report in enumerate(head.reports):
        if report.objective in rated_now:
            column = order.index(report.objective)
            weight[column], bias[column] = head.weight[position], head.bias[position]
            reports.append(asdict(report))
    return weight, bias, reports


def extended_transform(
    rm: ArmoRM, rewards: np.ndarray, reference: Sequence[Conversation], fresh: int
) -> tuple[np.ndarray, np.ndarray]:
    """The transform (k, k) with columns for new objectives, and their penalties (b, fresh)."""
    old = rm.model.reward_transform_matrix.cpu().double().numpy()
    k, before = rewards.shape[1], len(old)
    transform = np.eye(k)
    transform[:before, :before] = old
    config = rm.model.config.debiasing
    biases = [rm.objectives.position(name) for name in config.get("against", [])]
    penalties = np.zeros((len(biases), fresh))
    if biases and fresh:
        columns = [*biases, *range(before, k)]
        groups = np.unique([conversation.prompt_key for conversation in reference], return_inverse=True)[1]
        debiasing = fit_debiasing(
            rewards[:, columns],
            list(range(len(biases))),
            metric=config.get("metric", "spearman"),
            level=config.get("level", "pooled"),
            groups=groups,
        )
        penalties = debiasing.penalties[:, len(biases) :]
        transform[np.ix_(biases, range(before, k))] = -penalties
    kept = np.diagonal(old)[np.diagonal(old) != 0]
    if len(kept) and not np.allclose(kept, 1):  # the model's rewards are scaled to unit deviation
        transform[:, before:] /= np.maximum((rewards @ transform[:, before:]).std(0), 1e-12)
    return transform.astype(np.float32).astype(np.float64), penalties


@torch.no_grad()
def wider_gate(rm: ArmoRM, fresh: int, prompts: np.ndarray, share: float | None) -> GatingNetwork:
    """The gate with outputs for new objectives: constant logits that give them their share over the prompts (m, d)."""
    config, old = rm.model.config, rm.model.gating
    k = len(rm.objectives)
    gate = GatingNetwork(
        config.hidden_size,
        k + fresh,
        hidden_size=config.gating_hidden_dim,
        hidden_layers=config.gating_n_hidden,
        temperature=config.gating_temperature,
    )
    state = {name: tensor.clone().cpu() for name, tensor in old.state_dict().items()}
    last = f"layers.{config.gating_n_hidden}"
    wanted = fresh / (k + fresh) if share is None else share
    if fresh and not 0 < wanted < 1:
        raise FitError(f"share {wanted:g}, expected more than 0 and less than 1")
    logits = torch.from_numpy(prompts).float()
    for layer in old.layers[:-1]:
        logits = torch.relu(layer.cpu()(logits))
    logits = old.layers[-1].cpu()(logits).double() / config.gating_temperature
    total = torch.logsumexp(logits, 1)
    low, high = float(total.min()) - 50.0, float(total.max()) + 50.0
    for _ in range(100):  # the mean share rises with the logit
        middle = (low + high) / 2
        mean = float(torch.sigmoid(middle - total).mean())
        low, high = (middle, high) if mean < wanted else (low, middle)
    each = (low - np.log(max(fresh, 1))) * config.gating_temperature
    state[f"{last}.weight"] = torch.cat([state[f"{last}.weight"], torch.zeros(fresh, state[f"{last}.weight"].shape[1])])
    state[f"{last}.bias"] = torch.cat([state[f"{last}.bias"], torch.full((fresh,), each)])
    gate.load_state_dict(state)
    return gate.eval()


def extended_card(rm: ArmoRM, metrics: dict[str, Any]) -> str:
    """The card of an extended model."""
    entry, rated = metrics["extended"], metrics["evaluation"]["ratings"]
    gate = metrics["gate"]
    shared = "The gate gives new objectives a fixed share of the weight."
    if gate:
        shared = (
            f"The gate was trained on from its old weights on {gate['pairs']:,} pairs: accuracy {gate['accuracy']:.3f} "
            f"on {gate['held_out_pairs']:,} held out by prompt ({gate['uniform_accuracy']:.3f} by uniform weights)."
        )
    lines = [
        "---",
        "library_name: armorm",
        "pipeline_tag: text-classification",
        "tags: [reward-model, armorm, interpretable]",
        "---",
        "",
        f"# {Path(entry['from']).name}, extended",
        "",
        f"{len(rm.objectives)} objectives; new here: {', '.join(entry['objectives']) or 'none'}; more ratings of: "
        f"{', '.join(entry['more_ratings']) or 'none'}. All else is that of `{entry['from']}`.",
        "",
        "| objective | ratings | alpha | R2 | test n | Spearman |",
        "|---|---|---|---|---|---|",
    ]
    for report in metrics["regression"]:
        test = rated.get(report["objective"], {})
        spearman = test.get("spearman", float("nan"))
        lines.append(
            f"| {report['objective']} | {report['ratings']:,} | {report['alpha']:g} | {report['r2']:.3f} "
            f"| {test.get('n', '')} | {'' if np.isnan(spearman) else f'{spearman:.3f}'} |"
        )
    return "\n".join([*lines, "", shared]) + "\n"
