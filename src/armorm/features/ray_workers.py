"""Extraction on Ray: the shards of a plan computed by a pool of workers, on one machine or a cluster.

Each worker is a Ray Data actor with its own copy of the backbone and its own devices; a row of the Ray dataset is one
shard, so conversations that share a prompt stay together. Token ids and features do not travel through Ray: workers
read a token table from disk and write their shards to the store, so every machine must see both under the same path.
Ray restarts a worker that dies, and its unfinished shards are computed again; a shard is complete or absent, so it
does not matter when that happens. Workers on machines of one kind, with the same number of threads, write the same
bytes as a single process. Without a store (`RayWorkers.features`), parts of the conversations go through Ray to a pool
of actors, and their features come back.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from armorm.backbone.chat_template import ChatTemplate, EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.locate import backbone_path
from armorm.backbone.readout import Pooling, PromptPooling
from armorm.errors import ArmormError, BackboneError, MissingExtraError, StoreError
from armorm.features.engine import ExtractionPlan, Rows, resumed_engine
from armorm.features.extract import extract
from armorm.features.store import KEY, differing_parts, part_path, shard_name, write_shard
from armorm.features.token_table import TokenTable
from armorm.features.workers import ExtractionSettings, LocalWorker, Work, compute_shard
from armorm.progress import progress, say

_MOST_BLOCKS = 4096
# Machines may be lost, but a shard that kills every worker has to end the run.
ATTEMPTS = 5


class Source(Protocol):
    """Where a worker gets its backbone; a dataclass of plain data, which is sent to workers."""

    name: str  # of a model; a folder must be one that every machine sees

    def load(self) -> Backbone:
        """The backbone."""

    def template(self) -> ChatTemplate:
        """Its chat template."""


@dataclass(frozen=True)
class BackboneSource:
    """Arguments of `Backbone.load`."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    layer: int | float | None = None
    pooling: Pooling = "last"
    prompt_pooling: PromptPooling = "gate"
    revision: str | None = None
    trust_remote_code: bool = False

    def load(self) -> Backbone:
        return Backbone.load(**vars(self))

    def template(self) -> ChatTemplate:
        """The chat template, without loading the weights; a `BackboneError` for a model without a tokenizer."""
        from transformers import AutoTokenizer

        path, options = backbone_path(self.name, self.revision), {"trust_remote_code": self.trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=self.revision, **options)
        except (OSError, ValueError) as error:
            raise BackboneError(f"backbone {self.name}: {error}") from error
        return ChatTemplate(tokenizer)


@dataclass
class RayWorkers:
    """`Workers` on Ray: connects to the cluster of `RAY_ADDRESS` or of this machine, or starts Ray here.

    Raises:
        MissingExtraError: if Ray is not installed.
        BackboneError: for more workers than the cluster has resources for.
    """

    source: Any  # `Source` of the backbone that each worker loads
    workers: int | None = None  # by default one per GPU of the cluster, or one per machine if it has no GPUs
    gpus: float | None = None  # per worker; by default one if the cluster has any
    cpus: float | None = None  # cores per worker; by default an equal share
    sharing_fault: str | None = field(default=None, init=False)  # as of the backbone, None until a worker tested it
    _pool: list[Any] | None = field(default=None, init=False)  # actors that compute in memory

    def __post_init__(self) -> None:
        ray = _started()
        if Path(self.source.name).exists():  # (workers run in another folder)
            self.source = replace(self.source, name=str(Path(self.source.name).resolve()))
        have = ray.cluster_resources()
        if self.gpus is None:
            self.gpus = 1.0 if have.get("GPU") else 0.0
        if self.workers is None:
            machines = sum(1 for node in ray.nodes() if node["Alive"])
            self.workers = max(1, int(have.get("GPU", 0) // self.gpus) if self.gpus else machines)
        if self.cpus is None:
            self.cpus = max(1.0, have.get("CPU", 1.0) // self.workers)
        for kind, each in (("GPU", self.gpus), ("CPU", self.cpus)):
            if each * self.workers > have.get(kind, 0):
                raise BackboneError(
                    f"{self.workers} workers with {each:g} {kind} each: the cluster has {have.get(kind, 0):g}; "
                    "expected fewer workers, or less for each"
                )

    @property
    def fingerprint_parts(self) -> Mapping[str, str]:
        """As of the backbone."""
        return self._description[0]

    @property
    def hidden_size(self) -> int:
        """d."""
        return self._description[1]

    @property
    def response_size(self) -> int:
        """Size of a response feature."""
        return self._description[2]

    def choose(
        self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: ExtractionSettings
    ) -> Mapping[str, Any]:
        work: Any = list(encoded)
        if isinstance(encoded, Rows) and isinstance(encoded.encoded, TokenTable):  # (read there, not sent)
            work = str(encoded.encoded.folder.resolve()), encoded.rows
        chosen, self.sharing_fault = self._head_answer("choose", work, shared, settings)
        if self.sharing_fault:
            say(f"{self.source.name}: prefixes are not shared, batches are plain: {self.sharing_fault}")
        return chosen

    def run(self, work: Work) -> None:
        """Compute the shards and make them readable in the store.

        Raises:
            StoreError: for a store of another backbone than the workers', or if shards are not visible here.
            BackboneError: for a shard that cannot be computed, or whose workers keep dying.
        """

        differing = differing_parts(work.store.fingerprint, self.fingerprint_parts)
        if differing:
            raise StoreError(
                f"{work.store.folder}: has another backbone than the workers load ({', '.join(differing)} differ); "
                "expected the same weights, dtype, tokenizer and template (set the dtype if machines differ)"
            )
        self._release()
        total = sum(work.tokens.values())
        with _table(work) as table, progress(work.description, total, work.unit) as advance:
            rows = [
                {
                    "number": number,
                    "name": shard_name(work.plan.id, number),
                    "places": np.asarray(work.places[number], np.int64).tobytes(),
                    "owned": np.asarray(work.owned(number), KEY).tobytes(),
                }
                for number in work.numbers
            ]
            with _counter(advance) as counter:
                # (Absolute: workers run in another folder.)
                folders = str(table.folder.resolve()), str(work.store.folder.resolve())
                worker = (self.source, *folders, work.store.dtype, work.plan.settings, counter)
                for name, fault in self._computed(rows, worker):
                    if fault:
                        say(f"{self.source.name}: prefixes are not shared in {name}: {fault}")
                    work.store.adopt(name)
        left = [number for number in work.numbers if not work.store.has_shard(shard_name(work.plan.id, number))]
        if left:
            raise StoreError(
                f"{work.store.folder}: {len(left)} of {len(work.numbers)} shards that workers wrote are not here; "
                "expected a folder that every machine of the cluster sees under the same path"
            )

    def features(
        self,
        backbone: Backbone,
        rows: Sequence[EncodedConversation],
        plan: ExtractionPlan,
        settings: ExtractionSettings,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response features (n, ...) of planned conversations, which travel through Ray in parts.

        Raises:
            BackboneError: for a part that cannot be computed.
        """
        import ray
        from ray.exceptions import RayError
        from ray.util import ActorPool

        prompt = np.empty((len(rows), backbone.hidden_size), np.float32)
        response = np.empty((len(rows), backbone.response_size), np.float32)
        parts = plan.parts(max(2, self.workers or 1), settings.batch_tokens)
        if self._pool is None:
            self._release()
            resources = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": -1, "max_task_retries": ATTEMPTS}
            actor = ray.remote(_Head).options(**resources)
            self._pool = [actor.remote(self.source) for _ in range(self.workers or 1)]
        tokens = [sum(len(row) for row in rows[part]) for part in parts]
        with progress(settings.description, sum(tokens), "tokens") as advance:
            work = ((number, list(rows[part])) for number, part in enumerate(parts))
            try:
                for number, *found in ActorPool(self._pool).map_unordered(
                    lambda actor, task: actor.features.remote(*task, settings), work
                ):
                    prompt[parts[number]], response[parts[number]] = found
                    advance(tokens[number])
            except RayError as error:
                raise _own(error) from None
        return prompt, response

    def _computed(self, rows: list[dict[str, Any]], worker: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
        """Name of each shard as it is finished, and why its prefixes were not shared.

        `worker` are the arguments of `_Worker`.
        """
        import ray
        from ray.exceptions import RayError

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_BLOCKS)).map(
            _Worker,
            fn_constructor_args=worker,
            compute=ray.data.ActorPoolStrategy(size=min(self.workers or 1, len(rows))),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        try:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
                yield from zip(map(str, batch["name"]), map(str, batch["fault"]), strict=True)
        except RayError as error:
            raise _own(error) from None

    def _release(self) -> None:
        """End the actors, whose devices others need."""
        import ray

        for actor in [*(self._pool or []), *([self.__dict__.pop("_head")] if "_head" in self.__dict__ else [])]:
            ray.kill(actor)
        self._pool = None

    def _head_answer(self, method: str, *arguments: Any) -> Any:
        """The answer of the first worker, which is kept until others need its devices."""
        import ray
        from ray.exceptions import RayError

        if "_head" not in self.__dict__:
            self._release()
        try:
            return ray.get(getattr(self._head, method).remote(*arguments))
        except RayError as error:
            raise _own(error) from None

    @cached_property
    def _description(self) -> tuple[Mapping[str, str], int, int]:
        return self._head_answer("describe")

    @cached_property
    def _head(self) -> Any:
        import ray

        return ray.remote(_Head).options(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=-1).remote(self.source)


class _Head:
    """A worker that answers with numbers: describes the backbone, chooses its engine, computes features in memory."""

    def __init__(self, source: BackboneSource) -> None:
        self.backbone = source.load()

    def describe(self) -> tuple[Mapping[str, str], int, int]:
        """Fingerprint parts and sizes of prompt and response features."""
        return self.backbone.fingerprint_parts, self.backbone.hidden_size, self.backbone.response_size

    def features(
        self, number: int, conversations: list[EncodedConversation], settings: ExtractionSettings
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """Number, prompt and response features of a part."""
        options: dict[str, Any] = {"sharing": settings.sharing, "compiled": settings.compiled}
        found = extract(self.backbone, conversations, batch_tokens=settings.batch_tokens, **options)
        return number, found.prompt[found.prompt_index], found.response

    def choose(
        self, work: list[EncodedConversation] | tuple[str, np.ndarray], shared: np.ndarray, settings: ExtractionSettings
    ) -> tuple[Mapping[str, Any], str | None]:
        """Engine settings for conversations, or for rows of a token table; and why prefixes are not shared."""
        encoded = work if isinstance(work, list) else Rows(TokenTable(Path(work[0])), work[1])
        chosen = LocalWorker(self.backbone).choose(encoded, shared, settings)
        return chosen, self.backbone.sharing_fault


class _Worker:
    """Computes the shard of one row of the Ray dataset."""

    def __init__(
        self, source: BackboneSource, table: str, store: str, dtype: str, settings: Mapping[str, Any], counter: Any
    ) -> None:
        self.store, self.dtype, self.settings, self.counter = Path(store), dtype, dict(settings), counter
        self.backbone, self.encoded = source.load(), TokenTable(Path(table))
        self.engine: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import ray

        number, name = int(row["number"]), str(row["name"])
        path = self.store / name
        if not path.exists():  # (else a worker before this one wrote it, and died)
            if ray.get(self.counter.begin.remote(number)) > ATTEMPTS:
                raise BackboneError(
                    f"{name}: {ATTEMPTS} workers died on it; expected fewer batch_tokens or more memory a worker"
                )
            conversations = list(Rows(self.encoded, np.frombuffer(row["places"], np.int64)))
            if self.engine is None:
                self.engine = resumed_engine(self.backbone, self.settings, conversations)
            done = 0

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                self.counter.set.remote(number, done)

            part = part_path(path)
            shard = compute_shard(self.engine, conversations, np.frombuffer(row["owned"], KEY), advance, part)
            write_shard(path, self.dtype, **shard)
            part.unlink(missing_ok=True)
        return {"name": name, "fault": self.backbone.sharing_fault or ""}


class _Counter:
    """Tokens computed of each shard, and how often each was started."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        """Count a start of a shard; returns the number of starts."""
        self.begun[number] += 1
        return self.begun[number]

    def set(self, number: int, tokens: int) -> None:
        self.tokens[number] = tokens

    def total(self) -> int:
        return sum(self.tokens.values())


@contextmanager
def _counter(advance: Any) -> Iterator[Any]:
    """An actor that workers report to, polled once a second."""
    import ray
    from ray.exceptions import RayError

    actor = ray.remote(_Counter).options(num_cpus=0).remote()
    stop = threading.Event()

    def follow() -> None:
        shown, last = 0, False
        while not last:
            last = stop.wait(1.0)
            try:
                found = ray.get(actor.total.remote())
            except RayError:  # not a reason to fail the run
                return
            advance(max(0, found - shown))
            shown = max(shown, found)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join()
        ray.kill(actor)


@contextmanager
def _table(work: Work) -> Iterator[TokenTable]:
    """The conversations on disk: the table they come from, or a temporary one next to the shards."""
    if isinstance(work.encoded, TokenTable):
        yield work.encoded
        return
    folder = work.store.folder / f"tokens-{work.plan.id}"
    try:
        yield TokenTable.write(folder, [work.encoded])
    finally:
        for path in sorted(folder.glob("*")):
            path.unlink()
        folder.rmdir()


def _started() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtraError("the ray engine needs Ray, expected: pip install 'armorm[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning")
    return ray


def _own(error: BaseException) -> ArmormError:
    """An error of a worker as an armorm error: its own if it raised one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ArmormError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return BackboneError(f"a worker failed: {lines[-1]}")
