"""`armorm rank` and `armorm compare`: which response is better, and which objectives decide."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from armorm.cli.scoring import DeviceOption, DtypeOption, ModelOption
from armorm.conversation import Conversation
from armorm.data.rows import Location, Row, line_rows
from armorm.embedded import EMBEDDED_REWARD_MODEL
from armorm.errors import ConversationError, DataError
from armorm.files import text_file, write_text

_CHUNK = 1024


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
    entries = read_candidates(_rows(input))
    chunk = list(islice(entries, _CHUNK))  # a file that cannot be read is refused before the model is loaded
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
            chunk = list(islice(entries, _CHUNK))
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


def _rows(name: str) -> Any:
    """Rows in order; a broken line stops the reading by name."""
    if name != "-":
        return Location.find(name).rows()
    return _checked(line_rows(sys.stdin.buffer, "standard input"))


def _checked(rows: Any) -> Any:
    for row in rows:
        if not isinstance(row, Row):
            raise row
        yield row
