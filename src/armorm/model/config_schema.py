"""Schema of a reward model's `config.json`: what is checked before a model is built from it.

Fields that are not here are settings for other readers, and kept as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, field_validator

from armorm.backbone.model_files import decoder_fault, first_fault
from armorm.objectives import ObjectiveError, ObjectiveSet

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MOST_OBJECTIVES = 10_000


class _Limits(BaseModel):
    max_length: Optional[Annotated[int, Field(gt=0)]] = None
    overflow: Literal["error", "truncate_prompt", "skip"] = "error"
    reasoning: Literal["keep", "drop"] = "keep"


class _Reference(BaseModel):
    score_mean: Optional[Number] = None
    score_std: Optional[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = None
    score_quantiles: Optional[list[Number]] = None
    reward_means: Optional[list[Number]] = None
    gating_weights: Optional[list[Number]] = None


class _Readout(BaseModel):
    pooling: Literal["last", "mean", "last+mean"] = "last"
    prompt: Literal["gate", "mean"] = "gate"
    layer: Optional[Annotated[int, Field(ge=0, le=1_000)]] = None
    layers: Optional[Annotated[int, Field(ge=0, le=1_000)]] = None
    normed: bool = True


class _Quantiles(BaseModel):
    objectives: list[str]
    levels: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, max_length=1_000)]


class _Uncertainty(BaseModel):
    rows: Annotated[list[Any], Field(max_length=MOST_OBJECTIVES)]
    rank: Annotated[int, Field(ge=0, le=100_000)]


class _Source(BaseModel):
    name: Optional[str] = None
    referenced: bool = False
    sha256: Optional[str] = None
    commit: Optional[str] = None


class _RewardModel(BaseModel):
    """Fields of `ArmoRMConfig`."""

    model_config = ConfigDict(extra="allow")

    backbone_config: dict[str, Any]
    objectives: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_OBJECTIVES)]
    gating_temperature: Positive = 10.0
    gating_hidden_dim: Annotated[int, Field(strict=True, gt=0, le=1_000_000)] = 1024
    gating_n_hidden: Annotated[int, Field(strict=True, ge=0, le=1_000)] = 3
    regression_bias: Annotated[bool, Field(strict=True)] = False
    gate_pattern: Optional[list[Annotated[int, Field(strict=True, ge=0)]]] = None
    limits: Optional[_Limits] = None
    reference: Optional[_Reference] = None
    debiasing: Optional[dict[str, Any]] = None
    uncertainty: Optional[dict[str, Any]] = None
    steering: Optional[dict[str, Any]] = None
    calibration: Optional[dict[str, Any]] = None
    quantiles: Optional[dict[str, Any]] = None
    readout: Optional[_Readout] = None
    backbone_source: Optional[_Source] = None
    adapters: Optional[dict[str, Any]] = None
    provenance: Optional[dict[str, Any]] = None
    heads_digest: Optional[str] = None

    @field_validator("objectives")
    @classmethod
    def _valid(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        nameless = [number for number, entry in enumerate(value) if not isinstance(entry.get("name"), str)]
        if nameless:
            raise ValueError(f"entry {nameless[0]} has no name, expected objectives with a name each")
        try:
            ObjectiveSet.from_dicts(value)
        except ObjectiveError as error:
            raise ValueError(str(error)) from None
        return value


def settings_fault(settings: Mapping[str, Any]) -> str:
    """The first field of a reward model's settings that is missing or that no model can have; empty if all are fine."""
    fault = first_fault(_RewardModel, settings)
    if fault:
        return fault
    for field, schema in (("uncertainty", _Uncertainty), ("quantiles", _Quantiles)):
        if settings.get(field) and (fault := first_fault(schema, settings[field], field)):
            return fault
    names = {entry["name"] for entry in settings["objectives"]}
    unknown = sorted(set((settings.get("quantiles") or {}).get("objectives", ())) - names)
    if unknown:
        return f"field quantiles.objectives: found {unknown[0]!r}, expected names of the model's objectives"
    if not isinstance(settings["backbone_config"].get("model_type"), str):
        return "field backbone_config.model_type: missing, expected the family of the decoder"
    return decoder_fault(settings["backbone_config"], "backbone_config")


def reference_fault(reference: Mapping[str, Any], count: int) -> str:
    """The first field of the reference data that does not have a number for each of the objectives; empty if all do."""
    for field in ("reward_means", "gating_weights"):
        found = len(reference.get(field) or ())
        if found not in (0, count):
            return f"field reference.{field}: found {found} numbers, expected {count}: one per objective"
    return ""
