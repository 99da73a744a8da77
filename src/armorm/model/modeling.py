"""The reward model as a Hugging Face model: backbone, regression layer, transform, gate.

In:  token ids (B, t) with their mask; the gate positions (B,), or a gate pattern in the config.
Out: `ArmoRMOutput`: rewards, gating output, score, the same score as logits (B, 1), and both features.

    hidden_state     = backbone state at the last real token           (B, d)
    prompt_embedding = backbone state at the gate position             (B, d)
    rewards          = regression_layer(hidden_state)                  (B, k)
    gating_output    = softmax(gating(prompt_embedding) / temperature) * logit_scale
    score            = sum over k of gating_output * (rewards @ reward_transform_matrix)

Tensor names are those of the released checkpoint (FIELD 3). The heads stay in float32 whatever the
backbone's dtype: they are small, and a score is a sum of differences. The attention mask decides what
is real; where none is given, pads at the ends are taken off by the config's pad id.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import ModelOutput

from armorm.embedded import EMBEDDED_BACKBONE, EMBEDDED_REWARD_MODEL, embedded_path
from armorm.errors import CheckpointError
from armorm.heads.gating import GatingNetwork
from armorm.model.configuration import ArmoRMConfig
from armorm.steering import steering_factors


@dataclass
class ArmoRMOutput(ModelOutput):
    """What a forward pass gives; B rows, k objectives, hidden size d.

    Attributes:
        logits: (B, 1), the score.
        rewards: (B, k), untransformed.
        gating_output: (B, k), gating weights times logit_scale.
        score: (B,).
        hidden_state: (B, d), response feature.
        prompt_embedding: (B, d), prompt feature.
    """

    logits: torch.Tensor = None  # type: ignore[assignment]
    rewards: torch.Tensor = None  # type: ignore[assignment]
    gating_output: torch.Tensor = None  # type: ignore[assignment]
    score: torch.Tensor = None  # type: ignore[assignment]
    hidden_state: torch.Tensor = None  # type: ignore[assignment]
    prompt_embedding: torch.Tensor = None  # type: ignore[assignment]


class ArmoRMForSequenceClassification(PreTrainedModel):
    """Interpretable reward model.

    Raises:
        CheckpointError: by `from_pretrained`, naming every tensor that is missing, unexpected or misshapen.
    """

    config_class = ArmoRMConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ["regression_layer", "gating", "reward_transform_matrix"]  # noqa: RUF012
    _no_split_modules: list[str] = []  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: ArmoRMConfig) -> None:
        super().__init__(config)
        if config.backbone_config is None:
            raise CheckpointError("the config holds no backbone_config, expected that of a decoder")
        self.model = AutoModel.from_config(config.backbone_config)
        self._build_heads(config)
        self.post_init()

    def _build_heads(self, config: ArmoRMConfig) -> None:
        d, k = config.hidden_size, len(config.objectives)
        self.regression_layer = nn.Linear(d, k, bias=config.regression_bias, dtype=torch.float32)
        self.register_buffer("reward_transform_matrix", torch.eye(k, dtype=torch.float32))
        self.steering_factors = _factors(config)
        self.gating = GatingNetwork(
            d,
            k,
            hidden_size=config.gating_hidden_dim,
            hidden_layers=config.gating_n_hidden,
            temperature=config.gating_temperature,
        )

    @classmethod
    def assemble(cls, backbone: PreTrainedModel, config: ArmoRMConfig) -> ArmoRMForSequenceClassification:
        """A model around a loaded backbone, with fresh heads; the backbone's weights are not copied."""
        with torch.device("meta"):
            model = cls(config)
        model.model = backbone
        with torch.device(backbone.device):
            model._build_heads(config)
        model.config.dtype = backbone.dtype
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *model_args: Any, **kwargs: Any
    ) -> ArmoRMForSequenceClassification:
        """Load from a folder, a hub id or an embedded name; every tensor must be there and fit.

        Args:
            kwargs: as for any transformers model; `dtype` is that of the weights by default. Only
                safetensors are read.
        """
        name = str(pretrained_model_name_or_path)
        kwargs.setdefault("dtype", "auto")
        wants_report = kwargs.pop("output_loading_info", False)
        folder = embedded_path(name)
        path: str | None = str(folder or name)
        if folder is not None:
            kwargs["state_dict"] = _embedded_state()
            kwargs.setdefault("config", ArmoRMConfig.from_pretrained(folder))
            path = None
        # Mismatched tensors are let through to the report, which names them, and refused there.
        kwargs |= {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(path, *model_args, **kwargs)
        _require_complete(name, report)
        return (model, report) if wants_report else model  # type: ignore[return-value]  # as transformers has it

    def with_config(self, config: ArmoRMConfig) -> ArmoRMForSequenceClassification:
        """The same weights under another config, such as another steering."""
        model = copy.copy(self)
        model.config = config
        model.steering_factors = _factors(config)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embeddings."""
        self.model.set_input_embeddings(value)

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        gate_positions: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ArmoRMOutput:
        """Score token ids.

        Args:
            input_ids: (B, t).
            attention_mask: (B, t), 1 for real tokens; padding on either side.
            gate_positions: (B,) index of the gate in each row; searched by the config's gate pattern if absent.

        Raises:
            ValueError: where a row holds no real token, or not the gate pattern.
        """
        mask = attention_mask if attention_mask is not None else infer_mask(input_ids, self.config.pad_token_id)
        mask = mask.to(input_ids.device).bool()
        empty = torch.nonzero(~mask.any(1)).flatten().tolist()
        if empty:
            raise ValueError(f"rows {empty} hold no real token, expected a conversation")
        if gate_positions is None:
            gate_positions = find_gate(input_ids, mask, self.config.gate_pattern)
        if position_ids is None and self._takes_positions:
            position_ids = (mask.long().cumsum(1) - 1).clamp_min(0)
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        kwargs = {name: value for name, value in kwargs.items() if name not in ("use_cache", "return_dict", "labels")}
        states = self.model(
            input_ids=input_ids, attention_mask=None if mask.all() else mask.long(), use_cache=False, **kwargs
        ).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        places = torch.arange(states.shape[1], device=mask.device)
        last = torch.where(mask, places, -1).amax(1).to(states.device)
        return self.score_features(states[rows, last], states[rows, gate_positions.to(states.device)])

    def score_features(self, hidden_state: torch.Tensor, prompt_embedding: torch.Tensor) -> ArmoRMOutput:
        """Everything after the backbone, in float32.

        Args:
            hidden_state: (B, d) response features.
            prompt_embedding: (B, d) prompt features.
        """
        with torch.autocast(hidden_state.device.type, enabled=False):
            rewards = self.regression_layer(hidden_state.float())
            factors = None if self.steering_factors is None else rewards.new_tensor(self.steering_factors)
            gating_output = self.gating(prompt_embedding.float(), factors)
            score = (gating_output * (rewards @ self.reward_transform_matrix)).sum(1)
        return ArmoRMOutput(
            logits=score[:, None],
            rewards=rewards,
            gating_output=gating_output,
            score=score,
            hidden_state=hidden_state,
            prompt_embedding=prompt_embedding,
        )


def _factors(config: ArmoRMConfig) -> list[float] | None:
    return steering_factors(config.objective_set, config.steering).tolist() if config.steering else None


def infer_mask(input_ids: torch.Tensor, pad_id: int | None) -> torch.Tensor:
    """Mask (B, t) that leaves out runs of the pad id at both ends; a pad id inside the text is text."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if pad_id is None else input_ids != pad_id
    from_left = real.long().cumsum(1) > 0
    from_right = real.flip(1).long().cumsum(1).flip(1) > 0
    return from_left & from_right


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


def _embedded_state() -> dict[str, torch.Tensor]:
    """Heads of the embedded reward model on the weights of the embedded backbone."""
    from safetensors.torch import load_file

    heads, backbone = (embedded_path(name) for name in (EMBEDDED_REWARD_MODEL, EMBEDDED_BACKBONE))
    assert heads is not None and backbone is not None
    state = {f"model.{name}": tensor for name, tensor in load_file(backbone / "model.safetensors").items()}
    return state | load_file(heads / "heads.safetensors")


def _require_complete(name: str, report: Any) -> None:
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(_described(key) for key in report.get(f"{kind}_keys", ()))
        if keys:
            faults.append(f"{kind} {', '.join(keys)}")
    if faults:
        raise CheckpointError(f"{name}: the checkpoint does not fit an armorm model: {'; '.join(faults)}")


def _described(key: Any) -> str:
    """A tensor as a load report names it: a name, or a name with the shape that was found and the one expected."""
    if isinstance(key, str):
        return key
    name, *shapes = key
    found, expected = (list(shape) for shape in shapes)
    return f"{name} (shape {found}, expected {expected})"


AutoModelForSequenceClassification.register(ArmoRMConfig, ArmoRMForSequenceClassification, exist_ok=True)
