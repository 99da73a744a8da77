"""`ArmoRM`: load a reward model, score, explain, compare, steer, save.

    rm = ArmoRM.from_pretrained("armorm-small-rm")
    batch = rm.score([[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]])
    batch.scores, batch.contributions

A score does not depend on the other conversations of its batch. Rows keep their index; a conversation that cannot be
scored is an error, or with `on_refused="skip"` listed with its reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from armorm import attribution
from armorm.backbone.message_forms import Reasoning, valid_reasoning
from armorm.backbone.score_input import ScoreInput, Turns, read_score_input
from armorm.conversation import Conversation, ConversationLike, several, two_responses
from armorm.data.rows import read_conversation
from armorm.data.seen_prompts import SeenPrompts
from armorm.errors import CheckpointError, ConversationError
from armorm.explain.explanation import Explanation, explain_row
from armorm.explain.model_summary import model_summary
from armorm.explain.occlusion import OccludedPart, occluded, occlusion_changes
from armorm.explain.ranking import Ranking, rank_responses
from armorm.explain.response_comparison import ResponseComparison, compare_responses
from armorm.explain.row_influences import RowInfluences, row_influences
from armorm.explain.text_spans import sentences
from armorm.explain.token_attribution import attribute_tokens, score_by_token
from armorm.features.extract import BATCH_TOKENS, Features, extract
from armorm.files import DEFAULT_REWARD_MODEL, demonstration, read_text
from armorm.heads.uncertainty import Uncertainty
from armorm.model.export import Layout, save_model, upload_saved
from armorm.model.loading import backbone_of, compute_on, load_parts
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.remote_code import UNCERTAINTY_BUFFERS
from armorm.objectives import ObjectiveSet
from armorm.progress import say
from armorm.score_batch import ScoreBatch
from armorm.steering import steering_settings, with_steering_note, without_model_index


class ArmoRM:
    """An interpretable reward model.

    Attributes:
        model: the Hugging Face model.
        tokenizer: its tokenizer.
        name: what it was loaded from.
        backbone: the decoder inside the model, with its chat template.
        seen: the prompts that it was trained on, as far as they are known.
    """

    def __init__(self, model: ArmoRMForSequenceClassification, tokenizer: Any, name: str = "") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.backbone = backbone_of(model, tokenizer, name)
        self.seen = SeenPrompts(partial=True)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_REWARD_MODEL,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        reasoning: Reasoning | None = None,
        **kwargs: Any,
    ) -> ArmoRM:
        """Load a reward model from a folder, a hub id, or one inside the package: `armorm-small-rm`, `armorm-tiny-rm`.

        Args:
            dtype: of the backbone: `auto` (bfloat16 on GPUs; on CPUs float32 up to a billion parameters, so that a
                text has one score in every command), `weights` (as they are stored), `float32`, `bfloat16` or
                `float16`; heads are float32 always.
            device: `auto` (the first accelerator, else the processor), `all`, a torch device, or several with commas
                (`cuda:0,cuda:1`), which share the work; the heads are on the first. `ray` is the cluster of
                RAY_ADDRESS, or Ray on this machine: its workers compute features, `ray:4` with four of them.
            reasoning: replies are scored with their `<think>` block (`keep`) or without it (`drop`); by default as the
                model was trained, which is `keep` unless its recipe says otherwise.
            kwargs: passed to `from_pretrained` of the model (`revision`, `device_map`, ...).

        Raises:
            CheckpointError: if there is no reward model, or an incomplete one.
        """
        model, tokenizer, seen = load_parts(name, str(dtype), "cpu" if device.startswith("ray") else device, **kwargs)
        if notice := demonstration(str(name)):
            say(notice)
        if reasoning is not None:
            model.config.limits["reasoning"] = valid_reasoning(reasoning)
        rm = cls(model, tokenizer, str(name))
        rm.seen = seen
        if "device_map" not in kwargs:
            compute_on(rm.backbone, device)
        return rm

    @property
    def objectives(self) -> ObjectiveSet:
        """The k objectives, with scales: `rm.objectives.to_raw(batch.rewards)`."""
        return self.model.config.objective_set

    @property
    def transform(self) -> np.ndarray:
        """T (k, k) float64 as it is applied, its steering included."""
        transform: np.ndarray = self.model.transform().detach().cpu().double().numpy()
        return transform

    @property
    def reference(self) -> Mapping[str, Any]:
        """Statistics of the reference data: score mean, standard deviation, quantiles, mean rewards and weights."""
        return self.model.config.reference

    @property
    def margin_scale(self) -> float | None:
        """The s > 0 with which sigmoid(s * margin) is the probability that a response is preferred, as fitted on pairs.

        None for a model that was not calibrated, or is steered: its margins are no logits.
        """
        config = self.model.config
        return None if config.steering or not config.calibration else float(config.calibration.get("margin_scale", 1))

    def score(
        self,
        conversations: Any,
        *,
        normalize: bool = False,
        lower_confidence: float = 0.0,
        on_refused: Literal["error", "skip"] = "error",
        same_prompt: bool = False,
        per_token: bool = False,
        turns: Turns = "last",
        batch_tokens: int = BATCH_TOKENS,
    ) -> ScoreBatch:
        """Score conversations.

        Args:
            conversations: a DataFrame, a Dataset, or a list; each entry a list of messages that ends with the
                assistant's reply, or an object with the columns of a row (docs/data.md).
            normalize: scores in standard deviations from the reference mean.
            lower_confidence: number of epistemic standard deviations subtracted from each score, so that a policy
                does not profit from responses unlike the rated ones; contributions stay those of the plain score.
            on_refused: for a conversation that cannot be scored: `error`, or `skip` for an entry in `rejected`.
            same_prompt: the conversations are responses to one prompt that are compared; a prompt that has to be
                truncated loses the same part for all.
            per_token: also each score as a sum over the response's tokens (`token_scores`, `token_spans`): the exact
                one where the response feature is a mean; what is read from the last token is given to the last token.
                It costs a second forward pass.
            turns: `all` scores every assistant turn after the first user turn, as if the conversation ended there:
                one row for each, with its place in the messages in `turns`. The rows of a conversation share one
                forward pass.
            batch_tokens: most tokens of a forward pass.

        Raises:
            ConversationError: naming the first conversation that cannot be scored, and why.
            CheckpointError: if scores are to be normalised or lowered and the model has no statistics for it.
        """
        if normalize:
            self._reference_score()
        given = self._read(several(conversations), on_refused=on_refused, same_prompt=same_prompt, turns=turns)
        encoded = given.encoded
        # (The turns of a conversation are computed in one pass, as far as one's tokens begin the next one's.)
        share = True if turns == "all" else None
        options: dict[str, Any] = {"batch_tokens": batch_tokens, "description": "scores", "sharing": share}
        features = extract(self.backbone, encoded.encoded, **options)
        options = {"normalize": normalize, "lower_confidence": lower_confidence, "rejected": given.rejected}
        batch = self.score_features(features, rows=given.of_kept(given.indices), **options)
        batch = replace(
            batch,
            truncated=sorted({given.indices[i] for i in encoded.truncated}),
            response_tokens=np.array([row.response_tokens for row in encoded.encoded], np.int64),
            turns=given.of_kept(given.turns) if turns == "all" else None,
        )
        finite = np.flatnonzero(np.isfinite(batch.scores))
        batch = batch.finite(on_refused)
        if not per_token:
            return batch
        kept, head = [given.conversations[encoded.kept[i]] for i in finite], self.model.regression_layer
        scale = self._reference_score()[1] if normalize else 1.0
        options = {"scale": scale, "batch_tokens": batch_tokens}
        return score_by_token(self.backbone, head, kept, [encoded.encoded[i] for i in finite], batch, **options)

    def _read(self, conversations: Any, **options: Any) -> ScoreInput:
        """Conversations and their tokens; options as in `score`."""
        return read_score_input(self.backbone.template, conversations, self.model.config.limits, **options)

    @torch.inference_mode()
    def score_features(
        self,
        features: Features,
        *,
        normalize: bool = False,
        lower_confidence: float = 0.0,
        rows: np.ndarray | None = None,
        rejected: Sequence[tuple[int, str]] = (),
    ) -> ScoreBatch:
        """Scores of features that were extracted before; arguments as in `score`."""
        device = self.model.regression_layer.weight.device
        prompt = features.prompt[features.prompt_index]
        output = self.model.score_features(
            torch.from_numpy(features.response).to(device), torch.from_numpy(prompt).to(device)
        )
        quantiles = self.model.quantiles(output)
        rewards = output.rewards.cpu().double().numpy()
        gating_output = output.gating_output.cpu().double().numpy()
        coefficients = attribution.coefficients(gating_output, self.transform)
        means = np.array(self.reference.get("reward_means") or np.zeros(rewards.shape[1]))
        scores = output.score.cpu().numpy()
        known = self.uncertainty
        uncertainty = {} if known is None else known.columns(features.response, coefficients)
        if lower_confidence:
            if not uncertainty:
                raise CheckpointError(f"{self.name}: no uncertainty to lower scores by; expected a model with it")
            scores = (scores - lower_confidence * uncertainty["score_std"]).astype(np.float32)
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
            prompt_index=features.prompt_index,
            quantiles=None if quantiles is None else quantiles.cpu().numpy(),
            quantile_levels=tuple(self.model.config.quantiles.get("levels", ())),
            **uncertainty,
        )

    @cached_property
    def uncertainty(self) -> Uncertainty | None:
        """Uncertainty of the rewards, or None for a model without."""
        settings = self.model.config.uncertainty
        if not settings:
            return None
        buffers = {name.partition("_")[2]: getattr(self.model, name).cpu().numpy() for name in UNCERTAINTY_BUFFERS}
        return Uncertainty.from_settings(settings, buffers)

    def intervals(self, batch: ScoreBatch, level: float = 0.8) -> np.ndarray:
        """Prediction intervals (n, k, 2), raw scale, that contain the share `level` of ratings by the source's raters.

        They are clipped to the objective's range (except for measured objectives); NaN for objectives with fewer than
        five levels.

        Args:
            level: 0.5, 0.8 or 0.95.

        Raises:
            CheckpointError: if the model has no intervals of that level.
        """
        known = self.uncertainty
        if known is None or level not in known.conformal or batch.predictive_std is None:
            levels = sorted(known.conformal) if known else []
            raise CheckpointError(f"{self.name}: no intervals of level {level}, expected one of {levels}")
        return known.intervals(batch.rewards, batch.predictive_std, level, self.objectives)

    def explain(
        self, conversation: Any, response: Any = None, *, tokens: bool | Literal["gradient"] = False
    ) -> Explanation:
        """Explanation of one score; prints as a table, and has `to_dict` and `to_html`.

        Args:
            conversation, response: a conversation; or a prompt and a response (as in `Conversation.from_prompt`).
            tokens: also by tokens of the response, for another forward pass; exact where the response feature is, or
                has, a mean. `gradient` attributes what is read from the last token as well, by integrated gradients (k
                passes for each of their steps), as True does for a model that reads the last token alone.
        """
        row = [conversation if response is None else Conversation.from_prompt(conversation, response)]
        return self.explanations(self.score(row), row, tokens=tokens)[0]

    def explanations(
        self,
        batch: ScoreBatch,
        conversations: Sequence[ConversationLike] = (),
        *,
        tokens: bool | Literal["gradient"] = True,
        same_prompt: bool = False,
    ) -> list[Explanation]:
        """Explanations of scored rows, of their plain scores.

        Args:
            conversations: that were scored, rejected ones included, whose texts the explanations show.
            tokens, same_prompt: as in `explain` and `score`; tokens need the conversations.
        """
        objectives, known = list(self.objectives), self.uncertainty
        options: dict[str, Any] = {
            "model": self.name,
            "steered": self.model.config.steering,
            "approximate": (known.approximate(self.objectives.names) or None) if known else None,
            "biases": self.model.config.debiasing.get("against", ()),
        }
        found = [explain_row(batch, row, objectives, self.reference, **options) for row in range(len(batch))]
        if not conversations:
            return found
        texts = [read_conversation(conversations[i]) for i in batch.rows]
        if batch.turns is not None:
            texts = [text.until(turn) for text, turn in zip(texts, batch.turns.tolist(), strict=True)]
        if not tokens:
            return [replace(shown, conversation=text) for shown, text in zip(found, texts, strict=True)]
        head, rows = self.model.regression_layer, self._read(texts, same_prompt=same_prompt).encoded.encoded
        by_token = attribute_tokens(self.backbone, head, texts, rows, batch, gradient=tokens == "gradient")
        return [
            replace(shown, tokens=parts, conversation=text)
            for shown, parts, text in zip(found, by_token, texts, strict=True)
        ]

    def occlude(
        self, conversation: ConversationLike, spans: Sequence[tuple[int, int]] | None = None
    ) -> list[OccludedPart]:
        """How the score changes without each part of the response: the slow truth, one more response per part.

        Args:
            spans: start and end in characters of each part; by default the sentences.

        Raises:
            ConversationError: for a span that is not inside the response.
        """
        whole = Conversation.from_messages(conversation)
        parts = sentences(whole.response) if spans is None else list(spans)
        without = occluded(whole, parts)
        batch = self.score([whole, *(part for part in without if part is not None)], same_prompt=True)
        return occlusion_changes(whole, parts, without, batch)

    def influences(self, conversation: ConversationLike, objective: str, run: str | Path = "") -> RowInfluences:
        """How the reward of an objective would change without each rated row, prompt and set of the training run.

        `run` is its folder, by default that of the model. A `StoreError` says what it lacks, or that it did not fit it.
        """
        column = self.objectives.position(objective)
        features = extract(self.backbone, self._read([conversation]).encoded.encoded)
        batch = self.score_features(features)
        weight = self.model.regression_layer.weight[column].detach().cpu().numpy()
        of_response = batch.rewards[0, column], batch.coefficients[0, column]
        return row_influences(run or self.name, objective, features.response[0], weight, *of_response)

    def compare(self, *compared: Any, tokens: bool | Literal["gradient"] = False) -> ResponseComparison:
        """Which of two responses to one prompt is better, and which objectives decide; prints as a table.

        Args:
            compared: two conversations, or a prompt and two responses (as in `Conversation.from_prompt`).
            tokens: also which sentences of each response carry the difference; as in `explain`.

        Raises:
            ConversationError: for two prompts, or an invalid conversation.
        """
        conversations = two_responses(*compared)
        if conversations[0].key == conversations[1].key:
            del conversations[1]
        batch = self.score(conversations, same_prompt=True)
        shown = self.explanations(batch, conversations, tokens=tokens, same_prompt=True)
        spread = self.reference.get("score_std")
        return compare_responses(shown[0], shown[-1], margin_scale=self.margin_scale, score_std=spread)

    def rank(self, prompt: Any, responses: Sequence[Any], *, tokens: bool | Literal["gradient"] = False) -> Ranking:
        """The responses to a prompt from best to worst, with the verdict between the best two; prints as a table.

        Args:
            prompt, responses: as in `Conversation.from_prompt`.
            tokens: as in `explain`.

        Raises:
            ConversationError: for no responses, or an invalid one.
        """
        if isinstance(responses, str) or not len(responses):
            raise ConversationError(f"found {responses!r}, expected a list of responses", "responses")
        conversations = [Conversation.from_prompt(prompt, r, f"responses[{i}]") for i, r in enumerate(responses)]
        batch = self.score(conversations, same_prompt=True)
        shown = self.explanations(batch, conversations, tokens=tokens, same_prompt=True)
        return rank_responses(shown, margin_scale=self.margin_scale, score_std=self.reference.get("score_std"))

    def __repr__(self) -> str:
        backbone = self.model.config.backbone_source.get("name") or type(self.backbone.model).__name__
        return f"ArmoRM({self.name!r}, {len(self.objectives)} objectives, backbone {backbone!r})"

    def _repr_html_(self) -> str:
        return model_summary(self.name, self.model.config, calibrated=self.margin_scale is not None)

    def steer(
        self,
        multiply: Mapping[str, float] | None = None,
        *,
        drop: str | Sequence[str] = (),
        pin: Mapping[str, float] | None = None,
        blend: Mapping[str, Any] | None = None,
        debias_strength: float = 1.0,
    ) -> ArmoRM:
        """A reward model with other weights of the objectives; it shares all tensors, and its config holds the changes.

        Changes are relative to the gate as trained and replace an earlier steering. A policy in a file is applied by
        `rm.steer(**armorm.steering.read_policy(path))`.

        Args:
            multiply: factor of the gating weight of each named objective, >= 0, before renormalising.
            drop: objectives whose weight is redistributed to the others.
            pin: share of the total weight, the same on every prompt, of each named objective.
            blend: `{"share": 0 to 1, "weights": {objective: weight}}`: that share of the weight that is not pinned is
                distributed by fixed weights instead of the gate's; by equal ones by default.
            debias_strength: of the transform; 0 is before debiasing, 1 as trained.

        Raises:
            SteeringError: for a number out of range, for dropping all objectives or one that others are debiased
                against, for conflicting changes to one objective.
            ObjectiveError: for an unknown objective.
        """
        config = copy.deepcopy(self.model.config)
        biases = config.debiasing.get("against", [])
        config.steering = steering_settings(
            self.objectives, multiply, drop, biases, pin=pin, blend=blend, debias_strength=debias_strength
        )
        steered = copy.copy(self)
        steered.model = self.model.with_config(config)
        return steered

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        layout: Layout = "armorm",
        self_contained: bool = False,
        heads_only: bool = False,
        max_shard_size: int | str = "5GB",
    ) -> None:
        """Write model, config and tokenizer for `from_pretrained` and, after `import armorm`, the Auto classes.

        The record of the prompts that it was trained on is written next to them.
        A backbone whose float32 weights are exactly bfloat16 numbers is stored as bfloat16.

        Args:
            layout: `armorm`, or `released`: the config of `RLHFlow/ArmoRM-Llama3-8B-v0.1`, for code that reads it.
                Steering by factors and debiasing strength is folded into the weights; other steering does not fit.
            self_contained: add a remote-code file, so that machines without armorm can load the model
                (`trust_remote_code=True`).
            heads_only: leave the backbone out; the config names it, with its hash, and loading takes it from there.
            max_shard_size: larger weights are split over several files.

        Raises:
            CheckpointError: for a model that does not fit the released layout, with the reasons.
        """
        options: dict[str, Any] = {"self_contained": self_contained, "heads_only": heads_only}
        options["max_shard_size"] = max_shard_size
        self.seen.save(Path(folder))
        save_model(self.model, self.tokenizer, Path(folder), layout=layout, **options)

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
        """Save and upload to a repository of the Hub, as one commit; a missing repository is created.

        The model card is the README.md of the folder that the model was loaded from: its front matter has the held-out
        results as a `model-index`. The card of a steered model has a note on the steering instead of them.

        Args:
            private: whether a new repository is private; by default the owner's setting.
            token: by default that of `hf auth login`.
            revision: branch; by default `main`.
            dry_run: do not use the network.
            saving: passed to `save_pretrained`.

        Returns:
            URL of the commit; in a dry run, name and size in bytes of each file that would be sent.

        Raises:
            ValueError: for an invalid repository id.
            OSError: if the Hub rejects the request or cannot be reached.
        """
        options = {"private": private, "token": token, "revision": revision, "commit_message": commit_message}
        card = Path(self.name) / "README.md"
        text, steering = read_text(card) if card.is_file() else "", self.model.config.steering
        if text:
            text = with_steering_note(without_model_index(text) if steering else text, steering)
        save = partial(self.save_pretrained, **saving)
        return upload_saved(save, repo_id, card=text, dry_run=dry_run, **options)

    def _reference_score(self) -> tuple[float, float]:
        mean, deviation = self.reference.get("score_mean"), self.reference.get("score_std")
        if mean is None or not deviation:
            found = f"found score_mean {mean} and score_std {deviation} in the config's reference"
            raise CheckpointError(f"{self.name}: {found}, expected numbers to normalise scores by")
        return float(mean), float(deviation)
