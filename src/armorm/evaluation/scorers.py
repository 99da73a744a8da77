"""Scorers of models: reward models of this library and Hugging Face sequence classifiers; `load_scorer` finds the right
one by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import CheckpointError, shown
from armorm.evaluation.scorer import CallableScorer, Scored, Scorer, ScorerError, spread
from armorm.evaluation.scorer_names import ScorerName
from armorm.files import files_together

if TYPE_CHECKING:
    from armorm.backbone.chat_template import ChatTemplate
    from armorm.objectives import ObjectiveSet
    from armorm.reward_model import ArmoRM

BATCH_TOKENS = 8192
NOT_A_NUMBER = "the model's score is not a finite number"


def load_scorer(
    model: Any,
    *,
    store: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    name: str = "",
    api_key_env: str | None = None,
) -> Scorer:
    """A scorer of a model, a function or a model name.

    Args:
        model: an `ArmoRM`, a `Scorer`, a function, or a folder, hub id, embedded name, or a name of another kind
            (`evaluation/scorer_names.py`): a URL, `dpo:...`, `judge:...`.
        store: feature store to read and fill, for models of this library; `auto` is the dtype of its features.
        api_key_env: environment variable with the key of a server; by default ARMORM_API_KEY.

    Raises:
        CheckpointError: if the name is not that of a reward model.
        ScorerError: if `model` is none of these.
    """
    if not isinstance(model, (str, Path)):
        if callable(getattr(model, "score", None)) and callable(getattr(model, "describe", None)):
            return model
        if callable(model):
            return CallableScorer(model, name)
    from armorm.features.store import dtype_for  # a function is evaluated without loading any of this
    from armorm.reward_model import ArmoRM

    if isinstance(model, ArmoRM):
        return ArmoRMScorer(model, store)
    if not isinstance(model, (str, Path)):
        raise ScorerError(f"found {shown(model)}, expected a reward model, a function or the name of a model")
    named = ScorerName.parse(str(model))
    if named is not None:
        return named.load(device=device, api_key_env=api_key_env)
    if is_classifier(str(model)):
        return ClassifierScorer.from_pretrained(str(model), dtype=dtype, device=device)
    return ArmoRMScorer(ArmoRM.from_pretrained(model, dtype=dtype_for(store, dtype), device=device), store)


def require_known(name: str) -> None:
    """Check that a model name has a config, or is well formed if it is of another kind; nothing else is read.

    Raises:
        CheckpointError: if it has none.
        ScorerError: if it is malformed.
    """
    from armorm.files import embedded_path
    from armorm.hub_access import not_loaded, require_folder, require_spelling

    if ScorerName.parse(name) is not None:
        return
    require_spelling(name)
    if embedded_path(name) is None:
        require_folder(name)
        try:
            found = _settings(name)
        except (OSError, ValueError) as error:
            why = not_loaded(name, error)
            raise CheckpointError(f"{name}: cannot be loaded as a reward model: {why}") from error
        if not found:
            raise CheckpointError(f"{name}: has no config.json, expected a reward model")


def is_classifier(name: str) -> bool:
    """Whether a name is that of a sequence classifier rather than a model of this library."""
    from armorm.files import embedded_path
    from armorm.hub_access import require_spelling
    from armorm.model.configuration import ArmoRMConfig, is_released

    require_spelling(name)
    if embedded_path(name) is not None:
        return False
    try:
        settings = _settings(name)
    except (OSError, ValueError):  # loading it as a reward model says what is wrong
        return False
    found = settings.get("architectures")
    if settings.get("model_type") == ArmoRMConfig.model_type or is_released(settings) or not isinstance(found, list):
        return False
    return any(str(architecture).endswith("ForSequenceClassification") for architecture in found)


def _settings(name: str) -> dict[str, Any]:
    """The settings in the config.json of a folder or hub id; empty if there is none."""
    from transformers import PretrainedConfig

    from armorm.backbone.model_files import CONFIG, read_object
    from armorm.hub_access import hub_if_it_answers

    if (Path(name) / CONFIG).is_file():
        return read_object(Path(name) / CONFIG, CheckpointError)
    with hub_if_it_answers(name):
        found: dict[str, Any] = PretrainedConfig.get_config_dict(name)[0]
    return found


class ArmoRMScorer:
    """A reward model of this library.

    Args:
        rm: the model.
        store: folder of a feature store to read and fill; None to store nothing.
    """

    def __init__(self, rm: ArmoRM, store: Path | None = None, batch_tokens: int = BATCH_TOKENS) -> None:
        self.rm, self.store, self.batch_tokens = rm, store, batch_tokens

    @property
    def objectives(self) -> ObjectiveSet:
        """The model's objectives."""
        return self.rm.objectives

    @property
    def margin_scale(self) -> float | None:
        """That of the model."""
        return self.rm.margin_scale

    @property
    def score_std(self) -> float | None:
        """Standard deviation of the scores of the reference data."""
        return self.rm.reference.get("score_std")

    def describe(self) -> dict[str, Any]:
        """Name, backbone with its fingerprint, dtype, fingerprint of the heads, steering."""
        from armorm.backbone.weight_bytes import weight_bytes

        digest = blake2b(digest_size=8)
        heads = {n: t for n, t in self.rm.model.state_dict().items() if not n.startswith("model.")}
        for name, tensor in sorted(heads.items()):
            digest.update(name.encode())
            for part in weight_bytes(tensor):
                digest.update(part)
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

    def score(
        self, conversations: Sequence[Conversation], compared: Iterable[Sequence[int] | np.ndarray] = ()
    ) -> Scored:
        """Scores with their columns; features that are in the store are not computed again.

        Args:
            compared: indices of responses to one prompt, which get the same prompt if it has to be truncated.
        """
        from armorm.backbone.encoding import encode_rows, same_prompts
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
        template, most = self.rm.backbone.template, limits.get("max_length")
        encoded = same_prompts(template, conversations, encoded, compared, most)
        unscored = dict(encoded.rejected)
        if not encoded.kept:
            return Scored(np.full(len(conversations), np.nan), unscored)
        backbone = self.rm.backbone
        store = FeatureStore.of(self.store, backbone) if self.store is not None else None
        features = extract(backbone, encoded.encoded, store, batch_tokens=self.batch_tokens)
        finite = np.isfinite(features.response).all(1) & np.isfinite(features.prompt[features.prompt_index]).all(1)
        features, finite_rows = features.take(np.flatnonzero(finite)), np.array(encoded.kept)[finite]
        batch = spread(self.rm.score_features(features), features.prompt_index, finite_rows, len(conversations))
        unscored |= {row: NOT_A_NUMBER for row in encoded.kept if np.isnan(batch.scores[row])}
        return Scored(
            batch.scores,
            unscored,
            tuple(encoded.truncated),
            batch,
            self.objectives,
            self.rm.transform,
            features.prompt,
            self.margin_scale,
        )


class ClassifierScorer:
    """A Hugging Face sequence classifier with one logit, on its own chat template.

    A score depends on its conversation alone: rows are padded on the right, under a mask, with an id that occurs in
    none of them, so that models that search for their padding token find the right last token. Text inside messages
    cannot forge a turn.

    Attributes:
        name: what it was loaded from.
        model, tokenizer: of transformers.
        template: its chat template.
        max_length: maximum tokens of a conversation, or None.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, max_length: int | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        from armorm.backbone.chat_template import ChatTemplate

        if getattr(model.config, "num_labels", 1) != 1:
            raise CheckpointError(f"{name}: has {model.config.num_labels} labels, expected one, the reward")
        self.name, self.model, self.tokenizer, self.batch_tokens = name, model.eval(), tokenizer, batch_tokens
        self.template: ChatTemplate = ChatTemplate(tokenizer)
        self.max_length = max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def from_pretrained(cls, name: str, *, dtype: str = "auto", device: str = "auto") -> ClassifierScorer:
        """Load a classifier.

        Raises:
            CheckpointError: if it is not a sequence classifier, or weights are missing (such as the head, which
                transformers would initialise at random).
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from armorm.backbone.decoder import Placement
        from armorm.backbone.locate import CONFIG_ERRORS
        from armorm.backbone.model_files import CONFIG, require_sound_folder

        placement = Placement.for_scores(dtype, device)
        if (Path(name) / CONFIG).is_file():
            require_sound_folder(Path(name), CheckpointError)
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=placement.load_dtype, output_loading_info=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, *CONFIG_ERRORS, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{name}: cannot be loaded as a sequence classifier: {error}") from error
        missing = sorted(str(key) for key in report["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{name}: the checkpoint lacks {', '.join(missing[:5])}, which would be initialised at random"
            )
        placement.apply(model)
        return cls(name, model, tokenizer)

    @property
    def margin_scale(self) -> float | None:
        """As of `ArmoRM.margin_scale`, from the field `armorm_calibration` of the config."""
        calibration = getattr(self.model.config, "armorm_calibration", None)
        return float(calibration["margin_scale"]) if calibration else None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer."""
        with files_together(Path(folder)) as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)

    def describe(self) -> dict[str, Any]:
        """Name, architecture, fingerprint of weights and template, dtype."""
        return {
            "name": self.name,
            "kind": "sequence classifier",
            "backbone": {
                "name": type(self.model).__name__,
                "fingerprint": self.fingerprint,
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
        }

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of weights, head included, and chat template."""
        from armorm.backbone.weight_bytes import weight_bytes

        digest = blake2b(str(self.tokenizer.chat_template).encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            for part in weight_bytes(tensor):
                digest.update(part)
        return digest.hexdigest()

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Logits; conversations over the length limit are unscored."""
        import torch

        from armorm.backbone.decoder import length_sorted_batches
        from armorm.backbone.encoding import encode_rows
        from armorm.progress import progress

        encoded = encode_rows(self.template, conversations, self.max_length, "skip")
        rows = [row.ids for row in encoded.encoded]
        scores = np.full(len(conversations), np.nan)
        lengths = [len(ids) for ids in rows]
        with progress("scores", sum(lengths), "tokens") as advance, torch.inference_mode():
            for batch in length_sorted_batches(lengths, self.batch_tokens):
                logits = self._logits([rows[i] for i in batch])
                scores[[encoded.kept[i] for i in batch]] = logits
                advance(sum(lengths[i] for i in batch))
        unscored = dict(encoded.rejected)
        for row in np.flatnonzero(~np.isfinite(scores)):
            unscored.setdefault(int(row), NOT_A_NUMBER)
            scores[row] = np.nan
        return Scored(scores, unscored, margin_scale=self.margin_scale)

    def _logits(self, batch: list[np.ndarray]) -> np.ndarray:
        import torch

        longest = max(len(ids) for ids in batch)
        pad = _unused_id(batch)
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[row, : len(tokens)] = 1
        config = self.model.config.get_text_config()
        kept, config.pad_token_id = config.pad_token_id, pad
        try:
            logits = self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
        finally:
            config.pad_token_id = kept
        return logits.reshape(len(batch), -1)[:, 0].double().cpu().numpy()


def _unused_id(batch: Sequence[np.ndarray]) -> int:
    """The lowest token id that occurs in no row."""
    used = np.unique(np.concatenate(batch))
    gaps = np.flatnonzero(used != np.arange(len(used)))
    return int(gaps[0]) if len(gaps) else len(used)
