"""Configuration of a reward model: everything but the weights, in the `config.json` of transformers.

It is apart from the model's code so that reading a config, or registering it with `AutoConfig`, loads no model code.
`gating_temperature`, `gating_hidden_dim` and `gating_n_hidden` are named as in `RLHFlow/ArmoRM-Llama3-8B-v0.1`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from armorm.backbone.model_files import CONFIG, read_object
from armorm.errors import CheckpointError
from armorm.files import embedded_path
from armorm.model.config_schema import settings_fault
from armorm.model.released import ARCHITECTURES, from_released
from armorm.objectives import ObjectiveSet


class ArmoRMConfig(PretrainedConfig):
    """Config of `ArmoRMForSequenceClassification`.

    Args:
        backbone_config: config of the decoder, as an object or a dictionary with `model_type`.
        objectives: k dictionaries, `ObjectiveSet.to_dicts`.
        gating_temperature, gating_hidden_dim, gating_n_hidden: shape of the gate.
        regression_bias: whether rewards have an intercept (the released model has none).
        gate_pattern: ids from the gate to the start of the reply, for callers that have only ids.
        limits: `max_length` in tokens, `overflow`, the policy for longer conversations, and `reasoning`: whether
            replies are read with it (`keep`, the default) or without (`drop`).
        reference: statistics of the reference data: `score_mean`, `score_std`, `score_quantiles` (101),
            `reward_means` (k), `gating_weights` (k means), `rows`.
        debiasing: `against` (names of the biases), `metric`, `level`, `penalties` (k).
        uncertainty: settings of `armorm.heads.uncertainty.Uncertainty`; empty for a model without.
        steering: explicit changes to the weights (`armorm.steering`); empty for a model as trained.
        calibration: `armorm.heads.calibration.Calibration` of the logit scale, or of score margins by `armorm
            calibrate`, then with `margin_scale`, their factor; None if the scale was set by hand or fitted on too
            few pairs, or the model is older than the field.
        quantiles: `objectives` (names) and `levels` of the quantile heads; empty for a model without.
        readout: `armorm.backbone.readout.Readout` and `normed`; empty for the last token of the last layer. The
            backbone's config has the layers that are computed.
        backbone_source: `Backbone.source` of the backbone that the heads belong to; with `referenced` if its weights
            are not in the model's folder but loaded from there.
        adapters: `armorm.backbone.adapters.Adapters.settings` of adapters that the backbone was fine-tuned with: its
            weights are those of `backbone_source` with `adapters.safetensors` merged; empty without.
        heads_digest: `remote_code.heads_digest` of the weights that were saved with these objectives, in this order;
            empty if the model is older than the field.
        provenance: `backbone`, `armorm_version`, `recipe_hash`, `recipe_name`.
    """

    model_type = "armorm"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    # `Trainer.predict` returns the logits only.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "rewards", "gating_output", "score", "hidden_state", "prompt_embedding",
    ]  # fmt: skip

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        objectives: list[dict[str, Any]] | None = None,
        gating_temperature: float = 10.0,
        gating_hidden_dim: int = 1024,
        gating_n_hidden: int = 3,
        regression_bias: bool = False,
        gate_pattern: list[int] | None = None,
        limits: dict[str, Any] | None = None,
        reference: dict[str, Any] | None = None,
        debiasing: dict[str, Any] | None = None,
        uncertainty: dict[str, Any] | None = None,
        steering: dict[str, Any] | None = None,
        calibration: dict[str, Any] | None = None,
        quantiles: dict[str, Any] | None = None,
        readout: dict[str, Any] | None = None,
        backbone_source: dict[str, Any] | None = None,
        adapters: dict[str, Any] | None = None,
        heads_digest: str = "",
        provenance: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            settings = dict(backbone_config)
            backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        # A copy: transformers resets the attention of nested configs, and a backbone may be using this one.
        self.backbone_config = copy.deepcopy(backbone_config)
        self.objectives = list(objectives or [])
        self.gating_temperature = gating_temperature
        self.gating_hidden_dim = gating_hidden_dim
        self.gating_n_hidden = gating_n_hidden
        self.regression_bias = regression_bias
        self.gate_pattern = list(gate_pattern or [])
        self.limits = dict(limits or {})
        self.reference = dict(reference or {})
        self.debiasing = dict(debiasing or {})
        self.uncertainty = dict(uncertainty or {})
        self.steering = dict(steering or {})
        self.calibration = dict(calibration) if calibration else None
        self.quantiles = dict(quantiles or {})
        self.readout = dict(readout or {})
        self.backbone_source = dict(backbone_source or {})
        self.adapters = dict(adapters or {})
        self.heads_digest = heads_digest
        self.provenance = dict(provenance or {})
        kwargs.pop("auto_map", None)  # belongs to the folder it was read from
        # One score: consumers that build a head from the config must not apply a softmax or create two labels.
        kwargs = {"num_labels": 1, "problem_type": "regression", "pad_token_id": None, **kwargs}
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of a `config.json`; those of the released layout are converted to ours.

        Raises:
            CheckpointError: for a file that is not JSON, the config of another kind of model, such as a plain backbone,
                or a value that no model can have, by its field.
        """
        path = embedded_path(str(pretrained_model_name_or_path)) or pretrained_model_name_or_path
        file = Path(path) / CONFIG
        if file.is_file():
            read_object(file, CheckpointError)
        settings, rest = super().get_config_dict(path, **kwargs)
        if not settings:  # transformers 4, for a folder without the file
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: no or an empty config.json, expected a reward model"
            )
        if is_released(settings):
            settings = from_released(settings)
        found = settings.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: model_type {found!r}, expected {cls.model_type!r}: "
                "a reward model with its heads"
            )
        fault = settings_fault(settings)
        if fault:
            raise CheckpointError(f"{file if file.is_file() else pretrained_model_name_or_path}, {fault}")
        return settings, rest

    @property
    def objective_set(self) -> ObjectiveSet:
        """The objectives as objects."""
        return ObjectiveSet.from_dicts(self.objectives)

    @property
    def hidden_size(self) -> int:
        """d of the backbone."""
        assert isinstance(self.backbone_config, PretrainedConfig)
        return int(self.backbone_config.get_text_config().hidden_size)


def is_released(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a `config.json` are those of the released layout."""
    found = settings.get("architectures")
    return isinstance(found, list) and any(name in ARCHITECTURES.values() for name in found)


AutoConfig.register(ArmoRMConfig.model_type, ArmoRMConfig, exist_ok=True)
