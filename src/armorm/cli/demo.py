"""`armorm demo`: the whole method on a generated corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from armorm.cli.options import JsonOption, Place
from armorm.cli.output import AGAIN, emit
from armorm.interruption import keep


def demo(
    output: Annotated[Path, Option("--output", "-o", help="Folder for data, model and findings."), Place.FOLDER] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, Option(help="Random seed of the corpus and of training.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train on a generated corpus with known effects and check that they are found.

    Uses the embedded backbone and no network; takes about a minute on two cores.

    Example: `armorm demo --output runs/demo`
    """
    from armorm.training.demo import findings_table, run_demo

    keep(f"finished work is kept in {output}; {AGAIN}")
    findings = run_demo(output, seed)
    emit(findings, findings_table(findings), as_json=as_json)
