"""Log-likelihoods of replies by the backbone with its language-model head and all layers.

log p(reply | prompt) sums over the tokens of the reply's text, without the template's tokens around it, each given all
tokens before it. log p(reply) alone is the same with one empty user turn in place of the prompt, rendered by the same
template, so both replies have the same beginning and the same tokens. Their difference says how much the prompt raises
the reply's likelihood: above zero for most replies that belong to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.backbone.decoder import Backbone, Placement, length_sorted_batches, load_network, load_tokenizer
from armorm.conversation import Conversation, Message
from armorm.files import read_arrays, write_arrays

BATCH_TOKENS = 2048  # padding included; the logits of a batch take BATCH_TOKENS x vocabulary x 4 bytes
_SAVED_BATCHES = 64  # between two writes of the cache


def load_language_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """A backbone with its language-model head.

    Args:
        dtype: of weights and hidden states, as in `Backbone.load`; the softmax is in float32 and sums are in float64.

    Raises:
        BackboneError: for weights that cannot be read, or that have no language-model head.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(name, **options)
    placement = Placement.choose(dtype, device)
    model = load_network(AutoModelForCausalLM, name, dtype=placement.load_dtype, **options)
    placement.apply(model)
    return Backbone(name, model, tokenizer)


def without_prompt(conversation: Conversation) -> Conversation:
    """The reply after one empty user turn."""
    return Conversation((Message("user", ""), conversation.messages[-1]))


def closing_tokens(template: ChatTemplate) -> int:
    """Tokens that the template writes after every reply."""
    replies = [Conversation((Message("user", "a"), Message("assistant", text))) for text in ("Yes", "no.", "It is 7")]
    endings = zip(*(row.ids[::-1].tolist() for row in template.encode(replies)), strict=False)
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, endings))


@torch.inference_mode()
def batch_log_likelihoods(language_model: Backbone, batch: Sequence[EncodedConversation], closing: int) -> np.ndarray:
    """log p(reply | what precedes it) (n,) float64 in nats, of one batch.

    Args:
        closing: as `closing_tokens` of the template.
    """
    ids = pad_sequence([torch.from_numpy(row.ids.astype(np.int64)) for row in batch], batch_first=True)
    ids = ids.to(language_model.device)
    firsts = [len(row) - closing - row.response_tokens for row in batch]
    earliest = min(firsts) - 1  # logits before it are of no use
    kept = ids.shape[1] - earliest
    named = "logits_to_keep" in inspect.signature(language_model.model.forward).parameters
    options = {"logits_to_keep": kept} if named else {}
    logits = language_model.model(input_ids=ids, use_cache=False, **options).logits[:, -kept:]
    values = np.empty(len(batch))
    for number, (row, first) in enumerate(zip(batch, firsts, strict=True)):
        reply = ids[number, first : first + row.response_tokens]
        place = first - 1 - earliest
        given = logits[number, place : place + len(reply)].float()
        tokens = given.log_softmax(-1).gather(1, reply[:, None])
        values[number] = float(tokens.double().sum())
    return values


def reply_log_likelihoods(
    language_model: Backbone,
    encoded: Sequence[EncodedConversation],
    cache: Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """log p(reply | what precedes it) (n,) float64 in nats; each distinct conversation is computed once.

    Args:
        cache: file of values that were computed before, keyed by the weights and the token ids; it is added to.
        advance: called with the number of tokens just done.
    """
    keys = [_key(row) for row in encoded]
    known = _cached(cache, language_model.fingerprint) if cache is not None else {}
    left = {key: row for key, row in zip(keys, encoded, strict=True) if key not in known}
    advance(sum(len(row) for key, row in zip(keys, encoded, strict=True) if key in known))
    names, rows = list(left), list(left.values())
    closing = closing_tokens(language_model.template)
    batches = length_sorted_batches([len(row) for row in rows], BATCH_TOKENS)
    for number, batch in enumerate(batches, 1):
        values = batch_log_likelihoods(language_model, [rows[i] for i in batch], closing)
        known.update(zip((names[i] for i in batch), values.tolist(), strict=True))
        if cache is not None and (number % _SAVED_BATCHES == 0 or number == len(batches)):
            table = np.frombuffer(b"".join(known), np.uint8).reshape(-1, 16)
            arrays = {"keys": table.copy(), "values": np.array(list(known.values()))}
            write_arrays(cache, arrays, {"fingerprint": language_model.fingerprint})
        advance(sum(len(rows[i]) for i in batch))
    return np.array([known[key] for key in keys], np.float64)


def _key(row: EncodedConversation) -> bytes:
    return blake2b(row.key + row.response_tokens.to_bytes(8, "little"), digest_size=16).digest()


def _cached(path: Path, fingerprint: str) -> dict[bytes, float]:
    """Values by key; none if they are those of other weights."""
    from safetensors import safe_open

    if not path.exists():
        return {}
    with safe_open(path, framework="np") as file:
        if (file.metadata() or {}).get("fingerprint") != fingerprint:
            return {}
    arrays = read_arrays(path)
    return {key.tobytes(): value for key, value in zip(arrays["keys"], arrays["values"].tolist(), strict=True)}
