"""The sections of a recipe: every key with its range, default and meaning.

In:  the dictionaries of a recipe (recipe.py reads the file).
Out: frozen pydantic models; a key that is unknown or a value that is impossible is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from armorm.errors import nearest

Range = tuple[float, float]
OUR_COLUMNS = ("prompt", "response", "messages", "chosen", "rejected", "margin", "split")


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
    engine: Literal["local", "ray"] = Field("local", description="who extracts features: this process, or Ray workers")
    workers: Optional[int] = Field(None, ge=1, description="of the ray engine; if empty, one for each GPU")
    gpus_per_worker: Optional[float] = Field(
        None, ge=0, description="of the ray engine; if empty, 1 where there are any"
    )
    revision: Optional[str] = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @model_validator(mode="after")
    def _workers_of_ray(self) -> BackboneSection:
        if self.engine == "local" and (self.workers is not None or self.gpus_per_worker is not None):
            raise ValueError("workers and gpus_per_worker go with engine: ray")
        return self


class FinetuneSection(Section):
    """The backbone trained with the heads before its features are read (finetune.py)."""

    method: Literal["full", "lora"] = Field("full", description="every weight, or adapters that are merged at the end")
    share: float = Field(
        0.8, gt=0, lt=1, description="share of the prompts to train on; the others choose alpha and train the gate"
    )
    source_shares: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict, description="share of a rated set's prompts, where it differs"
    )
    objective_weights: Literal["equal", "balanced"] = Field(
        "balanced", description="equal: the paper's sum; balanced: by variance and the root of the number of ratings"
    )
    epochs: float = Field(2.0, gt=0, description="passes over the ratings")
    preference_epochs: float = Field(0.0, ge=0, description="passes over the preference pairs before them")
    learning_rate: float = Field(2e-5, gt=0)
    head_learning_rate: float = Field(
        0.003, gt=0, description="of the linear rewards, as the most that a step moves one on its scale of 0 to 1"
    )
    weight_decay: float = Field(0.01, ge=0)
    schedule: Literal["cosine", "linear", "stable"] = Field(
        "cosine", description="stable: constant, then a linear fall to zero"
    )
    decay: float = Field(0.4, gt=0, le=1, description="share of the steps over which a stable rate falls")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps")
    batch_tokens: int = Field(8192, ge=64, description="tokens of a batch, padding included")
    tree_tokens: int = Field(1024, ge=64, description="most tokens of one prompt with its responses")
    accumulation: int = Field(1, ge=1, description="batches of a step")
    frozen_layers: int = Field(0, ge=0, description="first layers, with the embeddings, that stay as they are")
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    save_steps: int = Field(200, ge=1, description="steps between checkpoints")
    report_to: tuple[str, ...] = Field((), description="tensorboard, wandb, ...: as for transformers' Trainer")


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
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="the set's own column for prompt, response, messages, chosen, rejected or split, where it differs",
    )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name not in OUR_COLUMNS:
                raise ValueError(
                    f"found {name!r}, expected one of {', '.join(OUR_COLUMNS)}{nearest(name, OUR_COLUMNS)}"
                )
        return value


class RatingsSection(SetSection):
    """A set of rated conversations, a preset, or a computed objective."""

    objectives: dict[str, ObjectiveSection] = Field(
        default_factory=dict, description="rating columns with their ranges"
    )
    preset: Optional[str] = Field(None, description="a public set whose mapping is known")
    compute: Optional[str] = Field(
        None,
        description="response_length, list_density, markdown_density, or python:MODULE:FUNCTION",
    )
    name: Optional[str] = Field(None, description="name of the computed objective")
    map: Literal["min_max", "bin_centre"] = Field(
        "min_max", description="of a preset's objectives; bin_centre as in the released model"
    )

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
        if self.data is None and self.columns:
            raise ValueError(f"columns go with data, not with {given[0]}")
        if self.preset is None and self.map != "min_max":
            raise ValueError("map goes with preset; that of an objective is written beside its range")
        return self


class PreferencesSection(SetSection):
    """A set of preference pairs, a preset, or pairs made from the ratings of one objective."""

    preset: Optional[str] = Field(None, description="a public set whose layout is known")
    from_ratings: Optional[str] = Field(None, description="objective whose ratings make pairs within a prompt")
    margin: float = Field(0.0, ge=0, description="least difference of two raw ratings that makes a pair")
    max_pairs_per_prompt: Optional[int] = Field(None, ge=1, description="cap, drawn at random with the seed")

    @model_validator(mode="after")
    def _one_kind(self) -> PreferencesSection:
        given = [key for key in ("data", "preset", "from_ratings") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of data, preset and from_ratings, found {' and '.join(given) or 'none'}"
            )
        if self.from_ratings is not None and self.margin <= 0:
            raise ValueError("from_ratings needs a margin > 0, in raw units")
        if self.from_ratings is None and self.margin:
            raise ValueError("margin goes with from_ratings; a pair's own margin is a column of its data")
        return self


class ReferenceSection(SetSection):
    """Conversations over which correlation with a bias, score mean and standard deviation are measured."""

    preset: Optional[str] = Field(None, description="a public set, rated or of pairs (both sides are taken)")

    @model_validator(mode="after")
    def _one_kind(self) -> ReferenceSection:
        if (self.data is None) == (self.preset is None):
            raise ValueError("expected exactly one of data and preset")
        return self


class RegressionSection(Section):
    """Stage 1."""

    alphas: tuple[float, ...] = Field(
        tuple(10.0**e for e in range(-4, 5)), min_length=1, description="ridge penalties to choose from"
    )
    intercept: bool = Field(False, description="fit an unpenalised intercept")
    validation: Literal["by_prompt", "split"] = Field(
        "by_prompt",
        description="alpha is chosen on every fold in turn, or on one fold alone (split); folds are by prompt",
    )
    folds: int = Field(5, ge=2, le=50, description="folds for choosing alpha and for out-of-fold rewards")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="of an objective's squared errors against its penalty, 1 by default"
    )
    uncertainty: bool = Field(True, description="keep in the model what says how sure rewards are")
    keep_statistics: bool = Field(True, description="keep the rows' sums, so that ratings can be added later")

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

    against: tuple[str, ...] = Field(min_length=1, description="objectives that are biases")
    metric: Literal["spearman", "pearson"] = Field("spearman", description="correlation brought to zero")
    level: Literal["pooled", "within_prompt"] = Field(
        "pooled", description="over all rows, or only differences within a prompt"
    )
    method: Literal["exact", "published"] = Field(
        "exact", description="published: the grid search of the published script, for reproduction only"
    )

    @model_validator(mode="after")
    def _published_way(self) -> DebiasSection:
        doubled = [name for i, name in enumerate(self.against) if name in self.against[:i]]
        if doubled:
            raise ValueError(f"against names {doubled[0]!r} twice")
        if self.method == "published" and (len(self.against), self.metric, self.level) != (1, "spearman", "pooled"):
            raise ValueError("method published goes with one bias, metric spearman and level pooled")
        return self


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
    margin: float = Field(0.0, ge=0, description="times a pair's margin over its source's mean: least lead of chosen")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken as labelled the wrong way")
    entropy: float = Field(0.0, ge=0, description="reward for weights that are spread over the objectives")
    load_balance: float = Field(0.0, ge=0, description="penalty for mean weights that are not uniform")
    source_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="how much a pair of a preference set counts, 1 by default"
    )
    scale_rewards: bool = Field(
        False, description="debiased rewards of unit standard deviation on the reference data, folded into T"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of products in training; auto: bfloat16 where the hardware is fast at it"
    )


Benchmark = Literal["pairs", "ratings", "rewardbench", "rewardbench2", "rm-bench", "judgebench", "ppe"]


class EvaluationSection(SetSection):
    """One evaluation after training."""

    benchmark: Benchmark = Field(
        description="pairs: preference rows; ratings: held-out ratings; or a published benchmark"
    )
    name: Optional[str] = Field(None, description="name in the report, by default that of the data")

    @model_validator(mode="after")
    def _has_data(self) -> EvaluationSection:
        if self.benchmark == "ratings" and self.data is not None:
            raise ValueError("ratings are evaluated on the held-out rows of the recipe's own sets; expected no data")
        if self.benchmark == "pairs" and self.data is None:
            raise ValueError("pairs need data")
        return self
