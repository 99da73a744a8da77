"""Configuration of a reward model: everything but the weights.

In:  the backbone's own config, the objectives with their scales, the gate's shape, reference figures.
Out: `config.json` in the habit of transformers, read back to the same object.

`gating_temperature`, `gating_hidden_dim` and `gating_n_hidden` keep the names of the released
checkpoint (FIELD 3).
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from armorm.errors import CheckpointError
from armorm.model.released import from_released, is_released
from armorm.objectives import ObjectiveSet


class ArmoRMConfig(PretrainedConfig):
    """Config of `ArmoRMForSequenceClassification`.

    Args:
        backbone_config: config of the decoder, as an object or a dictionary with `model_type`.
        objectives: k dictionaries, `ObjectiveSet.to_dicts`.
        gating_temperature, gating_hidden_dim, gating_n_hidden: shape of the gate.
        regression_bias: whether rewards have an intercept (the released model has none).
        gate_pattern: ids from the gate to the start of the reply, for callers that have only ids.
        limits: `max_length` in tokens, and `overflow`, what happens beyond it.
        reference: figures of the reference data: `score_mean`, `score_std` (of the score),
            `score_quantiles` (101 of them), `reward_means` (k), `gating_weights` (k means), `rows`.
        debiasing: what was debiased against: `against` (names), `metric`, `level`, `penalties` (k).
        uncertainty: how sure rewards are (`heads/uncertainty.py`), empty for a model that does not say.
        steering: explicit changes to the weighing (`armorm.steering`), empty for a model as trained.
        quantiles: `objectives` (names) and `levels` of the quantile heads, empty for a model without.
        provenance: `backbone`, `armorm_version`, `recipe_hash`, `recipe_name`.
    """

    model_type = "armorm"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    # What `Trainer.predict` leaves out of its predictions: all but the logits.
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
        quantiles: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            settings = dict(backbone_config)
            backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        # A copy: transformers resets the attention of the configs inside this one, and a backbone may be using it.
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
        self.quantiles = dict(quantiles or {})
        self.provenance = dict(provenance or {})
        kwargs.pop("auto_map", None)  # of the folder it was read from; another may have no such file
        # One score: consumers that build a head from the config must not apply a softmax or count two labels.
        kwargs = {"num_labels": 1, "problem_type": "regression", "pad_token_id": None, **kwargs}
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings in a `config.json`, those of the released layout turned into ours.

        Raises:
            CheckpointError: for the config of another kind of model, such as a plain backbone.
        """
        settings, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not settings:  # what transformers 4 makes of a folder without the file
            raise CheckpointError(f"{pretrained_model_name_or_path}: no config.json, expected a reward model")
        if is_released(settings):
            return from_released(settings), rest
        found = settings.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: model_type {found!r}, expected {cls.model_type!r}: "
                "a reward model with its heads, not a model without them"
            )
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


AutoConfig.register(ArmoRMConfig.model_type, ArmoRMConfig, exist_ok=True)
