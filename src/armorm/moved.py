"""Modules of version 0.1 under another name in 0.2: importing one raises an error that names the new module.

There are no aliases: many modules were merged or split, and an alias would lack some of their names. The table,
`moved_modules.json`, is read only when an import of a module of armorm fails.
"""

from __future__ import annotations

import sys
from pathlib import Path


class MovedModules:
    """Last finder of `sys.meta_path`, so it is asked only for modules that do not exist."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if not name.startswith("armorm."):
            return
        import json

        moved = json.loads(Path(__file__).with_name("moved_modules.json").read_text(encoding="utf-8"))
        if name in moved:
            raise ModuleNotFoundError(f"{name} is {moved[name]} since armorm 0.2.0", name=name)


def explain_moved_modules() -> None:
    """Install the finder, once."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)
