"""Builds the development data sets from clones of public repositories, in the schema of docs/data.md.

python tools/build_data.py --clones FOLDER --output FOLDER [--only NAME ...] [--clone] [--compare FOLDER]

FOLDER/truthfulqa, FOLDER/DiaSafety, ... are the clones; `--clone` adds missing ones. The files depend on the clones alone,
byte for byte. `--compare` prints how many rows agree with those of another folder, and exits with 1 if any differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from armorm.progress import progress
from data_sources.rows import SourceError, compared, write_rows
from data_sources.sources import SOURCES, benchmark_prompts, build, clone, repositories_of


def main(argv: Sequence[str] | None = None) -> None:
    """Build the data sets; exits with 1 after an error or a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clones", type=Path, required=True, help="folder with one clone per repository")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write ratings/, preferences/ and benchmarks/ to"
    )
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="NAME", help="data sets")
    parser.add_argument("--clone", action="store_true", help="clone missing repositories with git")
    parser.add_argument("--compare", type=Path, help="folder of the same layout to compare with")
    arguments = parser.parse_args(argv)
    try:
        differs = run(arguments)
    except SourceError as error:
        sys.exit(f"build_data: {error}")
    sys.exit(int(differs))


def run(arguments: argparse.Namespace) -> bool:
    """Build and compare; returns whether a compared file differs."""
    needed = dict.fromkeys(repository for name in arguments.only for repository in repositories_of(name))
    if arguments.clone:
        with progress("cloning", len(needed), "repositories") as advance:
            for repository in needed:
                clone(repository, arguments.clones)
                advance(1)
    filtered = any(SOURCES[name][0] != "benchmarks" for name in arguments.only)
    apart = benchmark_prompts(arguments.clones) if filtered else set()
    differs = False
    with progress("building", len(arguments.only), "data sets") as advance:
        for name in arguments.only:
            file = Path(SOURCES[name][0]) / f"{name}.jsonl.gz"
            count = write_rows(arguments.output / file, build(name, arguments.clones, apart))
            line = f"{file.as_posix():40}{count:8,} rows"
            if arguments.compare and not (arguments.compare / file).is_file():
                line += f"  no {arguments.compare / file}"
                differs = True
            elif arguments.compare:
                equal, missing, extra = compared(arguments.output / file, arguments.compare / file)
                line += f"{equal:8,} equal {missing:6,} missing {extra:6,} extra"
                differs = differs or bool(missing or extra)
            print(line, flush=True)
            advance(1)
    return differs


if __name__ == "__main__":
    main()
