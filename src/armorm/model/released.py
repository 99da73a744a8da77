"""The layout of the released checkpoint, `RLHFlow/ArmoRM-Llama3-8B-v0.1`: read as ours, and written from ours.

In:  the settings of a `config.json`; or a model of ours.
Out: settings of `ArmoRMConfig`; or the settings and tensors of the released layout.

Tensor names are the same in both layouts (FIELD 3), only the config differs: the released one is a Llama
(or Gemma-2) config with four fields of its own. It is recognised by its architecture's name, never by
`model_type`, so that other people's Llama models stay what they are. What it has no place for (objectives,
gate pattern, reference figures) is known for the published nineteen objectives; models of ours keep it in
one more field, `armorm`, which other readers pass over.
"""

from __future__ import annotations

import copy
import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from armorm.errors import CheckpointError
from armorm.objectives import RELEASED_OBJECTIVES, Objective, ObjectiveSet
from armorm.steering import weighing

if TYPE_CHECKING:
    from armorm.model.configuration import ArmoRMConfig

ARCHITECTURES = {"llama": "LlamaForRewardModelWithGating", "gemma2": "Gemma2ForRewardModelWithGating"}
# The gate's shape, and what the published code takes for a field that is absent.
GATE_FIELDS = {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 1024, "gating_n_hidden": 3}
# Ids from the end of the last prompt turn to the reply: all that the published code knows.
GATE_PATTERNS = {"llama": [128009, 128006, 78191, 128007, 271], "gemma2": [107, 108, 106, 2516, 108]}
# What the released layout has no place for, kept in the field `armorm`.
OWN_FIELDS = ("objectives", "gate_pattern", "limits", "reference", "debiasing", "provenance")
# Fields of the reward model in a released config; the others are the backbone's.
_NOT_BACKBONE = {
    "architectures", "auto_map", "armorm", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "id2label", "label2id", "num_labels", "problem_type", *GATE_FIELDS,
}  # fmt: skip
_NEVER = -1e30  # added to a logit of the gate, it leaves a weight of exactly 0
_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def is_released(settings: Mapping[str, Any]) -> bool:
    """Whether the settings of a `config.json` are those of the released layout."""
    return any(name in ARCHITECTURES.values() for name in settings.get("architectures") or ())


def from_released(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `ArmoRMConfig` from those of the released layout.

    Raises:
        CheckpointError: for a backbone that the layout does not have.
    """
    family = settings.get("model_type")
    if family not in ARCHITECTURES:
        raise CheckpointError(f"model_type {family!r} in the released layout, expected {' or '.join(ARCHITECTURES)}")
    shape = {field: settings.get(field, default) for field, default in GATE_FIELDS.items()}
    count = shape.pop("num_objectives")
    own = settings.get("armorm") or {}
    objectives = own.get("objectives") or _objectives(count, settings.get("id2label") or {})
    if len(objectives) != count:
        raise CheckpointError(f"num_objectives {count} and {len(objectives)} objectives, expected as many")
    defaults = {
        "gate_pattern": GATE_PATTERNS[family],
        "limits": {"max_length": settings.get("max_position_embeddings"), "overflow": "error"},
        "provenance": {"backbone": settings.get("_name_or_path", ""), "layout": "released"},
    }
    return {
        "model_type": "armorm",
        "architectures": ["ArmoRMForSequenceClassification"],
        "backbone_config": {key: value for key, value in settings.items() if key not in _NOT_BACKBONE},
        "pad_token_id": settings.get("pad_token_id"),
        **shape,
        **defaults,
        **{field: own[field] for field in OWN_FIELDS if field in own},
        "objectives": objectives,
    }


def _objectives(count: int, labels: Mapping[Any, str]) -> list[dict[str, Any]]:
    """The published nineteen; for a relative with others, its labels, on the scale from 0 to 1."""
    if count == len(RELEASED_OBJECTIVES):
        return RELEASED_OBJECTIVES.to_dicts()
    names = [str(label) for label in labels.values()]
    if len(names) != count or names[0] == "LABEL_0":
        names = [f"objective-{i + 1}" for i in range(count)]
    return ObjectiveSet(Objective.rated(name, 0, 1) for name in names).to_dicts()


def biases(transform: torch.Tensor, names: list[str]) -> list[str]:
    """Objectives that a transform (k, k) takes out of the others: their rows hold the penalties."""
    others = transform - torch.diag(torch.diagonal(transform))
    return [name for name, row in zip(names, others, strict=True) if bool((row != 0).any())]


def backbone_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that most backbone weights of a folder have, from the headers of its safetensors."""
    sizes: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name.startswith("model."):
                start, end = entry["data_offsets"]
                sizes[entry["dtype"]] += end - start
    return _SAFETENSORS_DTYPES.get(sizes.most_common(1)[0][0]) if sizes else None


def obstacles(config: ArmoRMConfig) -> list[str]:
    """Why a model cannot be written in the released layout; empty where it can."""
    family = getattr(config.backbone_config, "model_type", "")
    found = []
    if family not in ARCHITECTURES:
        found.append(f"its backbone is {family}, the layout has {' and '.join(ARCHITECTURES)}")
    if config.regression_bias:
        found.append("its rewards have an intercept, the layout has none")
    fixed = [key for key in ("pin", "blend") if config.steering.get(key)]
    if fixed:
        found.append(
            f"it is steered by {' and '.join(fixed)}, and the layout has no weights that the gate does not give"
        )
    if config.quantiles:
        found.append("it has quantile heads, the layout has no place for them")
    return found


def folded(config: ArmoRMConfig, state: Mapping[str, torch.Tensor]) -> tuple[ArmoRMConfig, dict[str, torch.Tensor]]:
    """A steered model as a plain one: factors go into the gate's last bias, strength of debiasing into the transform.

        softmax((W h + b) / temperature + log factor) = softmax((W h + b + temperature * log factor) / temperature)

    What was steered stays on record in the config's `provenance`. Dropped objectives get a bias so low that their
    weight is exactly 0.

    Args:
        config: without what `obstacles` names.
        state: all tensors.
    """
    factors, _, _, strength = weighing(config.objective_set, config.steering)
    config, state = copy.deepcopy(config), dict(state)
    bias = f"gating.layers.{config.gating_n_hidden}.bias"
    if factors is not None:
        shift = config.gating_temperature * torch.tensor(factors, dtype=torch.float64).log()
        state[bias] = (state[bias].cpu().double() + shift).clamp(min=_NEVER).float()
    transform = state["reward_transform_matrix"].cpu().double()
    identity = torch.eye(len(transform), dtype=torch.float64)
    state["reward_transform_matrix"] = (identity + strength * (transform - identity)).float()
    config.provenance |= {"steering": config.steering}
    config.steering = {}
    return config, state


def to_released(config: ArmoRMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Settings of the released layout for a model of ours with weights of `dtype`.

    Raises:
        CheckpointError: saying everything that does not fit.
    """
    found = obstacles(config)
    if found:
        raise CheckpointError(f"the model does not fit the released layout: {'; '.join(found)}")
    assert config.backbone_config is not None and not isinstance(config.backbone_config, dict)
    settings = config.backbone_config.to_dict()
    family = settings["model_type"]
    for field in _NOT_BACKBONE:
        settings.pop(field, None)
    return settings | {
        "architectures": [ARCHITECTURES[family]],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "pad_token_id": config.pad_token_id,
        "num_labels": 1,
        "problem_type": "regression",
        "num_objectives": len(config.objectives),
        "gating_temperature": config.gating_temperature,
        "gating_hidden_dim": config.gating_hidden_dim,
        "gating_n_hidden": config.gating_n_hidden,
        "armorm": {field: getattr(config, field) for field in OWN_FIELDS},
    }
