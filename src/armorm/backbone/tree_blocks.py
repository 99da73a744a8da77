"""How attention over a prefix tree is divided on a CPU: blocks computed together, and runs computed as squares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from armorm.backbone.prefix_tree import PrefixTree

BLOCK_SIZES = (32, 64, 128)
STREAM_MULTIPLE = BLOCK_SIZES[-1]
# A run of at least this many tokens is a square if the tokens before it are at most this share of it.
_SQUARE_TOKENS, _SQUARE_BEFORE = 64, 1 / 3
_KEYS = 4096  # gathered for one chunk (a few megabytes), unless a single block has more
# Cost of a score by block size, of gathering a key and its value for one head, and of one chunk (nanoseconds on two
# cores with AVX2; only the ratios matter, and only for the choice of the block size).
_SCORE_COST = {32: 3.3, 64: 2.6, 128: 2.3}
_GATHER_COST, _CHUNK_COST = 10.0, 60_000.0


@dataclass(frozen=True)
class Chunk:
    """Blocks with about as many ancestors, computed together: G blocks of Q queries, K keys."""

    start: int  # of the blocks in the order of computation
    stop: int
    keys: torch.Tensor  # (G * K,) stream indices of the keys
    bias: torch.Tensor  # (G, 1, Q, K), 0 for visible keys, else the smallest number


@dataclass(frozen=True)
class Square:
    """A run with all tokens before it in its conversation."""

    start: int  # of the run
    stop: int
    before: int  # number of tokens before it
    place: int  # index of the first of them among the gathered tokens of all squares

    @property
    def end(self) -> int:
        """End (exclusive) of its gathered tokens."""
        return self.place + self.before + self.stop - self.start


@dataclass(frozen=True)
class Blocks:
    size: int
    order: torch.Tensor
    chunks: list[Chunk]


class TreePlan:
    """How the attention of one stream, a multiple of the largest block long, is divided."""

    def __init__(self, tree: PrefixTree) -> None:
        if len(tree) % STREAM_MULTIPLE:
            raise ValueError(f"a stream of {len(tree)} tokens, expected a multiple of {STREAM_MULTIPLE}")
        self.tree = tree
        self._ancestors = [tree.ancestors(token) for token in range(0, len(tree), BLOCK_SIZES[0])]
        self._blocks: dict[tuple, Blocks] = {}
        self._squares: tuple[list[Square], torch.Tensor] | None = None

    def squares(self) -> tuple[list[Square], torch.Tensor]:
        """The runs that are computed as squares, and the stream indices of their tokens, one square after another."""
        if self._squares is None:
            squares, places, size = [], [np.empty(0, np.int64)], 0
            for start, stop in zip(*(ends.tolist() for ends in self.tree.runs()), strict=True):
                if stop - start < _SQUARE_TOKENS:
                    continue
                before = self.tree.ancestors(start)
                if len(before) <= _SQUARE_BEFORE * (stop - start):
                    squares.append(Square(start, stop, len(before), size))
                    places += [before, np.arange(start, stop)]
                    size = squares[-1].end
            self._squares = squares, torch.from_numpy(np.concatenate(places))
        return self._squares

    def blocks(
        self,
        heads: int,
        kv_heads: int,
        window: int | None,
        squares: bool,
        only: np.ndarray | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Blocks:
        """Which blocks are computed together; the same for all layers of one shape.

        Args:
            squares: long runs are computed separately, as squares.
            only: stream indices of the tokens whose output is needed, None for all.
        """
        key = (heads, kv_heads, window, squares, None if only is None else only.tobytes(), dtype, device)
        if key not in self._blocks:
            needed = self._needed(squares, only)
            size = min(BLOCK_SIZES, key=lambda size: self._cost(size, needed, heads, kv_heads))
            self._blocks[key] = self._cut(size, needed, window, dtype, device)
        return self._blocks[key]

    def _needed(self, squares: bool, only: np.ndarray | None) -> np.ndarray:
        """Mask (t,) of the tokens to compute in blocks."""
        needed = np.ones(len(self.tree), bool)
        if only is not None:
            needed[:] = False
            needed[only] = True
        for square in self.squares()[0] if squares else []:
            needed[square.start : square.stop] = False
        return needed

    def _widths(self, size: int, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blocks with needed tokens, and the number of keys of each, rounded up."""
        blocks = np.flatnonzero(needed.reshape(-1, size).any(1))
        first = self._ancestors[:: size // BLOCK_SIZES[0]]
        return blocks, np.array([_rounded(len(first[block])) + size for block in blocks], np.int64)

    def _cost(self, size: int, needed: np.ndarray, heads: int, kv_heads: int) -> float:
        _, widths = self._widths(size, needed)
        keys = widths.sum()
        return (
            keys * size * heads * _SCORE_COST[size]
            + keys * kv_heads * _GATHER_COST
            + max(len(np.unique(widths)), keys / _KEYS) * _CHUNK_COST
        )

    def _cut(
        self, size: int, needed: np.ndarray, window: int | None, dtype: torch.dtype, device: torch.device
    ) -> Blocks:
        ends, positions = self.tree.ends, self.tree.positions
        order, widths = self._widths(size, needed)
        by_width = np.argsort(widths, kind="stable")
        order, widths = order[by_width], widths[by_width]
        chunks = []
        start = 0
        while start < len(order):
            width = int(widths[start])
            stop = min(int(np.searchsorted(widths, width, side="right")), start + max(1, _KEYS // width))
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
            bias = visible_bias(visible, dtype, device)[:, None]
            chunks.append(Chunk(start, stop, torch.from_numpy(keys.reshape(-1)).to(device), bias))
            start = stop
        return Blocks(size, torch.from_numpy(order).to(device), chunks)


def visible_bias(visible: np.ndarray, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 for visible keys, else the smallest number."""
    bias = torch.zeros(visible.shape, dtype=dtype)
    return bias.masked_fill_(torch.from_numpy(~visible), torch.finfo(dtype).min).to(device)


def _rounded(ancestors: int) -> int:
    """Round up by at most an eighth, or 31 keys, so that more blocks have equal widths and are computed together."""
    step = max(32, 1 << max(0, (ancestors - 1).bit_length() - 3))
    return -(-ancestors // step) * step
