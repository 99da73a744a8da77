"""`armorm leaderboard`: results of several models in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from armorm.cli.options import JsonOption, Place
from armorm.cli.output import WIDTH, emit
from armorm.errors import nearest
from armorm.files import write_json, write_text
from armorm.progress import say

SUFFIXES = (".html", ".md", ".svg", ".json")


def leaderboard(
    results: Annotated[
        list[Path], Argument(help="Result files of armorm evaluate, of one or several benchmarks."), Place.INPUT
    ],
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            help="Also write the table with its plot (.html), the table (.md, .json), or the plot "
            "of a benchmark (.svg).",
        ),
        Place.FILE,
    ] = None,
    level: Annotated[str, Option(help="Metrics to show: overall, sections or subsets.")] = "overall",
    as_json: JsonOption = False,
) -> None:
    """Compare the results of several models: values, 95% intervals, and paired tests against the best.

    All models are measured on the examples that their results of a benchmark share. The best model is that of the
    benchmark's first overall metric; the test exchanges two models on whole prompts.

    Example: `armorm leaderboard ours.json theirs.json judge.json --output leaderboard.html`
    """
    from armorm.evaluation.leaderboard import leaderboards
    from armorm.evaluation.metrics import LEVELS
    from armorm.evaluation.results import Results
    from armorm.evaluation.tables import leaderboard_tables
    from armorm.report.leaderboard_page import leaderboard_markdown, leaderboard_page, leaderboard_plot

    if level not in LEVELS:
        raise typer.BadParameter(
            f"--level: found {level!r}{nearest(level, LEVELS)}, expected one of {', '.join(LEVELS)}"
        )
    if output is not None and output.suffix not in SUFFIXES:
        raise typer.BadParameter(f"--output: found {output.name!r}, expected a name ending in {', '.join(SUFFIXES)}")
    loaded = [Results.load(path) for path in results]
    names = [str(found.model["name"]) for found in loaded]
    # Two results of one name are told apart by their files.
    labels = [
        f"{name} ({path.stem})" if names.count(name) > 1 else name for name, path in zip(names, results, strict=True)
    ]
    boards = leaderboards(loaded, labels, level=next(known for known in LEVELS if known == level))
    emit([board.to_dict() for board in boards], leaderboard_tables(boards), as_json=as_json, width=WIDTH)
    if output is None:
        return
    if output.suffix == ".json":
        write_json(output, [board.to_dict() for board in boards])
    elif output.suffix == ".svg":
        if len(boards) > 1:
            raise typer.BadParameter(f"--output: a plot is of one benchmark, found results of {len(boards)}")
        write_text(output, leaderboard_plot(boards[0]))
    else:
        write_text(output, leaderboard_page(boards) if output.suffix == ".html" else leaderboard_markdown(boards))
    say(f"wrote {output}")
