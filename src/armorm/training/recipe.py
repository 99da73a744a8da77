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
from typing import Annotated, Any, Literal, Optional, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from armorm.errors import RecipeError, nearest, shown

Range = tuple[float, float]
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BackboneSection(Section):
    """The decoder whose features everything is learned on."""

    model: str = Field("armorm-tiny", description="hub id, folder, or the embedded armorm-tiny")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware is fast at it"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    max_length: int = Field(2048, ge=8, description="most tokens of a conversation")
    overflow: Literal["error", "truncate_prompt", "skip"] = Field("error", description="what happens to longer ones")
    batch_tokens: int = Field(8192, ge=64, description="tokens of a forward pass, padding included")
    revision: Optional[str] = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class ObjectiveSection(Section):
    """How a rating column maps to an objective."""

    range: Range = Field(description="lowest and highest raw rating")
    direction: Literal["higher", "lower", "neutral"] = Field(
        "higher", description="lower: less is better, flipped in the map"
    )
    map: Literal["min_max", "bin_centre"] = Field(
        "min_max", description="bin_centre: integer levels at the centres of equal bins"
    )
    name: Optional[str] = Field(None, description="name of the objective, by default the column with its source")

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, value: Any) -> Any:
        return {"range": value} if isinstance(value, (list, tuple)) else value

    @field_validator("range")
    @classmethod
    def _ordered(cls, value: Range) -> Range:
        if not value[0] < value[1]:
            raise ValueError(f"found {list(value)}, expected [low, high] with low < high")
        return value


class SetSection(Section):
    """What every entry that reads rows has in common."""

    data: Optional[str] = Field(None, description="file or folder below data_root, or hub id")
    subset: Optional[str] = Field(None, description="configuration of a hub set")
    split: Optional[str] = Field(None, description="split to train on, by default train")
    revision: Optional[str] = Field(None, description="of a hub set")
    source: Optional[str] = Field(None, description="name of the set, by default that of its file")


class RatingsSection(SetSection):
    """A set of rated conversations, a preset, or a computed objective."""

    objectives: dict[str, ObjectiveSection] = Field(
        default_factory=dict, description="rating columns with their ranges"
    )
    preset: Optional[str] = Field(None, description="a public set whose mapping is known")
    compute: Optional[str] = Field(None, description="a measure of the response, such as response_length")
    name: Optional[str] = Field(None, description="name of the computed objective")

    @model_validator(mode="after")
    def _one_kind(self) -> RatingsSection:
        given = [key for key in ("data", "preset", "compute") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'} of data, preset, compute; expected exactly one")
        if self.data is not None and not self.objectives:
            raise ValueError("a set of ratings needs objectives: {column: [low, high]}")
        if self.compute is None and self.name is not None:
            raise ValueError("name goes with compute; a rated objective is named under objectives")
        if self.data is None and self.objectives:
            raise ValueError(f"objectives go with data, not with {given[0]}")
        return self


class PreferencesSection(SetSection):
    """A set of preference pairs, or pairs made from the ratings of one objective."""

    from_ratings: Optional[str] = Field(None, description="objective whose ratings make pairs within a prompt")
    margin: float = Field(0.0, ge=0, description="least difference of two raw ratings that makes a pair")
    max_pairs_per_prompt: Optional[int] = Field(None, ge=1, description="cap, drawn at random with the seed")

    @model_validator(mode="after")
    def _one_kind(self) -> PreferencesSection:
        if (self.data is None) == (self.from_ratings is None):
            raise ValueError("expected exactly one of data and from_ratings")
        if self.from_ratings is not None and self.margin <= 0:
            raise ValueError("from_ratings needs a margin > 0, in raw units")
        if self.data is not None and self.margin:
            raise ValueError("margin goes with from_ratings; a pair's own margin is a column of its data")
        return self


class ReferenceSection(SetSection):
    """Conversations over which correlation with a bias, score mean and standard deviation are measured."""

    data: str = Field(description="file or folder below data_root, or hub id; rows as for scoring, no labels needed")


class RegressionSection(Section):
    """Stage 1."""

    alphas: tuple[float, ...] = Field(
        tuple(10.0**e for e in range(-4, 5)), min_length=1, description="ridge penalties to choose from"
    )
    intercept: bool = Field(False, description="fit an unpenalised intercept")
    validation: Literal["by_prompt"] = Field("by_prompt", description="folds are by prompt")
    folds: int = Field(5, ge=2, le=50, description="folds for choosing alpha and for out-of-fold rewards")

    @field_validator("alphas")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError(f"found {min(value):g}, expected penalties > 0")
        return value


class JointSection(Section):
    """Regression heads trained on ratings and preference pairs together, after a first gate."""

    pair_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0, 0.1, 0.3, 1.0, 3.0), min_length=1, description="weights of the pair loss to choose from; 0 is stage 1"
    )
    r2_price: float = Field(0.02, ge=0, description="how far the mean held-out R^2 of the ratings may fall")


class QuantilesSection(Section):
    """A distribution for each objective that is rated in levels enough."""

    levels: tuple[float, ...] = Field(
        (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975), min_length=1, description="ascending, between 0 and 1"
    )

    @field_validator("levels")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(a < b for a, b in zip((0.0, *value), (*value, 1.0), strict=True)):
            raise ValueError(f"found {list(value)}, expected ascending numbers between 0 and 1")
        return value


class DebiasSection(Section):
    """The transform that takes a bias out of the other objectives."""

    against: tuple[str, ...] = Field(min_length=1, max_length=1, description="objective that is the bias")
    metric: Literal["spearman", "pearson"] = Field("spearman", description="correlation brought to zero")
    level: Literal["pooled", "within_prompt"] = Field(
        "pooled", description="over all rows, or only differences within a prompt"
    )


class GatingSection(Section):
    """Stage 2."""

    hidden_size: int = Field(1024, ge=1)
    hidden_layers: int = Field(3, ge=0, description="0 is a linear gate")
    temperature: float = Field(10.0, gt=0)
    logit_scale: Union[Literal["fit"], Annotated[float, Field(gt=0)]] = Field(
        "fit", description="fit, or a fixed number"
    )
    dropout: float = Field(0.2, ge=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    steps: int = Field(2000, ge=1)
    batch_size: int = Field(1024, ge=1)
    patience: int = Field(10, ge=1, description="evaluations (every 50 steps) without progress before stopping")


class EvaluationSection(SetSection):
    """One evaluation after training."""

    benchmark: Literal["pairs", "ratings"] = Field(description="pairs: preference rows; ratings: held-out ratings")
    name: Optional[str] = Field(None, description="name in the report, by default that of the data")

    @model_validator(mode="after")
    def _has_data(self) -> EvaluationSection:
        if self.benchmark == "ratings" and self.data is not None:
            raise ValueError("ratings are evaluated on the held-out rows of the recipe's own sets; expected no data")
        return self


class Recipe(Section):
    """A whole run.

    Example:
        >>> recipe = Recipe.from_yaml("recipes/demo.yaml", ["seed=1"])    # doctest: +SKIP
    """

    name: str = Field("unnamed", description="of the model and its card")
    seed: int = Field(0, ge=0)
    backbone: BackboneSection = BackboneSection()
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
            values = yaml.load(text, Loader=_UniqueKeys)
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


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key may stand once only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        doubled = next((key for key in keys if keys.count(key) > 1), None)
        if doubled is not None:
            raise yaml.YAMLError(f"key {doubled!r} stands twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


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
        value = yaml.load(text, Loader=_UniqueKeys)
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
            if not str(part).startswith(("literal[", "constrained", "ReferenceSection"))
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
        "gating": GatingSection, "evaluation": EvaluationSection, "joint": JointSection,
        "quantiles": QuantilesSection,
    }  # fmt: skip
    section: type[Section] = Recipe
    if path:
        section = ObjectiveSection if "objectives" in path else sections.get(str(path[0]), Recipe)
    return list(section.model_fields)
