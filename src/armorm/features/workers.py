"""Who computes the shards of an extraction: `LocalWorker` in this process, `ray_workers.RayWorkers` on a cluster.

Both call `compute_shard`, so the bytes of a shard do not depend on where it was computed. A backbone with replicas on
further devices has a thread for each (`run_on`); they take shard after shard from one list. A shard is written while
the next one is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.features.engine import BATCH_TOKENS, Engine, choose_engine, keys_of, prompt_keys_of, resumed_engine
from armorm.features.store import FeatureStore, StoredPlan, part_path, shard_name
from armorm.progress import Advance, progress


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are computed."""

    batch_tokens: int = BATCH_TOKENS  # most tokens of a forward pass: of a tree, or of a plain batch with its padding
    sharing: bool | None = None  # share prefixes; by default if that is exact for the model and pays
    compiled: bool | None = None  # compile layers; by default if that pays
    description: str = "features"  # of the progress line


@dataclass
class Work:
    """Shards of a plan that are not stored yet."""

    store: FeatureStore  # where they go
    plan: StoredPlan
    numbers: list[int]  # of the shards to compute, at least one
    encoded: Sequence[EncodedConversation]  # all requested conversations
    places: Sequence[np.ndarray]  # positions in `encoded` of the conversations of each shard, in order
    owned: Callable[[int], np.ndarray]  # keys of the prompts that a shard stores
    tokens: Mapping[int, int]  # to compute for each of `numbers`
    description: str  # of the progress line
    unit: str


class Workers(Protocol):
    """What computes shards."""

    def choose(
        self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: ExtractionSettings
    ) -> Mapping[str, Any]:
        """Settings of the engine (`Engine.settings`) for conversations in lexicographic order.

        `shared` (n,) is the number of ids that each has in common with the previous one.
        """

    def run(self, work: Work) -> float | None:
        """Compute the shards and write them to the store.

        Returns:
            seconds of forward passes, of all devices together; None if they are not known here.
        """


@dataclass
class LocalWorker:
    """Computes shards in this process: one after another on each device of the backbone."""

    backbone: Backbone

    def choose(
        self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: ExtractionSettings
    ) -> Mapping[str, Any]:
        return choose_engine(
            self.backbone, encoded, shared, settings.batch_tokens, sharing=settings.sharing, compiled=settings.compiled
        ).settings()

    def run(self, work: Work) -> float:
        first = [work.encoded[i] for i in work.places[work.numbers[0]]] if work.numbers else []
        engine = resumed_engine(self.backbone, work.plan.settings, first)
        seconds: list[float] = []
        total = sum(work.tokens.values())
        with progress(work.description, total, work.unit) as advance, _Writer() as writer:

            def compute(engine: Engine, number: int, advance: Advance) -> None:
                conversations = [work.encoded[i] for i in work.places[number]]
                name = shard_name(work.plan.id, number)
                part = part_path(work.store.folder / name)
                before = engine.seconds
                shard = compute_shard(engine, conversations, work.owned(number), advance, part)
                seconds.append(engine.seconds - before)

                def write() -> None:
                    work.store.write_shard(name, **shard)
                    part.unlink(missing_ok=True)

                writer.submit(write)

            run_on(engine, work.numbers, compute, advance)
        return sum(seconds)


class _Writer:
    """Writes in a thread of its own, one shard at a time; a device that has the next one ready waits."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="armorm-writer")
        self._lock = threading.Lock()
        self._last: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def submit(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread; an error of the one before is raised here, of the last one by the block's end."""
        with self._lock:
            if self._last is not None:
                self._last.result()
            self._last = self._pool.submit(write)

    def __exit__(self, kind: Any, *_: object) -> None:
        self._pool.shutdown()
        if kind is None and self._last is not None:
            self._last.result()


T = TypeVar("T")


def run_on(engine: Engine, tasks: Iterable[T], compute: Callable[[Engine, T, Advance], None], advance: Advance) -> None:
    """Compute tasks with an engine, and with a copy of it in a thread for each replica of its backbone.

    A device takes the next task as soon as it has finished one. After an error no further task is begun, and the first
    error is raised.

    Args:
        compute: called with the engine of a device, a task, and a function that counts progress.
    """
    backbone = engine.backbone
    if not backbone.replicas:
        for task in tasks:
            compute(engine, task, advance)
        return
    left, lock, ended = iter(list(tasks)), threading.Lock(), threading.Event()

    def count(tokens: int) -> None:
        with lock:
            advance(tokens)

    def work(engine: Engine) -> None:
        device = engine.backbone.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            while not ended.is_set():
                with lock:
                    task = next(left, None)
                if task is None:
                    return
                done = False
                try:
                    compute(engine, task, count)
                    done = True
                finally:
                    if not done:
                        ended.set()

    for other in backbone.replicas:
        other.sharing_verdict = backbone.sharing_verdict
    with ThreadPoolExecutor(len(backbone.replicas), thread_name_prefix="armorm-device") as pool:
        futures = [pool.submit(work, replace(engine, backbone=other)) for other in backbone.replicas]
        work(engine)
        for future in futures:
            future.result()


def compute_shard(
    engine: Engine,
    conversations: Sequence[EncodedConversation],
    owned: np.ndarray,
    advance: Advance,
    part: Path | None = None,
) -> dict[str, Any]:
    """Features of one shard as arguments of `store.write_shard`.

    Args:
        owned: keys of the prompts that the shard stores.
        part: as of `Engine.features`.
    """
    prompt, response = engine.features(conversations, advance, part)
    keys, first = np.unique(prompt_keys_of(conversations), return_index=True)
    rows = np.sort(first[np.isin(keys, owned)])
    return {
        "response_keys": keys_of(conversations),
        "response_features": response,
        "prompt_keys": prompt_keys_of([conversations[row] for row in rows]),
        "prompt_features": prompt[rows],
        "metadata": {"budget": str(engine.budget), "halvings": str(engine.halvings)} if engine.halvings else {},
    }
