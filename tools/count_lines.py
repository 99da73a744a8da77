"""Count the lines of the package: modules, code, docstrings, comments and blank lines, by package.

python tools/count_lines.py [--source src/armorm] [--modules]
"""

from __future__ import annotations

import argparse
import ast
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

KINDS = ("lines", "code", "docstrings", "comments", "blank")


def count(path: Path) -> Counter[str]:
    """Lines of one file by kind. A line is a docstring's, a comment's, blank, or else code."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    with path.open("rb") as file:
        comments = {token.start[0] for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT}
    kinds: Counter[str] = Counter(lines=len(lines))
    for number, line in enumerate(lines, 1):
        if number in docstrings:
            kinds["docstrings"] += 1
        elif not line.strip():
            kinds["blank"] += 1
        elif number in comments and line.lstrip().startswith("#"):
            kinds["comments"] += 1
        else:
            kinds["code"] += 1
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=Path(__file__).parents[1] / "src" / "armorm")
    parser.add_argument("--modules", action="store_true", help="one row for each module")
    arguments = parser.parse_args()
    table: dict[str, Counter[str]] = defaultdict(Counter)
    total: Counter[str] = Counter()
    for path in sorted(arguments.source.rglob("*.py")):
        place = path.relative_to(arguments.source)
        row = place.as_posix() if arguments.modules else place.parts[0] if len(place.parts) > 1 else "(root)"
        counted = count(path) + Counter(modules=path.stat().st_size > 0)
        table[row] += counted
        total += counted
    columns = ("modules", *KINDS)
    width = max(map(len, table)) + 2
    print("".ljust(width) + "".join(column.rjust(12) for column in columns))
    for name, row in [*sorted(table.items()), ("total", total)]:
        print(name.ljust(width) + "".join(f"{row[column]:12,}" for column in columns))


if __name__ == "__main__":
    main()
