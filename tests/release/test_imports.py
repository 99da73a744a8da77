"""Imports: each step loads only what it needs, the core needs no extra, and what needs one says which.

The steps are run once, in one fresh interpreter in which no extra can be found.
"""

from __future__ import annotations

import json
import subprocess
import sys
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
OF_EXTRAS = ("serving/", "integrations/distilabel")
HEAVY = ("torch", "transformers", "datasets", "numpy", "pandas", "scipy", "matplotlib", "fastapi")

STEPS = """
import contextlib, importlib, importlib.machinery, io, json, sys, time

extras, heavy, core, results = json.loads(sys.argv[1])
real = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in extras else real(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)

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
for name in core:
    importlib.import_module(name)
found["compiler"] = "torch._inductor.compile_fx" in sys.modules
found["core"] = len(core)
with open(results, "w") as file:
    json.dump(found, file)
"""


def core_modules() -> list[str]:
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith(OF_EXTRAS) and "__main__" not in name:
            names.append("armorm." + name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return [name.removesuffix(".__init__") for name in names]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, Any]:
    def run(folder: Path) -> None:
        task = json.dumps([EXTRAS, HEAVY, core_modules(), str(folder / "found.json")])
        done = subprocess.run([sys.executable, "-c", STEPS, task], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-1500:]

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


def test_every_module_of_the_core_imports_without_any_extra(steps):
    assert steps["core"] == len(core_modules()) > 100


def test_the_compiler_is_loaded_by_what_compiles_only(steps):
    assert not steps["compiler"], "torch._inductor takes a second of every start"
