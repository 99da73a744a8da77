"""Extras: the core stands without them, and what needs one says which."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "armorm"
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
# Rooms that belong to an extra; every other module is the core's.
OF_EXTRAS = (
    "serving/",
    "ui/",
    "features/ray",
    "training/finetune",
    "finetune",
    "cli/serving",
    "cli/playing",
    "cli/ui",
    "client",
    "integrations/distilabel",
)
BLOCK = f"""
import importlib.machinery
import sys

real = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {EXTRAS!r} else real(name, path, target)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def core_modules() -> list[str]:
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        if not name.startswith(OF_EXTRAS) and "__main__" not in name:
            names.append("armorm." + name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    return [name.removesuffix(".__init__") for name in names]


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + program], capture_output=True, text=True, check=False)


def test_every_module_of_the_core_imports_without_any_extra():
    done = python(
        f"import importlib\nfor name in {core_modules()!r}:\n    importlib.import_module(name)\nprint('done')"
    )
    assert done.stdout.strip().endswith("done"), done.stderr[-1500:]


def test_what_lacks_its_extra_says_which_to_install():
    program = """
from armorm.cli.app import main
from armorm.client import RewardClient
from armorm.errors import MissingExtraError
try: RewardClient('http://127.0.0.1:1')
except MissingExtraError as error: print(error)
main(['serve'])
"""
    done = python(program)
    assert "armorm[client]" in done.stdout
    assert done.returncode == 1
    assert "armorm[serve]" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy_and_starts_at_once():
    program = (
        "import time\nstart = time.process_time()\n"
        "from armorm.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(time.process_time() - start)\n"
        "print([n for n in ('torch', 'transformers', 'datasets', 'pandas', 'scipy', 'matplotlib') if n in sys.modules])"
    )
    seconds = []
    for _ in range(2):
        done = python(program)
        *_, used, heavy = done.stdout.splitlines()
        assert heavy == "[]", done.stderr[-500:]
        seconds.append(float(used))
    assert (
        min(seconds) < 3.0
    )  # 0.6 is the aim on a quiet machine (benchmarks/start.py); five times that is a fault anywhere
