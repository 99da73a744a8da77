"""The `armorm` command, also as `python -m armorm`: signals are handled before anything else is imported."""

import os

from armorm.interruption import install


def main() -> None:
    """Run the command line in this process."""
    install()
    _occupy_closed_streams()
    from armorm.cli.app import main as run

    run()


def _occupy_closed_streams() -> None:
    """Open the null device in place of closed standard streams, whose numbers the next files would get."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
