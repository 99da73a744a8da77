"""Rows of token ids: which tokens are real, where they go, where the gate stands.

In:  token ids (B, t), and what says which are padding: a mask, or the pad id.
Out: a mask (B, t); the order that moves the real tokens of each row to its beginning; gate positions (B,).

A pad id inside a text is text. Where padding and text cannot be told apart, rows are named, never guessed at.
"""

from __future__ import annotations

import torch


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
