"""Start-up time of the command line: whole processes, and `armorm explain` by phase.

python benchmarks/start.py [--times 7] [--output benchmarks/results/start.json]    # on an idle machine, a minute

`armorm explain` scores one short conversation with the default model, whose converted weights are in the cache.
Processor seconds (user and system) depend less on other programs than seconds of the clock do; both are given for whole
processes, processor seconds for the phases of one process. "collector of Python" is the same command with the settings
of the garbage collector that Python starts with (`armorm/__main__.py` changes them).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from armorm.files import write_json
from armorm.progress import progress

AIM, AIM_EXPLAIN = 0.6, 4.0  # seconds of `armorm --help` and of `armorm explain` on an idle machine
EXPLAIN = ["explain", "--prompt", "What is the capital of France?", "--response", "Paris is the capital of France."]
RUN = "import sys; sys.argv[1:] = {arguments!r}\n{main}\nmain()"
OURS, PYTHONS = "from armorm.__main__ import main", "from armorm.cli.app import main"

PHASES = """
import json, sys, time
import armorm.__main__
armorm.__main__.collect_rarely()
marks = {}
def mark(name, last=[0.0]):
    now = time.process_time()
    marks[name], last[0] = now - last[0], now
mark("Python")
import armorm.cli.app
mark("import of the command line")
import torch
mark("import of torch")
import transformers, transformers.modeling_utils
mark("import of transformers (its base class of models)")
from armorm import ArmoRM
from armorm.conversation import Conversation
import armorm.reward_model
mark("import of armorm.reward_model")
rm = ArmoRM.from_pretrained()
mark("loading the model")
conversation = Conversation.from_prompt(sys.argv[1], sys.argv[2])
batch = rm.score([conversation])
mark("score")
rm.explanations(batch, [conversation])[0].lines(80)
mark("explanation")
print(json.dumps(marks))
"""


def times(program: str, count: int) -> dict[str, list[float]]:
    """Seconds of the clock and of the processor of several runs of a Python program."""
    found: dict[str, list[float]] = {"clock": [], "processor": []}
    for _ in range(count):
        start, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        after = os.times()
        found["clock"].append(time.perf_counter() - start)
        used = after.children_user + after.children_system - before.children_user - before.children_system
        found["processor"].append(used)
    return found


def phases(count: int) -> dict[str, list[float]]:
    """Processor seconds of each phase of `armorm explain`, of several runs."""
    found: dict[str, list[float]] = {}
    for _ in range(count):
        arguments = [sys.executable, "-c", PHASES, EXPLAIN[2], EXPLAIN[4]]
        done = subprocess.run(arguments, capture_output=True, check=True, text=True)
        for name, seconds in json.loads(done.stdout).items():
            found.setdefault(name, []).append(seconds)
    return found


def median(values: list[float]) -> float:
    """The middle one, the larger of two."""
    return sorted(values)[len(values) // 2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=7, help="runs of each program")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "start.json")
    arguments = parser.parse_args()
    programs = {
        "python alone": "pass",
        "import armorm": "import armorm",
        "armorm --help": RUN.format(arguments=["--help"], main=OURS),
        "armorm explain": RUN.format(arguments=EXPLAIN, main=OURS),
        "armorm explain, collector of Python": RUN.format(arguments=EXPLAIN, main=PYTHONS),
    }
    results = {}
    with progress("start-up", len(programs) + 1, "programs") as advance:
        for name, program in programs.items():
            results[name] = times(program, arguments.times)
            advance(1)
        by_phase = phases(arguments.times)
    console = Console(highlight=False)
    table = Table("", box=None, header_style="bold")
    for head in ("clock, best", "clock, median", "processor, median"):
        table.add_column(head, justify="right")
    for name, found in results.items():
        shown = (min(found["clock"]), median(found["clock"]), median(found["processor"]))
        table.add_row(name, *(f"{seconds:.3f} s" for seconds in shown))
    console.print(table)
    table = Table("armorm explain, by phase", box=None, header_style="bold")
    table.add_column("processor, median", justify="right")
    for name, values in by_phase.items():
        table.add_row(name, f"{median(values):.3f} s")
    console.print("", table)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine = {"cores": os.cpu_count(), "load": load, "python": platform.python_version()}
    aims = {"help": AIM, "explain": AIM_EXPLAIN}
    write_json(arguments.output, {"aims": aims, "machine": machine, "seconds": results, "phases": by_phase})


if __name__ == "__main__":
    main()
