"""Features of encoded conversations: computed in memory, or read from a store that is filled with what it lacks.

Identical conversations are computed once; with a store, once for all requests to it. Missing conversations are
ordered and cut into shards (`engine.plan_extraction`); a complete shard is never computed again unless its checksum
fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.features.engine import (
    BATCH_TOKENS,
    Engine,
    ExtractionPlan,
    Rows,
    choose_engine,
    keys_of,
    lengths_of,
    plan_extraction,
    prompt_keys_of,
)
from armorm.features.store import FeatureStore, shard_name
from armorm.features.workers import ExtractionSettings, LocalWorker, Work, Workers, run_on
from armorm.files import require_space
from armorm.locks import locked
from armorm.progress import Advance, progress, say

SUMMARISED_TOKENS = 200_000  # requests of at least as many tokens are summarised on stderr


@dataclass(frozen=True)
class Features:
    """Features of n conversations with m distinct prompts."""

    response: np.ndarray  # (n, d) float32
    prompt: np.ndarray  # (m, d) float32
    prompt_index: np.ndarray  # (n,) int64, row of `prompt` for each conversation

    def __len__(self) -> int:
        return len(self.response)

    def take(self, rows: Sequence[int] | np.ndarray) -> Features:
        """Features of some of the conversations."""
        rows = np.asarray(rows, np.int64)
        used, index = np.unique(self.prompt_index[rows], return_inverse=True)
        return Features(self.response[rows], self.prompt[used], index)


@dataclass(frozen=True)
class ExtractionSummary:
    """What a request amounts to."""

    conversations: int  # requested
    unique: int  # distinct conversations
    stored: int  # distinct conversations whose features are stored already
    prompts: int  # distinct prompts
    asked_tokens: int  # of all conversations
    computed_tokens: int  # that go through the backbone
    model_seconds: float | None = None  # of forward passes, of all devices together; None if not known here

    @classmethod
    def of(cls, encoded: Sequence[EncodedConversation], plan: ExtractionPlan, computed: int) -> ExtractionSummary:
        """From all conversations, the plan of those that are not stored, and the tokens to compute."""
        keys, prompts = (len(np.unique(keys)) for keys in (keys_of(encoded), prompt_keys_of(encoded)))
        tokens = int(lengths_of(encoded).sum())
        return cls(len(encoded), keys, keys - len(plan.rows), prompts, tokens, computed)

    @property
    def saving(self) -> float:
        """Requested tokens for each computed one; infinite if nothing has to be computed."""
        return self.asked_tokens / self.computed_tokens if self.computed_tokens else float("inf")

    def __str__(self) -> str:
        repeated, shared = self.conversations - self.unique, self.unique - self.prompts
        parts = [
            f"{self.conversations:,} conversations"
            + (f" ({repeated:,} identical to another)" if repeated else "")
            + (f", {self.stored:,} stored" if self.stored else ""),
            f"{self.prompts:,} prompts" + (f" (shared by {shared:,} more responses)" if shared else ""),
            f"{self.asked_tokens:,} tokens requested",
            f"{self.computed_tokens:,} to compute"
            + (f", {self.saving:.2f} times fewer" if 1 < self.saving < float("inf") else ""),
        ]
        return "; ".join(parts)


def extract(
    backbone: Backbone,
    encoded: Sequence[EncodedConversation],
    store: FeatureStore | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    description: str = "features",
    sharing: bool | None = None,
    compiled: bool | None = None,
    workers: Workers | None = None,
) -> Features:
    """Compute features, or read those that the store has.

    Args:
        batch_tokens: most tokens of a forward pass: of a tree of shared prefixes, or of a padded batch.
        description: of the progress line.
        sharing, compiled: as in `ExtractionSettings`.
        workers: compute the shards of the store; by default those of the backbone, or this process does.

    Raises:
        BackboneError: for a conversation that does not fit into memory even alone.
        StoreError: for a store that cannot be written or read.
    """
    keys, prompt_keys = keys_of(encoded), prompt_keys_of(encoded)
    unique_prompts, prompt_index = distinct(prompt_keys)
    settings = ExtractionSettings(batch_tokens, sharing, compiled, description)
    if store is not None:
        fill_store(workers or backbone.workers or backbone, encoded, store, settings)
        return Features(store.responses(keys), store.prompts(unique_prompts), prompt_index)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    plan = plan_extraction(encoded, first)
    rows = [encoded[i] for i in plan.rows]
    compute = _features_here if backbone.workers is None else backbone.workers.features
    prompt, response = compute(backbone, rows, plan, settings)
    place = np.empty(len(encoded), np.int64)
    place[plan.rows] = np.arange(len(plan.rows))
    prompts, prompt_rows = np.unique(prompt_keys[plan.rows], return_index=True)
    return Features(
        response[place[first][inverse]], prompt[prompt_rows[np.searchsorted(prompts, unique_prompts)]], prompt_index
    )


def _features_here(
    backbone: Backbone, rows: Sequence[EncodedConversation], plan: ExtractionPlan, settings: ExtractionSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and response features (n, ...) of the planned conversations, computed by this process."""
    sharing, budget = settings.sharing, settings.batch_tokens
    engine = choose_engine(backbone, rows, plan.shared, budget, sharing=sharing, compiled=settings.compiled)
    response = np.empty((len(rows), backbone.response_size), np.float32)
    prompt = np.empty((len(rows), backbone.hidden_size), np.float32)

    def compute(engine: Engine, part: slice, advance: Advance) -> None:
        prompt[part], response[part] = engine.features(rows[part], advance)

    with progress(settings.description, int(plan.computed(engine.mechanism, budget).sum()), "tokens") as advance:
        run_on(engine, plan.parts(1 + len(backbone.replicas), budget), compute, advance)
    return prompt, response


def fill_store(
    workers: Backbone | Workers,
    encoded: Sequence[EncodedConversation],
    store: FeatureStore,
    settings: ExtractionSettings | None = None,
) -> ExtractionSummary:
    """Compute the features of these conversations that the store lacks.

    Args:
        workers: compute the shards; a backbone computes them in this process.
        encoded: in memory, or a `TokenTable` on disk.
    """
    workers = LocalWorker(workers) if isinstance(workers, Backbone) else workers
    settings = settings or ExtractionSettings()
    keys, prompt_keys = keys_of(encoded), prompt_keys_of(encoded)
    with locked(store.folder, wait=True) as waited:
        if waited:
            store.read_new()
        store.verify(keys, prompt_keys)
        missing, prompts = store.missing(keys), store.missing_prompts(prompt_keys)
        require_space(store.folder, store.bytes_of(len(missing), len(prompts)), "the features to compute")
        summary = _fill(store, workers, encoded, keys, prompt_keys, missing, settings)
        # (A prompt feature can be missing alone, if the shard of another request that held it was deleted.)
        prompts = store.missing_prompts(prompt_keys)
        if prompts:
            _fill(store, workers, encoded, keys, prompt_keys, prompts, settings)
    return summary


def _fill(
    store: FeatureStore,
    workers: Workers,
    encoded: Sequence[EncodedConversation],
    keys: np.ndarray,
    prompt_keys: np.ndarray,
    missing: Sequence[int],
    settings: ExtractionSettings,
) -> ExtractionSummary:
    """Compute the conversations at the positions `missing`, shard by shard."""
    plan = plan_extraction(encoded, missing)
    if not len(plan.rows):
        return ExtractionSummary.of(encoded, plan, 0)
    chosen = workers.choose(Rows(encoded, plan.rows), plan.shared, settings)
    stored = store.plan(keys, plan.rows, plan.bounds, chosen)
    order = np.argsort(keys, kind="stable")
    places = [order[np.searchsorted(keys, shard, sorter=order)] for shard in stored.shards]
    todo = [number for number in range(len(places)) if not store.has_shard(shard_name(stored.id, number))]
    # Prompts that no shard of another request holds; the first shard of a prompt stores it.
    prompts, first = np.unique(prompt_keys[np.concatenate(places)], return_index=True)
    absent = ~store.has_prompts(prompts, outside=f"shard-{stored.id}-")
    shard_of = np.searchsorted(np.cumsum([len(rows) for rows in places]), first[absent], side="right")
    owned = np.split(
        prompts[absent][np.argsort(shard_of, kind="stable")],
        np.cumsum(np.bincount(shard_of, minlength=len(places)))[:-1],
    )

    computed = np.zeros(len(encoded), np.int64)
    computed[plan.rows] = plan.computed(stored.settings["mechanism"], stored.settings["budget"])
    summary = ExtractionSummary.of(encoded, plan, int(computed.sum()))
    if summary.asked_tokens >= SUMMARISED_TOKENS:
        say(f"{settings.description}: {summary}")
    saving = f" ({summary.saving:.1f}x fewer than requested)" if summary.saving > 1.05 else ""
    seconds = workers.run(
        Work(
            store=store,
            plan=stored,
            numbers=todo,
            encoded=encoded,
            places=places,
            owned=owned.__getitem__,
            tokens={number: int(computed[places[number]].sum()) for number in todo},
            description=settings.description,
            unit=f"tokens{saving}",
        )
    )
    return replace(summary, model_seconds=seconds)


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys in order of appearance, and the row of each key among them."""
    found, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return found[order], rank[inverse].astype(np.int64)
