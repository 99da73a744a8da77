"""Writes `docs/licences.md`: the licence of every package that armorm and its extras require, from package metadata.

Run it in an environment in which every extra is installed.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from armorm.files import write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "docs" / "licences.md"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_LONGEST = 60


def requirements() -> dict[str, str]:
    """Direct requirements: name, and `core` or the extra that needs it; development extras are skipped."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {_name(line): "core" for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        if extra in ("dev", "full"):
            continue
        for line in lines:
            if not line.startswith("armorm["):
                needed.setdefault(_name(line), f"[{extra}]")
    return needed


def closure(roots: dict[str, str]) -> dict[str, str]:
    """Direct and indirect requirements, each with the first that needs it; packages that are not installed are skipped."""
    found: dict[str, str] = {}
    waiting = list(roots.items())
    while waiting:
        name, needed_by = waiting.pop(0)
        if name in found:
            continue
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found[name] = needed_by
        waiting += [(_name(line), needed_by) for line in lines if "extra ==" not in line]
    return found


def licence(name: str) -> str:
    """What a package states: its expression, its classifiers, or the first line of its licence."""
    about: Any = metadata.metadata(name)
    expression = about.get("License-Expression")
    classifiers = [
        line.split(" :: ")[-1] for line in about.get_all("Classifier") or () if line.startswith("License ::")
    ]
    stated = (about.get("License") or "").strip().splitlines()
    text = expression or ", ".join(dict.fromkeys(classifiers)) or (stated[0] if stated else "")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def page() -> str:
    """The page."""
    lines = [
        "# Licences",
        "",
        "armorm is licensed under Apache-2.0. It does not include the packages below; they are installed with it. This table is",
        "written by `tools/licences.py` from package metadata. *Needed by*: the core, or the extra that requires the package.",
        "",
        "| package | licence | needed by |",
        "|---|---|---|",
    ]
    for name, needed_by in sorted(closure(requirements()).items()):
        lines.append(f"| {name} | {licence(name) or 'not stated'} | {needed_by} |")
    return "\n".join(lines) + "\n"


def _name(line: str) -> str:
    found = _NAME.match(line)
    assert found is not None, line
    return re.sub(r"[-_.]+", "-", found[0]).lower()


if __name__ == "__main__":
    write_text(PLACE, page())
    print(f"wrote {PLACE}")
