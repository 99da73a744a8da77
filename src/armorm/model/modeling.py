"""`ArmoRMForSequenceClassification`: the model of `remote_code`, with what it needs inside armorm.

It adds the embedded models, heads on a backbone that is stored elsewhere, the released layout
(`armorm.model.released`), assembling from parts, quantiles, and errors of armorm's family. The forward pass and the
names of all tensors are those of `remote_code`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from armorm.backbone.adapters import FILE as ADAPTERS
from armorm.backbone.adapters import Adapters
from armorm.backbone.decoder import load_layers, require_decoder, settle_attention
from armorm.backbone.locate import backbone_path, require_same_weights
from armorm.backbone.model_files import CONFIG, WEIGHTS, cut_weights, integer_weights, size_fault, weight_shapes
from armorm.errors import CheckpointError
from armorm.files import embedded_path
from armorm.model.config_schema import reference_fault
from armorm.model.configuration import ArmoRMConfig
from armorm.model.remote_code import (
    ArmoRMOutput,
    RewardModel,
    heads_fault,
    loading_faults,
    quantile_layer,
    steering_terms,
)

HEADS = "heads.safetensors"  # all tensors but the backbone's, in the folder of a model whose backbone is elsewhere


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
    adapters: Adapters | None = None  # that are merged into the backbone, if it was fine-tuned with any

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
        return cls._around(backbone, config)

    @classmethod
    def _around(cls, backbone: PreTrainedModel, config: ArmoRMConfig) -> ArmoRMForSequenceClassification:
        """As `assemble`, for a backbone that was checked."""
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

        The released layout is read too (`armorm.model.released`), without its remote code. A folder with heads only
        names its backbone, which is loaded from where it is, and checked by its hash.

        Args:
            kwargs: as for any transformers model; the default `dtype` is that of the backbone's weights. Only
                safetensors are read. For a folder with heads only, `backbone` takes other weights than those that the
                heads belong to; scores drift.
        """
        path = str(embedded_path(str(pretrained_model_name_or_path)) or pretrained_model_name_or_path)
        wants_report = kwargs.pop("output_loading_info", False)
        config = kwargs.get("config") or _config(path, kwargs)
        if config is not None:
            require_weights(Path(path), config)
        if config is not None and config.backbone_source.get("referenced"):
            model, report = cls._on_referenced_backbone(path, config, kwargs)
        else:
            model, report = super().from_pretrained(path, *model_args, output_loading_info=True, **kwargs)
        if not Path(path).is_dir():  # a hub id, whose files are on this machine by now
            from transformers.utils import cached_file

            options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs} | {"local_files_only": True}
            cached = cached_file(path, CONFIG, _raise_exceptions_for_missing_entries=False, **options)
            if cached is not None:
                require_weights(Path(cached).parent, model.config)
        fault = reference_fault(model.config.reference, len(model.config.objectives))
        if fault:
            raise CheckpointError(f"{Path(path) / CONFIG}, {fault}")
        if model.config.adapters and model.adapters is None and (Path(path) / ADAPTERS).is_file():
            model.adapters = Adapters.read(path)
        if "against" not in model.config.debiasing:
            model.config.debiasing["against"] = _biases(model)
        return (model, report) if wants_report else model

    @classmethod
    def _on_referenced_backbone(cls, path: str, config: ArmoRMConfig, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The heads of a folder or hub id on the backbone that the config names; and the loading report."""
        from safetensors.torch import load_file
        from transformers.utils import cached_file

        source, readout, other = config.backbone_source, config.readout, kwargs.get("backbone")
        options = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
        adapters = Path(cached_file(path, ADAPTERS, **options)).parent if config.adapters else None
        if other is None:
            require_same_weights(source["name"], source.get("sha256"), path)
        dtype = str(kwargs.get("dtype") or "auto").removeprefix("torch.")
        placing = {key: kwargs[key] for key in ("device_map", "attn_implementation") if kwargs.get(key) is not None}
        backbone, _ = load_layers(
            other or source["name"],
            dtype="weights" if dtype == "auto" else dtype,
            device="cpu",
            layer=readout.get("layer"),
            adapters=adapters,
            revision=source.get("commit"),
            **placing,
        )
        heads = load_file(cached_file(path, HEADS, **options))
        model = cls._around(backbone.eval(), config)
        model.adapters = None if adapters is None else Adapters.read(adapters)
        missing, unexpected = model.load_state_dict(heads, strict=False)
        report = {"missing_keys": {key for key in missing if not key.startswith("model.")}}
        report |= {"unexpected_keys": set(unexpected), "mismatched_keys": set()}
        faults = loading_faults(report) or list(filter(None, [heads_fault(config, heads)]))
        if faults:
            raise CheckpointError(f"{path}: {'; '.join(faults)}")
        return model, report

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


_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def tokenizer_path(name: str, config: ArmoRMConfig) -> str:
    """Where `from_pretrained` finds the tokenizer of a reward model: with its backbone, if that is referenced."""
    source = config.backbone_source
    return backbone_path(source["name"], source.get("commit")) if source.get("referenced") else name


def require_weights(folder: Path, config: ArmoRMConfig) -> None:
    """Check the headers of the weights in a local folder, before any are loaded: files are whole and hold
    floating-point numbers, and the backbone has the sizes that the config says.

    Raises:
        CheckpointError: naming file and tensor, or the field of config.json.
    """
    backbone = config.backbone_config.to_dict() if isinstance(config.backbone_config, PretrainedConfig) else {}
    settings = {"quantization_config": getattr(config, "quantization_config", None)} | backbone
    for file in (HEADS, WEIGHTS):
        unsound = cut_weights(folder, file) or integer_weights(folder, file, settings, "model.")
        if unsound:
            raise CheckpointError(unsound)
        if file != HEADS and backbone:
            fault = size_fault(backbone, weight_shapes(folder, file), "backbone_config")
            if fault:
                raise CheckpointError(f"{folder / CONFIG}, {fault}")


def _config(path: str, kwargs: dict[str, Any]) -> ArmoRMConfig | None:
    """The config of a folder or hub id; None if it cannot be read, which loading will report."""
    try:
        return ArmoRMConfig.from_pretrained(path, **{key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs})
    except CheckpointError:
        raise
    except (OSError, ValueError):
        return None


def _biases(model: ArmoRMForSequenceClassification) -> list[str]:
    """Objectives that the others are debiased against: the rows of the transform that hold penalties."""
    transform = model.reward_transform_matrix.cpu()
    others = (transform - torch.diag(torch.diagonal(transform)) != 0).any(1)
    return [name for name, biased in zip(model.config.objective_set.names, others.tolist(), strict=True) if biased]


AutoModelForSequenceClassification.register(ArmoRMConfig, ArmoRMForSequenceClassification, exist_ok=True)
