"""Results of work that goes chunk by chunk, kept until the output is written, so that an interrupted run resumes.

    OUTPUT.partial/chunk-<digest>.json    one per finished chunk

The digest is of the chunk's content and of everything else that decides its result (the model, settings, the
version), so a chunk is used again exactly if it would be computed again to the same result, whatever became of the
other rows. Each file is written whole. One process at a time works in the folder, which is removed in one step after
the output has its name. A run that is killed between the two leaves a complete output next to all of its chunks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from armorm.errors import DataError
from armorm.files import discard, output_target, plain, write_json
from armorm.locks import FILE as LOCK
from armorm.locks import locked
from armorm.version import __version__


def partial_folder(output: Path) -> Path:
    """The folder in which an interrupted run keeps what belongs to `output`."""
    return output.with_name(f"{output.name}.partial")


class SavedChunks:
    """Chunks in a folder.

    Args:
        folder: None keeps nothing.
        identity: everything apart from a chunk's content that decides its result, as JSON values.
        complete: a file that has its name only if every chunk is saved; None computes those that are not.
    """

    def __init__(self, folder: Path | None, identity: Any, complete: Path | None = None) -> None:
        self.folder, self._complete = folder, complete
        self._identity = json.dumps([plain(identity), __version__], sort_keys=True)

    def get(self, content: Iterable[str], compute: Callable[[], Any]) -> Any:
        """The saved result of a chunk, else that of `compute`, which is then saved; JSON values, NaN as None.

        Raises:
            DataError: if `complete` turns out to be a file of another run.
        """
        if self.folder is None:
            return plain(compute())
        digest = blake2b(json.dumps([self._identity, *content]).encode(), digest_size=16).hexdigest()
        path = self.folder / f"chunk-{digest}.json"
        if not path.exists():
            if self._complete is not None:
                raise already_exists(self._complete)
            write_json(path, compute())
        return json.loads(path.read_text(encoding="utf-8"))


def already_exists(output: Path) -> DataError:
    """The error of a command that would replace a file."""
    return DataError("exists already; choose another name, or overwrite it with --force", file=output)


@contextmanager
def work_folder(output: Path | None) -> Iterator[Path | None]:
    """The partial folder of an output, locked; it is removed when the block ends without an error.

    None where nothing can be kept: without an output, or for one that is written to at once, such as a FIFO.
    """
    if output is None or (output.exists() and (not output.is_file() or output_target(output) is None)):
        yield None
        return
    folder = partial_folder(output)
    with locked(folder):
        done = False
        try:
            yield folder
            done = True
        finally:
            if done or [path.name for path in folder.iterdir()] == [LOCK]:
                discard(folder)
