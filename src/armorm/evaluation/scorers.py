"""Scorers: anything that gives a conversation a number, behind one door.

In:  conversations, each once.
Out: `Scored`: a score for each, NaN where it was refused, with the reason; and, of an interpretable
     model, the parts that the score is made of.

Three kinds: `ArmoRMScorer` (through a feature store where one is given), `ClassifierScorer` (classifier.py:
any Hugging Face sequence classifier with one logit) and `CallableScorer` (a function from conversations to
numbers).
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from armorm.attribution import coefficients
from armorm.conversation import Conversation
from armorm.errors import ArmormError, CheckpointError, shown

if TYPE_CHECKING:
    from armorm.features.extract import Features
    from armorm.objectives import ObjectiveSet
    from armorm.reward_model import ArmoRM

BATCH_TOKENS = 8192
NOT_A_NUMBER = "the model's score is not a finite number"
# What a function of somebody else's raises by mistake; anything rarer keeps its traceback.
_FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NameError, OSError, RuntimeError, TypeError, ValueError),
)
ScoreFunction = Callable[[list[list[dict[str, Any]]]], Sequence[float]]


class ScorerError(ArmormError, ValueError):
    """Something that was to score conversations and cannot, or that returned what is no score."""


@dataclass(frozen=True)
class Parts:
    """What the scores of an interpretable model are made of; rows of refused conversations are NaN.

    Attributes:
        names: (k,) objectives.
        rewards: (n, k) float64, predicted.
        weights: (n, k) gating weights, summing to 1.
        outputs: (n, k) gating weights times the scale of the score.
        transform: (k, k).
        raw: (n, k) predicted ratings on their raw scales.
        prompt_features: (m, d) of the distinct prompts.
        prompt_index: (n,) int64 row of `prompt_features`, -1 where refused.
    """

    names: list[str]
    rewards: np.ndarray
    weights: np.ndarray
    outputs: np.ndarray
    transform: np.ndarray
    raw: np.ndarray
    prompt_features: np.ndarray
    prompt_index: np.ndarray

    @cached_property
    def debiased(self) -> np.ndarray:
        """(n, k) rewards after the transform."""
        return self.rewards @ self.transform

    @cached_property
    def contributions(self) -> np.ndarray:
        """(n, k) share of each objective in the score."""
        return coefficients(self.outputs, self.transform) * self.rewards

    @property
    def is_debiased(self) -> bool:
        """Whether the transform changes anything."""
        return not np.array_equal(self.transform, np.eye(len(self.transform)))


@dataclass(frozen=True)
class Scored:
    """Scores of n conversations.

    Attributes:
        scores: (n,) float64, NaN where refused.
        refused: reason by row.
        truncated: rows that lost the beginning of their prompt.
        parts: of an interpretable model.
    """

    scores: np.ndarray
    refused: Mapping[int, str] = field(default_factory=dict)
    truncated: tuple[int, ...] = ()
    parts: Parts | None = None


class Scorer(Protocol):
    """What scores conversations. One of an interpretable model has `objectives` (an `ObjectiveSet`) and returns
    `Scored.parts`; it is called once, with all conversations."""

    def describe(self) -> dict[str, Any]:
        """Name, kind and fingerprint, for a result."""
        ...

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Score conversations, each of which is there once."""
        ...


class ArmoRMScorer:
    """A reward model of this library.

    Args:
        rm: the model.
        store: folder of a feature store to read and fill; None to keep nothing.
    """

    def __init__(self, rm: ArmoRM, store: Path | None = None, batch_tokens: int = BATCH_TOKENS) -> None:
        self.rm, self.store, self.batch_tokens = rm, store, batch_tokens

    @property
    def objectives(self) -> ObjectiveSet:
        """The model's objectives."""
        return self.rm.objectives

    def describe(self) -> dict[str, Any]:
        """Name, backbone with its fingerprint, dtype, fingerprint of the heads, steering."""
        import torch

        digest = blake2b(digest_size=8)
        heads = {n: t for n, t in self.rm.model.state_dict().items() if not n.startswith("model.")}
        for name, tensor in sorted(heads.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        config = self.rm.model.config
        described = {
            "name": self.rm.name,
            "kind": "armorm",
            "heads": digest.hexdigest(),
            "backbone": {
                "name": config.provenance.get("backbone", ""),
                "fingerprint": self.rm.backbone.fingerprint,
                "dtype": str(self.rm.model.model.dtype).removeprefix("torch."),
            },
            "objectives": self.rm.objectives.names,
        }
        return described | ({"steering": config.steering} if config.steering else {})

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Features from the store where they are there, the heads on top."""
        from armorm.backbone.encoding import encode_rows
        from armorm.features.extract import extract
        from armorm.features.store import FeatureStore
        from armorm.progress import progress

        limits = self.rm.model.config.limits
        policy = limits.get("overflow", "error")
        with progress("tokens", len(conversations), "conversations") as advance:
            encoded = encode_rows(
                self.rm.backbone.template,
                conversations,
                limits.get("max_length"),
                "skip" if policy == "error" else policy,
                advance,
            )
        backbone = self.rm.backbone
        store = None
        if self.store is not None:
            store = FeatureStore.of(self.store, backbone)
        refused = dict(encoded.rejected)
        if not encoded.kept:
            return Scored(np.full(len(conversations), np.nan), refused)
        features = extract(backbone, encoded.encoded, store, batch_tokens=self.batch_tokens)
        scores, parts = self._heads(features, np.array(encoded.kept), len(conversations))
        refused |= {row: NOT_A_NUMBER for row in encoded.kept if np.isnan(scores[row])}
        return Scored(scores, refused, tuple(encoded.truncated), parts)

    def _heads(self, features: Features, kept: np.ndarray, count: int) -> tuple[np.ndarray, Parts]:
        """Scores (count,) and their parts; NaN in the rows that are not kept, or that are not finite."""
        finite = np.isfinite(features.response).all(1) & np.isfinite(features.prompt[features.prompt_index]).all(1)
        features, kept = features.take(np.flatnonzero(finite)), kept[finite]
        batch = self.rm.score_features(features)
        scores = np.full(count, np.nan)
        scores[kept] = batch.scores

        def spread(values: np.ndarray) -> np.ndarray:
            whole = np.full((count, values.shape[1]), np.nan)
            whole[kept] = values
            return whole

        index = np.full(count, -1, np.int64)
        index[kept] = features.prompt_index
        rewards = batch.rewards.astype(np.float64)
        parts = Parts(
            names=batch.names,
            rewards=spread(rewards),
            weights=spread(batch.gating_weights),
            outputs=spread(batch.gating_output),
            transform=self.rm.transform,
            raw=spread(self.rm.objectives.to_raw(rewards)),
            prompt_features=features.prompt,
            prompt_index=index,
        )
        return scores, parts


class CallableScorer:
    """A function from conversations (lists of messages) to numbers.

    Args:
        function: takes a list of conversations, returns one number each; None or NaN is a refusal.
        name: for the result.
    """

    def __init__(self, function: ScoreFunction, name: str = "") -> None:
        self.function = function
        self.name = name or str(getattr(function, "__qualname__", type(function).__name__))

    @classmethod
    def from_name(cls, name: str) -> CallableScorer:
        """A function by `module:function`; modules of the working directory are found.

        Raises:
            ScorerError: for a name that leads nowhere.
        """
        module, colon, attribute = name.partition(":")
        if not (module and colon and attribute):
            raise ScorerError(f"scorer {name!r}: expected module:function")
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ScorerError(f"scorer {name!r}: {error}") from None
        if not callable(found) or inspect.isclass(found):
            raise ScorerError(f"scorer {name!r}: found {shown(found)}, expected a function")
        return cls(found, name)

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name, "kind": "function"}

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Call it once; a list of another length is refused, never broadcast.

        Raises:
            ScorerError: for what is no list of numbers, one a conversation; and for a fault inside the function, with
                the place where.
        """
        try:
            returned = self.function([conversation.to_list() for conversation in conversations])
        except _FAULTS as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ScorerError(
                f"scorer {self.name}: raised {type(error).__name__}: {str(error) or 'no message'} "
                f"({place.filename}, line {place.lineno})"
            ) from error
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(conversations):
            found = f"{len(values)} values" if isinstance(values, Sequence) else shown(values)
            raise ScorerError(f"scorer {self.name}: returned {found}, expected {len(conversations)} numbers")
        scores = np.full(len(conversations), np.nan)
        refused: dict[int, str] = {}
        for row, value in enumerate(values):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, np.number))):
                raise ScorerError(f"scorer {self.name}: returned {shown(value)}, expected a number")
            if value is None or not math.isfinite(value):
                refused[row] = f"the scorer returned {value}"
            else:
                scores[row] = value
        return Scored(scores, refused)


def load_scorer(
    model: Any, *, store: Path | None = None, dtype: str = "auto", device: str = "auto", name: str = ""
) -> Scorer:
    """A scorer from a model, a function, a scorer, or the name of a model.

    Args:
        model: an `ArmoRM`, a `Scorer`, a function, or a folder, hub id or embedded name of either kind of model.
        store: feature store, for models of this library.

    Raises:
        CheckpointError: for a name that holds no reward model.
    """
    if not isinstance(model, (str, Path)):
        if callable(getattr(model, "score", None)) and callable(getattr(model, "describe", None)):
            return model
        if callable(model):
            return CallableScorer(model, name)
    from armorm.reward_model import ArmoRM  # (a function is measured without loading any of this)

    if isinstance(model, ArmoRM):
        return ArmoRMScorer(model, store)
    if not isinstance(model, (str, Path)):
        raise ScorerError(f"found {shown(model)}, expected a reward model, a function or the name of a model")
    if is_classifier(str(model)):
        from armorm.evaluation.classifier import ClassifierScorer

        return ClassifierScorer.from_pretrained(str(model), dtype=dtype, device=device)
    return ArmoRMScorer(ArmoRM.from_pretrained(model, dtype=dtype, device=device), store)


def require_known(name: str) -> None:
    """Refuse the name of a model that has no config, by reading nothing else.

    Raises:
        CheckpointError: for a name that leads nowhere.
    """
    from transformers import PretrainedConfig

    from armorm.embedded import embedded_path

    if embedded_path(name) is None:
        try:
            found, _ = PretrainedConfig.get_config_dict(name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name}: cannot be loaded as a reward model: {error}") from error
        if not found:
            raise CheckpointError(f"{name}: has no config.json, expected a reward model")


def is_classifier(name: str) -> bool:
    """Whether a name is that of a sequence classifier that is no model of this library."""
    from transformers import PretrainedConfig

    from armorm.embedded import embedded_path
    from armorm.model.configuration import ArmoRMConfig

    if embedded_path(name) is not None:
        return False
    try:
        ArmoRMConfig.get_config_dict(name)
    except CheckpointError:
        settings, _ = PretrainedConfig.get_config_dict(name)
        architectures = settings.get("architectures") or []
        return any(architecture.endswith("ForSequenceClassification") for architecture in architectures)
    except (OSError, ValueError):
        return False
    return False
