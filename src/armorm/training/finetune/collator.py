"""Batches of prompt trees: the responses to one prompt as branches of one sequence, so the prompt is computed once.

A tree is the prompt's ids, followed by the ids of each response. Position ids of every response continue from the
prompt, and the mask lets a token attend to the prompt and its own response up to itself, so each hidden state equals
that of the conversation alone. For decoders that cannot use such a mask (recurrent layers, short sliding windows,
kernels without masks), the same trees are laid out as plain sequences, one per response. On the TruthfulQA rows, with
22 answers per question, half of all tokens are saved; on code with long prompts, more than half.

A `TokenIndex` numbers the distinct tokens of all trees, those of a prompt once: the states of frozen layers are stored
under these numbers (state_cache.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.prefix_forward import sharing_fault

WIDTH_STEP = 64


@dataclass(frozen=True)
class PromptTree:
    """One prompt and some of its responses."""

    rows: tuple[int, ...]  # indices of the tree's conversations, each once
    # training items as positions in `rows`: one position for a rated row, two for a pair
    items: tuple[tuple[int, ...], ...]
    tokens: int  # number of tokens computed


@dataclass(frozen=True)
class TreeTensors:
    """A batch of trees as decoder inputs."""

    # `input_ids` (B, t); for trees also `position_ids` (B, t) and an additive `attention_mask` (B, 1, t, t)
    inputs: dict[str, torch.Tensor]
    leaf_rows: torch.Tensor  # (l,) position of the last token of each conversation
    leaf_columns: torch.Tensor
    # response tokens to average, as positions in the flattened batch (s,), and the leaf of each (s,)
    span_places: torch.Tensor
    span_leaves: torch.Tensor
    rows: np.ndarray  # (l,) indices of these conversations
    pairs: torch.Tensor  # (m, 2) positions in `rows` of the items that are pairs
    tokens: torch.Tensor  # (B, t) number of each token in the `TokenIndex`, -1 for padding; empty without one


@dataclass(frozen=True)
class TokenIndex:
    """Numbers of the tokens of n conversations, prompt by prompt and then response by response."""

    prompts: np.ndarray  # (n,) number of the first token of each conversation's prompt
    responses: np.ndarray  # (n,) number of the first token after its gate
    size: int  # number of distinct tokens

    @classmethod
    def of(cls, encoded: Sequence[EncodedConversation]) -> TokenIndex:
        size = 0
        firsts: dict[bytes, int] = {}
        for row in encoded:
            if row.prompt_key not in firsts:
                firsts[row.prompt_key] = size
                size += row.gate_position + 1
        lengths = np.array([len(row) - row.gate_position - 1 for row in encoded], np.int64)
        ends = size + np.cumsum(lengths)
        prompts = np.array([firsts[row.prompt_key] for row in encoded], np.int64)
        return cls(prompts, ends - lengths, int(ends[-1]) if len(encoded) else 0)


def grow_trees(
    encoded: Sequence[EncodedConversation], items: Sequence[tuple[int, ...]], most_tokens: int, *, share: bool = True
) -> list[PromptTree]:
    """Group items by prompt into trees.

    Args:
        items: conversations with one prompt that must be in one batch: a rated row, or both sides of a pair.
        most_tokens: maximum tokens per tree; a longer item gets a tree of its own.
        share: whether the prompt counts once per tree, or once per response.

    Raises:
        ValueError: for an item whose conversations have different prompts.
    """
    groups: dict[bytes, list[tuple[int, ...]]] = {}
    for item in items:
        keys = {encoded[row].prompt_key for row in item}
        if len(keys) != 1:
            raise ValueError(f"item {item} has conversations of {len(keys)} prompts")
        groups.setdefault(keys.pop(), []).append(item)
    trees = []
    for group in groups.values():
        prompt = encoded[group[0][0]].gate_position + 1
        rows: dict[int, int] = {}
        placed: list[tuple[int, ...]] = []
        tokens = 0
        for item in group:
            while True:
                new = [row for row in dict.fromkeys(item) if row not in rows]
                added = sum(len(encoded[row]) - (prompt if share else 0) for row in new)
                added += prompt if share and not rows else 0
                if not rows or tokens + added <= most_tokens:
                    break
                trees.append(PromptTree(tuple(rows), tuple(placed), tokens))
                rows, placed, tokens = {}, [], 0
            for row in new:
                rows[row] = len(rows)
            placed.append(tuple(rows[row] for row in item))
            tokens += added
        trees.append(PromptTree(tuple(rows), tuple(placed), tokens))
    return trees


def tree_batches(trees: Sequence[PromptTree], budget: int, seed: int, step: int = 1) -> list[list[PromptTree]]:
    """Batches of trees of similar size, each at most `budget` tokens with padding; a larger tree is a batch by itself.

    Noise is added to the sizes before sorting, so that the batches differ between seeds.

    Args:
        step: widths are rounded up to a multiple of this.
    """
    rng = np.random.default_rng(seed)
    tokens = np.array([-(-tree.tokens // step) * step for tree in trees], np.int64)
    order = np.argsort(-(tokens + rng.uniform(0, 16, len(trees))), kind="stable")
    batches: list[list[PromptTree]] = []
    current: list[int] = []
    for index in order.tolist():
        if current and max(int(tokens[current].max()), int(tokens[index])) * (len(current) + 1) > budget:
            batches.append([trees[i] for i in current])
            current = []
        current.append(index)
    return [*batches, [trees[i] for i in current]] if current else batches


def tree_tensors(
    encoded: Sequence[EncodedConversation],
    trees: Sequence[PromptTree],
    *,
    share: bool = True,
    budget: int = 0,
    header: int = 1,
    index: TokenIndex | None = None,
) -> TreeTensors:
    """Decoder inputs of a batch of trees.

    Args:
        share: one sequence per tree with its mask; otherwise one plain sequence per conversation, padded on the right.
        budget: tokens; if given, the batch is padded to one of few shapes: a width in steps of `WIDTH_STEP`, and as
            many sequences as fit into the budget. On CPUs, bfloat16 kernels are generated for each new shape, which
            takes about as long as a training step.
        header: tokens from the gate to the reply (`Backbone.header_tokens`), which means leave out.
        index: of `encoded`.
    """
    sequences: list[list[int]] = [list(tree.rows) for tree in trees]
    if not share:
        sequences = [[row] for rows in sequences for row in rows]
    lengths = [_length(encoded, rows) for rows in sequences]
    height, width = len(sequences), max(lengths)
    if budget:
        width = -(-width // WIDTH_STEP) * WIDTH_STEP
        height = max(height, budget // width)
    ids = torch.zeros((height, width), dtype=torch.long)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)
    tokens = torch.full_like(ids if index else ids[:0], -1)
    leaf_rows, leaf_columns, leaf_starts = [], [], []
    for place, rows in enumerate(sequences):
        prompt = encoded[rows[0]].gate_position + 1
        ids[place, :prompt] = torch.from_numpy(encoded[rows[0]].ids[:prompt].astype(np.int64))
        positions[place, :prompt], branch[place, :prompt] = torch.arange(prompt), 0
        if index is not None:
            tokens[place, :prompt] = torch.arange(prompt) + int(index.prompts[rows[0]])
        end = prompt
        for number, row in enumerate(rows, 1):
            response = encoded[row].ids[prompt:].astype(np.int64)
            span = slice(end, end + len(response))
            ids[place, span] = torch.from_numpy(response)
            positions[place, span] = torch.arange(prompt, prompt + len(response))
            branch[place, span] = number
            if index is not None:
                tokens[place, span] = torch.arange(len(response)) + int(index.responses[row])
            leaf_starts.append(end + min(header, len(response)) - 1)
            end += len(response)
            leaf_rows.append(place)
            leaf_columns.append(end - 1)
    inputs = {"input_ids": ids}
    if share:
        same = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
        seen = same & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        # (Padding attends to padding, so that no row of the mask is empty, which would give 0 / 0.)
        hidden = torch.finfo(torch.float32).min
        inputs |= {"position_ids": positions, "attention_mask": (~seen)[:, None].float() * hidden}
    starts = np.cumsum([0, *(len(tree.rows) for tree in trees)])
    pairs = [
        tuple(start + i for i in item)
        for tree, start in zip(trees, starts[:-1], strict=True)
        for item in tree.items
        if len(item) == 2
    ]
    spans = [
        torch.arange(first, last + 1) + place * width
        for place, first, last in zip(leaf_rows, leaf_starts, leaf_columns, strict=True)
    ]
    return TreeTensors(
        inputs=inputs,
        leaf_rows=torch.tensor(leaf_rows),
        leaf_columns=torch.tensor(leaf_columns),
        span_places=torch.cat(spans),
        span_leaves=torch.arange(len(spans)).repeat_interleave(torch.tensor([len(span) for span in spans])),
        rows=np.array([row for rows in sequences for row in rows], np.int64),
        pairs=torch.tensor(pairs, dtype=torch.long).view(-1, 2),
        tokens=tokens,
    )


def _length(encoded: Sequence[EncodedConversation], rows: Sequence[int]) -> int:
    prompt = encoded[rows[0]].gate_position + 1
    return prompt + sum(len(encoded[row]) - prompt for row in rows)


def model_inputs(inputs: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The inputs on the device of a decoder, masks in its dtype, as attention requires."""
    parameter = next(model.parameters())
    moved = {name: tensor.to(parameter.device) for name, tensor in inputs.items()}
    if "attention_mask" in moved:
        lowest = torch.finfo(parameter.dtype).min
        moved["attention_mask"] = moved["attention_mask"].clamp(min=lowest).to(parameter.dtype)
    return moved


@torch.no_grad()
def reads_trees(model: torch.nn.Module, encoded: Sequence[EncodedConversation], trees: Sequence[PromptTree]) -> bool:
    """Whether a decoder computes the same states for trees as for separate conversations, up to rounding.

    Args:
        trees: a small sample, at least one with several conversations.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    window = getattr(config, "sliding_window", None)
    if window is not None and max(len(encoded[row]) for tree in trees for row in tree.rows) > window:
        return False
    device = next(model.parameters()).device

    def leaves(share: bool) -> list[np.ndarray]:
        batch = tree_tensors(encoded, trees, share=share)
        hidden = model(**model_inputs(batch.inputs, model), use_cache=False).last_hidden_state
        return [hidden[batch.leaf_rows.to(device), batch.leaf_columns.to(device)].float().cpu().numpy()]

    return not sharing_fault(lambda: leaves(True), leaves(False), next(model.parameters()).dtype)
