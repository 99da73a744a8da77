"""The reward model as a Hugging Face model, in one file that can be copied next to a checkpoint as its remote code.

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits

    hidden_state     = backbone state at the last real token           (B, d)
    prompt_embedding = backbone state at the gate position             (B, d)
    (or means over the tokens of response and prompt, of the state after a lower layer: the config's `readout`)
    rewards          = regression_layer(hidden_state)                  (B, k)
    gating_output    = softmax(gating(prompt_embedding) / temperature) * logit_scale
    score            = sum over k of gating_output * (rewards @ reward_transform_matrix)

It imports torch, transformers (4.51 or later) and safetensors only; armorm itself subclasses what is defined here
(`armorm.model.modeling`). It reads two layouts: a config of its own around the backbone's
(`ArmoRMForSequenceClassification`), and that of `RLHFlow/ArmoRM-Llama3-8B-v0.1`, the backbone's config with the
gate's shape added (`LlamaForRewardModelWithGating`, `Gemma2ForRewardModelWithGating`).

The heads stay in float32 whatever the backbone's dtype: they are small, and a score is a sum of differences. The
attention mask decides which tokens are real; without one, padding at the ends is found by the config's pad id.
Real tokens are moved to the left before the backbone sees them: attention is causal, so tokens to the right cannot
change earlier states, and every causal backbone, recurrent ones too, gives the same features for either padding side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
UNCERTAINTY_BUFFERS = ("uncertainty_basis", "uncertainty_eigenvalues", "uncertainty_center")
# Transformers 4 accepts parameter names only; there the transform, a buffer, keeps the dtype it was created in.
_BUFFERS = ["reward_transform_matrix", *UNCERTAINTY_BUFFERS]
_HEADS = ["regression_layer", "gating", *(["quantile_layer", *_BUFFERS] if _VERSION >= (5, 0) else [])]
# Ids from the gate to the start of the reply in the published models, whose configs do not have them.
GATE_PATTERNS = {"llama": [128009, 128006, 78191, 128007, 271], "gemma2": [107, 108, 106, 2516, 108]}
# Names of the norm after the last layer.
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm", "ln_out")


class ArmoRMConfig(PretrainedConfig):
    """Config of `ArmoRMForSequenceClassification`; fields that the model does not read are kept unchanged.

    Args:
        backbone_config: config of the decoder, as an object or a dictionary with `model_type`.
        objectives: k dictionaries, each with a `name`.
        gating_temperature, gating_hidden_dim, gating_n_hidden: shape of the gate.
        regression_bias: whether rewards have an intercept.
        gate_pattern: ids from the gate to the start of the reply.
        steering: explicit changes to the weights: `multiply`, `drop`, `pin`, `blend`, `debias_strength`.
        quantiles: `objectives` and `levels` of the quantile heads, which are loaded and saved; armorm evaluates them.
        readout: `pooling` (`last`, `mean`, `last+mean`) of the response, `prompt` (`gate`, `mean`), `normed` (whether
            the final norm is applied), `layer` and `layers` (of how many layers the backbone has the first ones);
            empty for the last token and the gate after all layers.
    """

    model_type = "armorm"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    # `Trainer.predict` returns the logits only.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "rewards", "gating_output", "score", "hidden_state", "prompt_embedding",
    ]  # fmt: skip

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        objectives: list[dict[str, Any]] | None = None,
        gating_temperature: float = 10.0,
        gating_hidden_dim: int = 1024,
        gating_n_hidden: int = 3,
        regression_bias: bool = False,
        gate_pattern: list[int] | None = None,
        steering: dict[str, Any] | None = None,
        quantiles: dict[str, Any] | None = None,
        readout: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            settings = dict(backbone_config)
            backbone_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.backbone_config = backbone_config
        self.objectives = list(objectives or [])
        self.gating_temperature = gating_temperature
        self.gating_hidden_dim = gating_hidden_dim
        self.gating_n_hidden = gating_n_hidden
        self.regression_bias = regression_bias
        self.gate_pattern = list(gate_pattern or [])
        self.steering = dict(steering or {})
        self.quantiles = dict(quantiles or {})
        self.readout = dict(readout or {})
        kwargs = {"num_labels": 1, "problem_type": "regression", "pad_token_id": None, **kwargs}
        if _VERSION < (4, 56):
            if "dtype" in kwargs:  # a field of that name would swallow the argument of `from_pretrained`
                kwargs["torch_dtype"] = kwargs.pop("dtype")
            kwargs.setdefault("tokenizer_class", "PreTrainedTokenizerFast")  # else pipelines look for no tokenizer
        super().__init__(**kwargs)


@dataclass
class ArmoRMOutput(ModelOutput):
    """Output of a forward pass: B rows, k objectives, hidden size d.

    Attributes:
        loss: mean squared error of the score against the labels, if labels are given.
        logits: (B, 1), the score.
        rewards: (B, k), untransformed.
        gating_output: (B, k), gating weights times logit_scale.
        score: (B,).
        hidden_state: (B, d), response feature; (B, 2d) of two poolings.
        prompt_embedding: (B, d), prompt feature.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor = None  # type: ignore[assignment]
    rewards: torch.Tensor = None  # type: ignore[assignment]
    gating_output: torch.Tensor = None  # type: ignore[assignment]
    score: torch.Tensor = None  # type: ignore[assignment]
    hidden_state: torch.Tensor = None  # type: ignore[assignment]
    prompt_embedding: torch.Tensor = None  # type: ignore[assignment]


class GatingNetwork(nn.Module):
    """A shallow ReLU MLP over the prompt feature that weights the objectives (arXiv 2406.12845, section 3.2).

    Its tensors are named `layers.N.weight`, `layers.N.bias`, `logit_scale`, as in the released checkpoint.

    Args:
        in_features: d.
        out_features: k.
        hidden_size, hidden_layers: width and number of hidden layers; 0 layers is a linear gate.
        temperature: divides the logits before the softmax.
        dropout: share of hidden units dropped in training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_size: int = 1024,
        hidden_layers: int = 3,
        temperature: float = 10.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [in_features, *[hidden_size] * hidden_layers, out_features]
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.float32) for a, b in pairs)
        self.logit_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.temperature = temperature
        self.dropout = dropout

    def weights(self, prompt_features: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Gating weights (n, k): non-negative, each row sums to 1.

        Args:
            factors: (k,) >= 0, multiply the weights before they are normalised; applied as logarithms, so that
                weight which vanishes in float32 is still redistributed.
        """
        hidden = prompt_features
        for layer in self.layers[:-1]:
            hidden = functional.dropout(functional.relu(layer(hidden)), self.dropout, self.training)
        logits = self.layers[-1](hidden) / self.temperature
        return torch.softmax(logits if factors is None else logits + factors.log(), dim=-1)

    def forward(self, prompt_features: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Gating output (n, k): weights times logit_scale, as released."""
        return self.weights(prompt_features, factors) * self.logit_scale


class RewardHeads(nn.Module):
    """Regression layer, transform, gate and steering: what turns a backbone's states into scores, in float32.

    Attributes:
        config: of either layout.
    """

    config: Any
    reward_transform_matrix: torch.Tensor

    def _build_heads(self, config: PretrainedConfig) -> None:
        objectives = getattr(config, "objectives", None)
        d = self._backbone_config.get_text_config().hidden_size
        k = len(objectives) if objectives else config.num_objectives
        # Created in float32: transformers 4.51 loads a tensor in the dtype that it was created in.
        bias = getattr(config, "regression_bias", False)
        wide = d * (2 if self._readout.get("pooling") == "last+mean" else 1)
        self.regression_layer = nn.Linear(wide, k, bias=bias, dtype=torch.float32)
        self.register_buffer("reward_transform_matrix", torch.eye(k, dtype=torch.float32))
        uncertainty = getattr(config, "uncertainty", None)
        if uncertainty:  # a model without it, such as the released one, has no such tensors; scores do not read them
            g, q = len(uncertainty["rows"]), uncertainty["rank"]
            for name, shape in zip(UNCERTAINTY_BUFFERS, ((g, q, wide), (g, q), (g, wide)), strict=True):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.quantile_layer = quantile_layer(config, wide)
        self.steering = steering_terms(config)
        self.gating = GatingNetwork(
            d,
            k,
            hidden_size=config.gating_hidden_dim,
            hidden_layers=config.gating_n_hidden,
            temperature=config.gating_temperature,
        )

    def _features(self, states: torch.Tensor, lasts: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Response and prompt features of states (B, t, d), as the readout says."""
        rows = torch.arange(len(states), device=states.device)
        pooling = self._readout.get("pooling", "last")
        response, prompt = states[rows, lasts], states[rows, gates]
        if pooling != "last":
            first = (gates + max(len(self.config.gate_pattern), 1)).minimum(lasts)
            mean = mean_states(states, first, lasts)
            response = mean if pooling == "mean" else torch.cat([response.float(), mean], -1)
        if self._readout.get("prompt") == "mean":
            prompt = mean_states(states, gates.clamp(max=1), gates)
        return response, prompt

    def transform(self) -> torch.Tensor:
        """T (k, k) as it is applied: as trained, or with its debiasing steered."""
        return steered_transform(self.reward_transform_matrix, self.steering[3])

    def score_features(self, hidden_state: torch.Tensor, prompt_embedding: torch.Tensor) -> ArmoRMOutput:
        """Everything after the backbone, in float32, from response and prompt features (B, d) each."""
        with torch.autocast(hidden_state.device.type, enabled=False):
            rewards = self.regression_layer(hidden_state.float())
            factors, fixed, gate_share, _ = self.steering
            gating_output = self.gating(
                prompt_embedding.float(), None if factors is None else rewards.new_tensor(factors)
            )
            if fixed is not None:
                gating_output = gate_share * gating_output + gating_output.new_tensor(fixed) * self.gating.logit_scale
            transform = self.transform().to(rewards.device)
            score = (gating_output.to(rewards.device) * (rewards @ transform)).sum(1)
        return ArmoRMOutput(
            logits=score[:, None],
            rewards=rewards,
            gating_output=gating_output,
            score=score,
            hidden_state=hidden_state,
            prompt_embedding=prompt_embedding,
        )

    @property
    def _readout(self) -> dict[str, Any]:
        return getattr(self.config, "readout", None) or {}

    @property
    def _backbone_config(self) -> PretrainedConfig:
        return getattr(self.config, "backbone_config", self.config)


class RewardModel(RewardHeads, PreTrainedModel):
    """Backbone, regression layer, transform and gate, for either layout of the config.

    `half()`, `bfloat16()`, `to(dtype)` cast the backbone only; the heads stay in float32, bit for bit.
    """

    model: Any
    base_model_prefix = "model"
    _keep_in_fp32_modules: ClassVar[list[str]] = _HEADS  # not quantised
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = _HEADS
    _no_split_modules: ClassVar[list[str]] = []
    # Saving again copies this file; transformers 4.57 forgets it for a config that it knows.
    _auto_class = "AutoModelForSequenceClassification"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    _checkpoint_error: type[Exception] = ValueError

    def __init__(self, config: PretrainedConfig) -> None:
        # One score: pipelines must not apply a softmax or a sigmoid.
        config.num_labels = 1
        config.problem_type = "regression"
        config.gate_pattern = gate_pattern(config)
        super().__init__(config)
        options = attention_options(self._backbone_config.get_text_config())
        self.model = transformers.AutoModel.from_config(self._backbone_config, **options)
        if not self._readout.get("normed", True):
            drop_final_norm(self.model, self._backbone_config.get_text_config().num_hidden_layers)
        self._build_heads(config)
        if (
            self.quantile_layer is not None and "quantile_layer" not in _HEADS
        ):  # transformers 4 wants existing ones only
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = [*_HEADS, "quantile_layer"]  # type: ignore[misc]
        self.post_init()  # type: ignore[operator]  # (transformers has no types here)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load from a folder or a hub id; every tensor must be there and fit.

        Args:
            kwargs: as for any transformers model; the default dtype is that of the backbone's weights. Only
                safetensors are read.

        Raises:
            ValueError: naming every tensor that is missing, unexpected or of another shape.
        """
        name = str(pretrained_model_name_or_path)
        wants_report = kwargs.pop("output_loading_info", False)
        dtype = next(
            (given for key in ("dtype", "torch_dtype") if (given := kwargs.pop(key, None)) is not None), "auto"
        )
        if (
            dtype == "auto" and kwargs.get("state_dict") is None
        ):  # transformers would use the config's, or the first tensor's
            dtype = stored_dtype(name, {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs})
        kwargs["dtype" if _VERSION >= (4, 56) else "torch_dtype"] = dtype
        # Mismatched tensors are let through to the report, which names them, and rejected there.
        kwargs |= {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        faults = loading_faults(report)
        if faults:
            raise cls._checkpoint_error(f"{name}: the checkpoint does not fit: {'; '.join(faults)}")
        fault = heads_fault(model.config, model.state_dict())
        if fault:
            raise cls._checkpoint_error(f"{name}: {fault}")
        return (model, report) if wants_report else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as every transformers model does; the config gets the digest that binds objectives to these heads."""
        record_heads(self.config, kwargs.get("state_dict") or self.state_dict())
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RewardModel:
        """Every move and cast of a module goes through here: heads are moved, but never cast."""

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        if recurse:
            for name, module in self.named_children():
                module._apply(fn if name == self.base_model_prefix else without_cast)
        return super()._apply(without_cast, recurse=False)

    def is_custom_code(self) -> bool:
        """Whether the backbone is custom code: transformers computes the buffers that no checkpoint holds only for its
        own classes, and would leave those of the backbone uninitialised."""
        return self.model.is_custom_code()

    def forward(
        self,
        input_ids: torch.Tensor | Mapping[str, Any],
        attention_mask: torch.Tensor | None = None,
        gate_positions: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ArmoRMOutput:
        """Score token ids.

        Args:
            input_ids: (B, t), or the mapping that a tokenizer returns. Repeated BOS at the start of a row count once
                (tokenizing text rendered by the chat template may add a second one).
            attention_mask: (B, t), 1 for real tokens; padding on either side.
            gate_positions: (B,) index of the gate in each row; by default the last match of the config's gate pattern.
            position_ids: (B, t); by default real tokens are counted from 0.
            labels: (B,) or (B, 1) target scores; the output then has a `loss`.
            return_dict: False for a plain tuple.
            kwargs: passed to the backbone, except `use_cache` and `token_type_ids`, which do not apply.

        Raises:
            ValueError: if a row has no real token, no gate pattern, or ends that may be padding or text.
        """
        if isinstance(input_ids, Mapping):
            given = {
                "attention_mask": attention_mask,
                "gate_positions": gate_positions,
                "position_ids": position_ids,
                "labels": labels,
                "return_dict": return_dict,
                **kwargs,
            }
            given = {name: value for name, value in given.items() if value is not None}
            twice = sorted(given.keys() & input_ids.keys())
            if twice:
                raise ValueError(f"{', '.join(twice)}: given in the mapping and as an argument, expected once")
            return self.forward(**input_ids, **given)
        mask = self._mask_from_ids(input_ids) if attention_mask is None else attention_mask.to(input_ids.device).bool()
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(mask.shape)}, expected the shape of ids {tuple(input_ids.shape)}")
        empty = torch.nonzero(~mask.any(1)).flatten().tolist()
        if empty:
            raise ValueError(f"rows {empty} have no real token, expected a conversation")
        if gate_positions is None:
            gate_positions = find_gate(input_ids, mask, self.config.gate_pattern)
        mask = with_one_bos(input_ids, mask, self._backbone_id("bos_token_id"))
        order, lengths, gates = to_the_left(mask, gate_positions.to(mask.device))
        real = torch.arange(order.shape[1], device=mask.device) < lengths[:, None]
        # (0 is an id of every model; the pad id may be none.)
        inputs = {"input_ids": torch.where(real, input_ids.gather(1, order), 0)}
        if position_ids is not None:
            inputs["position_ids"] = position_ids.to(mask.device).expand(input_ids.shape).gather(1, order)
        inputs |= {name: value for name, value in kwargs.items() if name not in ("use_cache", "token_type_ids")}
        states = self.model(**inputs, use_cache=False).last_hidden_state
        output = self.score_features(*self._features(states, lengths.to(states.device) - 1, gates.to(states.device)))
        if labels is not None:
            output = ArmoRMOutput(loss=functional.mse_loss(output.score, labels.to(output.score).view(-1)), **output)
        return output.to_tuple() if return_dict is False else output

    def _backbone_id(self, name: str) -> Any:
        """An id of the backbone's config, such as its `bos_token_id`; a list if there are several."""
        return getattr(self._backbone_config.get_text_config(), name, None)

    def _mask_from_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mask (B, t) by the config's pad id; ValueError if the ends of a row may as well be text."""
        pad_id, bos_id, eos_ids = self.config.pad_token_id, *map(self._backbone_id, ("bos_token_id", "eos_token_id"))
        ends = {*(eos_ids if isinstance(eos_ids, (list, tuple)) else [eos_ids]), *self.config.gate_pattern[:1]} - {None}
        rows = ambiguous_ends(input_ids, pad_id, bos_id, ends)
        if rows:
            named = "an id that ends turns, twice" if pad_id is None else f"id {pad_id}, which is both padding and text"
            raise ValueError(f"rows {rows} begin or end with {named}: padding cannot be inferred; pass attention_mask")
        return infer_mask(input_ids, pad_id)


class ArmoRMForSequenceClassification(RewardModel):
    """A reward model whose config contains its backbone's."""

    config_class = ArmoRMConfig


def __getattr__(name: str) -> Any:
    """`LlamaForRewardModelWithGating` and `Gemma2ForRewardModelWithGating`, whose configs are those of the backbone and
    the gate's shape. They are created on first use because armorm's registration may import this file while
    transformers is still importing the config of Llama."""
    family = name.removesuffix("ForRewardModelWithGating")
    if family not in ("Llama", "Gemma2"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config_class = getattr(transformers, f"{family}Config")
    globals()[name] = type(name, (RewardModel,), {"__module__": __name__, "config_class": config_class})
    return globals()[name]


def infer_mask(input_ids: torch.Tensor, pad_id: int | None) -> torch.Tensor:
    """Mask (B, t) that excludes runs of the pad id at both ends; a pad id inside the text is text."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if pad_id is None else input_ids != pad_id
    from_left = real.long().cumsum(1) > 0
    from_right = real.flip(1).long().cumsum(1).flip(1) > 0
    return from_left & from_right


def ambiguous_ends(input_ids: torch.Tensor, pad_id: int | None, bos_id: int | None, ends: set[int]) -> list[int]:
    """Rows that begin or end with what may be padding or text.

    Args:
        pad_id: the pad id; without one, callers pad with an id of `ends`, which is then repeated.
        ends: ids that end conversations or turns.
    """
    if pad_id is None:
        doubled = (input_ids[:, 1:] == input_ids[:, :-1]) & torch.isin(input_ids[:, 1:], input_ids.new_tensor([*ends]))
        doubtful = doubled[:, :1].any(1) | doubled[:, -1:].any(1)
    elif pad_id in {bos_id, *ends}:
        doubtful = (input_ids[:, [0, -1]] == pad_id).any(1)
    else:
        return []
    return torch.nonzero(doubtful).flatten().tolist()


def with_one_bos(input_ids: torch.Tensor, mask: torch.Tensor, bos_id: int | None) -> torch.Tensor:
    """The mask (B, t) with only the last of the BOS at the start of each row."""
    if bos_id is None:
        return mask
    starting = mask & ((mask & (input_ids != bos_id)).cumsum(1) == 0)
    count = starting.cumsum(1)
    return mask & ~(starting & (count < count[:, -1:]))


def to_the_left(mask: torch.Tensor, gate_positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order that moves the real tokens of each row to its beginning.

    Returns:
        indices (B, u) into t, with u the most real tokens of a row; lengths (B,); gate positions (B,) in that order.

    Raises:
        ValueError: naming the rows whose gate is not a real token.
    """
    outside = (gate_positions < 0) | (gate_positions >= mask.shape[1])
    gate = torch.where(outside, 0, gate_positions)[:, None]
    lost = torch.nonzero(outside | ~mask.gather(1, gate)[:, 0]).flatten().tolist()
    if lost:
        raise ValueError(f"rows {lost} have their gate at {gate_positions[lost].tolist()}, expected a real token")
    lengths = mask.sum(1)
    order = (~mask).long().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    return order, lengths, mask.cumsum(1).gather(1, gate)[:, 0] - 1


def find_gate(input_ids: torch.Tensor, mask: torch.Tensor, pattern: list[int]) -> torch.Tensor:
    """Start (B,) of the last match of the gate pattern among the real tokens.

    Raises:
        ValueError: naming the rows without a match and the ids that were searched.
    """
    if not pattern:
        raise ValueError("the config has no gate_pattern; pass gate_positions")
    if input_ids.shape[1] < len(pattern):
        raise ValueError(f"rows of {input_ids.shape[1]} tokens are shorter than the gate pattern {pattern}")
    wanted = torch.tensor(pattern, device=input_ids.device)
    windows = input_ids.unfold(1, len(pattern), 1)
    found = (windows == wanted).all(2) & mask.unfold(1, len(pattern), 1).all(2)
    absent = torch.nonzero(~found.any(1)).flatten().tolist()
    if absent:
        raise ValueError(
            f"rows {absent} have no gate pattern {pattern}: expected ids rendered by the model's own chat template"
        )
    return torch.where(found, torch.arange(found.shape[1], device=found.device), -1).amax(1)


def gate_pattern(config: PretrainedConfig) -> list[int]:
    """Ids from the gate to the start of the reply; in the released layout, in the field `armorm` or by model type."""
    own = (getattr(config, "armorm", None) or {}).get("gate_pattern")
    return getattr(config, "gate_pattern", None) or own or GATE_PATTERNS.get(config.model_type, [])


def attention_options(text: PretrainedConfig) -> dict[str, str]:
    """`eager` attention for backbones that sdpa computes wrongly: it omits the cap on attention logits, and before
    transformers 4.53 sliding windows too."""
    omitted = ["attn_logit_softcapping", *(["sliding_window"] if _VERSION < (4, 53) else [])]
    concerned = any(getattr(text, field, None) for field in omitted)
    return (
        {"attn_implementation": "eager"} if concerned and text._attn_implementation in (None, "sdpa", "eager") else {}
    )


def mean_states(states: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Means (n, d) float32 of states (n, t, d) over the tokens from `first` to `last` (n,), both included."""
    places = torch.arange(states.shape[1], device=states.device)
    inside = ((places >= first[:, None]) & (places <= last[:, None])).float()
    return torch.einsum("nt,ntd->nd", inside / inside.sum(1, keepdim=True), states.float())


def drop_final_norm(model: nn.Module, layers: int) -> None:
    """Remove the norm next to the list of layers, since features are read before it."""
    for module in model.modules():
        if any(isinstance(child, nn.ModuleList) and len(child) == layers for child in module.children()):
            for name in FINAL_NORMS:
                if isinstance(getattr(module, name, None), nn.Module):
                    setattr(module, name, nn.Identity())
            return


def quantile_layer(config: PretrainedConfig, d: int) -> nn.Linear | None:
    """Quantiles of the residual of each reward, objective after objective; None for a model without."""
    quantiles = getattr(config, "quantiles", None)
    if not quantiles:
        return None
    return nn.Linear(d, len(quantiles["objectives"]) * len(quantiles["levels"]), dtype=torch.float32)


def steering_terms(config: PretrainedConfig) -> tuple[list[float] | None, list[float] | None, float, float]:
    """Terms of steering: weights = fixed + share * softmax(logits + log factors), and the strength of debiasing.

    Returns:
        factors (k,) or None for the gate as trained; fixed weights (k,), which sum to 1 - share, or None; the gate's
        share, 0 to 1; the strength of debiasing, at least 0.

    Raises:
        ValueError: for unknown settings or objectives.
    """
    steering = getattr(config, "steering", None)
    if not steering:
        return None, None, 1.0, 1.0
    unknown = sorted(set(steering) - {"multiply", "drop", "pin", "blend", "debias_strength"})
    if unknown:
        raise ValueError(f"the config steers by {unknown}, which this version does not support")
    multiply, drop, pin = steering.get("multiply", {}), steering.get("drop", ()), steering.get("pin", {})
    share, weights = (steering.get("blend") or {}).get("share", 0.0), (steering.get("blend") or {}).get("weights", {})
    names = [objective["name"] for objective in config.objectives]
    unknown = sorted({*multiply, *drop, *pin, *weights} - set(names))
    if unknown:
        raise ValueError(f"the config steers objectives {unknown}, expected some of {names}")
    pinned = math.fsum(pin.values())
    rest, whole = (0.0, pinned) if pinned >= 1 - 1e-9 else (1.0 - pinned, 1.0)
    blended = rest * share / math.fsum(weights.values()) if weights else 0.0
    fixed = [pin.get(name, 0.0) / whole + blended * weights.get(name, 0.0) for name in names]
    gate_share = rest * (1.0 - share) if weights else rest
    factors = [0.0 if name in drop or name in pin else float(multiply.get(name, 1.0)) for name in names]
    return (
        factors if gate_share and set(factors) != {1.0} else None,
        fixed if any(fixed) else None,
        gate_share,
        float(steering.get("debias_strength", 1.0)),
    )


def steered_transform(transform: torch.Tensor, strength: float) -> torch.Tensor:
    """T (k, k) with every penalty times a strength; the scale of debiased rewards, which is their diagonal, stays.

    The row of a bias objective holds penalties, its diagonal too: before debiasing that is 1.
    """
    if strength == 1:
        return transform
    diagonal = transform.diagonal()
    biases = (transform != torch.diag(diagonal)).any(1) | (diagonal == 0)
    before = torch.diag(torch.where(biases, torch.ones_like(diagonal), diagonal))
    return before + strength * (transform - before)


def stored_dtype(name: str, options: dict[str, Any]) -> torch.dtype | str:
    """dtype of most of the backbone's weights in the (first) file of a checkpoint; "auto" if there is none to read."""
    options = {**options, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(name, "model.safetensors", **options)
    if file is None:
        index = cached_file(name, "model.safetensors.index.json", **options)
        if index is None:
            return "auto"
        shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        first = next((shard for key, shard in shards.items() if key.startswith("model.")), None)
        if first is None:
            return "auto"
        file = cached_file(name, first, **options)
    sizes: Counter[torch.dtype] = Counter()
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            if key.startswith("model."):
                entry = tensors.get_slice(key)
                sizes[entry[:0].dtype] += math.prod(entry.get_shape())
    return next((dtype for dtype, _ in sizes.most_common() if dtype.is_floating_point), "auto")


def heads_digest(names: list[str], state: Mapping[str, torch.Tensor]) -> str:
    """32 hex digits that bind the names of objectives, in their order, to the heads that compute them.

    Args:
        state: all tensors of the model, or its heads; they are read as float32, which heads always are.
    """
    digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16)
    for name in sorted(state):
        if name.startswith(("regression_layer.", "gating.", "reward_transform_matrix")):
            tensor = state[name].detach().cpu().float().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def record_heads(config: PretrainedConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Write the digest of heads into a config that names its objectives; one that cannot be computed is emptied."""
    own: Any = config if getattr(config, "objectives", None) else getattr(config, "armorm", None)
    objectives = own.get("objectives") if isinstance(own, dict) else getattr(own, "objectives", None)
    if not objectives:
        return
    heads = [tensor for name, tensor in state.items() if name.startswith(("regression_layer.", "gating."))]
    known = bool(heads) and not any(tensor.is_meta or not tensor.numel() for tensor in heads)
    digest = heads_digest([objective["name"] for objective in objectives], state) if known else ""
    if isinstance(own, dict):
        own["heads_digest"] = digest
    else:
        own.heads_digest = digest


def heads_fault(config: PretrainedConfig, state: Mapping[str, torch.Tensor]) -> str:
    """What is wrong with loaded heads: values that are not finite, or objectives of other heads; empty if nothing is.

    One pass over the heads, a few megabytes. A config without digest is older than the field and not compared.
    """
    heads = {name: tensor for name, tensor in state.items() if not name.startswith("model.") and not tensor.is_meta}
    for name, tensor in heads.items():
        bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
        if bad:
            return f"tensor {name} has {bad:,} values that are not finite, expected numbers"
    own = getattr(config, "armorm", None) or {}
    digest = getattr(config, "heads_digest", "") or own.get("heads_digest")
    objectives = getattr(config, "objectives", None) or own.get("objectives")
    if not (digest and objectives and "regression_layer.weight" in heads):
        return ""
    if digest == heads_digest([objective["name"] for objective in objectives], heads):
        return ""
    return (
        "config.json, field objectives: names or their order are not those that the heads were saved with "
        "(heads_digest); remove heads_digest from config.json if heads or names were changed on purpose"
    )


def loading_faults(report: Any) -> list[str]:
    """Tensors of a loading report of transformers that are missing, unexpected, or of another shape."""
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(
            key if isinstance(key, str) else f"{key[0]} (shape {list(key[1])}, expected {list(key[2])})"
            for key in report.get(f"{kind}_keys", ())
        )
        if keys:
            faults.append(f"{kind} {', '.join(keys)}")
    return faults
