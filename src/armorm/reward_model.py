"""The object a user holds: load a reward model, score, explain, steer, save.

In:  conversations.
Out: `ScoreBatch`: scores with everything they are made of, as numpy arrays.

    rm = ArmoRM.from_pretrained("armorm-tiny-rm")
    batch = rm.score([[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]])
    batch.scores, batch.contributions

A score does not depend on what it is batched with. Rows keep their index; a row that cannot be scored
is an error, or with `on_refused="skip"` listed with its reason, never a number.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from armorm import attribution
from armorm.backbone.decoder import Backbone, resolve_device, resolve_dtype, settle_dtype
from armorm.backbone.overflow import encode_rows
from armorm.conversation import Conversation, ConversationLike
from armorm.embedded import EMBEDDED_REWARD_MODEL, tokenizer_path
from armorm.errors import CheckpointError, ConversationError
from armorm.explanation import Explanation, explain_row
from armorm.features.extract import BATCH_TOKENS, Features, extract
from armorm.files import write_json
from armorm.model.hub import files_to_send, require_repo_id, upload
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.older_transformers import make_readable
from armorm.model.released import to_released
from armorm.model.self_contained import write_portable
from armorm.objectives import ObjectiveSet
from armorm.progress import progress
from armorm.steering import steering_settings

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class ScoreBatch:
    """Scores of n conversations over k objectives; all arrays float32 unless said otherwise.

    Attributes:
        scores: (n,), normalised if that was asked for.
        rewards: (n, k) predicted rewards, mapped scale.
        gating_weights: (n, k), each row sums to 1.
        gating_output: (n, k), weights times logit_scale.
        coefficients: (n, k), weight of each reward in the score.
        contributions: (n, k), sum over k is the (plain) score.
        relative: (n, k), contributions against a response of average rewards.
        names: (k,) objectives.
        rows: (n,) int64, index of each scored conversation in what was given.
        rejected: (index, reason) of each conversation that was not scored.
        truncated: index of each conversation that lost the beginning of its prompt to the length limit.
        uncertainty: (n, k) epistemic standard deviation, or None where the model carries none.
        quantiles: (n, k, q) of each rating, mapped scale, ascending; NaN for objectives without, None where none has.
        quantile_levels: (q,) between 0 and 1.
    """

    scores: np.ndarray
    rewards: np.ndarray
    gating_weights: np.ndarray
    gating_output: np.ndarray
    coefficients: np.ndarray
    contributions: np.ndarray
    relative: np.ndarray
    names: list[str]
    rows: np.ndarray
    rejected: list[tuple[int, str]] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    uncertainty: np.ndarray | None = None
    quantiles: np.ndarray | None = None
    quantile_levels: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def to_pandas(self) -> pandas.DataFrame:
        """One row a conversation: `score`, then `reward/X`, `weight/X`, `contribution/X` of each objective X."""
        import pandas

        columns: dict[str, np.ndarray] = {"score": self.scores}
        for label, values in (
            ("reward", self.rewards),
            ("weight", self.gating_weights),
            ("contribution", self.contributions),
        ):
            columns |= {f"{label}/{name}": values[:, i] for i, name in enumerate(self.names)}
        return pandas.DataFrame(columns, index=pandas.Index(self.rows, name="row"))


class ArmoRM:
    """An interpretable reward model.

    Attributes:
        model: the Hugging Face model.
        tokenizer: its tokenizer.
        name: what it was loaded from.
        backbone: the decoder inside the model, with its chat template.
    """

    def __init__(self, model: ArmoRMForSequenceClassification, tokenizer: Any, name: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.backbone = Backbone(name, model.model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = EMBEDDED_REWARD_MODEL,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        **kwargs: Any,
    ) -> ArmoRM:
        """Load a reward model from a folder, a hub id, or the embedded `armorm-tiny-rm`.

        Args:
            dtype: of the backbone: `auto` (bfloat16 where the hardware is fast at it), `weights` (as they are
                stored), `float32`, `bfloat16` or `float16`; heads are float32 always.
            device: `auto` (the first accelerator, else the processor), or a torch device.
            kwargs: passed on to `from_pretrained` of the model (`revision`, `device_map`, ...).

        Raises:
            CheckpointError: for a folder that holds no reward model, or an incomplete one.
        """
        from safetensors import SafetensorError
        from transformers import AutoTokenizer

        place = resolve_device(device)
        dtype = str(dtype).removeprefix("torch.")
        try:
            model = ArmoRMForSequenceClassification.from_pretrained(name, dtype=resolve_dtype(dtype, place), **kwargs)
            options = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path(str(name)) or name), **options)
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{name}: cannot be loaded as a reward model: {error}") from error
        settle_dtype(model.model, dtype, place)
        if "device_map" not in kwargs:
            model.to(place)
        return cls(model.eval(), tokenizer, str(name))

    @property
    def objectives(self) -> ObjectiveSet:
        """The k objectives, with scales: `rm.objectives.to_raw(batch.rewards)`."""
        return self.model.config.objective_set

    @property
    def reference(self) -> Mapping[str, Any]:
        """Figures of the reference data: score mean, standard deviation and quantiles, mean rewards and weights."""
        return self.model.config.reference

    def score(
        self,
        conversations: Sequence[ConversationLike],
        *,
        normalize: bool = False,
        on_refused: Literal["error", "skip"] = "error",
        batch_tokens: int = BATCH_TOKENS,
    ) -> ScoreBatch:
        """Score conversations.

        Args:
            conversations: each a list of messages that ends with the assistant's reply.
            normalize: scores in standard deviations from the reference mean.
            on_refused: what happens to a conversation that cannot be scored: an error, or an entry in `rejected`.
            batch_tokens: most tokens of a forward pass.

        Raises:
            ConversationError: naming the first conversation that cannot be scored, and why.
            CheckpointError: where scores are to be normalised and the config holds no figures for it.
        """
        if normalize:
            self._reference_score()
        limits = self.model.config.limits
        valid, rejected = validated(conversations, on_refused)
        policy = limits.get("overflow", "error")
        if policy == "error" and on_refused == "skip":
            policy = "skip"
        with progress("tokens", len(valid), "conversations") as advance:
            encoded = encode_rows(
                self.backbone.template,
                [conversation for _, conversation in valid],
                limits.get("max_length"),
                policy,
                advance,
            )
        rejected += [(valid[i][0], reason) for i, reason in encoded.rejected]
        if rejected and on_refused == "error":
            raise ConversationError(rejected[0][1], f"conversation {rejected[0][0]}")
        kept = [i for i, row in enumerate(encoded.rows) if row is not None]
        features = extract(
            self.backbone,
            [row for row in encoded.rows if row is not None],
            batch_tokens=batch_tokens,
            description="scores",
        )
        rows = np.array([valid[i][0] for i in kept], np.int64)
        batch = self.score_features(features, normalize=normalize, rows=rows, rejected=sorted(rejected))
        return replace(batch, truncated=[valid[i][0] for i in encoded.truncated])

    @torch.inference_mode()
    def score_features(
        self,
        features: Features,
        *,
        normalize: bool = False,
        rows: np.ndarray | None = None,
        rejected: Sequence[tuple[int, str]] = (),
    ) -> ScoreBatch:
        """Scores of features that are at hand already."""
        device = self.model.regression_layer.weight.device
        prompt = features.prompt[features.prompt_index]
        output = self.model.score_features(
            torch.from_numpy(features.response).to(device), torch.from_numpy(prompt).to(device)
        )
        quantiles = self.model.quantiles(output)
        rewards = output.rewards.cpu().double().numpy()
        gating_output = output.gating_output.cpu().double().numpy()
        transform = self.model.reward_transform_matrix.cpu().double().numpy()
        coefficients = attribution.coefficients(gating_output, transform)
        means = np.array(self.reference.get("reward_means") or np.zeros(rewards.shape[1]))
        scores = output.score.cpu().numpy()
        if normalize:
            mean, deviation = self._reference_score()
            scores = ((scores - mean) / deviation).astype(np.float32)
        return ScoreBatch(
            scores=scores,
            rewards=rewards.astype(np.float32),
            gating_weights=(gating_output / float(self.model.gating.logit_scale.detach())).astype(np.float32),
            gating_output=gating_output.astype(np.float32),
            coefficients=coefficients.astype(np.float32),
            contributions=attribution.contributions(coefficients, rewards).astype(np.float32),
            relative=attribution.relative(coefficients, rewards, means).astype(np.float32),
            names=self.objectives.names,
            rows=np.arange(len(scores)) if rows is None else rows,
            rejected=list(rejected),
            quantiles=None if quantiles is None else quantiles.cpu().numpy(),
            quantile_levels=tuple(self.model.config.quantiles.get("levels", ())),
        )

    def explain(self, conversation: ConversationLike) -> Explanation:
        """Take one score apart; the result prints as a table, and has `to_dict` and `to_html`."""
        return self.explanations(self.score([conversation]))[0]

    def explanations(self, batch: ScoreBatch) -> list[Explanation]:
        """Explanations of scored rows, of their plain scores."""
        return [
            explain_row(
                list(self.objectives),
                score=float(batch.contributions[i].sum()),
                rewards=batch.rewards[i],
                weights=batch.gating_weights[i],
                coefficients=batch.coefficients[i],
                contributions=batch.contributions[i],
                relative=batch.relative[i],
                reference=self.reference,
                model=self.name,
                steered=self.model.config.steering,
            )
            for i in range(len(batch))
        ]

    def steer(self, multiply: Mapping[str, float] | None = None, *, drop: str | Sequence[str] = ()) -> ArmoRM:
        """A reward model that weighs the objectives otherwise; it shares the weights and says so in its config.

        What is given counts from the gate as trained: it replaces an earlier steering.

        Args:
            multiply: factor of the gating weight of each named objective, >= 0, before renormalising.
            drop: objectives whose weight is shared out among the others.

        Raises:
            SteeringError: for dropping an objective that others are debiased against, or all of them.
        """
        config = copy.deepcopy(self.model.config)
        biases = config.debiasing.get("against", [])
        config.steering = steering_settings(self.objectives, multiply or {}, drop, biases)
        steered = copy.copy(self)
        steered.model = self.model.with_config(config)
        return steered

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        layout: Literal["armorm", "released"] = "armorm",
        self_contained: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write model, config and tokenizer; `from_pretrained` and, after `import armorm`, the Auto classes read them.

        A backbone whose float32 weights are exactly bfloat16 numbers (it was read from such) is stored as bfloat16.

        Args:
            layout: `armorm`, or `released`: the config of the published checkpoint, for code that reads that one.
            self_contained: add a remote-code file, with which machines without armorm load the model
                (`trust_remote_code=True`).
            max_shard_size: weights beyond it are split over several files.

        Raises:
            CheckpointError: for a model that the released layout has no place for, saying why.
        """
        state = self.model.state_dict()
        dtype = self.model.model.dtype
        if dtype == torch.float32 and all(_is_bfloat16(t) for name, t in state.items() if name.startswith("model.")):
            state = {name: t.bfloat16() if name.startswith("model.") else t for name, t in state.items()}
            dtype = torch.bfloat16
        config = copy.deepcopy(self.model.config)
        settings = to_released(config, dtype) if layout == "released" else None
        self.model.with_config(config).save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
        config.dtype = dtype  # transformers writes down the dtype in memory, and would read the file as that
        config.save_pretrained(folder)
        if settings is not None:
            write_json(Path(folder) / "config.json", settings)
        self.tokenizer.save_pretrained(folder)
        make_readable(Path(folder))
        if self_contained:
            write_portable(Path(folder), layout)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        dry_run: bool = False,
        **saving: Any,
    ) -> str | list[tuple[str, int]]:
        """Save and send to a repository of the Hub, as one commit; the repository is created where it does not exist.

        The card goes along: README.md of the folder that the model was loaded from, unless the model is steered.

        Args:
            private: whether a new repository is private; by default as its owner has it.
            token: by default the one that `hf auth login` keeps.
            revision: branch; by default `main`.
            dry_run: touch no network.
            saving: passed on to `save_pretrained`.

        Returns:
            the address of the commit; in a dry run, name and size in bytes of each file that would be sent.

        Raises:
            ValueError: for what cannot be the id of a repository.
            OSError: where the Hub refuses or cannot be reached.
        """
        require_repo_id(repo_id)
        with tempfile.TemporaryDirectory() as name:
            folder, card = Path(name), Path(self.name) / "README.md"
            self.save_pretrained(folder, **saving)
            if card.is_file() and not self.model.config.steering:
                shutil.copy(card, folder)
            if dry_run:
                return files_to_send(folder)
            return upload(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )

    def _reference_score(self) -> tuple[float, float]:
        """Mean and standard deviation of reference scores."""
        mean, deviation = self.reference.get("score_mean"), self.reference.get("score_std")
        if mean is None or not deviation:
            raise CheckpointError(
                f"{self.name}: found score_mean {mean} and score_std {deviation} in the config's reference, "
                "expected figures to normalise scores by"
            )
        return float(mean), float(deviation)


def _is_bfloat16(tensor: torch.Tensor) -> bool:
    return bool((tensor.bfloat16() == tensor).all())


def validated(
    conversations: Sequence[ConversationLike], on_refused: Literal["error", "skip"]
) -> tuple[list[tuple[int, Conversation]], list[tuple[int, str]]]:
    """Valid conversations with their index, and (index, reason) of the others.

    Raises:
        ConversationError: for the first invalid one, unless refused ones are skipped.
    """
    valid: list[tuple[int, Conversation]] = []
    rejected: list[tuple[int, str]] = []
    for index, messages in enumerate(conversations):
        try:
            valid.append((index, Conversation.from_messages(messages)))
        except ConversationError as error:
            if on_refused == "error":
                raise ConversationError(str(error), f"conversation {index}") from None
            rejected.append((index, str(error)))
    return valid, rejected
