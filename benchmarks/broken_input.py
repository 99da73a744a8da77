"""How many broken inputs were drawn at each entry point, and did each end in a result or one line?

    python benchmarks/broken_input.py                      # at least 200 for every test: about ten minutes
    python benchmarks/broken_input.py --examples 1000 --entries recipes --only any_text

Runs the tests of broken input with more examples than usual: hypothesis draws data files in eight formats, recipes,
configurations of models and HTTP bodies of every route; schemathesis draws requests from the server's own schema. No
input may end in a traceback, a NaN or a message of several lines (the tests say what each entry point may do). Prints a
table of counts and writes `results/broken_input.json`, in which tests that were not run keep their counts. Exit code 1
if a test fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENTRIES = {
    "data files": "tests/data/test_broken_data.py",
    "recipes": "tests/training/test_broken_recipes.py",
    "models": "tests/model/test_broken_models.py",
    "HTTP bodies": "tests/serving/test_any_body.py",
    "HTTP requests": "tests/serving/test_openapi.py",
}
TEST = re.compile(r"^\S*::(\S.*):$")
DRAWN = re.compile(r"(\d+) passing(?: examples)?, (\d+) failing")
REQUESTS = re.compile(r"^\s*(\d+) generated, (\d+) passed", re.MULTILINE)


def counted(output: str) -> list[dict[str, Any]]:
    """Inputs by test, from what hypothesis and schemathesis print."""
    found: dict[str, dict[str, Any]] = {}
    name = ""
    for line in output.splitlines():
        name = match[1] if (match := TEST.match(line.strip())) else name
        if drawn := DRAWN.search(line):
            entry = found.setdefault(name, {"test": name, "inputs": 0, "failing": 0})
            entry["inputs"] += int(drawn[1]) + int(drawn[2])
            entry["failing"] += int(drawn[2])
    for drawn in REQUESTS.finditer(output):
        found["schemathesis"] = {
            "test": "schemathesis",
            "inputs": int(drawn[1]),
            "failing": int(drawn[1]) - int(drawn[2]),
        }
    return list(found.values())


def run(test: str, examples: int, only: str) -> tuple[int, str]:
    """Exit code and output of the tests of one entry point."""
    command = [sys.executable, "-m", "pytest", test, "-m", "slow or not slow", "-k", only]
    done = subprocess.run(
        [*command, "--hypothesis-show-statistics"],
        cwd=ROOT,
        env=os.environ | {"ARMORM_EXAMPLES": str(examples)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200, help="at least so many for every test")
    parser.add_argument("--entries", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--only", default="any or schemathesis", help="tests by their names, as of pytest -k")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "broken_input.json")
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    failed = False
    for entry in options.entries:
        begin = time.monotonic()
        code, output = run(ENTRIES[entry], options.examples, options.only)
        found = counted(output)
        failed |= code != 0 or not found
        if code or not found:
            print(output[-6000:], file=sys.stderr)
        earlier = {test["test"]: test for test in results.get(entry, {}).get("tests", [])}
        tests = list((earlier | {test["test"]: test for test in found}).values())
        inputs, failing = (sum(test[key] for test in tests) for key in ("inputs", "failing"))
        results[entry] = {"inputs": inputs, "failing": failing, "tests": tests}
        print(f"{entry:15}{inputs:7,} inputs{failing:5} failing{time.monotonic() - begin:7.0f} s", flush=True)
        options.output.write_text(
            json.dumps({name: results[name] for name in ENTRIES if name in results}, indent=1) + "\n"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
