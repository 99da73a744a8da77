"""Results of work that goes chunk by chunk, kept until the output is written, so that an interrupted run resumes.

    OUTPUT.partial/chunk-<digest>.json    one per finished chunk

The digest is of the chunk's content and of everything else that decides its result (the model, settings, the
version), so a chunk is used again exactly if it would be computed again to the same result, whatever became of the
other rows. Each file is written whole. One process at a time works in the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from armorm.files import plain, write_json
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
    """

    def __init__(self, folder: Path | None, identity: Any) -> None:
        self.folder = folder
        self._identity = json.dumps([plain(identity), __version__], sort_keys=True)

    def get(self, content: Iterable[str], compute: Callable[[], Any]) -> Any:
        """The saved result of a chunk, else that of `compute`, which is then saved; JSON values, NaN as None."""
        if self.folder is None:
            return plain(compute())
        digest = blake2b(json.dumps([self._identity, *content]).encode(), digest_size=16).hexdigest()
        path = self.folder / f"chunk-{digest}.json"
        if not path.exists():
            write_json(path, compute())
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def work_folder(output: Path | None) -> Iterator[Path | None]:
    """The partial folder of an output, locked; it is removed when the block ends without an error.

    None where nothing can be kept: without an output, or for one that is written to at once, such as a FIFO.
    """
    if output is None or (output.exists() and not output.is_file()):
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
                shutil.rmtree(folder)
