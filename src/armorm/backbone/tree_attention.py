"""Attention over a prefix tree, for any model that takes its attention from the registry of transformers.

On a CPU the stream is cut into blocks of queries. The queries of a block can only see the ancestors of its first token
and the block itself, because the descendants of a token are contiguous. Blocks with about as many ancestors are
computed together: keys and values are gathered, then torch's fused attention is applied under a mask. The cost grows
with what the conversations need instead of the square of the stream. The block size minimises the estimated cost:
short for short conversations, long if many keys are gathered per block. A long run of tokens without a branch, with
few tokens before it, is computed as an ordinary causal square, of which half is skipped. On a GPU the same mask is
given to `flex_attention`.

Sliding windows and capped logits are supported; a model whose attention uses anything else (sinks, position biases)
raises `UnsupportedAttentionError` and runs without sharing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from armorm.backbone.prefix_tree import PrefixTree
from armorm.backbone.tree_blocks import STREAM_MULTIPLE, Square, TreePlan, visible_bias

NAME = "armorm_prefix_tree"
_IGNORED = {"dropout", "is_causal", "position_ids", "position_embeddings", "output_attentions", "use_cache", "cache"}
_IGNORED |= {"past_key_values", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position"}
_TREE: ContextVar[TreeAttention | None] = ContextVar("tree", default=None)


class UnsupportedAttentionError(ValueError):
    """The model's attention uses something that prefix trees do not support."""


class TreeAttention:
    """Attention of one stream, a multiple of the largest block long."""

    # Stream indices of the tokens whose output is needed, None for all (on a CPU; other outputs are 0).
    only: np.ndarray | None = None

    def __init__(self, tree: PrefixTree) -> None:
        self.tree = tree
        self.plan = TreePlan(tree)
        self._masks: dict[tuple, Any] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention output (1, t, heads, d_v) of query (1, heads, t, d), key (1, kv_heads, t, d), value (.., d_v)."""
        if window is not None and window > self.tree.positions.max():
            window = None
        if query.device.type == "cuda":
            return self._flex(query, key, value, scaling, window, softcap)
        return self._blockwise(query, key, value, scaling, window, softcap)

    def _blockwise(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        heads, t, d = query.shape[1:]
        kv_heads, d_v = key.shape[1], value.shape[3]
        squares, places = self.plan.squares() if window is None and softcap is None else ([], torch.empty(0))
        blocks = self.plan.blocks(heads, kv_heads, window, bool(squares), self.only, query.dtype, query.device)
        size, count = blocks.size, t // blocks.size
        # (Tokens outside, heads inside: gathered rows are long, and this is how projections lie in memory.)
        q, k, v = (part[0].transpose(0, 1).reshape(t, -1) for part in (query, key, value))
        out = (query.new_empty if self.only is None else query.new_zeros)(count, size, heads, d_v)
        queries = q.view(count, size, heads, d)[blocks.order].transpose(1, 2)
        for chunk in blocks.chunks:
            shape = (chunk.stop - chunk.start, chunk.bias.shape[3], kv_heads, -1)
            seen, given = (part.index_select(0, chunk.keys).view(shape).transpose(1, 2) for part in (k, v))
            attended = _attend_block(queries[chunk.start : chunk.stop], seen, given, chunk.bias, scaling, softcap)
            out[blocks.order[chunk.start : chunk.stop]] = attended.transpose(1, 2)
        out = out.view(1, t, heads, d_v)
        if squares:
            places = places.to(query.device)
            whole = [
                part.index_select(0, places).view(1, len(places), -1, width).transpose(1, 2)
                for part, width in ((q, d), (k, d), (v, d_v))
            ]
            for square in squares:
                query, key, value = (part[:, :, square.place : square.end] for part in whole)
                self._attend_square(square, query, key, value, scaling, out)
        return out

    def _attend_square(
        self, square: Square, query: Tensor, key: Tensor, value: Tensor, scaling: float, out: Tensor
    ) -> None:
        """Write the attention of one square, whose inputs (1, heads, n, ..) include the tokens before its run, to `out`
        (1, t, heads, d)."""
        if self.only is None:
            attended = _attend_block(query, key, value, None, scaling, None)  # (Includes the few tokens before it.)
            out[:, square.start : square.stop] = attended[:, :, square.before :].transpose(1, 2)
            return
        asked = self.only[(self.only >= square.start) & (self.only < square.stop)]
        if len(asked):
            rows = asked - square.start + square.before
            bias = visible_bias(np.arange(query.shape[2]) <= rows[:, None], query.dtype, query.device)
            attended = _attend_block(query[:, :, rows], key, value, bias[None, None], scaling, None)
            out[:, asked] = attended.transpose(1, 2)

    def _flex(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        device = query.device
        name = (window, device)
        if name not in self._masks:
            self._masks[name] = self.block_mask(window, device)

        def capped(score: Tensor, batch: Any, head: Any, q: Any, k: Any) -> Tensor:
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
        """The mask of `flex_attention`: which blocks of keys a block of queries sees partly, and which entirely.

        An earlier block of keys is visible to some query if one of its tokens is an ancestor of the first query, and to
        all queries if all its tokens are ancestors of the last one. (With a window all blocks are treated as partial.)
        """
        from torch.nn.attention.flex_attention import BlockMask

        size = STREAM_MULTIPLE
        ends = torch.from_numpy(self.tree.ends).to(device)
        positions = torch.from_numpy(self.tree.positions).to(device)

        def visible(batch: Any, head: Any, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < ends[k])
            return seen if window is None else seen & (positions[q] - positions[k] < window)

        by_block = self.tree.ends.reshape(-1, size)
        first = np.arange(len(by_block)) * size
        earlier = first[:, None] > first[None, :]
        whole = earlier & (by_block.min(1)[None, :] >= first[:, None] + size) & (window is None)
        part = (earlier & (by_block.max(1)[None, :] > first[:, None]) & ~whole) | np.eye(len(by_block), dtype=bool)
        partly, wholly = (_counts_and_places(blocks, device) for blocks in (part, whole))
        return BlockMask.from_kv_blocks(*partly, *wholly, BLOCK_SIZE=size, mask_mod=visible)


def _counts_and_places(blocks: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each row of a mask of blocks, the number of visible ones and the indices, visible ones first."""
    counts, places = blocks.sum(1), np.argsort(~blocks, 1, kind="stable")
    first, second = (torch.from_numpy(array.astype(np.int32))[None, None].to(device) for array in (counts, places))
    return first, second


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Attention (G, heads, Q, d_v) of G blocks: query (G, heads, Q, d), key (G, kv_heads, K, d), bias (G, 1, Q, K).

    Without a bias (and a cap) it is causal.
    """
    grouped = query.shape[1] != key.shape[1]
    if softcap is None or bias is None:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=bias is None, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    return (scores + bias).softmax(-1) @ value


@cache
def _flex_attention(device: str) -> Any:
    """Compiled on a GPU; uncompiled, for tests, it computes the whole square."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


# A custom operator, so that a compiled layer stays one graph: the current tree is not an argument of the layer.
@torch.library.custom_op("armorm::tree_attention", mutates_args=())
def _tree_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    tree = _TREE.get()
    if tree is None:
        raise RuntimeError("tree attention outside of `tree_attention`")
    return tree.attend(query, key, value, scaling, window, softcap)


@_tree_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, softcap: float | None) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers."""
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
    """Within the block, forward passes of the model are over the stream of this tree."""
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


@contextmanager
def only_tokens(rows: np.ndarray) -> Iterator[None]:
    """Within the block (inside of `tree_attention`) attention is computed for these tokens of the stream only."""
    tree = _TREE.get()
    assert tree is not None
    tree.only = rows
    try:
        yield
    finally:
        tree.only = None


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs that the layers read; a multimodal model has several."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in configs.values() if hasattr(config, "_attn_implementation")]
