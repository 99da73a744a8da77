"""Start-up time of the command line: whole processes of `armorm --help` and `import armorm`.

python benchmarks/start.py [--output benchmarks/results/start.json]    # on an idle machine, seconds
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from armorm.files import write_json

AIM = 0.6
TIMES = 7


def seconds(program: str) -> list[float]:
    """Wall-clock seconds of several runs of a Python program."""
    taken = []
    for _ in range(TIMES):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "start.json")
    arguments = parser.parse_args()
    command = "from armorm.cli.app import main\ntry: main(['{}'])\nexcept SystemExit: pass"
    programs = {"python alone": "pass", "armorm --help": command.format("--help"), "import armorm": "import armorm"}
    results = {name: seconds(program) for name, program in programs.items()}
    table = Table(box=None, header_style="bold")
    for head in ("", "best", "median"):
        table.add_column(head, justify="left" if not head else "right")
    for name, taken in results.items():
        table.add_row(name, f"{min(taken):.3f} s", f"{sorted(taken)[TIMES // 2]:.3f} s")
    Console(highlight=False).print(table)
    write_json(arguments.output, {"aim": AIM, "seconds": results})


if __name__ == "__main__":
    main()
