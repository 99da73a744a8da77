"""Every benchmark that needs a GPU, in one run: the shortest first, each with a time limit and its own JSON.

A step that fails or takes too long does not stop the others. `gpu.json` in the output folder says after each step what
ran, on which card, for how long; a step that the same command has done on the same card is not run again.

    python benchmarks/gpu.py --output benchmarks/results/gpu
    python benchmarks/gpu.py --device cpu --small --output /tmp/gpu    # tries the script on a processor
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from armorm.files import write_json
from conversation_sets import SIZES
from peak import environment

BENCHMARKS = Path(__file__).parent
MODEL, SMALL = "llama-3-8b", "armorm-tiny"  # of extraction


@dataclass(frozen=True)
class Step:
    """A command of this folder.

    Attributes:
        seconds: time limit.
        arguments: of the program `program`.py; `--device` and `--output` are added.
        small: arguments instead, for trying the script.
    """

    name: str
    seconds: int
    program: str
    arguments: tuple[str, ...]
    small: tuple[str, ...] = ()


STEPS = (
    Step("gate", 120, "heads", ("--part", "gate"), ("--part", "gate")),
    Step("gram", 120, "heads", ("--part", "gram"), ("--part", "gram")),
    Step(
        "kernels",
        240,
        "kernel_times",
        ("--models", MODEL, "--sets", "distinct", "long-prompts"),
        ("--models", SMALL, "--sets", "long-prompts", "--conversations", "4"),
    ),
    Step(
        "extraction",
        420,
        "extraction",
        ("--models", MODEL, "--sets", *SIZES, "--ways", "loop", "padded", "default"),
        ("--models", SMALL, "--sets", "long-prompts", "--ways", "padded", "default", "--rounds", "1"),
    ),
    Step(
        "serving",
        300,
        "serving",
        ("--parts", "crowds", "--seconds", "15"),
        ("--parts", "crowds", "--models", "armorm-tiny-rm", "--quick", "--seconds", "2", "--samples", "8"),
    ),
)


def command_of(step: Step, device: str, output: Path, *, small: bool) -> list[str]:
    """The command line of a step."""
    program = [sys.executable, str(BENCHMARKS / f"{step.program}.py")]
    return [*program, *(step.small if small else step.arguments), "--device", device, "--output", str(output)]


def run(step: Step, command: list[str], output: Path) -> dict[str, Any]:
    """Run a step; what it prints goes to NAME.log beside its JSON."""
    start = time.perf_counter()
    with output.with_suffix(".log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=log, env=environment(), timeout=step.seconds, check=False)
            outcome = "done" if done.returncode == 0 else f"failed with {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"not done within {step.seconds} s"
    return {"outcome": outcome, "seconds": round(time.perf_counter() - start, 1), "command": " ".join(command[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"), help="folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--small", action="store_true", help="as little work as possible, for trying the script")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    on_gpu = arguments.device != "cpu"
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "processor",
        "torch": torch.__version__,
        "steps": {},
    }
    if (summary := arguments.output / "gpu.json").exists():
        before = json.loads(summary.read_text(encoding="utf-8"))
        if before["device"] != found["device"]:
            sys.exit(f"{summary}: of {before['device']}, expected another --output for {found['device']}")
        found["steps"] = before["steps"]
    for step in STEPS:
        if arguments.only and step.name not in arguments.only:
            continue
        output = arguments.output / f"{step.name}.json"
        command = command_of(step, arguments.device, output, small=arguments.small)
        known = found["steps"].get(step.name, {})
        if (known.get("outcome"), known.get("command")) == ("done", " ".join(command[1:])) and output.exists():
            console.print(f"{step.name}: {output} is there")
            continue
        console.print(f"{step.name}: at most {step.seconds} s")
        found["steps"][step.name] = run(step, command, output)
        write_json(summary, found)
        console.print(f"{step.name}: {found['steps'][step.name]['outcome']}")
    faults = [name for name, step in found["steps"].items() if step["outcome"] != "done"]
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
