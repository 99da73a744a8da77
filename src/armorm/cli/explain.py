"""`armorm explain`: which objectives make up a score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from armorm.cli import completion
from armorm.cli.input import input_rows, split_rejected
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
from armorm.errors import DataError
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.progress import Terminal, say


def explain(
    input: Annotated[
        str | None,
        Argument(help="Rows as for `armorm score`; in a pipe, standard input.", autocompletion=completion.data),
        Place.INPUT,
    ] = None,
    prompt: Annotated[str | None, Option(help="Text of the prompt.")] = None,
    response: Annotated[str | None, Option(help="Text of the response.")] = None,
    model: ModelOption = DEFAULT_REWARD_MODEL,
    tokens: Annotated[bool, Option(help="Show how the score adds up over the words of the response.")] = False,
    gradient: Annotated[
        bool, Option("--gradient", help="With --tokens: attribute what is read from the last token too (slow).")
    ] = False,
    objective: Annotated[
        str | None,
        Option(
            autocompletion=completion.objectives,
            metavar="NAME",
            help="Show the words, or with --rows the rated rows, of one objective.",
        ),
    ] = None,
    influential: Annotated[
        int, Option("--rows", metavar="N", min=0, help="Show the N rated rows that raise and lower a reward most.")
    ] = 0,
    run: Annotated[
        Path | None, Option(help="With --rows: folder of the training run (default: that of the model).")
    ] = None,
    every: AllOption = False,
    html: HtmlOption = None,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON line per conversation.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Decompose scores into the contribution of each objective, and of each word of the response.

    `--rows N` lists the rated rows of the training run without which the reward of an objective (by default that with
    the largest relative contribution) would change most.

    Example: `armorm explain --prompt "What is 2+2?" --response "4" --tokens`
    """
    require_unused(html, force)
    if (prompt is None) != (response is None) or (input is not None and prompt is not None):
        raise typer.BadParameter("expected an input file, or both --prompt and --response")
    from armorm.explain.token_map import TokenMap
    from armorm.reward_model import ArmoRM

    name = STANDARD_INPUT if input in (None, "-") else str(input)
    rejected: list[tuple[int, str]] = []
    columns: list[Mapping[str, Any]] = [{}]
    if prompt is not None and response is not None:
        rows = [(1, Conversation.from_prompt(prompt, response))]
    else:
        others = {"pairs": "compare", "candidates": "rank"}
        read, rejected = split_rejected(input_rows(input, strict=strict), strict=strict, others=others)
        rows = [(row.number, conversation) for row, conversation in read]
        columns = [row.columns for row, _ in read]
        if not rows:
            raise DataError(rejected[0][1], file=name, row=rejected[0][0])
    rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device)
    if objective is not None:
        rm.objectives.position(objective)
    batch = rm.score([conversation for _, conversation in rows], on_refused="skip")
    refused = [(rows[index][0], reason) for index, reason in batch.rejected]
    if refused and (strict or not len(batch)):
        number, reason = refused[0]
        raise DataError(reason, file=name if prompt is None else "", row=number if prompt is None else None)
    say_rejected([DataError(reason, file=name, row=number) for number, reason in [*rejected, *refused]])
    if rejected or refused:
        say(f"explained {len(batch):,} rows, rejected {len(rejected) + len(refused):,}")
    words = tokens or (objective is not None and not influential)
    by_token: bool | Literal["gradient"] = "gradient" if gradient else words
    explanations = rm.explanations(batch, [found for _, found in rows], tokens=by_token)
    rows, columns = [rows[index] for index in batch.rows], [columns[index] for index in batch.rows]
    for (number, conversation), given, explanation in zip(rows, columns, explanations, strict=True):
        if not as_json and len(explanations) > 1:
            with standard_output():
                Terminal().rule(f"row {number}", align="left")
        table = explanation if objective is None else replace(explanation, tokens=None)
        shown = table.lines(Terminal().width, every=every)
        if explanation.tokens is not None and objective is not None:
            shown += ["", TokenMap(explanation.tokens, objective)]
        found = with_columns({"row": number, **explanation.to_dict()}, given, texts=False)
        if influential:
            moved = rm.influences(conversation, objective or explanation.ranked[0].name, run or "").top(influential)
            found["influences"], shown = moved.to_dict(), [*shown, "", moved]
        emit(found, *shown, as_json=as_json, indent=None)
    if html is not None:
        from armorm.explain.explanation import explanations_page

        parts = [(f"row {number}", found, c) for (number, c), found in zip(rows, explanations, strict=True)]
        write_page(html, explanations_page(parts))
