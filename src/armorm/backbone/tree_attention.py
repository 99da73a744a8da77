"""Attention over a prefix tree, for any model that takes its attention from transformers' registry.

In:  queries, keys and values of one stream of tokens, and the `PrefixTree` it was laid out by.
Out: what each token gets from attending to itself and to the tokens before it in its own conversation.

On a processor the stream is cut into blocks of queries. All that the queries of a block can see are the
ancestors of its first token and the block itself, because the descendants of a token stand together. Blocks with
about as many ancestors are computed together: keys and values gathered, then torch's fused attention under a mask.
Work then follows what the conversations ask for rather than the square
of the stream. The block is as long as makes the least work: short where conversations are short, long where many
keys are gathered for each block. On a GPU the same rule is the mask of `flex_attention`.

Sliding windows and caps on the logits are done here; a model that hands its attention anything else (sinks, biases
of positions) raises `UnsupportedAttentionError` and is computed without sharing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from armorm.backbone.prefix_tree import PrefixTree

NAME = "armorm_prefix_tree"
BLOCK_SIZES = (32, 64, 128)
STREAM_MULTIPLE = BLOCK_SIZES[-1]
_KEYS = 4096  # gathered for one chunk, unless a single block has more: a few megabytes
# Cost of a score by the size of its block, of gathering a key and its value for one head, and of one chunk (nanoseconds
# on two cores with AVX2; only their ratios matter, and only for the choice of the block).
_SCORE_COST = {32: 3.3, 64: 2.6, 128: 2.3}
_GATHER_COST, _CHUNK_COST = 10.0, 60_000.0
_IGNORED = {"dropout", "is_causal", "position_ids", "position_embeddings", "output_attentions", "use_cache", "cache"}
_IGNORED |= {"past_key_values", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position"}
_TREE: ContextVar[TreeAttention | None] = ContextVar("tree", default=None)


class UnsupportedAttentionError(ValueError):
    """A model whose attention needs something that a prefix tree cannot give it."""


@dataclass(frozen=True)
class _Chunk:
    """Blocks with about as many ancestors, computed together: G blocks of Q queries, K keys.

    Attributes:
        start, stop: places of the blocks in the order of computing.
        keys: (G * K,) stream indices of the keys.
        bias: (G, 1, Q, K), 0 where a key is visible, else the least number.
    """

    start: int
    stop: int
    keys: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True)
class _Blocks:
    size: int
    order: torch.Tensor
    chunks: list[_Chunk]


class TreeAttention:
    """Attention of one stream.

    Args:
        tree: its length a multiple of the largest block.
    """

    def __init__(self, tree: PrefixTree) -> None:
        if len(tree) % STREAM_MULTIPLE:
            raise ValueError(f"a stream of {len(tree)} tokens, expected a multiple of {STREAM_MULTIPLE}")
        self.tree = tree
        self._ancestors = [tree.ancestors(token) for token in range(0, len(tree), BLOCK_SIZES[0])]
        self._blocks: dict[tuple, _Blocks] = {}
        self._masks: dict[tuple, Any] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention output (1, t, heads, d_v) of query (1, heads, t, d), key (1, kv_heads, t, d), value (.., d_v)."""
        if window is not None and window > self.tree.positions.max():
            window = None
        if query.device.type == "cuda":
            return self._flex(query, key, value, scaling, window, softcap)
        return self._blockwise(query, key, value, scaling, window, softcap)

    def _blockwise(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        heads, t, d = query.shape[1:]
        kv_heads, d_v = key.shape[1], value.shape[3]
        blocks = self._plan(heads, kv_heads, window, query.dtype, query.device)
        size, count = blocks.size, t // blocks.size
        # (Token by token, heads inside: rows to gather are long, and projections lie in memory that way.)
        q = query[0].transpose(0, 1).reshape(count, size, heads, d)[blocks.order].transpose(1, 2)
        k, v = (part[0].transpose(0, 1).reshape(t, -1) for part in (key, value))
        out = query.new_empty(count, size, heads, d_v)
        for chunk in blocks.chunks:
            shape = (chunk.stop - chunk.start, chunk.bias.shape[3], kv_heads, -1)
            seen, given = (part.index_select(0, chunk.keys).view(shape).transpose(1, 2) for part in (k, v))
            attended = _attend_block(q[chunk.start : chunk.stop], seen, given, chunk.bias, scaling, softcap)
            out[blocks.order[chunk.start : chunk.stop]] = attended.transpose(1, 2)
        return out.view(1, t, heads, d_v)

    def _plan(self, heads: int, kv_heads: int, window: int | None, dtype: torch.dtype, device: torch.device) -> _Blocks:
        """Which blocks are computed together; the same for every layer of one shape."""
        key = (heads, kv_heads, window, dtype, device)
        if key not in self._blocks:
            size = min(BLOCK_SIZES, key=lambda size: self._cost(size, heads, kv_heads))
            self._blocks[key] = self._cut(size, heads, kv_heads, window, dtype, device)
        return self._blocks[key]

    def _widths(self, size: int) -> np.ndarray:
        """Keys of each block, rounded up."""
        first = self._ancestors[:: size // BLOCK_SIZES[0]]
        return np.array([_rounded(len(ancestors)) + size for ancestors in first])

    def _cost(self, size: int, heads: int, kv_heads: int) -> float:
        widths = self._widths(size)
        keys = widths.sum()
        return (
            keys * size * heads * _SCORE_COST[size]
            + keys * kv_heads * _GATHER_COST
            + max(len(np.unique(widths)), keys / _KEYS) * _CHUNK_COST
        )

    def _cut(
        self, size: int, heads: int, kv_heads: int, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> _Blocks:
        ends, positions = self.tree.ends, self.tree.positions
        widths = self._widths(size)
        order = np.argsort(widths, kind="stable")
        chunks = []
        start = 0
        while start < len(order):
            width = int(widths[order[start]])
            stop = min(
                int(np.searchsorted(widths[order], width, side="right")),
                start + max(1, _KEYS // width),
            )
            blocks = order[start:stop]
            keys = np.zeros((len(blocks), width), np.int64)
            real = np.zeros(keys.shape, bool)
            real[:, width - size :] = True
            keys[:, width - size :] = blocks[:, None] * size + np.arange(size)
            for row, block in enumerate(blocks):
                ancestors = self._ancestors[block * size // BLOCK_SIZES[0]]
                keys[row, : len(ancestors)] = ancestors
                real[row, : len(ancestors)] = True
            queries = (blocks[:, None] * size + np.arange(size))[:, :, None]
            seen = keys[:, None, :]
            visible = real[:, None, :] & (seen <= queries) & (queries < ends[seen])
            if window is not None:
                visible &= positions[queries] - positions[seen] < window
            bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(
                torch.from_numpy(~visible), torch.finfo(dtype).min
            )
            chunks.append(_Chunk(start, stop, torch.from_numpy(keys.reshape(-1)).to(device), bias[:, None].to(device)))
            start = stop
        return _Blocks(size, torch.from_numpy(order).to(device), chunks)

    def _flex(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        device = query.device
        name = (window, device)
        if name not in self._masks:
            self._masks[name] = self.block_mask(window, device)

        def capped(score: torch.Tensor, batch: Any, head: Any, q: Any, k: Any) -> torch.Tensor:
            assert softcap is not None
            return softcap * torch.tanh(score / softcap)

        attention = _flex_attention(device.type)
        out = attention(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=self._masks[name],
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """The mask of `flex_attention`: which blocks of keys a block of queries sees in part, and which as a whole.

        A block of earlier keys is seen by some query if one of its tokens has the first query below it, and by every
        query if all of its tokens have the last one below them. (Under a window every block is looked into.)
        """
        from torch.nn.attention.flex_attention import BlockMask

        size = STREAM_MULTIPLE
        ends = torch.from_numpy(self.tree.ends).to(device)
        positions = torch.from_numpy(self.tree.positions).to(device)

        def visible(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            seen = (k <= q) & (q < ends[k])
            return seen if window is None else seen & (positions[q] - positions[k] < window)

        by_block = self.tree.ends.reshape(-1, size)
        first = np.arange(len(by_block)) * size
        earlier = first[:, None] > first[None, :]
        whole = earlier & (by_block.min(1)[None, :] >= first[:, None] + size) & (window is None)
        part = (earlier & (by_block.max(1)[None, :] > first[:, None]) & ~whole) | np.eye(len(by_block), dtype=bool)
        partly, wholly = (_counts_and_places(blocks, device) for blocks in (part, whole))
        return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=size, mask_mod=visible)


def _counts_and_places(blocks: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of a mask of blocks, how many are seen, and where they are, those first."""
    counts, places = blocks.sum(1), np.argsort(~blocks, 1, kind="stable")
    first, second = (torch.from_numpy(array.astype(np.int32))[None, None].to(device) for array in (counts, places))
    return first, second


def _attend_block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention (G, heads, Q, d_v) of G blocks: query (G, heads, Q, d), key (G, kv_heads, K, d), bias (G, 1, Q, K)."""
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    return (scores + bias).softmax(-1) @ value


def _rounded(ancestors: int) -> int:
    """A few widths rather than many, so that blocks can be computed together; an eighth more at most, or 31 keys."""
    step = max(32, 1 << max(0, (ancestors - 1).bit_length() - 3))
    return -(-ancestors // step) * step


@cache
def _flex_attention(device: str) -> Any:
    """Compiled where that pays; without compilation it computes the whole square, for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


# An operator of its own, so that a compiled layer stays in one piece: the present tree is no argument of the layer.
@torch.library.custom_op("armorm::tree_attention", mutates_args=())
def _tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    tree = _TREE.get()
    if tree is None:
        raise RuntimeError("tree attention outside of `tree_attention`")
    return tree.attend(query, key, value, scaling, window, softcap)


@_tree_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What a model's attention layer calls."""
    unknown = sorted(name for name, given in others.items() if given is not None and name not in _IGNORED)
    if unknown or others.get("is_causal") is False:
        raise UnsupportedAttentionError(f"its attention uses {', '.join(unknown) or 'no causal order'}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return _tree_attention(query, key, value, float(scaling), sliding_window, softcap), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *arguments, **options: None)


@contextmanager
def tree_attention(model: PreTrainedModel, tree: PrefixTree) -> Iterator[None]:
    """Within the block, forward passes of the model are over that tree's stream."""
    configs = _attention_configs(model)
    before = [config._attn_implementation for config in configs]
    token = _TREE.set(TreeAttention(tree))
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _TREE.reset(token)


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs that the model's layers read; a multimodal model has several."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in configs.values() if hasattr(config, "_attn_implementation")]
