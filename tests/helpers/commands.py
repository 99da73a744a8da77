"""Commands of armorm, run in this process."""

from __future__ import annotations

import pytest

from armorm.cli.app import main


def exit_code(*arguments: object) -> int:
    """How a command ends."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of a command."""
    code = exit_code(*arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
