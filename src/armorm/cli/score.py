"""`armorm score`: scores of conversations, with the columns of their rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from armorm.cli.input import input_rows, row_content, split_rejected
from armorm.cli.options import (
    ApiKeyEnvOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    ModelOption,
    Place,
    ReasoningOption,
    RowsArgument,
    RowsOutput,
    ServerOption,
    StrictOption,
    TextsOption,
    chosen_model,
)
from armorm.cli.output import output_rows, require_outputs, require_unused, resumable, with_columns, write_rejected
from armorm.data.sources import STANDARD_INPUT
from armorm.errors import ArmormError, DataError
from armorm.files import DEFAULT_REWARD_MODEL, output_target
from armorm.progress import progress, say

if TYPE_CHECKING:
    from armorm.conversation import Conversation
    from armorm.data.rows import Row
    from armorm.score_batch import ScoreBatch

    Scoring = Callable[[list[Conversation]], ScoreBatch]

CHUNK_ROWS = 256  # what a run that is interrupted loses at most
SHOWN_REJECTIONS = 5
DETAILS = ("rewards", "gating_weights", "contributions", "uncertainty")


def score(
    context: typer.Context,
    input: RowsArgument = None,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    server: ServerOption = None,
    api_key_env: ApiKeyEnvOption = None,
    output: RowsOutput = None,
    rejected: Annotated[
        Path | None, Option(help="File for rejected rows (default: NAME.rejected.jsonl next to --output)."), Place.FILE
    ] = None,
    normalize: Annotated[bool, Option(help="Standardise scores by the reference data.")] = False,
    details: Annotated[bool, Option(help="Add reward, weight and contribution of every objective.")] = False,
    every_turn: Annotated[
        bool, Option("--every-turn", help="A row for every assistant turn, as if the conversation ended there.")
    ] = False,
    reasoning: ReasoningOption = None,
    texts: TextsOption = True,
    strict: StrictOption = False,
    force: ForceOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "all",
) -> None:
    """Score conversations and write one row for each.

    Input rows are `{"messages": [...]}`, `{"prompt": ..., "response": ...}` or one of the other layouts of
    docs/data.md. Output rows are `{"row": 1, "score": 0.12}` with the input's columns; a column of the same
    name becomes `input_NAME`. `armorm monitor` reads the output of `--details` for the samples of an RL run, by
    their columns `step` and `group`. With `--every-turn` a row has `turn`, the place of the reply in the messages,
    counted from 0. Rows that cannot be scored are reported with the reason and skipped. With
    `--output`, a run that was interrupted resumes from NAME.partial.

    Example: `armorm score responses.csv --output scores.csv --details`

    Example: `armorm score responses.jsonl --server http://rewards:8008`
    """
    beside = output is not None and output_target(output) is not None  # not beside a device or a FIFO
    listing = rejected or (output.with_name(f"{output.stem}.rejected.jsonl") if output and beside else None)
    require_outputs([path for path in (output, listing) if path], inputs=[input] if input else [])
    for path in (output, listing):
        require_unused(path, force, kept_for=output)
    named = chosen_model(context, model, server)
    name = STANDARD_INPUT if input in (None, "-") else input
    rows = input_rows(input, strict=strict)
    options: dict[str, Any] = {"normalize": normalize, "turns": "all" if every_turn else "last"}
    score_chunk, identity = _scoring(named, api_key_env, dtype, device, reasoning, details=details, **options)

    def scored(chunk: list[Row | DataError]) -> dict[str, Any]:
        valid, invalid = split_rejected(chunk, strict=strict, others={"candidates": "rank", "pairs": "compare"})
        batch = score_chunk([conversation for _, conversation in valid])
        refused = [(valid[i][0].number, reason) for i, reason in batch.rejected]
        if strict and refused:
            raise DataError(refused[0][1], file=name, row=refused[0][0])
        cut = set(batch.truncated)
        entries = [
            _entry(valid[index][0], batch, place, cut=index in cut, details=details, texts=texts)
            for place, index in enumerate(batch.rows)
        ]
        return {"rows": entries, "truncated": len(cut), "rejected": invalid + refused}

    count = truncated = 0
    skipped: list[tuple[int, str]] = []
    identity += [normalize, details, every_turn, texts, strict]
    with resumable([output], identity, force=force) as (chunks, [place]), output_rows(place) as write:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            found = chunks.get(map(row_content, chunk), partial(scored, chunk))
            for entry in found["rows"]:
                write(entry)
            count += len(found["rows"])
            truncated += found["truncated"]
            skipped += [(number, reason) for number, reason in found["rejected"]]
        if listing is not None and (skipped or listing.is_file()):  # (with --force, one of an earlier run)
            write_rejected(listing, skipped)
    for number, reason in skipped[:SHOWN_REJECTIONS]:
        say(f"rejected: {name}, row {number}: {reason}")
    cut_prompts = f" ({truncated:,} with a truncated prompt)" if truncated else ""
    place_of_list = f", listed in {listing}" if skipped and listing else ""
    say(f"scored {count:,} rows{cut_prompts}, rejected {len(skipped):,}{place_of_list}")
    if skipped and not count:
        raise ArmormError(f"{name}: no row could be scored")


def _entry(row: Row, batch: ScoreBatch, place: int, *, cut: bool, details: bool, texts: bool) -> dict[str, Any]:
    """A row of the output."""
    entry: dict[str, Any] = {"row": row.number, "score": float(batch.scores[place])}
    if batch.turns is not None:
        entry = {"row": row.number, "turn": int(batch.turns[place]), "score": float(batch.scores[place])}
    if cut:
        entry["truncated"] = True
    if details:
        length = batch.response_tokens
        entry |= {} if length is None else {"length": int(length[place])}
        for label in DETAILS:
            values = getattr(batch, label)
            if values is not None and values.shape[1]:
                entry[label] = dict(zip(batch.names, values[place].tolist(), strict=True))
    return with_columns(entry, row.columns, texts=texts)


def _scoring(
    model: str, api_key_env: str | None, dtype: str, device: str, reasoning: Any, *, details: bool, **options: Any
) -> tuple[Scoring, list[Any]]:
    """A function that scores conversations, in this process or on a server, and what decides its scores."""
    from armorm.client import PoolingClient
    from armorm.evaluation.scorer_names import ScorerName

    parsed = ScorerName.parse(model)
    if parsed is None:
        from armorm.evaluation.scorers import ArmoRMScorer
        from armorm.reward_model import ArmoRM

        rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device, reasoning=reasoning)
        place = rm.backbone.device.type if rm.backbone.workers is None else "ray"
        identity = [ArmoRMScorer(rm).describe(), place, rm.backbone.template.reasoning]
        return partial(rm.score, on_refused="skip", **options), identity
    if parsed.kind != "server":
        raise typer.BadParameter(f"found {model!r}, expected a model of this library or a server (see armorm rank)")
    from armorm.evaluation.server_scorer import server_scorer

    client = parsed.client(api_key_env)
    if reasoning is not None:
        raise typer.BadParameter("--reasoning: the server decides it, expected armorm serve --reasoning")
    if isinstance(client, PoolingClient) and options.pop("turns") == "all":
        raise typer.BadParameter(f"--every-turn: {client.address} scores last turns only, expected armorm serve")
    if isinstance(client, PoolingClient) and client.api != "plugin" and details:
        expected = "expected armorm serve, or vLLM with armorm's plugin"
        raise typer.BadParameter(f"--details: {client.address} sends scores only, {expected}")
    if not isinstance(client, PoolingClient) and not details:
        options["include"] = ()

    def score_chunk(conversations: list[Conversation]) -> ScoreBatch:
        with progress("scores", len(conversations), "conversations") as advance:
            return client.score(conversations, on_refused="skip", advance=advance, **options)

    return score_chunk, [server_scorer(client).describe()]
