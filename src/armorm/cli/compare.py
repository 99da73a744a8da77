"""`armorm compare`: which of two responses is better, and why."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.input import input_rows
from armorm.cli.options import (
    AllOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    HtmlOption,
    ModelOption,
    Place,
    StrictOption,
)
from armorm.cli.output import emit, require_unused, say_rejected, standard_output, with_columns, write_page
from armorm.conversation import Conversation
from armorm.data.sources import STANDARD_INPUT
from armorm.errors import ConversationError, DataError
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.progress import Terminal, say

if TYPE_CHECKING:
    from armorm.data.candidates import Candidates
    from armorm.evaluation.scorer import Scorer
    from armorm.explain.response_comparison import ResponseComparison

EXAMPLE = """echo '{"prompt": "What is 2+2?", "responses": ["4", "5, I think."]}' | armorm compare"""


def compare(
    first: Annotated[
        str | None,
        Argument(
            metavar="A|FILE",
            help="Text of the first response; without --prompt, rows with two responses: a file, folder or hub id, or "
            "- (or nothing, in a pipe) for standard input.",
            autocompletion=completion.data,
        ),
        Place.INPUT,
    ] = None,
    second: Annotated[str | None, Argument(metavar="B", help="Text of the second response.")] = None,
    prompt: Annotated[str | None, Option(help="Text of the prompt.")] = None,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    tokens: Annotated[bool, Option(help="Show which sentences of each response carry the margin.")] = False,
    every: AllOption = False,
    html: HtmlOption = None,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON line per comparison.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Compare two responses to a prompt and show which objectives decide.

    The rows of a file hold a prompt and two responses (`responses`, or `response_a` and `response_b`), or `chosen` and
    `rejected` (the chosen one is A), or one response each, two of them to the same prompt.

    Example: `armorm compare --prompt "What is 2+2?" "4" "5, I think."`

    Example: `armorm compare pairs.jsonl --json`
    """
    from armorm.data.candidates import Candidates, read_candidates

    require_unused(html, force)
    unread: list[DataError] = []
    name = STANDARD_INPUT if first in (None, "-") else str(first)
    if prompt is not None:
        if first is None or second is None:
            raise typer.BadParameter("--prompt: expected the texts of two responses after it")
        sides = [Conversation.from_prompt(prompt, text, side) for text, side in ((first, "A"), (second, "B"))]
        entries = iter([Candidates(1, None, list(sides))])
    elif second is not None:
        raise typer.BadParameter("found two texts, expected their --prompt too, or a file of rows")
    else:
        given = input_rows(first, strict=strict, example=EXAMPLE)
        entries = _pairs(read_candidates(given, None if strict else unread), name, unread)
        start = next(entries, None)  # rows without a pair are reported before a model is loaded
        if start is None:
            raise unread[0]
        entries = chain([start], entries)
    from armorm.evaluation.scorers import ArmoRMScorer, load_scorer
    from armorm.explain.response_comparison import comparisons_page

    scorer = load_scorer(model, dtype=dtype, device=device)
    if tokens and not isinstance(scorer, ArmoRMScorer):
        raise typer.BadParameter(f"--tokens needs an armorm reward model, found {model}")
    pages, count, marked, agree, close = [], 0, 0, 0, 0
    for entry in entries:
        conversations = [conversation for conversation in entry.conversations if conversation is not None]
        try:
            found = _compared(scorer, conversations, tokens=tokens)
        except ConversationError as fault:
            if prompt is not None:
                raise
            unread.append(DataError(fault.problem, file=name, row=entry.row, field=fault.field))
            continue
        if not as_json and prompt is None:
            with standard_output():
                Terminal().rule(f"row {entry.row}", align="left")
        place = {} if prompt is not None else {"row": entry.row}
        shown = with_columns({**place, **found.to_dict()}, entry.columns, texts=False)
        emit(shown, *found.lines(Terminal().width, every=every), as_json=as_json, indent=None)
        count += 1
        marked += entry.chosen is not None
        agree += entry.chosen is not None and found.better == "AB"[entry.chosen]
        close += found.too_close
        if html is not None:
            pages.append(("" if prompt is not None else f"row {entry.row}", found, conversations))
    if strict and unread:
        raise unread[0]
    say_rejected(unread)
    if prompt is None:
        preferred = f", the chosen response scores higher in {agree:,} of {marked:,}" if marked else ""
        say(f"compared {count:,} pairs{preferred}, {close:,} too close to call, rejected {len(unread):,}")
    if not count:
        raise unread[0]
    if html is not None:
        write_page(html, comparisons_page(pages))


def _pairs(entries: Iterator[Candidates], name: str, unread: list[DataError]) -> Iterator[Candidates]:
    """Those with two valid responses; an error is added to `unread` for each of the others."""
    for entry in entries:
        for position, fault in list(entry.faults.items())[:1]:
            unread.append(DataError(fault, file=name, row=entry.row, field=f"responses[{position}]"))
        if not entry.faults and len(entry.conversations) == 2:
            yield entry
        elif not entry.faults:
            found = f"found {len(entry.conversations)} responses to this prompt, expected 2 to compare"
            unread.append(DataError(f"{found} (armorm rank orders any number)", file=name, row=entry.row))


def _compared(scorer: Scorer, conversations: list[Conversation], *, tokens: bool) -> ResponseComparison:
    """The comparison of two conversations by a model of this library or any other scorer."""
    from armorm.evaluation.scorers import ArmoRMScorer
    from armorm.explain.response_comparison import compare_scores

    if isinstance(scorer, ArmoRMScorer):
        return scorer.rm.compare(*conversations, tokens=tokens)
    same = conversations[0].key == conversations[1].key
    scored = scorer.score(conversations[:1] if same else conversations)
    if scored.unscored:
        row, reason = sorted(scored.unscored.items())[0]
        raise ConversationError(reason, "AB"[row])
    model, scale = str(scorer.describe()["name"]), getattr(scorer, "margin_scale", None)
    return compare_scores(float(scored.scores[0]), float(scored.scores[-1]), model, margin_scale=scale)
