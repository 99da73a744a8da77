"""`armorm score` and `armorm explain`: conversations in, scores and their reasons out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from armorm.conversation import Conversation
from armorm.data.rows import Row, line_rows
from armorm.data.sources import Location
from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.errors import ArmormError, ConversationError, DataError
from armorm.files import text_file, write_text

if TYPE_CHECKING:
    from armorm.score_batch import ScoreBatch

_CHUNK = 2048

_KEPT = ("id", "step", "group")  # columns that go along; the last two are what `armorm monitor` reads

# What the commands run on where nothing is given: two answers to one question.
_EXAMPLE = [
    {"prompt": "How do I get a wine stain out of a cotton shirt?", "response": reply}
    for reply in (
        "Dab it with cold water and a little dish soap, let it stand for ten minutes, then rinse and wash as usual.",
        "Who cares? Throw it away, stupid.",
    )
]

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Folder, hub id, or the embedded armorm-tiny-rm.")]

DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]

DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def score(
    input: Annotated[
        Optional[str], typer.Argument(help="JSON lines (or Parquet); - is standard input; an example if absent.")
    ] = None,
    model: ModelOption = EMBEDDED_REWARD_MODEL,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="File for the scores; standard output if absent.")
    ] = None,
    rejected: Annotated[
        Optional[Path],
        typer.Option(help="File for refused rows with their reasons; by default OUTPUT with .rejected.jsonl."),
    ] = None,
    normalize: Annotated[bool, typer.Option(help="Scores in standard deviations from the reference mean.")] = False,
    details: Annotated[
        bool, typer.Option(help="Rewards, weights and contributions of every objective as well.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Score conversations, one a line: `{"messages": [...]}`, or `{"prompt": ..., "response": ...}`.

    Writes one JSON line for each: `{"row": 1, "score": 0.12}`, with the row's `id`, `step` and `group` where it has
    them: samples of an RL run, scored with --details, are a log for `armorm monitor`. Rows that cannot be scored are
    reported with the reason, and listed in the rejected file; the others keep their number.

    Example: `armorm score responses.jsonl --output scores.jsonl --details`
    """
    from armorm.reward_model import ArmoRM

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    rows = _rows(input, console)
    first = next(rows, None)  # a file that cannot be read is refused before the model is loaded
    rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device)
    count = truncated = 0
    refused: list[tuple[int, str]] = []
    with text_file(output) if output else nullcontext(sys.stdout) as sink:
        chunk = [] if first is None else [first, *islice(rows, _CHUNK - 1)]
        while chunk:
            valid, faults = _valid(chunk)
            batch = rm.score([conversation for _, conversation in valid], normalize=normalize, on_refused="skip")
            refused += faults + [(valid[i][0].number, reason) for i, reason in batch.rejected]
            cut = set(batch.truncated)
            truncated += len(cut)
            for place, index in enumerate(batch.rows):
                row = valid[index][0]
                entry: dict[str, Any] = {"row": row.number, "score": float(batch.scores[place])}
                entry |= {name: row.values[name] for name in _KEPT if row.values.get(name) is not None}
                if index in cut:
                    entry["truncated"] = True
                if details:
                    entry |= _details(batch, place)
                sink.write(json.dumps(entry, ensure_ascii=False) + "\n")
            count += len(batch)
            chunk = list(islice(rows, _CHUNK))
    for number, reason in refused[:5]:
        console.print(f"refused: {input}, row {number}: {reason}")
    where = ""
    listing = rejected or (output.with_name(f"{output.stem}.rejected.jsonl") if output else None)
    if refused and listing is not None:
        write_text(
            listing, "".join(json.dumps({"row": number, "reason": reason}) + "\n" for number, reason in sorted(refused))
        )
        where = f", listed in {listing}"
    shortened = f"; {truncated:,} lost the beginning of a prompt that was too long" if truncated else ""
    console.print(f"scored {count:,} rows{shortened}, refused {len(refused):,}{where}")
    if refused and not count:
        raise ArmormError(f"{input}: no row could be scored")


def explain(
    input: Annotated[
        Optional[str],
        typer.Argument(help="JSON lines, as for score; or use --prompt and --response; an example if absent."),
    ] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Text of the prompt.")] = None,
    response: Annotated[Optional[str], typer.Option(help="Text of the response.")] = None,
    model: ModelOption = EMBEDDED_REWARD_MODEL,
    html: Annotated[Optional[Path], typer.Option(help="Write the explanation as a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line a conversation.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Take scores apart: which objectives count for this prompt, and what each adds or takes away.

    Example: `armorm explain --prompt "What is 2+2?" --response "4"`
    """
    if (prompt is None) != (response is None) or (input is not None and prompt is not None):
        raise typer.BadParameter("expected an input file, or both --prompt and --response")
    from armorm.reward_model import ArmoRM

    rows: list[tuple[int, Conversation]] = []
    if prompt is not None and response is not None:
        rows.append((1, Conversation.from_prompt(prompt, response)))
    else:
        for row in _rows(input, Console(stderr=True, highlight=False)):
            if isinstance(row, DataError):
                raise row
            rows.append((row.number, row.conversation()))
    rm = ArmoRM.from_pretrained(model, dtype=dtype, device=device)
    batch = rm.score([conversation for _, conversation in rows], on_refused="skip")
    if batch.rejected:
        index, reason = batch.rejected[0]
        raise DataError(reason, file=input or "", row=rows[index][0] if input else None)
    explanations = rm.explanations(batch)
    console = Console(highlight=False)
    for (number, _), explanation in zip(rows, explanations, strict=True):
        if as_json:
            print(json.dumps({"row": number, **explanation.to_dict()}, ensure_ascii=False))
        else:
            if len(explanations) > 1:
                console.rule(f"row {number}", align="left")
            console.print(explanation)
    if html is not None:
        from armorm.explain.explanation import explanations_page

        labels = [f"row {number}" for number, _ in rows]
        conversations = [conversation for _, conversation in rows]
        write_text(html, explanations_page(list(zip(labels, explanations, conversations, strict=True))))
        Console(stderr=True, highlight=False).print(f"wrote {html}", markup=False)


def _rows(name: str | None, console: Console) -> Iterator[Row | DataError]:
    if name is None:
        console.print("no input given, so here is an example (--help says more):")
        for example in _EXAMPLE:
            console.print(f"  {example['prompt']} / {example['response']}")
        return iter([Row("example", number, dict(example)) for number, example in enumerate(_EXAMPLE, 1)])
    if name == "-":
        return line_rows(sys.stdin.buffer, "standard input")
    return Location.find(name).rows_or_faults()


def _valid(chunk: list[Row | DataError]) -> tuple[list[tuple[Row, Conversation]], list[tuple[int, str]]]:
    """Rows with their conversations, and (row, reason) of the refused ones."""

    valid: list[tuple[Row, Conversation]] = []
    faults: list[tuple[int, str]] = []
    for row in chunk:
        if isinstance(row, DataError):
            faults.append((row.row or 0, row.problem))
            continue
        try:
            valid.append((row, row.conversation()))
        except DataError as error:
            faults.append((row.number, f"{error.field}: {error.problem}" if error.field else error.problem))
    return valid, faults


def _details(batch: ScoreBatch, place: int) -> dict[str, Any]:
    columns = {"rewards": batch.rewards, "gating_weights": batch.gating_weights, "contributions": batch.contributions}
    if batch.uncertainty is not None:
        columns["uncertainty"] = batch.uncertainty
    length = {} if batch.response_tokens is None else {"length": int(batch.response_tokens[place])}
    return length | {
        label: dict(zip(batch.names, values[place].tolist(), strict=True)) for label, values in columns.items()
    }


_RANK_CHUNK = 1024


def rank(
    input: Annotated[str, typer.Argument(help="JSON lines (or Parquet); - is standard input.")],
    model: ModelOption = EMBEDDED_REWARD_MODEL,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="File for the rankings; standard output if absent.")
    ] = None,
    pairs: Annotated[
        Optional[Path],
        typer.Option(help="Also write best against worst as preference rows: prompt, chosen, rejected, margin."),
    ] = None,
    min_margin: Annotated[float, typer.Option(min=0.0, help="Leave out pairs whose margin is not above it.")] = 0.0,
    scorer: Annotated[
        Optional[str],
        typer.Option(help="module:function instead of a model: a list of conversations in, a list of numbers out."),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Put the responses to each prompt in order: best of n, with the objectives that decide.

    A row holds `{"prompt": ..., "responses": [...]}`, or one response as for `armorm score`; those are grouped by
    prompt. Writes one JSON line a prompt: the order, the scores, and what decides between the first two.

    Example: `armorm rank samples.jsonl --output ranked.jsonl --pairs dpo.jsonl`
    """
    from armorm.evaluation.best_of_n import preference_row, read_candidates
    from armorm.evaluation.best_of_n import rank as ranked_prompts
    from armorm.evaluation.scorers import CallableScorer, load_scorer

    function = CallableScorer.from_name(scorer) if scorer is not None else None
    entries = read_candidates(_candidate_rows(input))
    chunk = list(islice(entries, _RANK_CHUNK))  # a file that cannot be read is refused before the model is loaded
    if not chunk:
        raise DataError("found no rows to rank", file=input)
    chosen = function or load_scorer(model, dtype=dtype, device=device)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    prompts = written = refused = 0
    with (
        text_file(output) if output else nullcontext(sys.stdout) as sink,
        text_file(pairs) if pairs else nullcontext(None) as pair_sink,
    ):
        while chunk:
            for entry in ranked_prompts(chosen, chunk):
                sink.write(json.dumps(entry.to_dict(), ensure_ascii=False) + "\n")
                prompts += 1
                for position, reason in entry.refused.items():
                    refused += 1
                    if refused <= 5:
                        console.print(f"refused: {input}, row {entry.row}, response {position}: {reason}")
                row = preference_row(entry, min_margin)
                if pair_sink is not None and row is not None:
                    pair_sink.write(json.dumps(row, ensure_ascii=False) + "\n")
                    written += 1
            chunk = list(islice(entries, _RANK_CHUNK))
    said = f"ranked {prompts:,} prompts, refused {refused:,} responses"
    if pairs is not None:
        said += f"; wrote {written:,} pairs to {pairs}, left out {prompts - written:,} prompts without a margin"
    console.print(said)


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Text of one response.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Text of the other.")],
    prompt: Annotated[str, typer.Option(help="Text of the prompt.")],
    model: ModelOption = EMBEDDED_REWARD_MODEL,
    html: Annotated[Optional[Path], typer.Option(help="Write the comparison as a page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Say which of two responses is better, and which objectives decide.

    Example: `armorm compare --prompt "What is 2+2?" "4" "5, I think."`
    """
    from armorm.evaluation.scorers import ArmoRMScorer, load_scorer
    from armorm.explain.response_comparison import contrast_of_scores

    conversations = [_conversation(prompt, text, name) for text, name in ((first, "A"), (second, "B"))]
    scorer = load_scorer(model, dtype=dtype, device=device)
    if isinstance(scorer, ArmoRMScorer):
        found = scorer.rm.compare(*conversations)
    else:
        same = conversations[0].key == conversations[1].key
        scored = scorer.score(conversations[:1] if same else conversations)
        if scored.refused:
            row, reason = sorted(scored.refused.items())[0]
            raise ConversationError(reason, "AB"[row])
        found = contrast_of_scores(float(scored.scores[0]), float(scored.scores[-1]), str(scorer.describe()["name"]))
    if as_json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        Console(highlight=False).print(found)
    if html is not None:
        write_text(html, found.to_html(conversations))
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"wrote {html}", markup=False)


def _conversation(prompt: str, text: str, name: str) -> Conversation:
    return Conversation.from_prompt(prompt, text, name)


def _candidate_rows(name: str) -> Any:
    """Rows in order; a broken line stops the reading by name."""
    if name != "-":
        return Location.find(name).rows()
    return _checked(line_rows(sys.stdin.buffer, "standard input"))


def _checked(rows: Any) -> Any:
    for row in rows:
        if not isinstance(row, Row):
            raise row
        yield row
