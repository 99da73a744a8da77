"""The parts of a run put together: a reward model with everything that its config holds.

In:  a backbone, fitted heads, transform and gate; prompt features and rewards of reference conversations.
Out: `ArmoRM`.
"""

from __future__ import annotations

import numpy as np
import torch

import armorm
from armorm.backbone.decoder import Backbone
from armorm.heads.debiasing import Debiasing
from armorm.heads.gating import GatingNetwork
from armorm.heads.regression import RegressionHead
from armorm.heads.uncertainty import Uncertainty
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.objectives import ObjectiveSet
from armorm.reward_model import ArmoRM
from armorm.training.recipe import Recipe

QUANTILES = 101


@torch.no_grad()
def assemble_model(
    recipe: Recipe,
    backbone: Backbone,
    objectives: ObjectiveSet,
    head: RegressionHead,
    uncertainty: Uncertainty | None,
    debiasing: Debiasing,
    network: GatingNetwork,
    reference: tuple[np.ndarray, np.ndarray],
    reference_rewards: np.ndarray,
) -> ArmoRM:
    """A reward model of its parts.

    Args:
        reference: of the n reference conversations, whose scores place those of others: features (m, d) of their
            prompts, and which of them each has (n,).
        reference_rewards: (n, k) rewards as stage 1 gives them, out of fold.
    """
    prompts, prompt_index = reference
    weights = network.weights(torch.from_numpy(prompts)).double().numpy()[prompt_index]
    output = weights * float(network.logit_scale)
    scores = (output * debiasing.apply(reference_rewards)).sum(1)
    names = objectives.names
    tokenizer_pad = backbone.tokenizer.pad_token_id
    config = ArmoRMConfig(
        backbone_config=backbone.model.config,
        objectives=objectives.to_dicts(),
        gating_temperature=recipe.gating.temperature,
        gating_hidden_dim=recipe.gating.hidden_size,
        gating_n_hidden=recipe.gating.hidden_layers,
        regression_bias=recipe.regression.intercept,
        gate_pattern=backbone.template.gate_pattern(),
        limits={"max_length": recipe.backbone.max_length, "overflow": recipe.backbone.overflow},
        pad_token_id=tokenizer_pad,
        reference={
            "rows": len(prompt_index),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
            "score_quantiles": np.quantile(scores, np.linspace(0, 1, QUANTILES)).tolist(),
            "reward_means": reference_rewards.mean(0).tolist(),
            "gating_weights": weights.mean(0).tolist(),
        },
        debiasing={
            "against": [names[i] for i in debiasing.against],
            "metric": debiasing.metric,
            "level": debiasing.level,
            "penalties": debiasing.penalties[0].tolist()
            if len(debiasing.against) == 1
            else debiasing.penalties.tolist(),
        }
        if debiasing.against
        else {},
        uncertainty=uncertainty.settings() if uncertainty else {},
        provenance={
            "backbone": backbone.name,
            "recipe_name": recipe.name,
            "recipe_hash": recipe.hash,
            "armorm_version": armorm.__version__,
        },
    )
    model = ArmoRMForSequenceClassification.assemble(backbone.model, config)
    model.regression_layer.weight.copy_(torch.from_numpy(head.weight))
    if recipe.regression.intercept:
        model.regression_layer.bias.copy_(torch.from_numpy(head.bias))
    for name, tensor in (uncertainty.tensors() if uncertainty else {}).items():
        getattr(model, f"uncertainty_{name}").copy_(torch.from_numpy(tensor))
    model.reward_transform_matrix.copy_(torch.from_numpy(debiasing.matrix))
    model.gating.load_state_dict(network.state_dict())
    return ArmoRM(model, backbone.tokenizer, recipe.name)
