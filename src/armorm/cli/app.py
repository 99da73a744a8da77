"""The command line: every command parses, calls the library, prints.

In:  arguments. Out: results on standard output or in files, progress on standard error.
Exit codes: 0 done, 1 failed (one line says why), 2 bad usage.

Heavy imports (torch, transformers) happen inside the commands that need them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from armorm.cli import (
    embed as embedding,
)
from armorm.cli import (
    evaluate as evaluating,
)
from armorm.cli import (
    evaluate as reporting,
)
from armorm.cli import (
    evaluate as steering,
)
from armorm.cli import (
    export as exporting,
)
from armorm.cli import (
    init as starting,
)
from armorm.cli import (
    inspect as inspecting,
)
from armorm.cli import (
    monitor as monitoring,
)
from armorm.cli import (
    score as ranking,
)
from armorm.cli import (
    score as scoring,
)
from armorm.cli import (
    serve as serving,
)
from armorm.cli import (
    train as extending,
)
from armorm.cli import (
    train as training,
)
from armorm.errors import ArmormError, RecipeError
from armorm.version import __version__

app = typer.Typer(
    name="armorm",
    help="Interpretable reward models: train, score, explain.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    pass


app.command("demo")(training.demo)
app.command("init")(starting.init)
app.command("train")(training.train)
app.command("extend")(extending.extend)
app.command("score")(scoring.score)
app.command("explain")(scoring.explain)
app.command("compare")(ranking.compare)
app.command("rank")(ranking.rank)
app.command("steer")(steering.steer)
app.command("evaluate")(evaluating.evaluate)
app.command("report")(reporting.report)
app.command("embed")(embedding.embed)
app.command("export")(exporting.export)
app.command("inspect")(inspecting.inspect)
app.command("monitor")(monitoring.monitor)
app.command("serve")(serving.serve)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run a command, turn an armorm error into one line and an exit code."""
    # Bars of other libraries too appear only where something takes more than two seconds.
    os.environ.setdefault("TQDM_DELAY", "2")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app(args=arguments, standalone_mode=True)
    except ArmormError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]armorm:[/red] {_escaped(str(error))}")
        sys.exit(2 if isinstance(error, RecipeError) else 1)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # A full disk, a folder that may not be written to: nothing of ours, and nothing a traceback explains.
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]armorm:[/red] {_escaped(str(error))}")
        sys.exit(1)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
