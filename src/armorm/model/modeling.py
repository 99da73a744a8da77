"""`ArmoRMForSequenceClassification`: the model of `remote_code`, with what it needs inside armorm.

It adds the embedded models, the released layout (`armorm.model.released`), assembling from parts, quantiles, and
errors of armorm's family. The forward pass and the names of all tensors are those of `remote_code`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from armorm.backbone.decoder import require_decoder, settle_attention
from armorm.errors import CheckpointError
from armorm.files import EMBEDDED_BACKBONE, EMBEDDED_REWARD_MODEL, embedded_path
from armorm.model.configuration import ArmoRMConfig
from armorm.model.remote_code import ArmoRMOutput, RewardModel, quantile_layer, steering_terms


class ArmoRMForSequenceClassification(RewardModel):
    """Interpretable reward model.

    `half()`, `bfloat16()`, `to(dtype)` cast the backbone only; the heads stay in float32, bit for bit.

    Raises:
        CheckpointError: by `from_pretrained`, naming every tensor that is missing, unexpected or of another shape.
    """

    config_class = ArmoRMConfig
    config: ArmoRMConfig
    _auto_class = None  # type: ignore[assignment]  # saving copies no code
    _checkpoint_error = CheckpointError

    def __init__(self, config: ArmoRMConfig) -> None:
        if config.backbone_config is None:
            raise CheckpointError("the config has no backbone_config, expected that of a decoder")
        super().__init__(config)

    @classmethod
    def assemble(cls, backbone: PreTrainedModel, config: ArmoRMConfig) -> ArmoRMForSequenceClassification:
        """A model around a loaded backbone, with new heads; the backbone's weights are not copied.

        Raises:
            BackboneError: for a backbone that is not a decoder.
        """
        settle_attention(backbone)
        require_decoder(backbone.eval(), backbone.name_or_path or type(backbone).__name__)
        with torch.device("meta"):
            model = cls(config)
        model.model = backbone
        with torch.device(backbone.device):
            model._build_heads(config)
        model.config.dtype = backbone.dtype
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load from a folder, a hub id or the name of an embedded model; every tensor must be there and fit.

        The released layout is read too (`armorm.model.released`), without its remote code.

        Args:
            kwargs: as for any transformers model; the default `dtype` is that of the backbone's weights. Only
                safetensors are read.
        """
        path: str | None = str(pretrained_model_name_or_path)
        folder = embedded_path(str(path))
        if folder is not None:
            kwargs["state_dict"] = _embedded_state()
            kwargs.setdefault("config", ArmoRMConfig.from_pretrained(folder))
            path = None
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        if "against" not in model.config.debiasing:
            model.config.debiasing["against"] = _biases(model)
        return (model, report) if wants_report else model

    @torch.no_grad()
    def add_quantiles(self, objectives: list[str], levels: list[float], weight: np.ndarray, bias: np.ndarray) -> None:
        """Add quantile heads; the score does not change.

        Args:
            objectives: (j,) names.
            levels: (q,) ascending, between 0 and 1.
            weight: (j * q, d), of the residual of each reward, objective after objective.
            bias: (j * q,).
        """
        self.config.quantiles = {"objectives": list(objectives), "levels": [float(level) for level in levels]}
        with torch.device(self.regression_layer.weight.device):
            layer = quantile_layer(self.config, self.regression_layer.in_features)
        assert layer is not None
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
        self.quantile_layer = layer

    def with_config(self, config: ArmoRMConfig) -> ArmoRMForSequenceClassification:
        """The same weights under another config, such as another steering."""
        model = copy.copy(self)
        model.config = config
        model.steering = steering_terms(config)
        return model

    def quantiles(self, output: ArmoRMOutput) -> torch.Tensor | None:
        """Quantiles (B, k, q) of the rating of each objective, mapped scale, ascending along the last axis.

        NaN for objectives without quantile heads; None for a model without any.
        """
        if self.quantile_layer is None:
            return None
        settings, names = self.config.quantiles, self.config.objective_set.names
        columns = [names.index(name) for name in settings["objectives"]]
        with torch.autocast(output.hidden_state.device.type, enabled=False):
            residual = self.quantile_layer(output.hidden_state.float()).to(output.rewards.device)
        rewards, q = output.rewards, len(settings["levels"])
        result = rewards.new_full((*rewards.shape, q), float("nan"))
        result[:, columns] = (rewards[:, columns, None] + residual.view(len(rewards), -1, q)).sort(-1).values
        return result


def _embedded_state() -> dict[str, torch.Tensor]:
    """Heads of the embedded reward model on the weights of the embedded backbone."""
    from safetensors.torch import load_file

    heads, backbone = (embedded_path(name) for name in (EMBEDDED_REWARD_MODEL, EMBEDDED_BACKBONE))
    assert heads is not None and backbone is not None
    state = {f"model.{name}": tensor for name, tensor in load_file(backbone / "model.safetensors").items()}
    return state | load_file(heads / "heads.safetensors")


def _biases(model: ArmoRMForSequenceClassification) -> list[str]:
    """Objectives that the others are debiased against: the rows of the transform that hold penalties."""
    transform = model.reward_transform_matrix.cpu()
    others = (transform - torch.diag(torch.diagonal(transform)) != 0).any(1)
    return [name for name, biased in zip(model.config.objective_set.names, others.tolist(), strict=True) if biased]


AutoModelForSequenceClassification.register(ArmoRMConfig, ArmoRMForSequenceClassification, exist_ok=True)
