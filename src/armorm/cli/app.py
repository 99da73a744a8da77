"""Entry point of the `armorm` command.

Results go to standard output or to files, messages and progress to standard error. Exit codes: 0 success, 1 failure
(reported in one line), 2 usage error. torch and transformers are imported inside the commands that need them, so that
`armorm --help` stays fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import typer

from armorm.cli.calibrate import calibrate
from armorm.cli.command import command, end
from armorm.cli.compare import compare
from armorm.cli.demo import demo
from armorm.cli.embed import embed
from armorm.cli.evaluate import evaluate
from armorm.cli.explain import explain
from armorm.cli.export import export
from armorm.cli.extend import extend
from armorm.cli.fetch import fetch
from armorm.cli.init import init
from armorm.cli.inspect import inspect
from armorm.cli.label import label
from armorm.cli.leaderboard import leaderboard
from armorm.cli.monitor import monitor
from armorm.cli.probe import probe
from armorm.cli.rank import rank
from armorm.cli.report import report
from armorm.cli.score import score
from armorm.cli.serve import serve
from armorm.cli.steer import steer
from armorm.cli.suggest import suggest
from armorm.cli.train import train
from armorm.errors import ArmormError
from armorm.version import __version__

app = typer.Typer(
    name="armorm",
    help="Train, evaluate and serve interpretable reward models. `armorm COMMAND --help` shows an example of each.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Training": (demo, init, probe, train, extend),
    "Scoring": (score, explain, compare, rank, steer),
    "Evaluation": (evaluate, leaderboard, calibrate, report, monitor),
    "Data and features": (inspect, label, suggest, embed, fetch),
    "Deployment": (export, serve),
}
for panel, functions in COMMANDS.items():
    for function in functions:
        app.command(function.__name__, rich_help_panel=panel)(command(function))


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors of armorm and of the file system become one line and an exit code."""
    # Progress bars of other libraries, too, appear only after two seconds.
    os.environ.setdefault("TQDM_DELAY", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app(args=arguments, standalone_mode=True)
    except (ArmormError, OSError) as error:
        end(error)
