"""The recipe: one YAML file that describes a whole training run.

`${NAME:-default}` is replaced by an environment variable (and written out again as the reference that it is), and
`key=value` overrides are applied before validation.
Paths of data start at `data_root`, relative to the recipe or, if it is not there, to the working directory. Without one
they start at the recipe's folder if any of the data is there, else at the working directory.
Unknown keys, invalid values and duplicate keys are rejected before any work, each by its path in the file and with the
nearest valid name; missing files and unknown objectives are rejected by dataset.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args

import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from armorm.data.rows import LINE_SUFFIXES, TABLE_SUFFIXES
from armorm.errors import RecipeError, nearest, read_fault, shown
from armorm.files import read_text, read_yaml
from armorm.training.recipe_variables import Path as Place
from armorm.training.recipe_variables import expanded, references_kept
from armorm.training.schema import (
    BackboneSection,
    DebiasSection,
    EvaluationSection,
    FinetuneSection,
    GatingSection,
    JointSection,
    PreferencesSection,
    QuantilesSection,
    RatingsSection,
    ReferenceSection,
    RegressionSection,
    Section,
)

_DATA_SUFFIXES = (*LINE_SUFFIXES, *TABLE_SUFFIXES, ".parquet")


class Recipe(Section):
    """Everything that decides a training run.

    Example:
        >>> recipe = Recipe.from_yaml("recipes/demo.yaml", ["seed=1"])    # doctest: +SKIP
    """

    _references: dict[Place, str] = PrivateAttr(default_factory=dict)  # to environment variables, by place

    name: str = Field("unnamed", min_length=1, max_length=200, description="name of the model, used in its card")
    seed: int = Field(0, ge=0, description="of everything random: gate training, subsampling, fine-tuning")
    backbone: BackboneSection = BackboneSection()
    finetune: Optional[FinetuneSection] = None
    data_root: str = Field(
        ".",
        description="folder that relative paths of data start from, relative to the recipe (if it is there, else to "
        "the working directory); by default the recipe's folder if any of the data is there, else the working "
        "directory",
    )
    test_share: float = Field(0.1, ge=0, lt=1, description="share of prompts held out from sets without a split column")
    limit: Optional[int] = Field(
        None, ge=1, description="approximate maximum rows per set, sampled by prompt, for quick experiments"
    )
    ratings: tuple[RatingsSection, ...] = Field(min_length=1)
    preferences: tuple[PreferencesSection, ...] = Field(
        (), description="pairs for the gate; without any, its weights are the objectives' reliability for every prompt"
    )
    reference: Union[Literal["ratings"], ReferenceSection] = "ratings"
    regression: RegressionSection = RegressionSection()
    joint: Optional[JointSection] = None
    quantiles: Optional[QuantilesSection] = None
    debias: Optional[DebiasSection] = None
    gating: GatingSection = GatingSection()
    evaluation: tuple[EvaluationSection, ...] = ()
    keep_apart: tuple[str, ...] = Field(
        (), description="benchmarks or files of pairs whose prompts are excluded from training without being evaluated"
    )
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description="trackers that receive the training metrics, in addition to metrics.jsonl"
    )

    @field_validator("name")
    @classmethod
    def _no_path(cls, value: str) -> str:
        if value in (".", "..") or not value.isprintable() or set(value) & set("/\\"):
            raise ValueError(f"found {shown(value)}, expected a name without path separators and control characters")
        return value

    @model_validator(mode="after")
    def _finetuned_layers(self) -> Recipe:
        if self.finetune is not None and self.backbone.layer == 0:
            raise ValueError("finetune trains layers: expected backbone.layer above 0, found 0 (the embeddings)")
        return self

    @field_validator("preferences")
    @classmethod
    def _some_judged(cls, value: tuple[PreferencesSection, ...]) -> tuple[PreferencesSection, ...]:
        if value and all(entry.weak for entry in value):
            raise ValueError("every set is weak, expected at least one to validate them on")
        return value

    @model_validator(mode="after")
    def _joint_of_ratings_and_pairs(self) -> Recipe:
        if self.joint is not None and self.preference_objectives:
            raise ValueError("joint fits every objective to ratings and pairs: expected no bradley_terry in ratings")
        if self.joint is not None and not self.preferences:
            raise ValueError("joint needs preferences")
        return self

    @property
    def preference_objectives(self) -> dict[str, tuple[str, ...]]:
        """Names of the preference sets of each objective that is fitted to pairs."""
        return {entry.name or "preferred": entry.bradley_terry for entry in self.ratings if entry.bradley_terry}

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        if isinstance(value, str):
            return () if value == "none" else (value,)
        return () if value is None else value

    @field_validator("evaluation")
    @classmethod
    def _named_apart(cls, value: tuple[EvaluationSection, ...]) -> tuple[EvaluationSection, ...]:
        first: dict[tuple[bool, str], int] = {}
        for i, entry in enumerate(value):
            other = first.setdefault((entry.benchmark == "pairs", entry.label), i)
            if other != i and entry.benchmark != "ratings":
                raise ValueError(f"{other} and {i} are both named {entry.label!r}, expected another name for one")
        return value

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from a file.

        Args:
            overrides: `key=value` each; the key is a path (`gating.steps`, `ratings.0.data`), the value YAML.

        Raises:
            RecipeError: naming each error by its path in the file.
        """
        if str(path).endswith(_DATA_SUFFIXES) and Path(path).is_file():
            raise RecipeError(f"{path}: found data, and a recipe is YAML; armorm init {path} writes one")
        try:
            text = read_text(Path(path))
        except (OSError, UnicodeError) as error:
            raise RecipeError(f"{path}: {read_fault(path, error)}") from None
        recipe = cls.from_text(text, overrides, name=str(path))
        if any(override.partition("=")[0].strip() == "data_root" for override in overrides):
            return recipe  # relative to the working directory, as every path of a command line
        return recipe.model_copy(update={"data_root": recipe._root_from(Path(path).parent)})

    def _root_from(self, folder: Path) -> str:
        """`data_root`, as seen from the working directory, of a recipe in a folder."""
        given = Path(self.data_root).expanduser()
        if given.is_absolute() or folder == Path():
            return self.data_root
        if "data_root" in self.model_fields_set:
            return str(folder / given) if (folder / given).is_dir() else self.data_root
        sections = [*self.ratings, *self.preferences, *self.evaluation, self.reference]
        names = [name for section in sections if (name := getattr(section, "data", None))]
        return str(folder) if any((folder / name).exists() for name in names) else self.data_root

    @classmethod
    def from_text(cls, text: str, overrides: Sequence[str] = (), *, name: str = "recipe") -> Recipe:
        """Read a recipe from YAML text; see `from_yaml`."""
        try:
            values = read_yaml(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{name}: not valid YAML: {error}") from None
        if not isinstance(values, dict):
            found = "an empty file" if values is None else shown(values)
            raise RecipeError(f"{name}: found {found}, expected keys and values")
        for override in overrides:
            _override(values, override)
        try:
            values, references = expanded(values)
            recipe = cls.from_dict(values, name=name)
            recipe._references = references
            recipe._references = expanded(recipe.stored())[1]  # by their places in what is stored
        except RecipeError as error:
            raise error if str(error).startswith(name) else RecipeError(f"{name}: {error}") from None
        return recipe

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
        """Validate a recipe that is given as a dictionary."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError(f"{name}: {'; '.join(_faults(error))}") from None

    @property
    def hash(self) -> str:
        """Digest of all values, 16 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def stored(self) -> dict[str, Any]:
        """All values, defaults included, as they are written to files and sent to trackers: with references to
        environment variables as in the recipe, not with what these hold."""
        return references_kept(self.model_dump(mode="json", exclude_none=True, by_alias=True), self._references)

    def to_yaml(self) -> str:
        """The recipe with all values, defaults included; references to environment variables stay references."""
        return yaml.safe_dump(self.stored(), sort_keys=False, allow_unicode=True, width=100)


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"override {override!r}: expected key=value")
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: {error}") from None
    keys = path.strip().split(".")
    place: Any = values
    for position, key in enumerate(keys):
        is_last = position == len(keys) - 1
        if isinstance(place, dict):
            place[key] = value if is_last else place.get(key, {})
            place = place[key]
        elif isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise RecipeError(f"override {override!r}: found {key!r}, expected a number from 0 to {len(place) - 1}")
            place[int(key)] = value if is_last else place[int(key)]
            place = place[int(key)]
        else:
            raise RecipeError(f"override {override!r}: {'.'.join(keys[:position])} holds a value, not keys")


def _faults(error: ValidationError) -> list[str]:
    faults = []
    found = error.errors()
    inner = {fault["loc"][:n] for fault in found for n in range(len(fault["loc"]))}
    for fault in found:
        if fault["type"] == "too_short" and fault["loc"] in inner:
            continue  # entries that are invalid themselves
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
    """Keys of the section at a path."""
    section: type[Section] = Recipe
    for part in path:
        field = section.model_fields.get(str(part))
        section = next(_sections(field.annotation), section) if field else section
    return [field.alias or name for name, field in section.model_fields.items()]


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections in a type such as `Optional[GatingSection]` or `dict[str, ObjectiveSection]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
