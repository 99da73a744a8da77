"""`armorm score`: scores of conversations, as JSON lines."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from armorm.cli.input import input_or_example, row_content, split_rejected
from armorm.cli.options import DeviceOption, DtypeOption, ModelOption, Place
from armorm.cli.output import lines_to, require_outputs, resumable, write_out, write_rejected
from armorm.data.rows import Row
from armorm.errors import ArmormError, DataError
from armorm.files import DEFAULT_REWARD_MODEL, json_text, output_target
from armorm.progress import say

CHUNK_ROWS = 256  # what a run that is interrupted loses at most
COPIED_COLUMNS = ("id", "step", "group")  # `armorm monitor` reads the last two
SHOWN_REJECTIONS = 5


def score(
    input: Annotated[
        str | None, Argument(help="File, folder, hub id, or - for standard input (default: an example)."), Place.INPUT
    ] = None,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    output: Annotated[
        Path | None, Option("--output", "-o", help="File for the scores (default: standard output)."), Place.FILE
    ] = None,
    rejected: Annotated[
        Path | None, Option(help="File for rejected rows (default: NAME.rejected.jsonl next to --output)."), Place.FILE
    ] = None,
    normalize: Annotated[bool, Option(help="Standardise scores by the reference data.")] = False,
    details: Annotated[bool, Option(help="Add reward, weight and contribution of every objective.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Score conversations and write one JSON line per row.

    Input rows are `{"messages": [...]}` or `{"prompt": ..., "response": ...}`; output lines are `{"row": 1, "score":
    0.12}`. Columns `id`, `step` and `group` are copied, so `armorm monitor` can read the output of `--details` for the
    samples of an RL run. Rows that cannot be scored are reported with the reason and skipped. With `--output`, a run
    that was interrupted resumes from NAME.partial.

    Example: `armorm score responses.jsonl --output scores.jsonl --details`
    """
    from armorm.evaluation.scorers import ArmoRMScorer
    from armorm.reward_model import ArmoRM

    beside = output is not None and output_target(output) is not None  # not beside a device or a FIFO
    listing = rejected or (output.with_name(f"{output.stem}.rejected.jsonl") if output and beside else None)
    require_outputs([path for path in (output, listing) if path], inputs=[input] if input else [])
    if output is None:
        write_out("")  # a closed output is found before the work
    rows = input_or_example(input)
    rows = chain(list(islice(rows, 1)), rows)  # an unreadable file is reported before the model is loaded
    rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device)

    def scored(chunk: list[Row | DataError]) -> dict[str, Any]:
        valid, invalid = split_rejected(chunk)
        batch = rm.score([conversation for _, conversation in valid], normalize=normalize, on_refused="skip")
        entries = []
        for place, index in enumerate(batch.rows):
            row = valid[index][0]
            entry: dict[str, Any] = {"row": row.number, "score": float(batch.scores[place])}
            entry |= {name: row.values[name] for name in COPIED_COLUMNS if row.values.get(name) is not None}
            if index in batch.truncated:
                entry["truncated"] = True
            if details:
                length = batch.response_tokens
                entry |= {} if length is None else {"length": int(length[place])}
                for label in ("rewards", "gating_weights", "contributions", "uncertainty"):
                    values = getattr(batch, label)
                    if values is not None:
                        entry[label] = dict(zip(batch.names, values[place].tolist(), strict=True))
            entries.append(json_text(entry) + "\n")
        reasons = invalid + [(valid[i][0].number, reason) for i, reason in batch.rejected]
        return {"lines": entries, "truncated": len(set(batch.truncated)), "rejected": reasons}

    count = truncated = 0
    skipped: list[tuple[int, str]] = []
    identity = [ArmoRMScorer(rm).describe(), rm.backbone.device.type, normalize, details]
    with resumable(output, identity) as chunks, lines_to(output) as write:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            found = chunks.get(map(row_content, chunk), partial(scored, chunk))
            write("".join(found["lines"]))
            count += len(found["lines"])
            truncated += found["truncated"]
            skipped += [(number, reason) for number, reason in found["rejected"]]
        if skipped and listing is not None:
            write_rejected(listing, skipped)
    for number, reason in skipped[:SHOWN_REJECTIONS]:
        say(f"rejected: {input}, row {number}: {reason}")
    cut_prompts = f" ({truncated:,} with a truncated prompt)" if truncated else ""
    place_of_list = f", listed in {listing}" if skipped and listing else ""
    say(f"scored {count:,} rows{cut_prompts}, rejected {len(skipped):,}{place_of_list}")
    if skipped and not count:
        raise ArmormError(f"{input}: no row could be scored")
