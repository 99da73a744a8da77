"""`armorm rank`: the responses to each prompt from best to worst (best of n)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from armorm.cli.input import input_rows, valid_rows
from armorm.cli.options import DeviceOption, DtypeOption, ModelOption, Place, ScorerOption
from armorm.cli.output import lines_to, resumable, write_out
from armorm.errors import DataError
from armorm.files import DEFAULT_REWARD_MODEL, json_text
from armorm.progress import ignore, say

if TYPE_CHECKING:
    from armorm.evaluation.best_of_n import Candidates

CHUNK_PROMPTS = 64  # what a run that is interrupted loses at most
SHOWN_REJECTIONS = 5


def rank(
    input: Annotated[str, Argument(help="File, folder or hub id; - for standard input."), Place.INPUT],
    model: ModelOption = DEFAULT_REWARD_MODEL,
    output: Annotated[
        Path | None, Option("--output", "-o", help="File for the rankings (default: standard output)."), Place.FILE
    ] = None,
    pairs: Annotated[
        Path | None, Option(help="Also write best and worst response as preference pairs."), Place.FILE
    ] = None,
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

    if output is None:
        write_out("")  # a closed output is found before the work
    function = CallableScorer.from_name(scorer) if scorer is not None else None
    candidates = read_candidates(valid_rows(input_rows(input)))
    first = list(islice(candidates, 1))  # an unreadable file is reported before the model is loaded
    if not first:
        raise DataError("found no rows to rank", file=input)
    candidates = chain(first, candidates)
    chosen = function or load_scorer(model, dtype=dtype, device=device)

    def ranked(chunk: list[Candidates]) -> dict[str, Any]:
        found = rank_candidates(chosen, chunk)
        rows = (preference_row(entry, min_margin) for entry in found)
        return {
            "lines": [json_text(entry.to_dict()) + "\n" for entry in found],
            "pairs": [json_text(row) + "\n" for row in rows if row is not None],
            "rejected": [[entry.row, *fault] for entry in found for fault in entry.unscored.items()],
        }

    prompts = written = 0
    rejected: list[tuple[int, int, str]] = []
    with (
        resumable(output or pairs, [chosen.describe(), dtype, device, min_margin]) as chunks,
        lines_to(output) as write,
        lines_to(pairs) if pairs else nullcontext(ignore) as write_pairs,
    ):
        while chunk := list(islice(candidates, CHUNK_PROMPTS)):
            found = chunks.get(map(_content, chunk), partial(ranked, chunk))
            write("".join(found["lines"]))
            write_pairs("".join(found["pairs"]))
            prompts += len(found["lines"])
            written += len(found["pairs"])
            rejected += found["rejected"]
    for row, position, reason in rejected[:SHOWN_REJECTIONS]:
        say(f"rejected: {input}, row {row}, response {position}: {reason}")
    summary = f"ranked {prompts:,} prompts, rejected {len(rejected):,} responses"
    if pairs is not None:
        summary += f"; wrote {written:,} pairs to {pairs}, skipped {prompts - written:,} prompts without a margin"
    say(summary)


def _content(entry: Candidates) -> str:
    """What decides the ranking of a prompt's responses, as one text."""
    keys = [None if conversation is None else conversation.key for conversation in entry.conversations]
    return json_text([entry.row, entry.id, keys, entry.faults])
