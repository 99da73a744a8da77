"""Schema of a recipe: every key with its type, range, default and description.

The descriptions are printed in the recipe reference of the documentation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from armorm.errors import nearest
from armorm.evaluation.benchmarks import BENCHMARKS
from armorm.heads.gate_training import GateSettings
from armorm.heads.uncertainty import MAX_RANK

Range = tuple[float, float]
DEFAULT_ROWS = 1000
OUR_COLUMNS = ("prompt", "response", "messages", "chosen", "rejected", "margin", "split")


class Section(BaseModel):
    """A part of a recipe. Unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def only(self, *keys: str) -> str:
        """The one of these keys that is given."""
        fields = {field.alias or name: name for name, field in type(self).model_fields.items()}
        given = [key for key in keys if getattr(self, fields[key]) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'} of {', '.join(keys)}; expected exactly one")
        return given[0]


class BackboneSection(Section):
    """The decoder whose hidden states are the features of all heads."""

    model: str = Field("armorm-tiny", description="hub id, local folder, or armorm-tiny (included in the package)")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto is bfloat16 on hardware that is fast at it, else float32"
    )
    device: str = Field("auto", description="auto (one), all, cpu, cuda:1, or several: cuda:0,cuda:1")
    layer: Union[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, le=1)], None] = Field(
        None,
        description="whose output is read, before any norm: 0 is the embeddings; a fraction (0.5) counts from below; "
        "by default the last, after the final norm. No layer above it is computed",
    )
    pooling: Literal["last", "mean", "last+mean"] = Field(
        "last", description="response feature: last token, mean over the response's tokens, or both"
    )
    prompt_pooling: Literal["gate", "mean"] = Field(
        "gate", description="prompt feature: the token that closes the prompt, or the mean over the prompt's tokens"
    )
    max_length: int = Field(2048, ge=8, description="maximum tokens per conversation")
    overflow: Literal["error", "truncate_prompt", "skip"] = Field(
        "error", description="longer conversations: stop the run, drop the beginning of the prompt, or reject the row"
    )
    reasoning: Literal["keep", "drop"] = Field(
        "keep", description="replies are read with their reasoning (a `<think>` block), or without it"
    )
    batch_tokens: int = Field(8192, ge=64, description="maximum tokens per forward pass, padding included")
    engine: Literal["local", "ray"] = Field("local", description="features are computed in this process, or by Ray")
    workers: Optional[int] = Field(None, ge=1, description="number of Ray workers, by default one per GPU")
    gpus_per_worker: Optional[float] = Field(None, ge=0, description="GPUs per Ray worker, by default 1 if any")
    revision: Optional[str] = Field(None, description="commit, tag or branch of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code from the model's repository")

    @model_validator(mode="after")
    def _workers_of_ray(self) -> BackboneSection:
        if self.engine == "local" and (self.workers is not None or self.gpus_per_worker is not None):
            raise ValueError("workers and gpus_per_worker need engine: ray")
        return self


class FinetuneSection(Section):
    """Fine-tuning of the backbone together with linear reward heads, before its features are computed."""

    method: Literal["full", "lora"] = Field("full", description="train all weights, or LoRA adapters merged at the end")
    share: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="share of the prompts to fine-tune on; only the others are used to fit heads and gate afterwards",
    )
    source_shares: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict, description="share for the prompts of single rated sets, by name"
    )
    objective_weights: Literal["equal", "balanced"] = Field(
        "balanced",
        description="weight of each objective's squared error: 1, or 1 / (variance x sqrt(number of ratings))",
    )
    epochs: float = Field(2.0, gt=0, description="passes over the ratings")
    preference_epochs: float = Field(0.0, ge=0, description="earlier passes over the pairs, with a Bradley-Terry loss")
    preference_weight: float = Field(
        0.0, ge=0, description="weight of the pairs' Bradley-Terry loss in the passes over the ratings; 0 uses no pairs"
    )
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of the backbone")
    head_learning_rate: float = Field(0.003, gt=0, description="of the heads: largest change of a reward per step")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay of the backbone's matrices")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each feature that the heads do not see in training")
    schedule: Literal["cosine", "linear", "stable"] = Field(
        "cosine", description="learning rate schedule after warmup; stable is constant with a linear decay at the end"
    )
    decay: float = Field(0.4, gt=0, le=1, description="share of the steps in which a stable schedule decays")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps used for linear warmup")
    reasoning: Literal["keep", "drop"] = Field(
        "keep", description="replies are read with their reasoning (a `<think>` block), or without it"
    )
    batch_tokens: int = Field(8192, ge=64, description="maximum tokens per batch, padding included")
    tree_tokens: int = Field(1024, ge=64, description="maximum tokens of a prompt and responses computed together")
    accumulation: int = Field(1, ge=1, description="gradient accumulation: batches per optimiser step")
    frozen_layers: Union[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        0, description="number of first layers to freeze, with the embeddings; a fraction (0.5) is of all layers"
    )
    cache_states: bool = Field(
        True, description="compute the states of frozen layers once and keep them on disk, in bfloat16"
    )
    lora_rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    lora_alpha: int = Field(32, ge=1, description="LoRA scaling")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="share of each adapter's ranks left out in a step")
    gradient_checkpointing: bool = Field(False, description="saves memory for about a third more time")
    validation_share: float = Field(
        0.0, ge=0, lt=1, description="share of these prompts that choose when to stop instead of being trained on"
    )
    eval_steps: int = Field(100, ge=1, description="steps between validations")
    patience: int = Field(5, ge=1, description="validations without a gain after which training stops")
    save_steps: int = Field(200, ge=1, description="steps between checkpoints")
    report_to: tuple[str, ...] = Field((), description="trackers, as for the Trainer of transformers: tensorboard, ...")


class ObjectiveSection(Section):
    """Scale of a rating column. `[low, high]` is short for `{range: [low, high]}`."""

    range: Range = Field(description="lowest and highest raw rating")
    direction: Literal["higher", "lower", "neutral"] = Field(
        "higher",
        description="whether a higher or lower rating is better, or neither (neutral); lower flips the scale",
    )
    map: Literal["min_max", "bin_centre"] = Field(
        "min_max",
        description="to rewards in 0-1: linear, or levels at the centres of equal bins, as in the released model",
    )
    name: Optional[str] = Field(None, description="name of the objective, by default SOURCE-COLUMN")

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
    """Keys of every entry that reads rows."""

    data: Optional[str] = Field(None, description="file or folder relative to data_root, or hub id")
    subset: Optional[str] = Field(None, description="configuration of a hub set")
    split: Optional[str] = Field(None, description="split to train on, by default train")
    revision: Optional[str] = Field(None, description="commit, tag or branch of a hub set")
    source: Optional[str] = Field(None, description="name of the set, by default its file name or preset")
    rows: Optional[int] = Field(
        None, ge=1, description="approximate maximum rows (of a construct: replies of each of its sets), whole prompts"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="column names of the set that differ: prompt, response, messages, chosen, rejected, margin, split",
    )

    @property
    def label(self) -> str:
        """Name of the set in metrics and weights: as given, else of the preset or objective, else of the file."""
        given = (self.source, getattr(self, "preset", None), getattr(self, "from_ratings", None))
        return next((name for name in given if name), Path(self.data or "").name.split(".")[0])

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in OUR_COLUMNS:
                raise ValueError(
                    f"found {name!r}, expected one of {', '.join(OUR_COLUMNS)}{nearest(name, OUR_COLUMNS)}"
                )
        return value


class ConstructSource(Section):
    """Replies that a construct starts from. `NAME` is short for `{set: NAME}`."""

    set: str = Field(
        description="name or data of a rated or preference set of the recipe (chosen replies are used), or other data"
    )
    where: dict[str, tuple[float, float]] = Field(
        default_factory=dict,
        description="only replies whose raw rating of each of these objectives (of other data: columns) is within "
        "[low, high], so unrated ones are left out",
    )
    rows: int | None = Field(
        None, ge=1, description="approximate maximum replies of this set; by default the entry's rows"
    )
    prompts: Literal["harmless", "harmful"] = Field(
        "harmless",
        description="harmful: they ask for something harmful, so only refusals are used, and only by constructs about "
        "wording",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"set": value} if isinstance(value, str) else value

    @field_validator("where")
    @classmethod
    def _ordered(cls, value: dict[str, Range]) -> dict[str, Range]:
        for name, (low, high) in value.items():
            if not low <= high:
                raise ValueError(f"found {name}: [{low:g}, {high:g}], expected [low, high] with low <= high")
        return value


class RatingsSection(SetSection):
    """One of: a set of rated conversations (`data`), a public set (`preset`), a computed objective (`compute`), a
    constructed one (`construct`), an objective fitted to preference pairs (`bradley_terry`)."""

    model_config = ConfigDict(populate_by_name=True)

    objectives: dict[str, ObjectiveSection] = Field(default_factory=dict, description="rating columns and their scales")
    preset: Optional[str] = Field(None, description="name of a public set with known columns and scales")
    compute: Optional[str] = Field(
        None,
        description="response_length, list_density, markdown_density, refusal or python:MODULE:FUNCTION",
    )
    constructed: Optional[str] = Field(
        None,
        alias="construct",
        description="objective whose labels a rule makes from replies and edits of them: answers-the-question, "
        "gives-an-answer, complete, fluent, courteous, consistent-facts or relevance",
    )
    from_: tuple[ConstructSource, ...] = Field(
        (), alias="from", description="sets whose replies a construct starts from"
    )
    per_prompt: int = Field(1, ge=1, description="of a construct: maximum replies of each prompt")
    variants: int = Field(1, ge=1, description="of a construct: edited replies for each reply")
    bradley_terry: Optional[Annotated[tuple[str, ...], Field(min_length=1)]] = Field(
        None, description="names of the preference sets whose pairs a linear reward is fitted to"
    )
    name: Optional[str] = Field(
        None,
        description="name of the computed or constructed objective, by default that of the measure or construct; or of "
        "that fitted to pairs (preferred)",
    )
    map: Literal["min_max", "bin_centre"] = Field("min_max", description="of a preset's objectives, see objectives")

    @property
    def construct_rows(self) -> int:
        """Approximate maximum replies of each set of a construct."""
        return self.rows or DEFAULT_ROWS

    @property
    def reads_rows(self) -> bool:
        """Whether the entry is a set of rows."""
        return self.data is not None or self.preset is not None

    @model_validator(mode="after")
    def _one_kind(self) -> RatingsSection:
        given = self.only("data", "preset", "compute", "construct", "bradley_terry")
        if self.data is not None and not self.objectives:
            raise ValueError("a set of ratings needs objectives: {column: [low, high]}")
        if self.reads_rows and self.name is not None:
            raise ValueError(
                "name needs compute, construct or bradley_terry; a rated objective is named under objectives"
            )
        if given == "construct" and not self.from_:
            raise ValueError("construct needs from: the sets whose replies it starts from")
        for field in ("from_", "per_prompt", "variants"):
            if given != "construct" and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field.rstrip('_')} needs construct, found {given}")
        for key in ("objectives", "columns"):
            if self.data is None and getattr(self, key):
                raise ValueError(f"{key} need data, found {given}")
        if self.preset is None and self.map != "min_max":
            raise ValueError("map needs preset; for data it is a key of each objective")
        return self


class PreferencesSection(SetSection):
    """One of: a set of preference pairs (`data`), a public set (`preset`), pairs made from ratings (`from_ratings`)."""

    preset: Optional[str] = Field(None, description="name of a public set with a known layout")
    from_ratings: Optional[str] = Field(None, description="objective whose ratings give pairs of responses")
    margin: float = Field(0.0, ge=0, description="minimum difference of raw ratings for a pair")
    max_pairs_per_prompt: Optional[int] = Field(None, ge=1, description="most pairs per prompt, sampled with the seed")
    weight: float = Field(1.0, gt=0, description="weight of the set's pairs in training the gate and joint heads")
    weak: bool = Field(
        False, description="weakly labelled: used only if the validation prompts of the other sets gain by it"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> PreferencesSection:
        self.only("data", "preset", "from_ratings")
        if self.from_ratings is not None and self.margin <= 0:
            raise ValueError("from_ratings needs a margin > 0, in raw units")
        if self.from_ratings is None and self.margin:
            raise ValueError("margin needs from_ratings; margins of pairs from data are a column")
        return self


class ReferenceSection(SetSection):
    """Reference data: debiasing is fitted, and mean and standard deviation of the score measured, on these rows."""

    preset: Optional[str] = Field(None, description="public set of ratings or pairs (both responses are used)")

    @model_validator(mode="after")
    def _one_kind(self) -> ReferenceSection:
        self.only("data", "preset")
        return self


class RegressionSection(Section):
    """Stage 1: ridge regression of the rewards."""

    alphas: tuple[float, ...] = Field(
        tuple(10.0**e for e in range(-4, 5)), min_length=1, description="candidate penalties"
    )
    intercept: bool = Field(False, description="fit an unpenalised intercept")
    validation: Literal["by_prompt", "split"] = Field(
        "by_prompt",
        description="alpha is chosen by cross-validation over all folds, or on one fold (split); folds are by prompt",
    )
    folds: int = Field(5, ge=2, le=50, description="number of folds, for choosing alpha and for out-of-fold rewards")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="weight of an objective's squared errors relative to its penalty, by default 1",
    )
    uncertainty: bool = Field(True, description="store what is needed for uncertainties and intervals of rewards")
    uncertainty_rank: int = Field(
        MAX_RANK,
        ge=1,
        description="most eigenvectors stored per group of objectives rated together; fewer make the model smaller "
        "and standard deviations approximate, by a stated bound",
    )
    keep_statistics: bool = Field(True, description="save sufficient statistics, for armorm extend")

    @field_validator("alphas")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError(f"found {min(value):g}, expected penalties > 0")
        return value


class JointSection(Section):
    """Regression heads trained on ratings and preference pairs together, with the weights of a first gate."""

    pair_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0, 0.1, 0.3, 1.0, 3.0),
        min_length=1,
        description="weights of the pair loss to choose from by cross-validation; 0 is stage 1",
    )
    r2_price: float = Field(0.02, ge=0, description="maximum decrease of the mean held-out R^2 of the ratings")


class QuantilesSection(Section):
    """Quantile heads: the distribution of each objective's ratings, if it has enough distinct values."""

    levels: tuple[float, ...] = Field(
        (0.025, 0.1, 0.25, 0.5, 0.75, 0.9, 0.975),
        min_length=1,
        description="quantile levels, ascending, between 0 and 1",
    )

    @field_validator("levels")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(a < b for a, b in zip((0.0, *value), (*value, 1.0), strict=True)):
            raise ValueError(f"found {list(value)}, expected ascending numbers between 0 and 1")
        return value


class DebiasSection(Section):
    """Debiasing: a linear transform that removes correlation with biases, such as verbosity, from the other rewards."""

    against: tuple[str, ...] = Field(min_length=1, description="objectives that are biases")
    keep: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="of an objective, biases that belong to its meaning: its correlation with them is not removed",
    )
    metric: Literal["spearman", "pearson"] = Field("spearman", description="correlation that is brought to zero")
    level: Literal["pooled", "within_prompt"] = Field(
        "pooled", description="correlation over all rows, or of differences between responses to the same prompt"
    )
    method: Literal["exact", "published"] = Field("exact", description="exact solution, or the published grid search")

    @model_validator(mode="after")
    def _published_way(self) -> DebiasSection:
        doubled = [name for i, name in enumerate(self.against) if name in self.against[:i]]
        if doubled:
            raise ValueError(f"found {doubled[0]!r} twice in against")
        for name, biases in self.keep.items():
            unknown = next((bias for bias in biases if bias not in self.against), None)
            if unknown is not None or name in self.against:
                what = f"{name}, which is a bias" if unknown is None else f"{unknown!r}, which is not in against"
                raise ValueError(f"found {what} in keep, expected {{objective: [biases of against]}}")
        if self.method == "published" and (len(self.against), self.metric, self.level) != (1, "spearman", "pooled"):
            raise ValueError("method published needs one bias, metric spearman and level pooled")
        return self


class GatingSection(Section, GateSettings):
    """Stage 2: training of the gate on preference pairs."""

    scale_rewards: bool = Field(
        False, description="scale debiased rewards to unit deviation on the reference data (in T)"
    )

    @model_validator(mode="before")
    @classmethod
    def _weights_of_sets(cls, value: Any) -> Any:
        if isinstance(value, dict) and "source_weights" in value:
            value = dict(value)
            if value.pop("source_weights"):
                raise ValueError("source_weights is now the key weight of each entry of preferences")
        return value


if TYPE_CHECKING:
    Benchmark = str
else:
    Benchmark = Literal[tuple(BENCHMARKS)]


class EvaluationSection(SetSection):
    """An evaluation after training."""

    benchmark: Benchmark = Field(
        description="pairs (those in data), ratings (held-out ratings), or a published benchmark"
    )
    name: Optional[str] = Field(None, description="name in metrics and report, by default that of the data")

    @property
    def label(self) -> str:
        """Name in metrics: as given, else of the file of pairs or the benchmark."""
        return self.name or (super().label if self.benchmark == "pairs" else self.benchmark)

    @model_validator(mode="after")
    def _has_data(self) -> EvaluationSection:
        if self.benchmark == "ratings" and self.data is not None:
            raise ValueError("ratings are evaluated on the held-out rows of the recipe's own sets; expected no data")
        if self.benchmark == "pairs" and self.data is None:
            raise ValueError("pairs need data")
        return self
