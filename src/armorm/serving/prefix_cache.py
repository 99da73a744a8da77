"""The forward pass of a server: a prompt is computed once for all the responses that come to it.

In:  encoded conversations of one batch, in any order; what was computed for earlier batches.
Out: their prompt features (n, d) and response features (n, d), float32.

Trainers ask for many responses to one prompt (a group of GRPO), all at once or one after another. Where several rows
of a batch share a prompt, or a recent batch had it, the prompt's keys and values are computed once and the responses
alone go through the model behind them; all other rows go through it whole, in a padded batch. The keys and values of
recent prompts are kept within a limit of bytes; a prompt that comes once is never kept.

What a model does with positions and states is its own affair, so nothing is taken on trust: the first rows that
share a prompt are computed both ways, and a model for which the two differ (one that keeps another kind of state, or
adds positions to its attention in a way of its own) gets whole rows from then on. So does, from the start, a model
whose rotations change with the length of the text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, length_sorted_batches
from armorm.backbone.prefix_forward import sharing_fault

# Tokens that sharing must save to be worth passes of its own. An accelerator's pass takes tens of milliseconds however
# little goes through it; a processor's takes as long as its tokens.
WORTH = {"cpu": 16, "other": 1024}
_TRIED = 3  # rows that are computed both ways
_SEEN = 4096  # prompts whose first coming is remembered


@dataclass(frozen=True)
class _Prompt:
    """What is kept of a prompt.

    Attributes:
        feature: (d,) float32.
        states: keys and values (1, heads, t, width) of each layer.
        bytes: that they take.
    """

    feature: np.ndarray
    states: list[tuple[torch.Tensor, torch.Tensor]]
    bytes: int


class Forward:
    """Forward passes of one backbone, and the prompts they met lately.

    Args:
        max_bytes: most bytes of kept prompts, 0 to keep none between batches.
        share: False for whole rows always.

    Attributes:
        refusal: why prompts are not shared; empty where they are, or until that is known.
        computed, spared: tokens that went through the model, and that did not have to.
        hits, misses: prompts of batches that were kept from earlier ones, and that were not.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = 0, *, share: bool = True) -> None:
        self.backbone, self.max_bytes = backbone, max_bytes
        self._worth = WORTH.get(backbone.device.type, WORTH["other"])
        config = backbone.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self._window = min((window for window in windows if window), default=None)
        self._kept: OrderedDict[bytes, _Prompt] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._bytes = 0
        self.computed, self.spared = 0, 0
        self.hits, self.misses = 0, 0
        self._tried = False
        self.refusal = "" if share else "it was told not to"
        if share and _turns_with_length(config):
            self.refusal = "its rotations change with the length of the text"

    @property
    def kept(self) -> tuple[int, int]:
        """Kept prompts, and their bytes."""
        return len(self._kept), self._bytes

    def forget(self) -> bool:
        """Give back the memory of all kept prompts; whether there were any."""
        had = bool(self._kept)
        self._kept.clear()
        self._bytes = 0
        return had

    def try_out(self, conversations: Sequence[EncodedConversation]) -> str:
        """Compare shared passes with whole ones; where they differ, whole rows are computed from now on.

        Args:
            conversations: of one prompt.

        Returns:
            why prompts are not shared; empty where they are.
        """
        alone = [self.backbone.features([conversation]) for conversation in conversations]

        def shared() -> tuple[np.ndarray, np.ndarray]:
            prompt = self._prompt(conversations[0])
            return np.repeat(prompt.feature[None], len(conversations), 0), self._behind(prompt, conversations)

        whole = [np.concatenate(parts) for parts in zip(*alone, strict=True)]
        self.refusal = sharing_fault(shared, whole, self.backbone.model.dtype)
        self._tried = True
        return self.refusal

    @torch.inference_mode()
    def features(self, rows: Sequence[EncodedConversation], budget: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response features of rows, in order.

        Args:
            budget: most tokens of a pass, padding and kept prompts included.
        """
        prompt = np.empty((len(rows), self.backbone.hidden_size), np.float32)
        response = np.empty_like(prompt)
        alone: list[int] = []
        for places in self._groups(rows):
            group = [rows[place] for place in places]
            known = self._known(group)
            if known is None:
                alone += places
                continue
            prompt[places] = known.feature
            lengths = [len(row) for row in group]
            for some in length_sorted_batches(lengths, budget):
                response[[places[i] for i in some]] = self._behind(known, [group[i] for i in some])
            self.computed += sum(lengths) - len(group) * (group[0].gate_position + 1)
            self._keep(group, known)  # (Not before its passes went well: they may need the memory.)
        for some in length_sorted_batches([len(rows[place]) for place in alone], budget):
            at = [alone[i] for i in some]
            prompt[at], response[at] = self.backbone.features([rows[place] for place in at])
            self.computed += sum(len(rows[place]) for place in at)
        return prompt, response

    def _groups(self, rows: Sequence[EncodedConversation]) -> list[list[int]]:
        """Places of the rows of each prompt."""
        groups: dict[bytes, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row.prompt_key, []).append(place)
        return list(groups.values())

    def _known(self, group: Sequence[EncodedConversation]) -> _Prompt | None:
        """A group's prompt, computed if that pays; None where whole rows are better."""
        first = group[0]
        if self.refusal or (self._window is not None and max(len(row) for row in group) > self._window):
            return None
        key, size = first.prompt_key, first.gate_position + 1
        known = self._kept.get(key)
        if known is not None:
            self._kept.move_to_end(key)
            if len(group) * size < self._worth:
                return None
            self.spared += len(group) * size
            self.hits += 1
            return known
        self.misses += 1
        again = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        # (The second time that a prompt comes alone it is computed apart, which costs nothing, for the third.)
        later = self.max_bytes > 0 and again and size >= self._worth
        if (len(group) - 1) * size < self._worth and not later:
            return None
        if not self._tried and self.try_out(group[:_TRIED]):
            return None
        known = self._prompt(first)
        self.computed += size
        self.spared += (len(group) - 1) * size
        return known

    def _keep(self, group: Sequence[EncodedConversation], prompt: _Prompt) -> None:
        """Keep a prompt for later batches; the longest unused give way."""
        key = group[0].prompt_key
        if key in self._kept or prompt.bytes > self.max_bytes:
            return
        self._kept[key] = prompt
        self._bytes += prompt.bytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].bytes

    @torch.inference_mode()
    def _prompt(self, row: EncodedConversation) -> _Prompt:
        """Pass of the tokens up to the gate."""
        ids = torch.from_numpy(row.ids[: row.gate_position + 1].astype(np.int64))[None].to(self.backbone.device)
        cache = DynamicCache()
        output = self.backbone.model(input_ids=ids, past_key_values=cache, use_cache=True)
        states = [(layer.keys, layer.values) for layer in cache.layers]
        layers = self.backbone.model.config.get_text_config().num_hidden_layers
        if len(states) != layers or any(keys is None or keys.shape[-2] != ids.shape[1] for keys, _ in states):
            raise ValueError("this model does not keep the keys and values of every token")
        size = sum(tensor.numel() * tensor.element_size() for pair in states for tensor in pair)
        return _Prompt(output.last_hidden_state[0, -1].float().cpu().numpy(), states, size)

    @torch.inference_mode()
    def _behind(self, prompt: _Prompt, rows: Sequence[EncodedConversation]) -> np.ndarray:
        """Response features of rows of one prompt: their tokens behind the gate go through the model."""
        start = rows[0].gate_position + 1
        lengths = torch.tensor([len(row) - start for row in rows])
        ids = torch.zeros((len(rows), int(lengths.max())), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row) - start] = torch.from_numpy(row.ids[start:].astype(np.int64))
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prompt.states):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        device = self.backbone.device
        positions = torch.arange(start, start + ids.shape[1], device=device).expand(len(rows), -1)
        output: Any = self.backbone.model(
            input_ids=ids.to(device), position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden = output.last_hidden_state
        last = hidden[torch.arange(len(rows), device=hidden.device), lengths.to(hidden.device) - 1]
        features: np.ndarray = last.float().cpu().numpy()
        return features


def _turns_with_length(config: Any) -> bool:
    """Whether a model rotates its queries and keys by angles that depend on the length of the whole text."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return any(str(one.get("rope_type", one.get("type"))) in ("dynamic", "longrope", "su") for one in several)
