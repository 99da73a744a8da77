"""Extraction: encoded conversations to features, through the store where there is one.

In:  encoded conversations, a backbone, optionally a store.
Out: `Features`: response features (n, d), and the prompt features of the m distinct prompts.

Identical conversations are computed once, across everything that was ever asked of the same store.
Work is cut into shards of about `SHARD_TOKENS` tokens, each sorted by length into batches of a token
budget; a finished shard is never computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from armorm.backbone.decoder import Backbone
from armorm.backbone.packing import length_sorted_batches
from armorm.backbone.template import EncodedConversation
from armorm.features.store import FeatureStore, shard_name
from armorm.progress import Advance, progress

BATCH_TOKENS = 8192
SHARD_TOKENS = 400_000


@dataclass(frozen=True)
class Features:
    """Features of n conversations over m distinct prompts.

    Attributes:
        response: (n, d) float32.
        prompt: (m, d) float32.
        prompt_index: (n,) int64, row of `prompt` for each conversation.
    """

    response: np.ndarray
    prompt: np.ndarray
    prompt_index: np.ndarray

    def __len__(self) -> int:
        return len(self.response)

    def take(self, rows: Sequence[int] | np.ndarray) -> Features:
        """Features of some of the conversations."""
        rows = np.asarray(rows, np.int64)
        used, index = np.unique(self.prompt_index[rows], return_inverse=True)
        return Features(self.response[rows], self.prompt[used], index)


def extract(
    backbone: Backbone,
    encoded: Sequence[EncodedConversation],
    store: FeatureStore | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    description: str = "features",
) -> Features:
    """Compute features, or read those the store has.

    Args:
        batch_tokens: most tokens of a forward pass, padding included.
    """
    keys = [conversation.key for conversation in encoded]
    prompt_keys = [conversation.prompt_key for conversation in encoded]
    unique_prompts, prompt_index = _unique(prompt_keys)
    if store is None:
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        rows = sorted(first.values())
        with progress(description, sum(len(encoded[i]) for i in rows), "tokens") as advance:
            prompt, response = _forward(backbone, [encoded[i] for i in rows], batch_tokens, advance)
        place = {keys[i]: row for row, i in enumerate(rows)}
        prompt_place = {prompt_keys[i]: row for row, i in reversed(list(enumerate(rows)))}
        order = [place[key] for key in keys]
        return Features(response[order], prompt[[prompt_place[key] for key in unique_prompts]], prompt_index)
    _fill(store, backbone, encoded, keys, store.missing(keys), batch_tokens, description)
    # (A prompt feature can be missing alone, where the shard of another request that held it was deleted.)
    _fill(store, backbone, encoded, keys, store.missing_prompts(prompt_keys), batch_tokens, description)
    return Features(store.responses(keys), store.prompts(unique_prompts), prompt_index)


def _fill(
    store: FeatureStore,
    backbone: Backbone,
    encoded: Sequence[EncodedConversation],
    keys: Sequence[bytes],
    missing: Sequence[int],
    batch_tokens: int,
    description: str,
) -> None:
    """Compute the conversations at the positions `missing`, shard by shard."""
    if not missing:
        return
    order = sorted(missing, key=lambda i: (-len(encoded[i]), keys[i]))
    lengths = np.array([len(encoded[i]) for i in order])
    bounds = _shard_bounds(lengths)
    plan, shards = store.plan(keys, order, bounds)
    by_key = dict(zip(keys, encoded, strict=True))
    names = [shard_name(plan, number) for number in range(len(shards))]
    todo = [i for i, name in enumerate(names) if not store.has_shard(name)]
    owners: dict[bytes, int] = {}
    for number, shard in enumerate(shards):
        for key in shard:
            owners.setdefault(by_key[key].prompt_key, number)
    total = sum(len(by_key[key]) for i in todo for key in shards[i])
    with progress(description, total, "tokens") as advance:
        for number in todo:
            batch = [by_key[key] for key in shards[number]]
            prompt, response = _forward(backbone, batch, batch_tokens, advance)
            own = {c.prompt_key: i for i, c in enumerate(batch) if owners[c.prompt_key] == number}
            kept = [key for key in own if not store.has_prompt(key, outside=f"shard-{plan}-")]
            store.write_shard(names[number], shards[number], response, kept, prompt[[own[key] for key in kept]])


def _shard_bounds(lengths: np.ndarray) -> list[int]:
    """Where shards end, so that each holds about SHARD_TOKENS tokens."""
    shard = (np.cumsum(lengths) - lengths) // SHARD_TOKENS
    return [*(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(lengths)]


def _forward(
    backbone: Backbone, encoded: Sequence[EncodedConversation], batch_tokens: int, advance: Advance
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt features and response features of conversations, in order."""
    prompt = np.empty((len(encoded), backbone.hidden_size), np.float32)
    response = np.empty_like(prompt)
    lengths = [len(conversation) for conversation in encoded]
    for rows in length_sorted_batches(lengths, batch_tokens):
        prompt[rows], response[rows] = backbone.features([encoded[i] for i in rows])
        advance(sum(lengths[i] for i in rows))
    return prompt, response


def _unique(keys: Sequence[bytes]) -> tuple[list[bytes], np.ndarray]:
    """Distinct keys in order of appearance, and the row of each key among them."""
    rows: dict[bytes, int] = {}
    index = np.fromiter((rows.setdefault(key, len(rows)) for key in keys), np.int64, len(keys))
    return list(rows), index
