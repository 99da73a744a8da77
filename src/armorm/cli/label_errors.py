"""`armorm inspect RUN --labels`: the ratings of a training run that disagree most with all others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from armorm.cli.output import emit
from armorm.errors import ArmormError
from armorm.files import json_text, text_file
from armorm.progress import say

SHOWN = 20
_LONGEST = 70  # characters of a text that are shown


def inspect_labels(folder: Path, objectives: Sequence[str], output: Path | None, as_json: bool) -> None:
    """Print the first ratings, and write all of them to a file of JSON lines.

    Raises:
        StoreError: for a folder that is not of a training run with its work.
        ObjectiveError: for an objective that no row of the run rates.
    """
    from armorm.evaluation.audits.label_errors import label_errors
    from armorm.heads.rated_record import RatedRun

    if output is not None and output.is_dir():
        raise ArmormError(f"{output}: is a folder, expected a file name")
    found = label_errors(RatedRun.open(folder), objectives)
    if output is not None:
        with text_file(output) as sink:
            sink.writelines(json_text(entry) + "\n" for entry in found.entries())
        say(f"wrote {output}: {len(found):,} ratings, the one that disagrees most first")
    first = list(found.entries(SHOWN))
    shown: list[Text] = []
    for entry in first:
        deviation = (f"{entry['deviations']:+5.1f} sd", "bold")
        numbers = f"   rated {entry['rating']:g}, expected {entry['expected']:.2f}"
        shown.append(
            Text.assemble(deviation, numbers, f"   {entry['objective']}, {entry['source']} row {entry['row']}")
        )
        texts = (" ".join(entry[name].split()) for name in ("prompt", "response"))
        shown.append(
            Text("   " + " / ".join(text[:_LONGEST] for text in texts), "dim", no_wrap=True, overflow="ellipsis")
        )
    title = f"{len(found):,} ratings; those that disagree most with what all others say:"
    emit(first, title, *shown, as_json=as_json)
