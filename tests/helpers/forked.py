"""Processes for tests that kill one: forked, so that they start at once, with everything imported."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess


@contextmanager
def forked(work: Callable[..., object], *arguments: object) -> Iterator[BaseProcess]:
    """`work(*arguments)` in another process, which is killed (SIGKILL) when the block ends."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
