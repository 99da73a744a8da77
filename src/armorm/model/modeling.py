"""The reward model as a Hugging Face model: backbone, regression layer, transform, gate.

In:  token ids (B, t) with their mask; the gate positions (B,), or a gate pattern in the config.
Out: `ArmoRMOutput`: rewards, gating output, score, the same score as logits (B, 1), and both features.

    hidden_state     = backbone state at the last real token           (B, d)
    prompt_embedding = backbone state at the gate position             (B, d)
    rewards          = regression_layer(hidden_state)                  (B, k)
    gating_output    = softmax(gating(prompt_embedding) / temperature) * logit_scale
    score            = sum over k of gating_output * (rewards @ reward_transform_matrix)

Steering (armorm.steering) changes gating_output and the transform by what the config says. Tensor names
are those of the released checkpoint (FIELD 3). The heads stay in float32 whatever the backbone's dtype:
they are small, and a score is a sum of differences. The attention mask decides what is real; where none is
given, pads at the ends are taken off by the config's pad id. Real tokens are moved to the left before the
backbone sees them: attention is causal, so what stands right of a token cannot change it, and every causal
backbone, recurrent ones too, gives the same features on either side of padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss
from transformers import AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils import ModelOutput

from armorm.backbone.decoder import require_decoder, settle_attention
from armorm.embedded import EMBEDDED_BACKBONE, EMBEDDED_REWARD_MODEL, embedded_path
from armorm.errors import CheckpointError
from armorm.heads.gating import GatingNetwork
from armorm.model.configuration import ArmoRMConfig
from armorm.model.padding import ambiguous_ends, find_gate, infer_mask, to_the_left, with_one_bos
from armorm.model.released import backbone_dtype, biases, is_released
from armorm.steering import weighing

# Transformers 4 takes names of parameters only; there the transform, a buffer, keeps the dtype that it was made in.
_HEADS = ["regression_layer", "gating"]
UNCERTAINTY = ("uncertainty_basis", "uncertainty_eigenvalues", "uncertainty_center")
_BUFFERS = ["reward_transform_matrix", *UNCERTAINTY]
_HEADS += ["quantile_layer", *_BUFFERS] if int(transformers_version.partition(".")[0]) >= 5 else []


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


class ArmoRMForSequenceClassification(PreTrainedModel):
    """Interpretable reward model.

    `half()`, `bfloat16()`, `to(dtype)` cast the backbone alone; the heads stay in float32, bit for bit.

    Raises:
        CheckpointError: by `from_pretrained`, naming every tensor that is missing, unexpected or misshapen.
    """

    config_class = ArmoRMConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = _HEADS
    _keep_in_fp32_modules = _HEADS  # what quantisers leave alone
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
        if (
            self.quantile_layer is not None and "quantile_layer" not in _HEADS
        ):  # transformers 4 wants only what is there
            self._keep_in_fp32_modules = self._keep_in_fp32_modules_strict = [*_HEADS, "quantile_layer"]
        self.post_init()

    def _build_heads(self, config: ArmoRMConfig) -> None:
        d, k = config.hidden_size, len(config.objectives)
        self.regression_layer = nn.Linear(d, k, bias=config.regression_bias, dtype=torch.float32)
        self.register_buffer("reward_transform_matrix", torch.eye(k, dtype=torch.float32))
        if config.uncertainty:  # a model without it, such as the released one, has no such tensors
            g, q = len(config.uncertainty["rows"]), config.uncertainty["rank"]
            for name, shape in zip(UNCERTAINTY, ((g, q, d), (g, q), (g, d)), strict=True):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float32))
        self.weighing = weighing(config.objective_set, config.steering)
        self.quantile_layer = _quantile_layer(config, d)
        self.gating = GatingNetwork(
            d,
            k,
            hidden_size=config.gating_hidden_dim,
            hidden_layers=config.gating_n_hidden,
            temperature=config.gating_temperature,
        ).float()

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> ArmoRMForSequenceClassification:
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

    @classmethod
    def assemble(cls, backbone: PreTrainedModel, config: ArmoRMConfig) -> ArmoRMForSequenceClassification:
        """A model around a loaded backbone, with fresh heads; the backbone's weights are not copied.

        Raises:
            BackboneError: for a backbone that is no decoder.
        """
        settle_attention(backbone)
        require_decoder(backbone.eval(), backbone.name_or_path or type(backbone).__name__)
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

        The released layout is read too (`armorm.model.released`), without its remote code.

        Args:
            kwargs: as for any transformers model; `dtype` is that of the weights by default. Only
                safetensors are read.
        """
        name = str(pretrained_model_name_or_path)
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", "auto"))
        wants_report = kwargs.pop("output_loading_info", False)
        folder = embedded_path(name)
        path: str | None = str(folder or name)
        if folder is not None:
            kwargs["state_dict"] = _embedded_state()
            kwargs.setdefault("config", ArmoRMConfig.from_pretrained(folder))
            path = None
        elif kwargs["dtype"] in ("auto", None) and is_released(_settings(name, kwargs)):
            # Its config claims float32 for weights in bfloat16: the weights themselves are asked.
            path = str(_local_folder(name, kwargs))
            kwargs["dtype"] = backbone_dtype(Path(path)) or "auto"
        # Mismatched tensors are let through to the report, which names them, and refused there.
        kwargs |= {"output_loading_info": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, report = super().from_pretrained(path, *model_args, **kwargs)
        _require_complete(name, report)
        settle_attention(model.model)
        if "against" not in model.config.debiasing:
            names = model.config.objective_set.names
            model.config.debiasing["against"] = biases(model.reward_transform_matrix.cpu(), names)
        return (model, report) if wants_report else model  # type: ignore[return-value]  # as transformers has it

    @torch.no_grad()
    def add_quantiles(self, objectives: list[str], levels: list[float], weight: np.ndarray, bias: np.ndarray) -> None:
        """Put quantile heads beside the score.

        Args:
            objectives: (j,) names.
            levels: (q,) ascending, between 0 and 1.
            weight: (j * q, d), of what each reward leaves open, objective after objective.
            bias: (j * q,).
        """
        self.config.quantiles = {"objectives": list(objectives), "levels": [float(level) for level in levels]}
        with torch.device(self.regression_layer.weight.device):
            self.quantile_layer = _quantile_layer(self.config, self.config.hidden_size)
        assert self.quantile_layer is not None
        self.quantile_layer.weight.copy_(torch.from_numpy(weight))
        self.quantile_layer.bias.copy_(torch.from_numpy(bias))

    def with_config(self, config: ArmoRMConfig) -> ArmoRMForSequenceClassification:
        """The same weights under another config, such as another steering."""
        model = copy.copy(self)
        model.config = config
        model.weighing = weighing(config.objective_set, config.steering)
        return model

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's token embeddings."""
        self.model.set_input_embeddings(value)

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

    def _backbone_id(self, name: str) -> Any:
        """An id that the backbone's config names, such as its `bos_token_id`; a list where there are several."""
        return getattr(self.config.backbone_config.get_text_config(), name, None)

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

    def transform(self) -> torch.Tensor:
        """T (k, k) as it is applied: as trained, or with its debiasing steered."""
        transform, strength = self.reward_transform_matrix, self.weighing[3]
        if strength == 1:
            return transform
        identity = torch.eye(len(transform), dtype=transform.dtype, device=transform.device)
        return identity + strength * (transform - identity)

    def score_features(self, hidden_state: torch.Tensor, prompt_embedding: torch.Tensor) -> ArmoRMOutput:
        """Everything after the backbone, in float32.

        Args:
            hidden_state: (B, d) response features.
            prompt_embedding: (B, d) prompt features.
        """
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

    def quantiles(self, output: ArmoRMOutput) -> torch.Tensor | None:
        """Quantiles (B, k, q) of the rating of each objective, mapped scale, ascending along the last axis.

        They stand beside the score and change nothing in it. NaN for objectives without quantile heads; None for a
        model without any.
        """
        if self.quantile_layer is None:
            return None
        settings, names = self.config.quantiles, self.config.objective_set.names
        columns = [names.index(name) for name in settings["objectives"]]
        with torch.autocast(output.hidden_state.device.type, enabled=False):
            left_open = self.quantile_layer(output.hidden_state.float()).to(output.rewards.device)
        rewards, q = output.rewards, len(settings["levels"])
        result = rewards.new_full((*rewards.shape, q), float("nan"))
        result[:, columns] = (rewards[:, columns, None] + left_open.view(len(rewards), -1, q)).sort(-1).values
        return result


def _quantile_layer(config: ArmoRMConfig, d: int) -> nn.Linear | None:
    """Quantiles of what each reward leaves open, objective after objective; None for a model without."""
    if not config.quantiles:
        return None
    rows = len(config.quantiles["objectives"]) * len(config.quantiles["levels"])
    return nn.Linear(d, rows, dtype=torch.float32)


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def _settings(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config.json holds, as it stands there."""
    hub = {key: kwargs[key] for key in (*_HUB_ARGUMENTS, "subfolder") if key in kwargs}
    return PretrainedConfig.get_config_dict(name, **hub)[0]


def _local_folder(name: str, kwargs: dict[str, Any]) -> Path:
    """The folder of a checkpoint; one on the hub is downloaded whole, as loading it would."""
    from huggingface_hub import snapshot_download

    folder = Path(name)
    if not folder.is_dir():
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"], **hub))
    return folder / kwargs.get("subfolder", "")


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
