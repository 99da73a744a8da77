"""`armorm score`: scores of conversations, as JSON lines."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from armorm.cli.input import input_or_example, split_rejected
from armorm.cli.options import DeviceOption, DtypeOption, ModelOption
from armorm.cli.output import write_rejected
from armorm.errors import ArmormError
from armorm.files import DEFAULT_REWARD_MODEL, json_text, text_file
from armorm.progress import say

CHUNK_ROWS = 2048
COPIED_COLUMNS = ("id", "step", "group")  # `armorm monitor` reads the last two
SHOWN_REJECTIONS = 5


def score(
    input: Annotated[
        str | None, Argument(help="File, folder, hub id, or - for standard input (default: an example).")
    ] = None,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    output: Annotated[
        Path | None, Option("--output", "-o", help="File for the scores (default: standard output).")
    ] = None,
    rejected: Annotated[
        Path | None, Option(help="File for rejected rows (default: NAME.rejected.jsonl next to --output).")
    ] = None,
    normalize: Annotated[bool, Option(help="Standardise scores by the reference data.")] = False,
    details: Annotated[bool, Option(help="Add reward, weight and contribution of every objective.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Score conversations and write one JSON line per row.

    Input rows are `{"messages": [...]}` or `{"prompt": ..., "response": ...}`; output lines are `{"row": 1, "score":
    0.12}`. Columns `id`, `step` and `group` are copied, so `armorm monitor` can read the output of `--details` for the
    samples of an RL run. Rows that cannot be scored are reported with the reason and skipped.

    Example: `armorm score responses.jsonl --output scores.jsonl --details`
    """
    from armorm.reward_model import ArmoRM

    rows = input_or_example(input)
    rows = chain(list(islice(rows, 1)), rows)  # an unreadable file is reported before the model is loaded
    rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device)
    count = truncated = 0
    skipped: list[tuple[int, str]] = []
    with text_file(output) if output else nullcontext(sys.stdout) as sink:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            valid, invalid = split_rejected(chunk)
            batch = rm.score([conversation for _, conversation in valid], normalize=normalize, on_refused="skip")
            skipped += invalid + [(valid[i][0].number, reason) for i, reason in batch.rejected]
            cut = set(batch.truncated)
            for place, index in enumerate(batch.rows):
                row = valid[index][0]
                entry: dict[str, Any] = {"row": row.number, "score": float(batch.scores[place])}
                entry |= {name: row.values[name] for name in COPIED_COLUMNS if row.values.get(name) is not None}
                if index in cut:
                    entry["truncated"] = True
                if details:
                    length = batch.response_tokens
                    entry |= {} if length is None else {"length": int(length[place])}
                    for label in ("rewards", "gating_weights", "contributions", "uncertainty"):
                        values = getattr(batch, label)
                        if values is not None:
                            entry[label] = dict(zip(batch.names, values[place].tolist(), strict=True))
                sink.write(json_text(entry) + "\n")
            count += len(batch.scores)
            truncated += len(cut)
    for number, reason in skipped[:SHOWN_REJECTIONS]:
        say(f"rejected: {input}, row {number}: {reason}")
    listing = rejected or (output.with_name(f"{output.stem}.rejected.jsonl") if output else None)
    if skipped and listing is not None:
        write_rejected(listing, skipped)
    cut_prompts = f" ({truncated:,} with a truncated prompt)" if truncated else ""
    place_of_list = f", listed in {listing}" if skipped and listing else ""
    say(f"scored {count:,} rows{cut_prompts}, rejected {len(skipped):,}{place_of_list}")
    if skipped and not count:
        raise ArmormError(f"{input}: no row could be scored")
