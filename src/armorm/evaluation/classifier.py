"""Plain reward models: a sequence classifier with one logit, on its own chat template.

In:  a checkpoint of `AutoModelForSequenceClassification`; conversations.
Out: `Scored`: the logits.

A score depends on its conversation alone: rows are padded on the right, under a mask, with an id that
occurs in none of them, so that models which look for their padding find the right last token. Text inside
messages cannot forge a turn. A checkpoint without its head is refused: transformers would fill in a
random one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from armorm.conversation import Conversation
from armorm.errors import CheckpointError
from armorm.evaluation.scorers import BATCH_TOKENS, NOT_A_NUMBER, Scored

if TYPE_CHECKING:
    from armorm.backbone.chat_template import ChatTemplate


class ClassifierScorer:
    """A sequence classifier with one logit, scored on its own chat template.

    Attributes:
        name: what it was loaded from.
        model, tokenizer: of transformers.
        template: its chat template; text inside messages cannot forge a turn.
        max_length: most tokens of a conversation, or None.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, max_length: int | None = None, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        from armorm.backbone.chat_template import ChatTemplate

        if getattr(model.config, "num_labels", 1) != 1:
            raise CheckpointError(f"{name}: has {model.config.num_labels} labels, expected one logit: a reward")
        self.name, self.model, self.tokenizer, self.batch_tokens = name, model.eval(), tokenizer, batch_tokens
        self.template: ChatTemplate = ChatTemplate(tokenizer)
        self.max_length = max_length or getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @classmethod
    def from_pretrained(cls, name: str, *, dtype: str = "auto", device: str = "auto") -> ClassifierScorer:
        """Load a classifier; one whose head is not in the checkpoint is refused.

        Raises:
            CheckpointError: for a folder that holds none, or an incomplete one.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from armorm.backbone.decoder import Placement

        placement = Placement.choose(dtype, device)
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=placement.load_dtype, output_loading_info=True, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{name}: cannot be loaded as a sequence classifier: {error}") from error
        missing = sorted(str(key) for key in report["missing_keys"])
        if missing:
            raise CheckpointError(f"{name}: the checkpoint lacks {', '.join(missing[:5])}; its head would be random")
        placement.apply(model)
        return cls(name, model, tokenizer)

    def describe(self) -> dict[str, Any]:
        """Name, architecture, fingerprint of weights and template, dtype."""
        return {
            "name": self.name,
            "kind": "sequence classifier",
            "backbone": {
                "name": type(self.model).__name__,
                "fingerprint": self.fingerprint,
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
        }

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits of weights, head included, and chat template."""
        import torch

        digest = blake2b(str(self.tokenizer.chat_template).encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Logits; over-long conversations are refused."""
        import torch

        from armorm.backbone.decoder import length_sorted_batches
        from armorm.backbone.encoding import encode_rows
        from armorm.progress import progress

        encoded = encode_rows(self.template, conversations, self.max_length, "skip")
        rows = [row.ids for row in encoded.encoded]
        scores = np.full(len(conversations), np.nan)
        lengths = [len(ids) for ids in rows]
        with progress("scores", sum(lengths), "tokens") as advance, torch.inference_mode():
            for batch in length_sorted_batches(lengths, self.batch_tokens):
                logits = self._logits([rows[i] for i in batch])
                scores[[encoded.kept[i] for i in batch]] = logits
                advance(sum(lengths[i] for i in batch))
        refused = dict(encoded.rejected)
        for row in np.flatnonzero(~np.isfinite(scores)):
            refused.setdefault(int(row), NOT_A_NUMBER)
            scores[row] = np.nan
        return Scored(scores, refused)

    def _logits(self, batch: list[np.ndarray]) -> np.ndarray:
        import torch

        longest = max(len(ids) for ids in batch)
        pad = _unused_id(batch)
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[row, : len(tokens)] = 1
        config = self.model.config.get_text_config()
        kept, config.pad_token_id = config.pad_token_id, pad
        try:
            logits = self.model(input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device)).logits
        finally:
            config.pad_token_id = kept
        return logits.reshape(len(batch), -1)[:, 0].double().cpu().numpy()


def _unused_id(batch: Sequence[np.ndarray]) -> int:
    """The lowest id that occurs in no row: the padding of this batch."""
    used = np.unique(np.concatenate(batch))
    gaps = np.flatnonzero(used != np.arange(len(used)))
    return int(gaps[0]) if len(gaps) else len(used)
