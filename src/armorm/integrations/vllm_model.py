"""The reward model inside vLLM: vLLM's own decoder, with armorm's heads as its pooler.

The decoder is the one that vLLM has for the backbone's family, without its language-model head; a backbone that is read
below its last layer has fewer layers and no final norm, as in `armorm.backbone.readout`. Response and prompt features
are read by the same code as in the Hugging Face model (`RewardHeads`).

A prompt may come to the pooler in chunks. The states from the first token that a feature needs on (the gate, or the
prompt's second token for a mean over the prompt) are kept until the last chunk is there, so a score does not depend on
how a conversation was cut. A conversation with missing states (read from a cache) gets NaN, which the server answers
with an error. The gate is the last match of the gate pattern: `RewardRenderer` lets no other through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import init_vllm_registered_model

from armorm.backbone.locate import backbone_path
from armorm.backbone.model_files import WEIGHTS
from armorm.backbone.readout import FINAL_NORMS
from armorm.errors import CheckpointError
from armorm.integrations.vllm_plugin import EVERYTHING, reward_config
from armorm.model.modeling import HEADS
from armorm.model.remote_code import RewardHeads, find_gate, heads_fault

_BACKBONE = "backbone."  # prefix of weights from where the backbone is stored
_HEADS = ("regression_layer.", "gating.", "reward_transform_matrix", "quantile_layer.", "uncertainty_")


class Unnormed(nn.Module):
    """Stands for the final norm of a decoder that is read below its last layer: only adds the residual."""

    def forward(self, states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return states if residual is None else (states + residual, residual)


class ServedRewardModel(RewardHeads):
    """A reward model of either layout, for vLLM's pooling runner, task `classify`.

    Raises:
        CheckpointError: for a backbone family that vLLM does not have, or tensors that are missing.
    """

    is_pooling_model = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config = config = reward_config(model_config.hf_config)
        self.name = model_config.model
        text = model_config.hf_text_config
        family = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
        if family is None:
            raise CheckpointError(f"{self.name}: no decoder of vLLM for backbones of type {text.model_type!r}")
        decoder = init_vllm_registered_model(vllm_config, hf_config=text, architectures=[family], prefix=prefix)
        self.model: Any = getattr(decoder, "model", None)
        if self.model is None:
            raise CheckpointError(f"{self.name}: vLLM's {family} has no decoder named model, so it cannot be read")
        if not self._readout.get("normed", True):
            for norm in FINAL_NORMS:
                if hasattr(self.model, norm):
                    setattr(self.model, norm, Unnormed())
        self._build_heads(config)
        # vLLM reads the files of the first pattern that fits any: weights alone, not records stored next to them.
        self.allow_patterns_overrides = [HEADS, WEIGHTS]
        source = config.backbone_source
        self.referenced = bool(source.get("referenced"))
        if self.referenced:
            path, commit = backbone_path(source["name"], source.get("commit")), source.get("commit")
            files = {"allow_patterns_overrides": [WEIGHTS]}
            self.secondary_weights = [DefaultModelLoader.Source(path, revision=commit, prefix=_BACKBONE, **files)]
        self.pooler = RewardPooler(self.kept_from, self.gate, self.score_rows)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (t, d) of ids (t,)."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States (t, d) of the tokens of a step."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the heads, in float32, and the backbone; other tensors of the folder are ignored.

        Returns:
            names of the loaded parameters.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}
        heads: dict[str, torch.Tensor] = {}

        def backbone() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith(_HEADS):
                    heads[name] = tensor
                elif self._is_backbone(name):
                    yield name.removeprefix(_BACKBONE).removeprefix("model."), tensor

        loaded = {f"model.{name}" for name in self.model.load_weights(backbone())}
        missing, unexpected = sorted(own.keys() - heads.keys()), sorted(heads.keys() - own.keys())
        shapes = [name for name, tensor in heads.items() if name in own and tensor.shape != own[name].shape]
        if missing or unexpected or shapes:
            raise CheckpointError(
                f"{self.name}: the heads do not fit: missing {missing}, unexpected {unexpected}, other shapes {shapes}"
            )
        fault = heads_fault(self.config, heads)
        if fault:
            raise CheckpointError(f"{self.name}: {fault}")
        for name, tensor in heads.items():
            own[name].copy_(tensor)
        return loaded | heads.keys()

    def _is_backbone(self, name: str) -> bool:
        """Whether a tensor belongs to the backbone's computed layers."""
        if not name.startswith(_BACKBONE if self.referenced else "model."):
            return False
        parts = name.removeprefix(_BACKBONE).removeprefix("model.").split(".")
        if parts[0] in ("lm_head", *(() if self._readout.get("normed", True) else FINAL_NORMS)):
            return False
        layers = self.config.backbone_config.get_text_config().num_hidden_layers
        return not (parts[0] == "layers" and int(parts[1]) >= layers)

    def gate(self, ids: torch.Tensor) -> int | None:
        """Index of the gate in the ids (t,) of a whole conversation; None if there is none, as in vLLM's dry runs."""
        try:
            return int(find_gate(ids[None], torch.ones_like(ids[None], dtype=torch.bool), self.config.gate_pattern)[0])
        except ValueError:
            return None

    def kept_from(self, gate: int) -> int:
        """Index of the first token whose state is needed."""
        return 0 if self._readout.get("prompt") == "mean" else gate

    def score_rows(self, rows: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        """Score, rewards, gating weights and coefficients (n, 1 + 3k) float32.

        Args:
            rows: of each conversation the states (t, d) from `kept_from` on, and the index of the gate in them.
        """
        features = [
            self._features(states[None], *(torch.tensor([i], device=states.device) for i in (len(states) - 1, gate)))
            for states, gate in rows
        ]
        response, prompt = (torch.cat(part) for part in zip(*features, strict=True))
        output = self.score_features(response, prompt)
        weights = output.gating_output / self.gating.logit_scale
        coefficients = output.gating_output @ self.transform().T
        return torch.cat([output.score[:, None], output.rewards, weights, coefficients], 1)


class RewardPooler(Pooler):
    """Collects the states of each conversation and scores it when it is complete.

    Args:
        kept_from, gate, score: as in `ServedRewardModel`.
    """

    def __init__(
        self,
        kept_from: Callable[[int], int],
        gate: Callable[[torch.Tensor], int | None],
        score: Callable[[list[tuple[torch.Tensor, int]]], torch.Tensor],
    ) -> None:
        super().__init__()
        self._kept_from, self._gate, self._score = kept_from, gate, score

    def get_supported_tasks(self) -> set[str]:
        return {"classify"}

    def get_pooling_updates(self, task: str) -> Any:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
        """One entry per conversation of the step: None until it is complete, then its score (1,); for requests of
        `RewardProcessor` everything (1 + 3k,)."""
        cursor = pooling_metadata.get_pooling_cursor()
        counts = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        finished = cursor.get_finished_mask()
        rows: dict[int, tuple[torch.Tensor, int]] = {}
        outputs: list[torch.Tensor | None] = [None] * len(counts)
        chunks = hidden_states[: sum(counts)].split(counts)
        for i, (chunk, ids) in enumerate(zip(chunks, pooling_metadata.get_prompt_token_ids_cpu(), strict=True)):
            state, gate, begin = pooling_metadata.pooling_states[i], self._gate(ids), ends[i] - counts[i]
            if begin == 0:  # (also of a conversation that was preempted and starts again)
                state.clean()
            if gate is not None:
                start = self._kept_from(gate)
                kept = chunk[max(start - begin, 0) :]
                if len(kept):
                    # (A copy: the runner may reuse the buffer of a step.)
                    state.hidden_states_cache.append(kept if finished[i] else kept.clone())
                if finished[i] and sum(map(len, state.hidden_states_cache)) == ends[i] - start:
                    rows[i] = torch.cat(state.hidden_states_cache), gate - start
            if finished[i]:
                outputs[i] = chunk.new_full((1,), float("nan"), dtype=torch.float32)
                state.clean()
        if rows:
            for i, values in zip(rows, self._score(list(rows.values())), strict=True):
                everything = (pooling_metadata.pooling_params[i].extra_kwargs or {}).get(EVERYTHING)
                outputs[i] = values if everything else values[:1]
        return outputs
