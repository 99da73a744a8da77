"""Forward passes of a server: a prompt is computed once for all its responses, and recent prompts are cached.

Trainers request many responses to one prompt (a GRPO group), at once or one after another. If several rows of a batch
share a prompt, or a recent batch had it, its keys and values are computed once and only the responses pass through the
model behind them; all other rows are computed whole, in padded batches. Keys and values of recent prompts are cached
within a limit of bytes, from the second time a prompt appears.

Whether a model supports this is tested, not assumed: the first rows that share a prompt are computed both ways, and a
model whose features differ (because it keeps another kind of state, or adds positions to its attention in its own way)
gets whole rows from then on. Models whose rotary embedding depends on the length of the text always do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, StateReaders, length_sorted_batches, pass_tokens
from armorm.backbone.prefix_forward import sharing_fault
from armorm.backbone.readout import mean_states

# Tokens that sharing must save to be worth separate passes. A pass on an accelerator takes tens of milliseconds however
# small it is; on a CPU its time is proportional to its tokens.
MIN_SAVED_TOKENS = {"cpu": 16, "other": 1024}
_TEST_ROWS = 3  # rows that are computed both ways
_SEEN = 4096  # prompts remembered as seen once


@dataclass(frozen=True)
class _Prompt:
    """A computed prompt."""

    feature: np.ndarray  # (d,) float32
    states: list[tuple[torch.Tensor, torch.Tensor]]  # keys and values (1, heads, t, width) of each layer
    bytes: int  # of the states


class CachedForward:
    """Forward passes of one backbone with a cache of at most `max_bytes` of prompts (0: none between batches)."""

    def __init__(self, backbone: Backbone, max_bytes: int = 0, *, share: bool = True) -> None:
        self.backbone, self.max_bytes = backbone, max_bytes
        self._min_saved = MIN_SAVED_TOKENS.get(backbone.device.type, MIN_SAVED_TOKENS["other"])
        config = backbone.model.config.get_text_config()
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self._window = min((window for window in windows if window), default=None)
        self._cache: OrderedDict[bytes, _Prompt] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._bytes = 0
        self.computed, self.saved = 0, 0  # tokens that passed through the model, and that did not have to
        self.hits, self.misses = 0, 0  # prompts of batches that were in the cache, and that were not
        self._tested = False
        # Why prompts are not shared; empty if they are, or until the first test.
        self.fault = "" if share else "sharing is switched off"
        if share and _rotates_by_length(config):
            self.fault = "its rotary embedding depends on the length of the text"

    @property
    def cached(self) -> tuple[int, int]:
        """Number of cached prompts, and their bytes."""
        return len(self._cache), self._bytes

    def clear(self) -> bool:
        """Free the memory of all cached prompts; returns whether there were any."""
        had, self._bytes = bool(self._cache), 0
        self._cache.clear()
        return had

    def test_sharing(self, conversations: Sequence[EncodedConversation]) -> str:
        """Compare features behind a shared prompt with those of whole rows; returns `fault`, how they differ."""

        def shared() -> tuple[np.ndarray, np.ndarray]:
            prompt = self._compute_prompt(conversations[0])
            return np.repeat(prompt.feature[None], len(conversations), 0), self._behind(prompt, conversations)

        alone = [self.backbone.features([conversation]) for conversation in conversations]
        whole = [np.concatenate(parts) for parts in zip(*alone, strict=True)]
        self.fault = sharing_fault(shared, whole, self.backbone.model.dtype)
        self._tested = True
        return self.fault

    @torch.inference_mode()
    def features(
        self, rows: Sequence[EncodedConversation], budget: int, readers: StateReaders | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response features of rows.

        Args:
            budget: most tokens of a pass, padding and prompts included.
            readers: called with the states (t, d) float32 of the response's tokens of some rows, by index.
        """
        wanted = readers or {}
        prompt = np.empty((len(rows), self.backbone.hidden_size), np.float32)
        response = np.empty((len(rows), self.backbone.response_size), np.float32)
        alone: list[int] = []
        groups: dict[bytes, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row.prompt_key, []).append(place)
        for places in groups.values():
            group = [rows[place] for place in places]
            known = self._prompt_of(group)
            if known is None:
                alone += places
                continue
            prompt[places] = known.feature
            lengths = [len(row) for row in group]
            for some in length_sorted_batches(lengths, budget):
                at = [places[i] for i in some]
                response[at] = self._behind(known, [group[i] for i in some], _at(wanted, at))
            self.computed += sum(lengths) - len(group) * (group[0].gate_position + 1)
            self._store(group, known)  # (After its passes, which may need the memory.)
        most = pass_tokens(budget, self.backbone.device)
        for some in length_sorted_batches([len(rows[place]) for place in alone], most):
            at = [alone[i] for i in some]
            prompt[at], response[at] = self.backbone.features([rows[place] for place in at], _at(wanted, at))
            self.computed += sum(len(rows[place]) for place in at)
        return prompt, response

    def _prompt_of(self, group: Sequence[EncodedConversation]) -> _Prompt | None:
        """The prompt of a group, from the cache or computed; None if whole rows are cheaper."""
        first = group[0]
        if self.fault or (self._window is not None and max(len(row) for row in group) > self._window):
            return None
        key, size = first.prompt_key, first.gate_position + 1
        known = self._cache.get(key)
        if known is not None:
            self._cache.move_to_end(key)
            if len(group) * size < self._min_saved:
                return None
            self.saved += len(group) * size
            self.hits += 1
            return known
        self.misses += 1
        again = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        # A prompt that appears for the second time is computed separately, at no cost, for the third.
        for_later = self.max_bytes > 0 and again and size >= self._min_saved
        if (len(group) - 1) * size < self._min_saved and not for_later:
            return None
        if not self._tested and self.test_sharing(group[:_TEST_ROWS]):
            return None
        known = self._compute_prompt(first)
        self.computed += size
        self.saved += (len(group) - 1) * size
        return known

    def _store(self, group: Sequence[EncodedConversation], prompt: _Prompt) -> None:
        """Cache a prompt for later batches; the least recently used are evicted."""
        key = group[0].prompt_key
        if key in self._cache or prompt.bytes > self.max_bytes:
            return
        self._cache[key] = prompt
        self._bytes += prompt.bytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._cache.popitem(last=False)[1].bytes

    @torch.inference_mode()
    def _compute_prompt(self, row: EncodedConversation) -> _Prompt:
        """Forward pass of the tokens up to the gate position."""
        ids = torch.from_numpy(row.ids[: row.gate_position + 1].astype(np.int64))[None].to(self.backbone.device)
        cache = DynamicCache()
        output = self.backbone.model(input_ids=ids, past_key_values=cache, use_cache=True)
        states = [(layer.keys, layer.values) for layer in cache.layers]
        layers = self.backbone.model.config.get_text_config().num_hidden_layers
        if len(states) != layers or any(keys is None or keys.shape[-2] != ids.shape[1] for keys, _ in states):
            raise ValueError("this model does not keep the keys and values of every token")
        size = sum(tensor.numel() * tensor.element_size() for pair in states for tensor in pair)
        hidden = output.last_hidden_state[0].float()
        feature = hidden[min(1, len(hidden) - 1) :].mean(0) if self.backbone.readout.prompt == "mean" else hidden[-1]
        return _Prompt(feature.cpu().numpy(), states, size)

    @torch.inference_mode()
    def _behind(
        self, prompt: _Prompt, rows: Sequence[EncodedConversation], readers: StateReaders | None = None
    ) -> np.ndarray:
        """Response features of rows of one prompt: only their tokens after the gate position are computed."""
        start = rows[0].gate_position + 1
        lengths = torch.tensor([len(row) - start for row in rows])
        ids = pad_sequence([torch.from_numpy(row.ids[start:].astype(np.int64)) for row in rows], batch_first=True)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prompt.states):
            cache.update(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1), layer)
        device = self.backbone.device
        positions = torch.arange(start, start + ids.shape[1], device=device).expand(len(rows), -1)
        output: Any = self.backbone.model(
            input_ids=ids.to(device), position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden = output.last_hidden_state
        for row, read in (readers or {}).items():
            read(hidden[row, self.backbone.response_start(rows[row]) - start : len(rows[row]) - start].float())
        lasts = lengths.to(hidden.device) - 1
        last, mean = hidden[torch.arange(len(rows), device=hidden.device), lasts].float(), None
        if self.backbone.readout.pooling != "last":
            mean = mean_states(hidden, (lasts * 0 + self.backbone.header_tokens - 1).minimum(lasts), lasts)
        return self.backbone.readout.response(last, mean).cpu().numpy()


def _at(readers: StateReaders, places: Sequence[int]) -> StateReaders:
    """The readers of some rows, by index among these."""
    return {index: readers[place] for index, place in enumerate(places) if place in readers}


def _rotates_by_length(config: Any) -> bool:
    """Whether the rotary embedding of a model depends on the length of the whole text."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    several = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return any(str(one.get("rope_type", one.get("type"))) in ("dynamic", "longrope", "su") for one in several)
