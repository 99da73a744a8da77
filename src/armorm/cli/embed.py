"""`armorm embed`: backbone features of conversations, in a feature store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.input import input_rows, split_rejected
from armorm.cli.options import DeviceOption, DtypeOption, JsonOption, Place, StrictOption, parse_layer
from armorm.cli.output import AGAIN, emit, write_rejected
from armorm.errors import RecipeError
from armorm.files import DEFAULT_BACKBONE
from armorm.interruption import keep
from armorm.locks import locked
from armorm.progress import progress, say

if TYPE_CHECKING:
    from armorm.backbone.chat_template import EncodedConversation

CHUNK_ROWS = 4096


def embed(
    input: Annotated[
        str,
        Argument(
            help="File, folder or hub id with rows as for `armorm score`; - for standard input.",
            autocompletion=completion.data,
        ),
        Place.INPUT,
    ],
    output: Annotated[Path, Option("--output", "-o", help="Folder of the feature store."), Place.FOLDER],
    backbone: Annotated[
        str,
        Option(
            "--backbone", "-b", help="Folder, hub id, GGUF file, or armorm-small.", autocompletion=completion.backbones
        ),
    ] = DEFAULT_BACKBONE,
    layer: Annotated[
        str | None, Option(help="Layer that is read: 0 is the embeddings, 0.5 half way (default: the last, normed).")
    ] = None,
    pooling: Annotated[str, Option(help="Response feature: last, mean or last+mean.")] = "last",
    prompt_pooling: Annotated[str, Option(help="Prompt feature: gate or mean.")] = "gate",
    max_length: Annotated[int | None, Option(min=8, help="Maximum tokens per conversation.")] = None,
    overflow: Annotated[str, Option(help="For longer conversations: skip or truncate_prompt.")] = "skip",
    batch_tokens: Annotated[int, Option(min=64, help="Maximum tokens per forward pass.")] = 8192,
    store_dtype: Annotated[str | None, Option(help="Dtype of a new store: float32 or bfloat16.")] = None,
    sharing: Annotated[bool | None, Option(help="Compute shared prefixes once (default: where faster).")] = None,
    compiled: Annotated[
        bool | None, Option("--compile/--no-compile", help="Use torch.compile (default: if faster).")
    ] = None,
    engine: Annotated[str, Option(help="local or ray.")] = "local",
    workers: Annotated[int | None, Option(min=1, help="Ray workers (default: one per GPU).")] = None,
    gpus_per_worker: Annotated[float | None, Option(min=0, help="GPUs per Ray worker (default: 1).")] = None,
    cpus_per_worker: Annotated[float | None, Option(min=0, help="CPUs per Ray worker.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "all",
    strict: StrictOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the features of conversations into a feature store; an interrupted run resumes.

    With `--engine ray`, the cluster is given by RAY_ADDRESS (default: this machine), and all its machines must see the
    output folder. Rejected rows are listed in `rejected.jsonl` of the store. `armorm inspect DIR` summarises a store.

    Example: `armorm embed conversations.jsonl --backbone armorm-small --output features`
    """
    from armorm.backbone.encoding import encode_rows
    from armorm.features.extract import fill_store
    from armorm.features.ray_workers import BackboneSource, RayWorkers
    from armorm.features.store import FeatureStore
    from armorm.features.token_table import TokenTable
    from armorm.features.workers import ExtractionSettings

    choices = {
        "overflow": (overflow, "skip", "truncate_prompt"),
        "engine": (engine, "local", "ray"),
        "pooling": (pooling, "last", "mean", "last+mean"),
        "prompt-pooling": (prompt_pooling, "gate", "mean"),
    }
    for name, (given, *expected) in choices.items():
        if given not in expected:
            raise RecipeError(f"--{name}: found {given!r}, expected {' or '.join(expected)}")
    if engine == "local" and (workers, gpus_per_worker, cpus_per_worker) != (None, None, None):
        raise RecipeError("--workers, --gpus-per-worker and --cpus-per-worker require --engine ray")
    rows = input_rows(input, strict=strict)
    keep(f"finished features are kept in {output}; {AGAIN}")
    source = BackboneSource(backbone, dtype, device, parse_layer(layer), pooling, prompt_pooling)  # type: ignore[arg-type]
    runner = source.load() if engine == "local" else RayWorkers(source, workers, gpus_per_worker, cpus_per_worker)
    template = source.template() if isinstance(runner, RayWorkers) else runner.template
    store = FeatureStore.of(output, runner, store_dtype)
    rejected: list[tuple[int, str]] = []

    def encoded_chunks() -> Iterator[list[EncodedConversation]]:
        with progress("tokens", 0, "conversations") as advance:
            while chunk := list(islice(rows, CHUNK_ROWS)):
                valid, invalid = split_rejected(chunk, strict=strict)
                encoded = encode_rows(template, [c for _, c in valid], max_length, overflow)  # type: ignore[arg-type]
                rejected.extend(invalid + [(valid[i][0].number, reason) for i, reason in encoded.rejected])
                advance(len(chunk))
                yield encoded.encoded

    devices = 1 if isinstance(runner, RayWorkers) else 1 + len(runner.replicas)
    began = time.perf_counter()
    with locked(output / "tokens"):
        conversations = TokenTable.write(output / "tokens", encoded_chunks())
        if rejected:
            write_rejected(output / "rejected.jsonl", rejected)
            say(f"rejected {len(rejected):,} rows, listed in {output / 'rejected.jsonl'}")
        start = time.perf_counter()
        plan = fill_store(runner, conversations, store, ExtractionSettings(batch_tokens, sharing, compiled))
        seconds = time.perf_counter() - start
    idle = None
    if plan.model_seconds is not None:
        idle = 1 - plan.model_seconds / (devices * (time.perf_counter() - began))
    found = {
        "conversations": plan.conversations,
        "unique": plan.unique,
        "stored_before": plan.stored,
        "prompts": plan.prompts,
        "tokens_asked": plan.asked_tokens,
        "tokens_computed": plan.computed_tokens,
        "saving": plan.saving,
        "seconds": seconds,
        "reading_seconds": start - began,
        "idle_share": idle,
        "refused": len(rejected),
        "sharing": "unknown" if runner.sharing_fault is None else runner.sharing_fault or "exact",
        "store": str(output),
    }
    speed = f"{plan.computed_tokens / max(seconds, 1e-9):,.0f} tokens/s computed"
    if idle is not None:
        speed += f", model idle {idle:.0%} of the time (reading and tokenising {start - began:.1f} s)"
    emit(found, str(plan), f"{speed}; store: {output}", as_json=as_json)
