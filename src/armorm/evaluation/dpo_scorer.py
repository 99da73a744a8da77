"""Implicit rewards of models trained by DPO (arXiv 2305.18290, eq. 5 without the term of the prompt alone).

reward = beta * (log p_policy(response | prompt) - log p_reference(response | prompt)), over the tokens of the
response's text, each given all tokens before it (`backbone/likelihood.py`), in float32. The tokens that the template
writes after every response are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.backbone.encoding import encode_rows
from armorm.backbone.likelihood import load_language_model, reply_log_likelihoods
from armorm.conversation import Conversation
from armorm.evaluation.scorer import Scored, ScorerError

BETA = 0.1


class DpoScorer:
    """A policy and the reference model that it was trained from.

    Args:
        policy, reference: folders, hub ids or embedded names of language models with the same tokenizer.
        beta: of the training; it scales all rewards alike.
        max_length: maximum tokens of a conversation; by default that of the policy's config.
    """

    def __init__(
        self, policy: str, reference: str, *, beta: float = BETA, max_length: int | None = None, device: str = "auto"
    ) -> None:
        if not beta > 0:
            raise ScorerError(f"beta: found {beta}, expected a number above 0")
        self.beta = beta
        self.policy, self.reference = (load_language_model(name, device=device) for name in (policy, reference))
        config = self.policy.model.config.get_text_config()
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)

    def describe(self) -> dict[str, Any]:
        """Names and fingerprints of both models, beta."""
        return {
            "name": self.policy.name,
            "kind": "DPO policy",
            "beta": self.beta,
            "backbone": {"name": self.policy.name, "fingerprint": self.policy.fingerprint, "dtype": "float32"},
            "reference": {"name": self.reference.name, "fingerprint": self.reference.fingerprint},
        }

    def score(self, conversations: Sequence[Conversation]) -> Scored:
        """Implicit rewards; conversations over the length limit are unscored.

        Raises:
            ScorerError: if the two models read a conversation as different tokens.
        """
        ours, theirs = (
            encode_rows(model.template, conversations, self.max_length, "skip")
            for model in (self.policy, self.reference)
        )
        for index, (a, b) in enumerate(zip(ours.rows, theirs.rows, strict=True)):
            if (a is None) != (b is None) or (a is not None and b is not None and a.key != b.key):
                raise ScorerError(
                    f"{self.policy.name} and {self.reference.name} read conversation {index} as different tokens, "
                    "expected a reference with the policy's tokenizer and chat template"
                )
        scores = np.full(len(conversations), np.nan)
        with_policy, with_reference = (
            reply_log_likelihoods(model, rows.encoded) if rows.encoded else np.empty(0)
            for model, rows in ((self.policy, ours), (self.reference, theirs))
        )
        scores[ours.kept] = self.beta * (with_policy - with_reference)
        unscored = dict(ours.rejected)
        unscored |= {int(row): "the log-likelihood is not finite" for row in ours.kept if not np.isfinite(scores[row])}
        scores[~np.isfinite(scores)] = np.nan
        return Scored(scores, unscored)
