"""Stop commands at random moments, and let the disk fill up: do they end with the same bytes, and in one line?

    python benchmarks/reliability.py                       # 100 kills, 250 signals and 50 full disks
    python benchmarks/reliability.py --kills 5 --signals 5 --full-disks 5 --commands score embed --output small.json

Three shows, over train, embed, extend, evaluate and score with the embedded models:

kills       SIGKILL at random moments; the same command then runs to its end. Its output must have the bytes of a run
            that nobody disturbed.
signals     SIGINT and SIGTERM in turn. The command must end within two seconds (of an idle machine: `--limit`) with
            exit code 130 or 143 and exactly one new line, which names what is kept; then as above.
full disks  The output is on a file system that is full after a random number of bytes. The command must end with exit
            code 1 and one line that names the output; with space again it must end with the same bytes. Needs root, to
            mount a tmpfs.

Commands run in forks of this process, which has imported the libraries, so that the moments fall into their work: they
are drawn from the whole run time, from the first tenth of a second on. Every fifth signal goes to a new interpreter
instead, imports included. Prints a table of counts and writes `results/reliability.json` after every run. Counts there
of the same settings are continued, and those of other commands and kinds are kept: the shows can be stopped, and run in
parts or at the same time. To start over, delete the file. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

PAGE = 4096  # bytes that a tmpfs gives at once
FIRST_MOMENT = 0.1  # Python has started, and handles signals
NEW_INTERPRETER = 5  # every such signal goes to a process that imports everything itself
IMPORTED = ["armorm.cli.app", "armorm.reward_model", "armorm.training", "transformers", "torch"]
RECIPE = """name: reliability
backbone: {{model: armorm-tiny}}
ratings:
  - {{data: {data}/rated.jsonl, objectives: {{quality: [1, 5], tone: [1, 5]}}}}
preferences:
  - {{data: {data}/pairs.jsonl}}
gating: {{hidden_size: 16, hidden_layers: 1, steps: 60}}
"""
NAMES = ["score", "embed", "evaluate", "train", "extend"]
KINDS = ["kills", "signals", "full disks"]
# Output that is not the result of a command: locks, times of training, the log of the gate's steps.
APART = {".lock"}


@dataclass
class Tally:
    """Counts of one show."""

    runs: int = 0
    same: int = 0  # ended with the same bytes, or had them when they were stopped
    stopped: int = 0  # before their end
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds from a signal to the end


def write_data(folder: Path, rows: int, rng: random.Random) -> None:
    """Rated rows, pairs and rows to score."""
    folder.mkdir(parents=True)
    words = ["rice", "water", "fire", "stone", "river", "light", "paper", "glass", "bread", "cloud"]
    rated, pairs = [], []
    for row in range(rows):
        prompt = f"Tell me about {words[row % 10]} {row // 4}."
        response = " ".join(rng.choices(words, k=4 + row % 30))
        entry = {"prompt": prompt, "response": response, "quality": 1 + row % 5, "tone": 1 + (row // 3) % 5}
        rated.append(entry | {"warmth": 1 + (row // 7) % 5})
        pairs.append({"prompt": prompt, "chosen": response + " indeed.", "rejected": response})
    for name, entries in (("rated", rated), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "recipe.yaml").write_text(RECIPE.format(data=folder))


def arguments_of(data: Path, base: Path) -> dict[str, Callable[[Path], list[str]]]:
    """The arguments of each command, given its output; `base` is a model to extend."""
    tiny = ["--model", "armorm-tiny-rm", "--dtype", "float32", "--device", "cpu"]
    return {
        "score": lambda out: ["score", f"{data}/rated.jsonl", "-o", f"{out}/scores.jsonl", *tiny],
        "embed": lambda out: ["embed", f"{data}/rated.jsonl", "-o", f"{out}/features", "-b", "armorm-tiny"],
        "evaluate": lambda out: [
            *("evaluate", "pairs", "-d", f"{data}/pairs.jsonl", "-o", f"{out}/results.json", "--include-seen"),
            *tiny,
        ],
        "train": lambda out: ["train", f"{data}/recipe.yaml", "-o", f"{out}/model"],
        "extend": lambda out: [
            *("extend", str(base), "--ratings", f"{data}/rated.jsonl", "--objective", "warmth=1:5"),
            *("-o", f"{out}/extended"),
        ],
    }


def start(arguments: list[str], log: Path, new_interpreter: bool = False) -> ForkProcess:
    """Run a command of armorm; both outputs go to a file."""
    process = multiprocessing.get_context("fork").Process(target=command, args=(arguments, log, new_interpreter))
    process.start()
    return process


def command(arguments: list[str], log: Path, new_interpreter: bool) -> None:
    """Become the command, in a process of its own."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if new_interpreter:
        os.execv(sys.executable, [sys.executable, "-m", "armorm", *arguments])
    from armorm.__main__ import main as armorm

    sys.argv = ["armorm", *arguments]
    armorm()


def wait(process: ForkProcess) -> int:
    """The exit code of a command when it has ended; minus the number of a signal that ended it."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def finish(arguments: list[str], log: Path) -> int:
    """Run a command to its end; its exit code."""
    return wait(start(arguments, log))


def digests(folder: Path, temporary: bool = True) -> dict[str, str]:
    """SHA-256 of every file below a folder, without names of the folder in text.

    Args:
        temporary: also of files that a killed process leaves under a temporary name.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        apart = not temporary and any(name.endswith(".tmp") for name in path.relative_to(folder).parts)
        if path.is_file() and path.name not in APART and not apart:
            content = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
            found[str(path.relative_to(folder))] = sha256(content).hexdigest()
    return found


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """Names of the files that differ; empty if none does."""
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    return ", ".join(names)


class Shows:
    """The three shows on one command at a time; `rng` draws the moments."""

    def __init__(self, work: Path, limit: float, importing: float) -> None:
        self.work, self.limit, self.importing = work, limit, importing
        self.rng = random.Random()
        self.log = work / "log"

    def undisturbed(self, arguments: Callable[[Path], list[str]]) -> tuple[dict[str, str], float]:
        """Digests and seconds of a run that nobody stops."""
        out = self.fresh()
        begin = time.monotonic()
        if finish(arguments(out), self.log):
            raise SystemExit(f"the undisturbed run failed: {self.log.read_text()}")
        return digests(out), time.monotonic() - begin

    def fresh(self) -> Path:
        """The output folder, empty; the same each time, since results name it."""
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return out

    def resume(self, tally: Tally, arguments: list[str], out: Path, expected: dict[str, str], what: str) -> None:
        """Run to the end, unless the output was complete already, and compare."""
        if not difference(expected, digests(out, temporary=False)):
            tally.same += 1
            return
        code = finish(arguments, self.log)
        if code:
            tally.faults.append(f"{what}: the run after it failed with {code}: {self.last_line()}")
            return
        differing = difference(expected, digests(out))
        if differing:
            tally.faults.append(f"{what}: {differing} differ")
        else:
            tally.same += 1

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def kill(self, tally: Tally, arguments: Callable[[Path], list[str]], expected: dict[str, str], span: float) -> None:
        """SIGKILL at one moment, then resume."""
        out, moment = self.fresh(), self.rng.uniform(FIRST_MOMENT, span)
        process = start(arguments(out), self.log)
        time.sleep(moment)
        process.kill()
        tally.runs += 1
        tally.stopped += wait(process) < 0
        self.resume(tally, arguments(out), out, expected, f"kill after {moment:.2f} s")

    def signal(
        self, tally: Tally, arguments: Callable[[Path], list[str]], expected: dict[str, str], span: float
    ) -> None:
        """SIGINT or SIGTERM at one moment, then resume."""
        number = (signal.SIGINT, signal.SIGTERM)[tally.runs % 2]
        new = tally.runs % NEW_INTERPRETER == 0
        out, moment = self.fresh(), self.rng.uniform(FIRST_MOMENT, span + new * self.importing)
        process = start(arguments(out), self.log, new)
        time.sleep(moment)
        running = process.exitcode is None and process.pid
        begin = time.monotonic()
        if running:
            os.kill(running, number)
        code = wait(process)
        seconds, what = time.monotonic() - begin, f"{number.name} after {moment:.2f} s"
        tally.runs += 1
        if code == 128 + number:
            tally.stopped += 1
            tally.slowest = max(tally.slowest, seconds)
            if seconds > self.limit:
                tally.faults.append(f"{what}: ended after {seconds:.1f} s")
            words = ("armorm: interrupted", "armorm: terminated")
            if not self.last_line().startswith(words) or "Traceback" in self.log.read_text():
                tally.faults.append(f"{what}: the last line is {self.last_line()!r}")
        elif code and running:
            tally.faults.append(f"{what}: exit code {code}: {self.last_line()}")
        self.resume(tally, arguments(out), out, expected, what)

    def full_disk(
        self, tally: Tally, arguments: Callable[[Path], list[str]], expected: dict[str, str], size: int
    ) -> None:
        """Run with little space, then with enough."""
        out, space = self.fresh(), PAGE * self.rng.randint(1, max(4, size // PAGE))
        with tmpfs(out, space) as resize:
            code = finish(arguments(out), self.log)
            tally.runs += 1
            what = f"a disk of {space:,} bytes"
            text, line = self.log.read_text(), self.last_line()
            if code:
                tally.stopped += 1
                named = code == 1 and "Traceback" not in text and line.startswith("armorm: ") and str(out) in line
                if not named:
                    tally.faults.append(f"{what}: exit code {code}, {line!r}")
            resize(4 * size + (64 << 20))
            self.resume(tally, arguments(out), out, expected, what)


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system in memory at a folder; yields a function that sets its size in bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def show(options: argparse.Namespace, work: Path, importing: float) -> Iterator[tuple[str, str, Tally]]:
    """Run the shows; yields show, command and counts."""
    data, base = work / "data", work / "base"
    write_data(data, options.rows, random.Random(options.seed))
    commands = arguments_of(data, base)
    if "extend" in options.commands and finish(["train", f"{data}/recipe.yaml", "-o", str(base)], work / "log"):
        raise SystemExit((work / "log").read_text())
    for name in options.commands:
        shows = Shows(work, options.limit, importing)
        arguments, place = commands[name], NAMES.index(name)
        expected, span = shows.undisturbed(arguments)
        size = sum(path.stat().st_size for path in (work / "out").rglob("*") if path.is_file())
        print(f"{name}: {span:.1f} s, {len(expected)} files, {size:,} bytes", file=sys.stderr, flush=True)
        counts = {"kills": options.kills, "signals": options.signals, "full disks": options.full_disks}
        runs = {"kills": (shows.kill, span), "signals": (shows.signal, span), "full disks": (shows.full_disk, size)}
        for kind, (run, extent) in runs.items():
            tally = earlier(options, kind, name)
            share = counts[kind] // len(NAMES) + (place < counts[kind] % len(NAMES))
            for number in range(tally.runs, share):
                shows.rng = random.Random(f"{options.seed} {name} {kind} {number}")
                known = len(tally.faults)
                run(tally, arguments, expected, extent)  # type: ignore[arg-type]
                keep(kind, name, tally, options)
                print(
                    f"  {name}, {kind}, {number + 1} of {share}: {tally.same} the same",
                    *tally.faults[known:],
                    sep="\n    ",
                    file=sys.stderr,
                    flush=True,
                )
            if share:
                yield kind, name, tally


def settings(options: argparse.Namespace, kind: str, name: str) -> dict[str, Any]:
    """What decides which counts belong together."""
    return {"show": kind, "command": name, "rows": options.rows, "seed": options.seed, "limit": options.limit}


def earlier(options: argparse.Namespace, kind: str, name: str) -> Tally:
    """The counts in the file of results, to be continued."""
    if options.output.exists():
        for entry in json.loads(options.output.read_text())["shows"]:
            same = settings(options, kind, name)
            if same == {key: entry.pop(key) for key in same}:
                return Tally(**entry)
    return Tally()


def keep(kind: str, name: str, tally: Tally, options: argparse.Namespace) -> None:
    """Write the counts of one show and command; entries of others stay in the file."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a+") as file:  # another process may write the same file
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        shows = json.loads(text)["shows"] if text else []
        shows = [entry for entry in shows if (entry["show"], entry["command"]) != (kind, name)]
        shows.append(settings(options, kind, name) | vars(tally))
        shows.sort(key=lambda entry: (KINDS.index(entry["show"]), NAMES.index(entry["command"])))
        file.truncate(0)
        file.write(json.dumps({"shows": shows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of all commands together")
    parser.add_argument("--signals", type=int, default=250)
    parser.add_argument("--full-disks", type=int, default=50, help="0 without root")
    parser.add_argument("--commands", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds from a signal to the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reliability.json")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):  # commands inherit what a shell ignores in the background
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    begin = time.monotonic()
    for module in IMPORTED:
        importlib.import_module(module)
    importing = time.monotonic() - begin
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for kind, name, tally in show(options, Path(work), importing):
            rows.append((kind, name, tally))
    print(f"{'show':12}{'command':10}{'runs':>6}{'stopped':>9}{'same':>6}{'faults':>8}{'slowest':>9}")
    for kind, name, tally in rows:
        slowest = f"{tally.slowest:.1f} s" if tally.slowest else ""
        counts = f"{tally.runs:6}{tally.stopped:9}{tally.same:6}{len(tally.faults):8}{slowest:>9}"
        print(f"{kind:12}{name:10}{counts}")
    sys.exit(any(tally.faults for *_, tally in rows))


if __name__ == "__main__":
    main()
