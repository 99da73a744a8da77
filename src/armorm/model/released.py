"""The released layout, that of `RLHFlow/ArmoRM-Llama3-8B-v0.1` on the Hugging Face Hub: its config read as ours.

Tensor names are the same in both layouts, only the config differs: the released one is a Llama (or Gemma 2) config
with four more fields. It is recognised by the name of its architecture, never by `model_type`, so that other Llama
models are left alone. Objectives, gate pattern and reference data are not part of it: they are known for the
published nineteen objectives, and models of ours keep them in one more field, `armorm`, which other readers ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armorm.errors import CheckpointError, shown
from armorm.model.config_schema import MOST_OBJECTIVES
from armorm.objectives import RELEASED_OBJECTIVES, Objective, ObjectiveSet

ARCHITECTURES = {"llama": "LlamaForRewardModelWithGating", "gemma2": "Gemma2ForRewardModelWithGating"}
# The gate's shape, with the defaults of the published code.
GATE_FIELDS = {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 1024, "gating_n_hidden": 3}
# Ids from the gate (the end of the last prompt turn) to the reply, from the published code.
GATE_PATTERNS = {"llama": [128009, 128006, 78191, 128007, 271], "gemma2": [107, 108, 106, 2516, 108]}
# Settings that the released layout does not have, kept in the field `armorm`.
OWN_FIELDS = (
    "objectives",
    "gate_pattern",
    "limits",
    "reference",
    "debiasing",
    "calibration",
    "heads_digest",
    "provenance",
)
# Fields of the reward model in a released config; the others are the backbone's.
NOT_BACKBONE = {
    "architectures", "auto_map", "armorm", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "id2label", "label2id", "num_labels", "problem_type", *GATE_FIELDS,
}  # fmt: skip


def from_released(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `ArmoRMConfig` from those of the released layout.

    Raises:
        CheckpointError: for a backbone that the layout does not support.
    """
    family = settings.get("model_type")
    if family not in ARCHITECTURES:
        raise CheckpointError(f"model_type {family!r} in the released layout, expected {' or '.join(ARCHITECTURES)}")
    shape = {field: settings.get(field, default) for field, default in GATE_FIELDS.items()}
    count = shape.pop("num_objectives")
    if not isinstance(count, int) or not 0 < count <= MOST_OBJECTIVES:
        raise CheckpointError(f"field num_objectives: found {shown(count)}, expected a number of objectives")
    own = settings.get("armorm") or {}
    if not isinstance(own, Mapping) or not isinstance(settings.get("id2label") or {}, Mapping):
        raise CheckpointError("field armorm or id2label: expected an object")
    objectives = own.get("objectives") or _objectives(count, settings.get("id2label") or {})
    if len(objectives) != count:
        raise CheckpointError(f"num_objectives {count} but {len(objectives)} objectives, expected the same number")
    defaults = {
        "gate_pattern": GATE_PATTERNS[family],
        "limits": {"max_length": settings.get("max_position_embeddings"), "overflow": "error"},
        "provenance": {"backbone": settings.get("_name_or_path", ""), "layout": "released"},
    }
    return {
        "model_type": "armorm",
        "architectures": ["ArmoRMForSequenceClassification"],
        "backbone_config": {key: value for key, value in settings.items() if key not in NOT_BACKBONE},
        "pad_token_id": settings.get("pad_token_id"),
        **shape,
        **defaults,
        **{field: own[field] for field in OWN_FIELDS if field in own},
        "objectives": objectives,
    }


def _objectives(count: int, labels: Mapping[Any, str]) -> list[dict[str, Any]]:
    """The published nineteen; for a model with another number, its labels, on the scale from 0 to 1."""
    if count == len(RELEASED_OBJECTIVES):
        return RELEASED_OBJECTIVES.to_dicts()
    names = [str(label) for label in labels.values()]
    if len(names) != count or names[0] == "LABEL_0":
        names = [f"objective-{i + 1}" for i in range(count)]
    return ObjectiveSet(Objective.rated(name, 0, 1) for name in names).to_dicts()
