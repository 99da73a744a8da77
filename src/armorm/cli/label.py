"""`armorm label`: ratings by a language model, and how far they agree with yours."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from armorm.cli.input import input_rows, split_rejected
from armorm.cli.options import ForceOption, JsonOption, Place, RowsArgument, StrictOption
from armorm.cli.output import AGAIN, emit, output_rows, require_outputs, require_unused, table
from armorm.data.sources import STANDARD_INPUT
from armorm.errors import ArmormError, DataError, nearest
from armorm.files import json_text, text_file
from armorm.interruption import keep
from armorm.progress import say
from armorm.saved_chunks import work_folder

if TYPE_CHECKING:
    import numpy as np

    from armorm.client.chat import ChatClient
    from armorm.conversation import Conversation
    from armorm.data.rows import Row
    from armorm.data.rubric import Rubric
    from armorm.evaluation.label_agreement import Measured
    from armorm.evaluation.labelling import ChatRequest, Labels

KEY_VARIABLE = "ARMORM_JUDGE_KEY"
SHOWN_BAD = 5


def label(
    rubric: Annotated[Path, Option(help="Questions and scales, in YAML (docs/labels.md)."), Place.INPUT],
    judge: Annotated[str, Option(metavar="URL", help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1.")],
    data: RowsArgument = None,
    judge_model: Annotated[
        str | None, Option(help="Name of the model at the server (default: the first that it lists).")
    ] = None,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="File of the ratings: .jsonl, .csv, .tsv or .parquet."),
        Place.ROWS,
    ] = None,
    rows: Annotated[
        int | None, Option(help="Label about so many rows only: all rows of some prompts, chosen by content.", min=1)
    ] = None,
    structured: Annotated[
        bool, Option("--structured", help="Ask for JSON by a schema (response_format), which many servers enforce.")
    ] = False,
    connections: Annotated[int, Option(help="Concurrent requests.", min=1)] = 8,
    max_tokens: Annotated[int, Option(help="Most tokens of an answer.", min=1)] = 512,
    temperature: Annotated[float, Option(help="Sampling temperature.", min=0)] = 0.0,
    seed: Annotated[int, Option(help="Random seed of the judge and of the intervals.")] = 0,
    api_key_env: Annotated[
        str | None,
        Option(metavar="NAME", help=f"Environment variable with the key (default: {KEY_VARIABLE}, ARMORM_API_KEY)."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print requests and tokens, and ask nothing.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask on a terminal before the requests are sent.")] = False,
    strict: StrictOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rate replies with a language model, by a rubric.

    Writes a row with the conversation and a rating of each objective, which `armorm extend` and `armorm init` read.
    Where DATA has your own ratings, prints how far the judge agrees with them, and whether it prefers long replies or
    the first of two. Answers are kept in the cache: a run that was interrupted goes on where it ended, and nothing is
    asked twice.

    Example: `armorm label replies.jsonl --rubric rubric.yaml --judge http://127.0.0.1:8000/v1 --output labels.jsonl`

    Example: `armorm label rated.jsonl --rubric rubric.yaml --judge http://127.0.0.1:8000/v1 --dry-run`
    """
    from armorm.client.http import address_fault
    from armorm.data.rubric import Rubric
    from armorm.evaluation.labelling import ask, pair_requests, rating_requests

    if fault := address_fault(judge):
        raise typer.BadParameter(f"--judge: {fault}")
    if output is None and not dry_run:
        raise typer.BadParameter("expected --output FILE for the ratings, or --dry-run")
    questions = Rubric.from_yaml(rubric)
    others = _further_outputs(output, questions)
    require_outputs([path for path in (output, *others.values()) if path], inputs=[data] if data else [])
    for path in (output, *others.values()):
        require_unused(path, force)
    found, rejected = split_rejected(input_rows(data, strict=strict), strict=strict)
    name = STANDARD_INPUT if data in (None, "-") else str(data)
    if not found:
        raise ArmormError(f"{name}: no row could be read, row {rejected[0][0]}: {rejected[0][1]}")
    found = _sample(found, rows)
    conversations = [conversation for _, conversation in found]
    own = _own_ratings(questions, [row for row, _ in found], name)
    ratings = rating_requests(questions, conversations, structured=structured)
    pairs = pair_requests(questions, conversations, structured=structured)
    client = _client(judge, judge_model, api_key_env, connections, max_tokens, temperature, seed)
    requests = [*ratings, *pairs]
    cost = _cost(requests, client, len(conversations), len(pairs) // 2)
    if dry_run:
        emit(cost, _cost_line(cost), f"\nthe first request:\n\n{requests[0].messages[-1]['content']}", as_json=as_json)
        return
    say(_cost_line(cost))
    if sys.stdin is not None and sys.stdin.isatty() and not yes and cost["requests"]:
        typer.confirm("Send them?", abort=True, err=True)
    assert output is not None
    with work_folder(output):
        keep(f"answers are kept in {client.answers}; {AGAIN}")
        labels = ask(questions, requests, client, len(conversations))
        if labels.bad and len(labels.bad) == labels.requests:
            raise ArmormError(f"{client.address}: no answer of {labels.requests:,} is valid; {labels.bad[0].reason}")
        with output_rows(output) as write:
            for place, (row, conversation) in enumerate(found):
                write(_entry(row, conversation, questions, labels.ratings[place]))
        if "pairs" in others:
            _write_pairs(others["pairs"], labels, conversations)
        _write_bad(others["rejected"], labels, rejected, [row for row, _ in found])
    _report(questions, labels, own, conversations, cost, output, others, seed=seed, as_json=as_json, skipped=rejected)


def _further_outputs(output: Path | None, rubric: Rubric) -> dict[str, Path]:
    if output is None:
        return {}
    found = {"rejected": output.with_name(f"{output.stem}.rejected.jsonl")}
    if rubric.pairs is not None:
        found["pairs"] = output.with_name(f"{output.stem}.pairs.jsonl")
    return found


def _sample(found: list[tuple[Row, Conversation]], rows: int | None) -> list[tuple[Row, Conversation]]:
    from armorm.data.ratings import sample_by_prompt

    return [found[i] for i in sample_by_prompt([conversation.prompt_key for _, conversation in found], rows)]


def _client(
    url: str,
    model: str | None,
    api_key_env: str | None,
    connections: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> ChatClient:
    from armorm.client.chat import ChatClient
    from armorm.evaluation.judge import answers_file

    key = os.environ.get(api_key_env or KEY_VARIABLE, "").strip()
    if api_key_env and not key:
        raise ArmormError(f"environment variable {api_key_env} is empty or absent, expected the API key")
    settings: dict[str, Any] = {"connections": connections, "max_tokens": max_tokens, "seed": seed}
    # 0 and 0.0 are one temperature, and one key of the answers.
    client = ChatClient(url, model, api_key=key or None, temperature=temperature or 0, **settings)
    client.answers = answers_file(client.address, client.model)
    return client


def _own_ratings(rubric: Rubric, rows: Sequence[Row], name: str) -> np.ndarray:
    """The user's ratings (n, k), NaN where missing.

    Raises:
        DataError: for a column that the rubric names and no row has, or ratings off the scale.
    """
    import numpy as np

    from armorm.data.ratings import ColumnCheck
    from armorm.data.rejections import Rejections
    from armorm.objectives import Objective

    columns = {column for row in rows for column in row.values}
    own, rejections = np.full((len(rows), len(rubric.objectives)), np.nan), Rejections()
    for place, objective in enumerate(rubric.objectives):
        if objective.column not in columns:
            if objective.column != objective.name:
                raise DataError(f"no row has it{nearest(objective.column, columns)}", file=name, field=objective.column)
            continue
        check = ColumnCheck(objective.column, Objective.rated(objective.name, objective.low, objective.high))
        own[:, place] = [check.read(row, rejections).value for row in rows]
        check.require_scale()
    rejections.report()
    return own


def _cost(requests: Sequence[ChatRequest], client: ChatClient, replies: int, pairs: int) -> dict[str, Any]:
    from armorm.evaluation.labelling import prompt_tokens

    left = client.unanswered([request.messages for request in requests], [request.form for request in requests])
    return {
        "model": client.model,
        "server": client.address,
        "replies": replies,
        "pairs": pairs,
        "requests": len(left),
        "answered": len(requests) - len(left),
        "prompt_tokens": prompt_tokens([requests[place] for place in left]),
        "answer_tokens_at_most": len(left) * client.max_tokens,
    }


def _cost_line(cost: Mapping[str, Any]) -> str:
    compared = f" and {cost['pairs']:,} pairs in both orders" if cost["pairs"] else ""
    return (
        f"{cost['model']}: {cost['requests']:,} requests for {cost['replies']:,} replies{compared} "
        f"({cost['answered']:,} answered before), about {cost['prompt_tokens']:,} prompt tokens, at most "
        f"{cost['answer_tokens_at_most']:,} answer tokens"
    )


def _entry(row: Row, conversation: Conversation, rubric: Rubric, ratings: np.ndarray) -> dict[str, Any]:
    """A row of the ratings file: the conversation, its split, and a cell for each objective."""
    entry: dict[str, Any] = {"row": row.number, "messages": conversation.to_list()}
    entry |= {"tools": list(conversation.tools)} if conversation.tools else {}
    entry |= {"split": row.values["split"]} if row.values.get("split") else {}
    return entry | {each.name: float(rating) for each, rating in zip(rubric.objectives, ratings, strict=True)}


def _write_pairs(path: Path, labels: Labels, conversations: Sequence[Conversation]) -> None:
    """Pairs in which one reply won over both orders, as rows for `--preferences`."""
    with text_file(path) as file:
        for (i, j), verdicts in labels.verdicts.items():
            net = sum(verdict or 0 for verdict in verdicts)
            if net and None not in verdicts:
                chosen, rejected = (conversations[row] for row in ((i, j) if net > 0 else (j, i)))
                prompt = [message.to_dict() for message in chosen.prompt]
                sides = {"chosen": chosen.response, "rejected": rejected.response}
                file.write(json_text({"prompt": prompt, **sides}) + "\n")


def _write_bad(path: Path, labels: Labels, rejected: Sequence[tuple[int, str]], rows: Sequence[Row]) -> None:
    """List rows that could not be read and bad answers; no file without any."""
    entries: list[dict[str, Any]] = [{"row": number, "reason": reason} for number, reason in rejected]
    for bad in labels.bad:
        numbers = [rows[row].number for row in bad.rows]
        place = {"row": numbers[0]} if len(numbers) == 1 else {"rows": numbers}
        entries.append({**place, "objective": bad.objective, "reason": bad.reason})
    if not entries:
        path.unlink(missing_ok=True)
        return
    with text_file(path) as file:
        file.writelines(json_text(entry) + "\n" for entry in entries)


def _report(
    rubric: Rubric,
    labels: Labels,
    own: np.ndarray,
    conversations: Sequence[Conversation],
    cost: Mapping[str, Any],
    output: Path,
    others: Mapping[str, Path],
    *,
    seed: int,
    as_json: bool,
    skipped: Sequence[tuple[int, str]],
) -> None:
    import numpy as np

    from armorm.evaluation.label_agreement import pair_agreement, rating_agreement

    measured = {
        objective.name: rating_agreement(labels.ratings[:, place], own[:, place], conversations, seed=seed)
        for place, objective in enumerate(rubric.objectives)
    }
    compared: list[Measured] = []
    if rubric.pairs is not None:
        named = rubric.pairs.objective
        place = next((i for i, objective in enumerate(rubric.objectives) if objective.name == named), None)
        higher = place is None or rubric.objectives[place].direction != "lower"
        compared = pair_agreement(labels, None if place is None else own[:, place], higher, conversations, seed=seed)
    bad = {name: sum(entry.objective == name for entry in labels.bad) for name in (*measured, "pairs")}
    shown = table("objective", "figure", "value", "95% interval", "n", left=2)
    for name, figures in {**measured, "pairs": compared}.items():
        for figure in figures:
            if not np.isnan(figure.value):
                ends = "" if figure.interval is None else "{:.2f} {:.2f}".format(*figure.interval)
                shown.add_row(name, figure.name, f"{figure.value:.2f}", ends, f"{figure.count:,}")
    given = [*measured, *(["pairs"] if compared else [])]
    counts = ", ".join(f"{name} {bad[name]:,}" for name in given)
    answers = f"{len(labels.bad):,} bad answers of {labels.requests:,} ({counts})"
    where = f", listed in {others['rejected']}" if labels.bad or skipped else ""
    for entry in labels.bad[:SHOWN_BAD]:
        say(f"bad answer: {entry.objective}: {entry.reason}")
    scales = " ".join(f"--objective {objective.scale}" for objective in rubric.objectives)
    result = {
        "cost": dict(cost),
        "answers": labels.requests,
        "bad": {name: bad[name] for name in given},
        "rows_left_out": len(skipped),
        "agreement": {name: {f.name: f.to_dict() for f in figures} for name, figures in measured.items()},
        "pairs": {figure.name: figure.to_dict() for figure in compared},
    }
    unrated = "" if not np.isnan(own).all() else "\nno own ratings in the data: agreement is not measured"
    emit(
        result,
        shown,
        unrated,
        f"\n{answers}{where}; {len(skipped):,} rows skipped",
        f"ratings: {output}; armorm extend MODEL --ratings {output} {scales} --output FOLDER",
        as_json=as_json,
    )
