"""`armorm rank`: the responses to each prompt from best to worst (best of n)."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from armorm.cli.input import input_rows, valid_rows
from armorm.cli.options import DeviceOption, DtypeOption, ModelOption, ScorerOption
from armorm.errors import DataError
from armorm.files import DEFAULT_REWARD_MODEL, json_text, text_file
from armorm.progress import say

CHUNK_PROMPTS = 1024
SHOWN_REJECTIONS = 5


def rank(
    input: Annotated[str, Argument(help="File, folder or hub id; - for standard input.")],
    model: ModelOption = DEFAULT_REWARD_MODEL,
    output: Annotated[
        Path | None, Option("--output", "-o", help="File for the rankings (default: standard output).")
    ] = None,
    pairs: Annotated[Path | None, Option(help="Also write best and worst response as preference pairs.")] = None,
    min_margin: Annotated[float, Option(min=0.0, help="Write only pairs with a margin above this.")] = 0.0,
    scorer: ScorerOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Rank the responses to each prompt (best of n) and write one JSON line per prompt.

    Input rows are `{"prompt": ..., "responses": [...]}`, or single responses as for `armorm score`, which are grouped
    by prompt. Output lines hold the order, the scores and the objectives that decide between the best two.

    Example: `armorm rank samples.jsonl --output ranked.jsonl --pairs dpo.jsonl`
    """
    from armorm.evaluation.best_of_n import preference_row, read_candidates
    from armorm.evaluation.best_of_n import rank as rank_candidates
    from armorm.evaluation.scorer import CallableScorer
    from armorm.evaluation.scorers import load_scorer

    function = CallableScorer.from_name(scorer) if scorer is not None else None
    candidates = read_candidates(valid_rows(input_rows(input)))
    first = list(islice(candidates, 1))  # an unreadable file is reported before the model is loaded
    if not first:
        raise DataError("found no rows to rank", file=input)
    candidates = chain(first, candidates)
    chosen = function or load_scorer(model, dtype=dtype, device=device)
    prompts = written = rejected = 0
    with (
        text_file(output) if output else nullcontext(sys.stdout) as sink,
        text_file(pairs) if pairs else nullcontext(None) as pair_sink,
    ):
        while chunk := list(islice(candidates, CHUNK_PROMPTS)):
            for entry in rank_candidates(chosen, chunk):
                sink.write(json_text(entry.to_dict()) + "\n")
                prompts += 1
                for position, reason in entry.unscored.items():
                    rejected += 1
                    if rejected <= SHOWN_REJECTIONS:
                        say(f"rejected: {input}, row {entry.row}, response {position}: {reason}")
                row = preference_row(entry, min_margin)
                if pair_sink is not None and row is not None:
                    pair_sink.write(json_text(row) + "\n")
                    written += 1
    summary = f"ranked {prompts:,} prompts, rejected {rejected:,} responses"
    if pairs is not None:
        summary += f"; wrote {written:,} pairs to {pairs}, skipped {prompts - written:,} prompts without a margin"
    say(summary)
