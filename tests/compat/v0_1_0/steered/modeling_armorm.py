"""A reward model for machines without armorm: one file that is copied beside a checkpoint as its remote code.

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits

In:  token ids (B, t) with their mask; the gate positions (B,), or a gate pattern in the config.
Out: `ArmoRMOutput`: rewards, gating output, score, the same score as logits (B, 1), and both features.

    hidden_state     = backbone state at the last real token           (B, d)
    prompt_embedding = backbone state at the gate position             (B, d)
    rewards          = regression_layer(hidden_state)                  (B, k)
    gating_output    = softmax(gating(prompt_embedding) / temperature) * logit_scale
    score            = sum over k of gating_output * (rewards @ reward_transform_matrix)

The file needs torch, transformers (4.51 or later) and safetensors. It serves two layouts: a config of its own
around the backbone's (`ArmoRMForSequenceClassification`), and the backbone's config with the gate's shape added
(`LlamaForRewardModelWithGating`, `Gemma2ForRewardModelWithGating`). The heads stay in float32 whatever the
backbone's dtype; a checkpoint that lacks a tensor is refused. Real tokens are moved to the left before the
backbone sees them: attention is causal, so what stands right of a token cannot change it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.nn.functional import mse_loss
from transformers import AutoConfig, AutoModel, Gemma2Config, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Transformers 4 takes names of parameters only; there the transform stays in float32 since it was made so.
_UNCERTAINTY = ("uncertainty_basis", "uncertainty_eigenvalues", "uncertainty_center")
_BUFFERS = ["reward_transform_matrix", *_UNCERTAINTY]
_HEADS = ["regression_layer", "gating", *(["quantile_layer", *_BUFFERS] if _VERSION >= (5, 0) else [])]
# Ids from the gate to the start of the reply, for configs that do not say: those of the published models.
_GATE_PATTERNS = {"llama": [128009, 128006, 78191, 128007, 271], "gemma2": [107, 108, 106, 2516, 108]}


class ArmoRMConfig(PretrainedConfig):
    """Config of `ArmoRMForSequenceClassification`; what the model does not read is kept as it stands.

    Args:
        backbone_config: config of the decoder, as an object or a dictionary with `model_type`.
        objectives: k dictionaries, each with a `name`.
        gating_temperature, gating_hidden_dim, gating_n_hidden: shape of the gate.
        regression_bias: whether rewards have an intercept.
        gate_pattern: ids from the gate to the start of the reply.
        steering: `multiply`, `drop`, `pin`, `blend`, `debias_strength`: explicit changes to the weighing.
        quantiles: `objectives` and `levels` of the quantile heads, which are loaded and saved; armorm reads them out.
    """

    model_type = "armorm"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    # What `Trainer.predict` leaves out of its predictions: all but the logits.
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
        kwargs = {"num_labels": 1, "problem_type": "regression", "pad_token_id": None, **kwargs}
        if _VERSION < (4, 56):
            if "dtype" in kwargs:  # a field of that name would swallow the argument of `from_pretrained`
                kwargs["torch_dtype"] = kwargs.pop("dtype")
            kwargs.setdefault("tokenizer_class", "PreTrainedTokenizerFast")  # else pipelines look for no tokenizer
        super().__init__(**kwargs)


@dataclass
class ArmoRMOutput(ModelOutput):
    """What a forward pass gives; B rows, k objectives, hidden size d.

    Attributes:
        loss: mean squared error of the score against the labels, where labels are given.
        logits: (B, 1), the score.
        rewards: (B, k), untransformed.
        gating_output: (B, k), gating weights times logit_scale.
        score: (B,).
        hidden_state: (B, d), response feature.
        prompt_embedding: (B, d), prompt feature.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor = None  # type: ignore[assignment]
    rewards: torch.Tensor = None  # type: ignore[assignment]
    gating_output: torch.Tensor = None  # type: ignore[assignment]
    score: torch.Tensor = None  # type: ignore[assignment]
    hidden_state: torch.Tensor = None  # type: ignore[assignment]
    prompt_embedding: torch.Tensor = None  # type: ignore[assignment]


class Gate(nn.Module):
    """A ReLU MLP over the prompt feature (n, d) -> gating output (n, k): weights times logit_scale."""

    def __init__(self, sizes: list[int], temperature: float) -> None:
        super().__init__()
        pairs = zip(sizes, sizes[1:], strict=False)
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.float32) for a, b in pairs)
        self.logit_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.temperature = temperature

    def forward(self, prompt_features: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """`factors` (k,) >= 0 multiply the weights before they are normalised."""
        hidden = prompt_features
        for layer in self.layers[:-1]:
            hidden = torch.relu(layer(hidden))
        logits = self.layers[-1](hidden) / self.temperature
        return torch.softmax(logits if factors is None else logits + factors.log(), dim=-1) * self.logit_scale


class RewardModel(PreTrainedModel):
    """Backbone, regression layer, transform and gate, whatever the layout of the config.

    `half()`, `bfloat16()`, `to(dtype)` cast the backbone alone.
    """

    base_model_prefix = "model"
    _keep_in_fp32_modules: ClassVar[list[str]] = _HEADS  # what quantisers leave alone
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = _HEADS
    _no_split_modules: ClassVar[list[str]] = []
    # Saving again takes this file along; transformers 4.57 forgets it beside a config that it knows.
    _auto_class = "AutoModelForSequenceClassification"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: PretrainedConfig) -> None:
        # One score: pipelines must not apply a softmax or a sigmoid.
        config.num_labels = 1
        config.problem_type = "regression"
        config.gate_pattern = gate_pattern(config)
        super().__init__(config)
        self._backbone_config = getattr(config, "backbone_config", config)
        text = self._backbone_config.get_text_config()
        self.model = AutoModel.from_config(self._backbone_config, **attention_options(text))
        objectives = getattr(config, "objectives", None)
        d, k = text.hidden_size, len(objectives) if objectives else config.num_objectives
        # Made in float32: transformers 4.51 loads a tensor in the dtype that it was made in.
        bias = getattr(config, "regression_bias", False)
        self.regression_layer = nn.Linear(d, k, bias=bias, dtype=torch.float32)
        self.register_buffer("reward_transform_matrix", torch.eye(k, dtype=torch.float32))
        uncertainty = getattr(config, "uncertainty", None)
        if uncertainty:  # kept for the machines that read it; scores do without
            g, q = len(uncertainty["rows"]), uncertainty["rank"]
            for name, shape in zip(_UNCERTAINTY, ((g, q, d), (g, q), (g, d)), strict=True):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        quantiles = getattr(config, "quantiles", None)
        if quantiles:
            rows = len(quantiles["objectives"]) * len(quantiles["levels"])
            self.quantile_layer = nn.Linear(d, rows, dtype=torch.float32)
            if "quantile_layer" not in _HEADS:  # transformers 4 wants only what is there
                self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = [*_HEADS, "quantile_layer"]  # type: ignore[misc]
        self.weighing = weighing(config)
        self.gating = Gate([d, *[config.gating_hidden_dim] * config.gating_n_hidden, k], config.gating_temperature)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any) -> Any:
        """Load from a folder or a hub id; every tensor must be there and fit.

        Args:
            kwargs: as for any transformers model; the dtype is that of the backbone's weights by default. Only
                safetensors are read.

        Raises:
            ValueError: naming every tensor that is missing, unexpected or misshapen.
        """
        name = str(pretrained_model_name_or_path)
        wants_report = kwargs.pop("output_loading_info", False)
        dtype = next(
            (asked for key in ("dtype", "torch_dtype") if (asked := kwargs.pop(key, None)) is not None), "auto"
        )
        if dtype == "auto":  # transformers would go by the config, or by whatever tensor comes first
            dtype = stored_dtype(name, {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs})
        kwargs["dtype" if _VERSION >= (4, 56) else "torch_dtype"] = dtype
        # Mismatched tensors are let through to the report, which names them, and refused there.
        kwargs |= {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(name, *model_args, **kwargs)
        require_complete(name, report)
        return (model, report) if wants_report else model

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RewardModel:
        """Every move and cast of a module goes through here: heads are moved, and never cast."""

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        if recurse:
            for name, module in self.named_children():
                module._apply(fn if name == self.base_model_prefix else without_cast)
        return super()._apply(without_cast, recurse=False)

    def is_custom_code(self) -> bool:
        """Whether the backbone's code is: transformers asks before it computes buffers that no checkpoint holds, and
        would leave those of its own backbones as they were allocated inside a class that is not its own."""
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
            input_ids: (B, t), or the whole mapping that a tokenizer returns. BOS is taken once, however often it
                stands at the start of a row (tokenizing text that the chat template rendered may write a second one).
            attention_mask: (B, t), 1 for real tokens; padding on either side.
            gate_positions: (B,) index of the gate in each row; searched by the config's gate pattern if absent.
            position_ids: (B, t); by default real tokens are counted from 0.
            labels: (B,) or (B, 1) scores to compare with; the output then has a `loss`.
            return_dict: False for a plain tuple.
            kwargs: passed on to the backbone, but for `use_cache` and `token_type_ids`, which mean nothing here.

        Raises:
            ValueError: where a row holds no real token, not the gate pattern, or ends that may be padding or text.
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
            raise ValueError(f"rows {empty} hold no real token, expected a conversation")
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
        rows = torch.arange(len(states), device=states.device)
        output = self.score_features(states[rows, lengths.to(states.device) - 1], states[rows, gates.to(states.device)])
        if labels is not None:
            output = ArmoRMOutput(loss=mse_loss(output.score, labels.to(output.score).view(-1)), **output)
        return output.to_tuple() if return_dict is False else output

    def transform(self) -> torch.Tensor:
        """T (k, k) as it is applied: as trained, or with its debiasing steered."""
        transform, strength = self.reward_transform_matrix, self.weighing[3]
        if strength == 1:
            return transform
        identity = torch.eye(len(transform), dtype=transform.dtype, device=transform.device)
        return identity + strength * (transform - identity)

    def score_features(self, hidden_state: torch.Tensor, prompt_embedding: torch.Tensor) -> ArmoRMOutput:
        """Everything after the backbone, in float32, of response and prompt features (B, d)."""
        with torch.autocast(hidden_state.device.type, enabled=False):
            rewards = self.regression_layer(hidden_state.float())
            factors, fixed, gate_share, _ = self.weighing
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

    def _backbone_id(self, name: str) -> Any:
        """An id that the backbone's config names, such as its `bos_token_id`; a list where there are several."""
        return getattr(self._backbone_config.get_text_config(), name, None)

    def _mask_from_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mask (B, t) by the config's pad id, for callers that pass none.

        Raises:
            ValueError: where the ends of a row may as well be text.
        """
        pad_id, bos_id, eos_ids = self.config.pad_token_id, *map(self._backbone_id, ("bos_token_id", "eos_token_id"))
        ends = {*(eos_ids if isinstance(eos_ids, (list, tuple)) else [eos_ids]), *self.config.gate_pattern[:1]} - {None}
        rows = ambiguous_ends(input_ids, pad_id, bos_id, ends)
        if rows:
            named = (
                "an id that ends turns, twice" if pad_id is None else f"id {pad_id}, which pads rows and is text too"
            )
            raise ValueError(
                f"rows {rows} begin or end with {named}: what is padding cannot be told; pass attention_mask"
            )
        return infer_mask(input_ids, pad_id)


class ArmoRMForSequenceClassification(RewardModel):
    """A reward model whose config stands around its backbone's."""

    config_class = ArmoRMConfig


class LlamaForRewardModelWithGating(RewardModel):
    """A reward model on Llama, its config a Llama's with `num_objectives` and the gate's shape."""

    config_class = LlamaConfig


class Gemma2ForRewardModelWithGating(RewardModel):
    """A reward model on Gemma 2, its config a Gemma 2's with `num_objectives` and the gate's shape."""

    config_class = Gemma2Config


def infer_mask(input_ids: torch.Tensor, pad_id: int | None) -> torch.Tensor:
    """Mask (B, t) that leaves out runs of the pad id at both ends; a pad id inside the text is text."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if pad_id is None else input_ids != pad_id
    from_left = real.long().cumsum(1) > 0
    from_right = real.flip(1).long().cumsum(1).flip(1) > 0
    return from_left & from_right


def ambiguous_ends(input_ids: torch.Tensor, pad_id: int | None, bos_id: int | None, ends: set[int]) -> list[int]:
    """Rows that begin or end with what may be padding or text.

    Args:
        pad_id: the pad id; callers of a model without one pad with an id of `ends`, which then stands there twice.
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
    """The mask (B, t) without all but the last of the BOS that a row begins with."""
    if bos_id is None:
        return mask
    starting = mask & ((mask & (input_ids != bos_id)).cumsum(1) == 0)
    count = starting.cumsum(1)
    return mask & ~(starting & (count < count[:, -1:]))


def to_the_left(mask: torch.Tensor, gate_positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where to take tokens from, so that the real ones of each row stand at its beginning.

    Returns:
        order (B, u) of indices into t, u the most real tokens of a row; lengths (B,); gate positions (B,) after it.

    Raises:
        ValueError: naming the rows whose gate is not a real token.
    """
    outside = (gate_positions < 0) | (gate_positions >= mask.shape[1])
    gate = torch.where(outside, 0, gate_positions)[:, None]
    lost = torch.nonzero(outside | ~mask.gather(1, gate)[:, 0]).flatten().tolist()
    if lost:
        raise ValueError(f"rows {lost} have their gate at {gate_positions[lost].tolist()}, expected a real token there")
    lengths = mask.sum(1)
    order = (~mask).long().argsort(dim=1, stable=True)[:, : int(lengths.max())]
    return order, lengths, mask.cumsum(1).gather(1, gate)[:, 0] - 1


def find_gate(input_ids: torch.Tensor, mask: torch.Tensor, pattern: list[int]) -> torch.Tensor:
    """Start (B,) of the last match of the gate pattern among the real tokens.

    Raises:
        ValueError: naming the rows without a match and the ids that were looked for.
    """
    if not pattern:
        raise ValueError("the config has no gate_pattern; pass gate_positions")
    if input_ids.shape[1] < len(pattern):
        raise ValueError(f"rows of {input_ids.shape[1]} tokens cannot hold the gate pattern {pattern}")
    wanted = torch.tensor(pattern, device=input_ids.device)
    windows = input_ids.unfold(1, len(pattern), 1)
    found = (windows == wanted).all(2) & mask.unfold(1, len(pattern), 1).all(2)
    absent = torch.nonzero(~found.any(1)).flatten().tolist()
    if absent:
        raise ValueError(
            f"rows {absent} hold no gate pattern {pattern}: expected ids rendered by the model's own chat template"
        )
    return torch.where(found, torch.arange(found.shape[1], device=found.device), -1).amax(1)


def gate_pattern(config: PretrainedConfig) -> list[int]:
    """Ids from the gate to the start of the reply; the layout of the published models keeps them apart, if at all."""
    kept_apart = (getattr(config, "armorm", None) or {}).get("gate_pattern")
    return getattr(config, "gate_pattern", None) or kept_apart or _GATE_PATTERNS.get(config.model_type, [])


def attention_options(text: PretrainedConfig) -> dict[str, str]:
    """What lets a backbone compute attention itself where sdpa leaves something out or refuses it: the cap on its
    logits, and before transformers 4.53 windows too."""
    left_out = ["attn_logit_softcapping", *(["sliding_window"] if _VERSION < (4, 53) else [])]
    concerned = any(getattr(text, field, None) for field in left_out)
    return (
        {"attn_implementation": "eager"} if concerned and text._attn_implementation in (None, "sdpa", "eager") else {}
    )


def weighing(config: PretrainedConfig) -> tuple[list[float] | None, list[float] | None, float, float]:
    """What steering does: weights = fixed + share * softmax(logits + log factors), T' = I + strength * (T - I).

    Returns:
        factors (k,) or None, fixed weights (k,) or None, the gate's share, the strength of debiasing.
    """
    steering = getattr(config, "steering", None)
    if not steering:
        return None, None, 1.0, 1.0
    unread = sorted(set(steering) - {"multiply", "drop", "pin", "blend", "debias_strength"})
    if unread:
        raise ValueError(f"the config steers by {unread}, which this file does not know")
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


def stored_dtype(name: str, options: dict[str, Any]) -> torch.dtype | str:
    """dtype of the backbone's weights as they stand in the files; "auto" where there are none to look into."""
    options = {**options, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(name, "model.safetensors", **options)
    if file is None:
        index = cached_file(name, "model.safetensors.index.json", **options)
        if index is None:
            return "auto"
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        file = cached_file(name, next(shard for key, shard in places.items() if key.startswith("model.")), **options)
    with safe_open(file, framework="pt") as tensors:
        found = (tensors.get_slice(key)[:0].dtype for key in tensors.keys() if key.startswith("model."))  # noqa: SIM118
        return next((dtype for dtype in found if dtype.is_floating_point), "auto")


def require_complete(name: str, report: Any) -> None:
    """Refuse a checkpoint that did not fill the model, by the loading report of transformers."""
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(key if isinstance(key, str) else str(key[0]) for key in report.get(f"{kind}_keys", ()))
        if keys:
            faults.append(f"{kind} {', '.join(keys)}")
    if faults:
        raise ValueError(f"{name}: the checkpoint does not fit: {'; '.join(faults)}")
