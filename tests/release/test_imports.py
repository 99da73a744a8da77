"""Imports: each step loads only what it needs, the core needs no extra, and what needs one says which.

The steps are run once, in a fresh interpreter in which no extra can be found. The modules of the core are imported in
one of their own (slow); the fast test reads what they import when they are loaded.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.shared_folders import shared_folder

SOURCE = Path(__file__).parents[2] / "src" / "armorm"
EXTRAS = (
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "httpx",
    "gradio",
    "ray",
    "peft",
    "accelerate",
    "mkdocs",
    "tensorboard",
    "distilabel",
)
# What belongs to an extra as a whole; every other module is the core's.
OF_EXTRAS = (
    "serving/",
    *(
        f"integrations/{name}"
        for name in ("distilabel", "openrlhf_agent", "verl_manager", "vllm_model", "vllm_requests")
    ),
)
HEAVY = ("torch", "transformers", "datasets", "numpy", "pandas", "scipy", "matplotlib", "fastapi")

WITHOUT_EXTRAS = """
import importlib, importlib.machinery, json, sys

extras, *task = json.loads(sys.argv[1])
real = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in extras else real(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""

STEPS = """
import contextlib, io, time

heavy, results = task

def command(*arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main(arguments)
        except SystemExit as stopped:
            return stopped.code, said.getvalue()

def loaded(*also):
    return sorted({*heavy, *also} & set(sys.modules))

found = {}
import armorm
found["package"] = loaded("pydantic")
start = time.process_time()
from armorm.cli.app import main
found["help"] = command("--help")
found["help seconds"] = time.process_time() - start
found["help loaded"] = loaded()
import armorm.client
found["client loaded"] = loaded()
try:
    armorm.client.RewardClient("http://127.0.0.1:1")
except armorm.ArmormError as error:
    found["client"] = [type(error).__name__, str(error)]
found["serve"] = command("serve")
with open(results, "w") as file:
    json.dump(found, file)
"""


CORE = """
for name in task[0]:
    importlib.import_module(name)
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler takes a second of every start"
"""


def core_modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith(OF_EXTRAS) and "__main__" not in name:
            dotted = name.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")
            found[f"armorm.{dotted}".rstrip(".")] = path
    return found


def imported_at_once(statements: list[ast.stmt]) -> Iterator[str]:
    """Names of what a module imports when it is loaded, not in functions or for type checkers."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield statement.module or ""
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from imported_at_once(statement.orelse)
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from imported_at_once(getattr(statement, field, []))


def fresh_interpreter(program: str, *task: object) -> None:
    arguments = [sys.executable, "-c", WITHOUT_EXTRAS + program, json.dumps([EXTRAS, *task])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, Any]:
    def run(folder: Path) -> None:
        fresh_interpreter(STEPS, HEAVY, str(folder / "found.json"))

    return json.loads((shared_folder(tmp_path_factory, "imports", run) / "found.json").read_text())


def test_importing_the_package_loads_no_heavy_library(steps):
    assert steps["package"] == []


def test_help_loads_nothing_heavy_and_starts_at_once(steps):
    assert steps["help"] == [0, ""]
    assert steps["help loaded"] == []
    # 0.6 is the aim on a quiet machine (benchmarks/start.py); five times that is a fault anywhere.
    assert steps["help seconds"] < 3.0


def test_the_client_loads_nothing_heavy_but_numpy(steps):
    assert set(steps["client loaded"]) <= {"numpy"}


def test_what_lacks_its_extra_says_which_to_install(steps):
    kind, message = steps["client"]
    assert kind == "MissingExtraError"
    assert "armorm[client]" in message
    code, said = steps["serve"]
    assert code == 1
    assert "armorm[serve]" in said
    assert "Traceback" not in said


def test_no_module_of_the_core_imports_an_extra_when_it_is_loaded():
    modules = core_modules()
    assert len(modules) > 100
    found = {
        f"{module}: {name}"
        for module, path in modules.items()
        for name in imported_at_once(ast.parse(path.read_text(encoding="utf-8")).body)
        if name.partition(".")[0] in EXTRAS
    }
    assert found == set()


@pytest.mark.slow
def test_every_module_of_the_core_imports_without_any_extra():
    fresh_interpreter(CORE, list(core_modules()))
