"""Trace an armorm command: which modules run functions, in what order, and how often control changes module.

    python tools/trace_modules.py score rows.jsonl --output scores.jsonl

Functions that run while a module is being found or imported (finders, decorators, class bodies) are not counted.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import armorm

ROOT = Path(armorm.__file__).parent
_IMPORT_CODE = {importlib._bootstrap._find_and_load.__code__}  # type: ignore[attr-defined]


class Tracer:
    """Counts calls by module; `walk` is the order in which modules are entered, repeats of the same one left out."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.walk: list[str] = []
        self._names: dict[Any, str | None] = {}
        self._importing = threading.local()

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code.co_name == "<module>" or code in _IMPORT_CODE:
            depth = getattr(self._importing, "depth", 0)
            self._importing.depth = depth + (1 if event == "call" else -1)
            return
        if event == "return" or getattr(self._importing, "depth", 0) > 0:
            return
        if code not in self._names:
            path = Path(code.co_filename)
            self._names[code] = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else None
        name = self._names[code]
        if name is not None:
            self.calls[name] += 1
            if not self.walk or self.walk[-1] != name:
                self.walk.append(name)


def main() -> None:
    from armorm.cli.app import main as command

    sys.argv = ["armorm", *sys.argv[1:]]
    tracer = Tracer()
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        command()
    except SystemExit:
        pass
    finally:
        sys.setprofile(None)
    print(f"{len(tracer.calls)} modules, control changes module {len(tracer.walk) - 1} times", file=sys.stderr)
    seen: list[str] = []
    for name in tracer.walk:
        if name not in seen:
            seen.append(name)
    for name in seen:
        print(f"  {name:40s} {tracer.calls[name]:8,} calls", file=sys.stderr)


if __name__ == "__main__":
    main()
