"""The `armorm` command, also as `python -m armorm`: signals are handled before anything else is imported."""

import atexit
import gc
import os

from armorm.interruption import install


def main() -> None:
    """Run the command line in this process."""
    install()
    collect_rarely()
    _occupy_closed_streams()
    from armorm.cli.app import main as run

    run()


def collect_rarely() -> None:
    """Let the garbage collector run less often, and not at exit: it searches all that torch and transformers import.

    `benchmarks/start.py` measures the processor time of both.
    """
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)


def _occupy_closed_streams() -> None:
    """Open the null device in place of closed standard streams, whose numbers the next files would get."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
