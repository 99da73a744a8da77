"""`armorm rank`: the responses to each prompt from best to worst (best of n)."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from armorm.cli.input import input_rows
from armorm.cli.options import (
    ApiKeyEnvOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    ModelOption,
    Place,
    RowsArgument,
    RowsOutput,
    ScorerOption,
    ServerOption,
    StrictOption,
    TextsOption,
    chosen_model,
)
from armorm.cli.output import output_rows, require_unused, resumable, with_columns
from armorm.data.sources import STANDARD_INPUT
from armorm.errors import DataError
from armorm.files import DEFAULT_REWARD_MODEL, json_text
from armorm.progress import ignore, say

if TYPE_CHECKING:
    from armorm.data.candidates import Candidates

CHUNK_PROMPTS = 64  # what a run that is interrupted loses at most
SHOWN_REJECTIONS = 5


def rank(
    context: typer.Context,
    input: RowsArgument = None,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    output: RowsOutput = None,
    pairs: Annotated[
        Path | None, Option(help="Also write best and worst response as preference pairs."), Place.ROWS
    ] = None,
    min_margin: Annotated[
        float | None,
        Option(
            min=0.0,
            help="Write only pairs with a margin above this (default: a calibrated probability of 0.6, or else 0.25 "
            "standard deviations of reference scores).",
        ),
    ] = None,
    min_probability: Annotated[
        float | None, Option(min=0.5, max=1.0, help="Write only pairs with at least this calibrated probability.")
    ] = None,
    answers_only: Annotated[
        bool,
        Option(
            "--answers-only",
            help="Write no pair whose chosen response refuses or gives no answer; by default it is marked "
            "chosen_gives_no_answer.",
        ),
    ] = False,
    server: ServerOption = None,
    api_key_env: ApiKeyEnvOption = None,
    scorer: ScorerOption = None,
    texts: TextsOption = True,
    strict: StrictOption = False,
    force: ForceOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "all",
) -> None:
    """Rank the responses to each prompt (best of n) and write one JSON line per prompt.

    Input rows are `{"prompt": ..., "responses": [...]}`, preference pairs, or single responses as for `armorm
    score`, which are grouped by prompt. Output lines hold a verdict on the best two (positions count from 0), the
    order, the scores, what decides between them, the responses that refuse or give no answer (`no_answer`), and the
    columns of the input (lists where they differ between the responses). `--pairs` leaves out prompts whose margin
    is within the noise, and says how many. `--model` also takes a sequence classifier, a DPO policy or a judge (see
    `armorm evaluate --help`).

    Example: `armorm rank samples.jsonl --output ranked.jsonl --pairs dpo.jsonl`
    """
    from armorm.data.candidates import read_candidates
    from armorm.evaluation.best_of_n import LeftOut, PairRule, preference_row
    from armorm.evaluation.best_of_n import rank as rank_candidates
    from armorm.evaluation.scorer import CallableScorer, PairJudge
    from armorm.evaluation.scorers import load_scorer

    for path in (output, pairs):
        require_unused(path, force, kept_for=output or pairs)
    if pairs is None and (answers_only or min_margin is not None or min_probability is not None):
        raise typer.BadParameter("--min-margin, --min-probability and --answers-only choose pairs: expected --pairs")
    named = chosen_model(context, model, server, scorer)
    name = STANDARD_INPUT if input in (None, "-") else input
    function = CallableScorer.from_name(scorer) if scorer is not None else None
    unread: list[DataError] = []
    candidates = read_candidates(input_rows(input, strict=strict), None if strict else unread)
    first = list(islice(candidates, 1))  # data without a prompt to rank are reported before the model is loaded
    if not first:
        raise unread[0]
    candidates = chain(first, candidates)
    chosen = function or load_scorer(named, dtype=dtype, device=device, api_key_env=api_key_env)
    if isinstance(chosen, PairJudge):
        raise typer.BadParameter(f"--model: {model} compares two responses, expected one that scores each")
    rule = PairRule.of(chosen, min_margin=min_margin, min_probability=min_probability, answers_only=answers_only)

    def ranked(chunk: list[Candidates]) -> dict[str, Any]:
        found = rank_candidates(chosen, chunk)
        rejected = [(entry.row, *fault) for entry in found for fault in entry.unscored.items()]
        if strict and rejected:
            row, position, reason = rejected[0]
            raise DataError(reason, file=name, row=row, field=f"responses[{position}]")
        rows = [preference_row(entry, rule) for entry in found]
        return {
            "rows": [with_columns(entry.to_dict(), entry.columns, texts=texts) for entry in found],
            "pairs": [row for row in rows if not isinstance(row, LeftOut)],
            "left_out": [row.value for row in rows if isinstance(row, LeftOut)],
            "rejected": rejected,
        }

    prompts = written = unanswered = 0
    left_out: Counter[str] = Counter()
    rejected: list[tuple[int, int, str]] = []
    identity = [chosen.describe(), dtype, device, asdict(rule), texts, strict]
    with (
        resumable([output, pairs], identity, force=force) as (chunks, [place, place_of_pairs]),
        output_rows(place) as write,
        output_rows(place_of_pairs) if pairs else nullcontext(ignore) as write_pair,
    ):
        while chunk := list(islice(candidates, CHUNK_PROMPTS)):
            found = chunks.get(map(_content, chunk), partial(ranked, chunk))
            for row in found["rows"]:
                write(row)
            for row in found["pairs"]:
                write_pair(row)
            prompts += len(found["rows"])
            written += len(found["pairs"])
            unanswered += sum(row["chosen_gives_no_answer"] for row in found["pairs"])
            left_out.update(found["left_out"])
            rejected += found["rejected"]
    for error in unread[:SHOWN_REJECTIONS]:
        say(f"rejected: {error}")
    for number, position, reason in rejected[:SHOWN_REJECTIONS]:
        say(f"rejected: {name}, row {number}, response {position}: {reason}")
    say(f"ranked {prompts:,} prompts, rejected {len(rejected) + len(unread):,} responses")
    if pairs is not None:
        why = f" ({rule.basis})" if rule.basis else ""
        say(f"wrote {written:,} pairs with a margin above {rule.least:.3g}{why} to {pairs}")
        for reason, count in left_out.most_common():
            say(f"skipped {count:,} prompts: {reason}")
        if unanswered:
            say(f"in {unanswered:,} pairs the chosen response gives no answer: chosen_gives_no_answer (--answers-only)")


def _content(entry: Candidates) -> str:
    """What decides the output for a prompt, as one text."""
    keys = [None if conversation is None else conversation.key for conversation in entry.conversations]
    return json_text([entry.row, entry.id, keys, entry.faults, entry.rows, entry.columns])
