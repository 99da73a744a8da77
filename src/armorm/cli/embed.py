"""`armorm embed`: conversations in, features in a store."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from armorm.cli.score import DeviceOption, DtypeOption
from armorm.embedded import EMBEDDED_BACKBONE
from armorm.errors import ConversationError, DataError, RecipeError
from armorm.files import plain, write_text

_CHUNK = 4096


def embed(
    input: Annotated[str, typer.Argument(help="JSON lines, Parquet, CSV, a folder or a hub id; rows as for `score`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the feature store.")],
    backbone: Annotated[str, typer.Option("--backbone", "-b", help="Folder, hub id or embedded.")] = EMBEDDED_BACKBONE,
    max_length: Annotated[Optional[int], typer.Option(min=8, help="Most tokens of a conversation.")] = None,
    overflow: Annotated[str, typer.Option(help="What happens to longer ones: skip or truncate_prompt.")] = "skip",
    batch_tokens: Annotated[int, typer.Option(min=64, help="Most tokens of a forward pass.")] = 8192,
    store_dtype: Annotated[
        Optional[str], typer.Option(help="float32 or bfloat16, of a new store; by default the backbone's.")
    ] = None,
    sharing: Annotated[
        Optional[bool], typer.Option(help="Compute what begins alike once; by default where that is exact.")
    ] = None,
    compiled: Annotated[
        Optional[bool], typer.Option("--compile/--no-compile", help="By default where it pays.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: workers on this machine or a cluster.")] = "local",
    workers: Annotated[
        Optional[int], typer.Option(min=1, help="Of the ray engine; by default one for each GPU.")
    ] = None,
    gpus_per_worker: Annotated[Optional[float], typer.Option(min=0, help="By default 1 where there are any.")] = None,
    cpus_per_worker: Annotated[Optional[float], typer.Option(min=0, help="By default an equal share.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute the features of conversations into a store; a run that was stopped goes on where it was.

    With `--engine ray`, the cluster is that of RAY_ADDRESS or of this machine, and DIR one that all its machines see.
    Refused rows are listed in `rejected.jsonl` of the store. `armorm inspect DIR` says what is in it.

    Example: `armorm embed conversations.jsonl --backbone armorm-tiny --output features`
    """
    from armorm.backbone.chat_template import EncodedConversation
    from armorm.backbone.decoder import Backbone
    from armorm.backbone.encoding import encode_rows
    from armorm.data.sources import Location
    from armorm.features.extract import fill_store
    from armorm.features.ray_workers import BackboneSource, RayWorkers
    from armorm.features.store import FeatureStore
    from armorm.features.token_table import TokenTable
    from armorm.features.workers import ExtractionSettings
    from armorm.progress import progress

    if overflow not in ("skip", "truncate_prompt"):
        raise RecipeError(f"--overflow: found {overflow!r}, expected skip or truncate_prompt")
    if engine not in ("local", "ray"):
        raise RecipeError(f"--engine: found {engine!r}, expected local or ray")
    if engine == "local" and (workers, gpus_per_worker, cpus_per_worker) != (None, None, None):
        raise RecipeError("--workers, --gpus-per-worker and --cpus-per-worker belong to --engine ray")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    rows = Location.find(input).rows()
    source = BackboneSource(backbone, dtype, device)
    runner: Backbone | RayWorkers
    if engine == "ray":
        runner = RayWorkers(source, workers, gpus_per_worker, cpus_per_worker)
        template = source.template()
    else:
        runner = source.load()
        template = runner.template
    store = FeatureStore.of(output, runner, store_dtype)
    refused: list[dict[str, Any]] = []

    def chunks() -> Iterator[list[EncodedConversation]]:
        with progress("tokens", 0, "conversations") as advance:
            while chunk := list(islice(rows, _CHUNK)):
                valid = []
                for row in chunk:
                    try:
                        valid.append((row, row.conversation()))
                    except (DataError, ConversationError) as error:
                        refused.append({"row": row.number, "reason": str(error)})
                encoded = encode_rows(template, [c for _, c in valid], max_length, overflow)  # type: ignore[arg-type]
                refused.extend({"row": valid[i][0].number, "reason": reason} for i, reason in encoded.rejected)
                advance(len(chunk))
                yield encoded.encoded

    table = TokenTable.write(output / "tokens", chunks())
    if refused:
        write_text(output / "rejected.jsonl", "".join(json.dumps(entry) + "\n" for entry in refused))
        console.print(f"refused: {len(refused):,} rows, listed in {output / 'rejected.jsonl'}")
    start = time.perf_counter()
    figures = fill_store(runner, table, store, ExtractionSettings(batch_tokens, sharing, compiled))
    seconds = time.perf_counter() - start
    found = {
        "conversations": figures.conversations,
        "unique": figures.unique,
        "stored_before": figures.stored,
        "prompts": figures.prompts,
        "tokens_asked": figures.asked_tokens,
        "tokens_computed": figures.computed_tokens,
        "saving": figures.saving,
        "seconds": seconds,
        "refused": len(refused),
        "sharing": "unknown" if runner.sharing_fault is None else runner.sharing_fault or "exact",
        "store": str(output),
    }
    if as_json:
        print(json.dumps(plain(found), indent=1))
        return
    out = Console(highlight=False, markup=False, soft_wrap=True)
    out.print(str(figures))
    out.print(f"{figures.computed_tokens / max(seconds, 1e-9):,.0f} tokens/s computed; store: {output}")
