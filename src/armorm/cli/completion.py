"""Tab completion of values: names of models and objectives, recipes, data files (`armorm --install-completion`).

A key press starts a process, so nothing here imports torch or numpy. Each function returns the values that begin with
what was typed; where a file may be named, files and folders are among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import typer

from armorm.data.rows import SUFFIXES
from armorm.errors import ArmormError
from armorm.files import (
    DEFAULT_BACKBONE,
    DEFAULT_REWARD_MODEL,
    EMBEDDED_BACKBONE,
    EMBEDDED_REWARD_MODEL,
    embedded_path,
    read_text,
)

BENCHMARKS = (
    *("pairs", "ratings", "rewardbench", "rewardbench2", "rm-bench", "rmb", "rewardmath", "judgebench"),
    *("judgebench-double", "ppe"),
)
Complete = Callable[[str], list[str]]


def one_of(*names: str) -> Complete:
    """Completion of a value that is one of these."""
    return lambda incomplete: _beginning(names, incomplete)


def models(incomplete: str) -> list[str]:
    """Reward models: those inside the package, and folders."""
    return _beginning((DEFAULT_REWARD_MODEL, EMBEDDED_REWARD_MODEL), incomplete) + _paths(incomplete, ())


def backbones(incomplete: str) -> list[str]:
    """Backbones: those inside the package, folders and GGUF files."""
    return _beginning((DEFAULT_BACKBONE, EMBEDDED_BACKBONE), incomplete) + _paths(incomplete, (".gguf",))


def recipes(incomplete: str) -> list[str]:
    """YAML files."""
    return _paths(incomplete, (".yaml", ".yml"))


def data(incomplete: str) -> list[str]:
    """Data files and folders; after a letter, also public sets by their hub id."""
    from armorm.data.presets import PREFERENCE_PRESETS, RATING_PRESETS

    known = [preset.hub_id for preset in (*RATING_PRESETS.values(), *PREFERENCE_PRESETS.values())]
    return _paths(incomplete, SUFFIXES) + (_beginning(dict.fromkeys(known), incomplete) if incomplete else [])


def objectives(context: typer.Context, incomplete: str) -> list[str]:
    """Objectives of the model that the command line names, or of the default one."""
    return _beginning(_objectives_of(context), incomplete)


def objective_numbers(context: typer.Context, incomplete: str) -> list[str]:
    """The same as `NAME=`, to be followed by a number."""
    return _beginning([f"{name}=" for name in _objectives_of(context)], incomplete)


def _objectives_of(context: typer.Context) -> list[str]:
    known = context.params.get("model") or context.params.get("what")
    name = str(known or next(iter(context.args), DEFAULT_REWARD_MODEL))  # (arguments may not have their names yet)
    try:
        held = json.loads(read_text((embedded_path(name) or Path(name)) / "config.json"))["objectives"]
        return [str(objective["name"]) for objective in held]
    except (ArmormError, OSError, ValueError, LookupError, TypeError):
        return []  # a hub id, or no model: nothing to offer


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    """Folders, with a slash at the end, and files with one of the suffixes; hidden ones only after a dot."""
    folder, _, start = incomplete.rpartition("/")
    place = Path(f"{folder}/" if "/" in incomplete else ".").expanduser()
    before = f"{folder}/" if "/" in incomplete else ""
    try:
        held = sorted(place.iterdir())
    except OSError:
        return []
    found = [path for path in held if path.name.startswith(start) and (start or not path.name.startswith("."))]
    files = [f"{before}{path.name}" for path in found if suffixes and path.name.endswith(suffixes) and path.is_file()]
    return files + [f"{before}{path.name}/" for path in found if path.is_dir()]
