"""The recipe: a whole run, written once.

In:  a YAML file (or a dictionary), `key=value` overrides, environment variables as `${NAME:-default}`.
Out: a validated `Recipe`.

Unknown keys, impossible values, keys that stand twice: refused before any work starts, each by its
path in the file and with the nearest right name. Missing files and unknown objectives are refused
just as early, by `training.plan`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import yaml
from pydantic import Field, ValidationError, field_validator

from armorm.errors import RecipeError, nearest, shown
from armorm.files import read_yaml
from armorm.training.schema import (
    BackboneSection,
    DebiasSection,
    EvaluationSection,
    FinetuneSection,
    GatingSection,
    JointSection,
    ObjectiveSection,
    PreferencesSection,
    QuantilesSection,
    RatingsSection,
    ReferenceSection,
    RegressionSection,
    Section,
)

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Recipe(Section):
    """A whole run.

    Example:
        >>> recipe = Recipe.from_yaml("recipes/demo.yaml", ["seed=1"])    # doctest: +SKIP
    """

    name: str = Field("unnamed", description="of the model and its card")
    seed: int = Field(0, ge=0)
    backbone: BackboneSection = BackboneSection()
    finetune: Optional[FinetuneSection] = None
    data_root: str = Field(
        ".", description="where every relative path starts, itself relative to the working directory"
    )
    test_share: float = Field(0.1, ge=0, lt=1, description="share of prompts held out of sets without a split column")
    limit: Optional[int] = Field(
        None, ge=1, description="about how many rows to keep of each set (whole prompts), for trying things out"
    )
    ratings: tuple[RatingsSection, ...] = Field(min_length=1)
    preferences: tuple[PreferencesSection, ...] = Field(min_length=1)
    reference: Union[Literal["ratings"], ReferenceSection] = "ratings"
    regression: RegressionSection = RegressionSection()
    joint: Optional[JointSection] = None
    quantiles: Optional[QuantilesSection] = None
    debias: Optional[DebiasSection] = None
    gating: GatingSection = GatingSection()
    evaluation: tuple[EvaluationSection, ...] = ()
    keep_apart: tuple[str, ...] = Field(
        (), description="benchmarks, or files of pairs, whose prompts are never trained on, though not evaluated here"
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="trackers that get the figures of training beside metrics.jsonl"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        if isinstance(value, str):
            return () if value == "none" else (value,)
        return () if value is None else value

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe.

        Args:
            overrides: `key=value` each, the key a path (`gating.steps`, `ratings.0.data`), the value YAML.

        Raises:
            RecipeError: naming every fault by its path in the file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot be read: {error}") from None
        return cls.from_text(text, overrides, name=str(path))

    @classmethod
    def from_text(cls, text: str, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
        """Read a recipe from YAML text; as `from_yaml`."""
        try:
            values = read_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{name}: not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{name}: found {shown(values)}, expected keys and values")
        for override in overrides:
            _override(values, override)
        return cls.from_dict(_with_environment(values), name=name)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
        """Validate a recipe given as a dictionary."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError(f"{name}: {'; '.join(_faults(error))}") from None

    @property
    def hash(self) -> str:
        """16 hex digits of everything the recipe says."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def to_yaml(self) -> str:
        """The recipe with every value written out, as it is kept beside its results."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True, width=100
        )


def _with_environment(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_environment(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_environment(entry) for entry in value]
    if isinstance(value, str):
        return _VARIABLE.sub(_variable, value)
    return value


def _variable(found: re.Match[str]) -> str:
    value = os.environ.get(found[1]) or found[2]
    if value is None:
        raise RecipeError(f"environment variable {found[1]} is not set and has no default (${{{found[1]}:-default}})")
    return value


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r}: expected key=value")
    *parents, last = path.strip().split(".")
    place: Any = values
    for position, key in enumerate(parents):
        if isinstance(place, list):
            place = place[_list_index(place, key, override)]
        elif isinstance(place, dict):
            place = place.setdefault(key, {})
        else:
            raise RecipeError(f"override {override!r}: {'.'.join(parents[:position])} holds a value, not keys")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: {error}") from None
    if isinstance(place, list):
        place[_list_index(place, last, override)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"override {override!r}: {'.'.join(parents)} holds a value, not keys")


def _list_index(place: list, key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise RecipeError(f"override {override!r}: found {key!r}, expected a number from 0 to {len(place) - 1}")
    return int(key)


def _faults(error: ValidationError) -> list[str]:
    faults = []
    for fault in error.errors():
        place = ".".join(
            str(part)
            for part in fault["loc"]
            if not str(part).startswith(("literal[", "constrained", "ReferenceSection", "function-after["))
        )
        if fault["type"] == "extra_forbidden":
            known = _known_keys(fault["loc"][:-1])
            faults.append(f"{place}: unknown key{nearest(str(fault['loc'][-1]), known)}")
        elif fault["type"] == "value_error":
            faults.append(f"{place}: {fault['ctx']['error']}")
        elif fault["type"] == "missing":
            faults.append(f"{place}: missing")
        else:
            hint = nearest(str(fault["input"]), re.findall(r"'(\w+)'", fault["msg"]))
            faults.append(f"{place}: found {shown(fault['input'])}, {fault['msg'][0].lower()}{fault['msg'][1:]}{hint}")
    return faults


def _known_keys(path: Sequence[str | int]) -> list[str]:
    """Keys that the section at a path knows."""
    sections: dict[str, type[Section]] = {
        "backbone": BackboneSection, "ratings": RatingsSection, "preferences": PreferencesSection,
        "reference": ReferenceSection, "regression": RegressionSection, "debias": DebiasSection,
        "gating": GatingSection, "evaluation": EvaluationSection, "finetune": FinetuneSection,
        "joint": JointSection, "quantiles": QuantilesSection,
    }  # fmt: skip
    section: type[Section] = Recipe
    if path:
        section = ObjectiveSection if "objectives" in path else sections.get(str(path[0]), Recipe)
    return list(section.model_fields)
