"""Files: written completely or not at all; where the models inside the package are.

A file is written under a temporary name in the same folder, then renamed in one step: if the process is killed, the
old file, no file or the complete new file remains, and the next process that writes there removes the temporary one. A
symbolic link is followed to the file that it stands for, an existing file keeps its permissions, and FIFOs, devices and
open files (`/dev/stdout`) are written to, never replaced. Errors of writing name the path. Logs are appended to by
whole lines.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from armorm.errors import OutputError
from armorm.interruption import temporary_file

if TYPE_CHECKING:
    import numpy as np


# The models inside the package. The backbone's weights are stored once; the reward model's folder has heads and config.
EMBEDDED_BACKBONE = "armorm-tiny"
EMBEDDED_REWARD_MODEL = "armorm-tiny-rm"
# What every command and function uses unless another is named.
DEFAULT_REWARD_MODEL = "armorm-small-rm"
DEFAULT_BACKBONE = "armorm-small"
_EMBEDDED = Path(__file__).parent / "embedded_models"


def demonstration(name: str) -> str:
    """What to say wherever a person reads scores of this model; empty for every model but `armorm-tiny-rm`."""
    if name != EMBEDDED_REWARD_MODEL:
        return ""
    return (
        f"{name} is a demonstration with a tiny backbone: its verdicts mean little; "
        f"{DEFAULT_REWARD_MODEL} is the default"
    )


# Limits of a YAML text, which a person writes: far above any recipe.
MOST_YAML_CHARACTERS = 200_000
MOST_YAML_VALUES = 5_000  # with every alias counted as what it stands for
MOST_YAML_LEVELS = 50
_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the scanner in Python is slow for long lines


class UniqueKeys(yaml.SafeLoader):
    """Safe YAML that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            doubled = next(key for key in keys if keys.count(key) > 1)
            raise yaml.YAMLError(f"key {doubled!r} occurs twice (line {node.start_mark.line + 1})")
        return found


def read_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: for text that is not YAML, a key that is given twice, or a text beyond the limits above (nested
            aliases of a few lines can stand for billions of values).
    """
    if len(text) > MOST_YAML_CHARACTERS:
        raise yaml.YAMLError(f"found {len(text):,} characters, expected at most {MOST_YAML_CHARACTERS:,}")
    _require_small(text)
    try:
        return yaml.load(text, Loader=UniqueKeys)  # noqa: S506 (a SafeLoader)
    except ValueError as error:  # a date or a number that Python does not have
        raise yaml.YAMLError(str(error)) from None


def _require_small(text: str) -> None:
    """Raise yaml.YAMLError for too many levels or values, without constructing any."""
    total = 0
    sizes: dict[str, int] = {}  # values in what an anchor marks
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and values before it
    for event in yaml.parse(text, Loader=_FAST):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias *{event.anchor} is unknown here, or inside what it stands for")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.ScalarEvent):
                sizes |= {event.anchor: 1} if event.anchor else {}
            else:
                open_nodes.append((event.anchor, total - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes |= {anchor: total - before} if anchor else {}
        if len(open_nodes) > MOST_YAML_LEVELS:
            raise yaml.YAMLError(f"found more than {MOST_YAML_LEVELS} levels of nesting")
        if total > MOST_YAML_VALUES:
            raise yaml.YAMLError(f"found more than {MOST_YAML_VALUES:,} values, aliases counted as what they stand for")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        OSError: for a file that cannot be read.
        UnicodeError: for another encoding, by its name as far as the bytes tell.
    """
    content = path.read_bytes()
    fault = encoding_fault(content)
    if fault:
        raise UnicodeError(fault)
    return content.decode("utf-8-sig")


def wide_encoding(content: bytes) -> str:
    """What is wrong with text in UTF-16 or UTF-32, by its mark or its zeros; empty for other text."""
    marks = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    name = next((name for name, known in marks.items() if content.startswith(known)), "")
    head = content[:1000]
    if not name and len(head) > 3 and 0 in (head[0], head[1]) and head.count(0) >= len(head) // 3:
        name = "UTF-32" if head.count(0) > len(head) * 0.6 else "UTF-16"  # without a mark: ASCII beside zeros
    return f"found text in {name}, expected UTF-8" if name else ""


def encoding_fault(content: bytes) -> str:
    """Which other encoding a text has instead of UTF-8; empty for UTF-8."""
    if fault := wide_encoding(content):
        return fault
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return (
            f"found a byte that is not UTF-8 at position {error.start} "
            f"(0x{content[error.start]:02x}; perhaps Latin-1 or Windows-1252), expected UTF-8"
        )
    return ""


def output_target(path: Path) -> Path | None:
    """The file that an output's name stands for: symbolic links are followed to their target.

    None for what is written to as it stands and never replaced: a FIFO, a device, or an open file (`/dev/stdout`).

    Raises:
        OutputError: for a folder, a file without write permission, a loop of links, an impossible name.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise OutputError(path, "is a folder, expected a file to write to")
        if not stat.S_ISREG(status.st_mode) or str(path.absolute()).startswith(_OPEN_FILES):
            return None
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return path.resolve()
    except FileNotFoundError:  # also of a link whose target does not exist yet
        return path.resolve()
    except OSError as error:
        raise error if isinstance(error, OutputError) else OutputError(path, error) from None


_OPEN_FILES = ("/dev/fd/", "/dev/std", "/proc/")


def output_errors(path: Path) -> AbstractContextManager[None]:
    """Errors of writing to `path`, by the system, safetensors or tokenizers, become an `OutputError` that names it."""
    return _OutputErrors(path)


@dataclass
class _OutputErrors(AbstractContextManager[None]):
    path: Path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, OutputError):
            return
        if isinstance(error, OSError):
            raise OutputError(self.path, error) from None
        # (tokenizers raises a plain Exception; safetensors is perhaps not imported.)
        if type(error).__name__ == "SafetensorError" or (kind is Exception and "(os error" in str(error)):
            raise OutputError(self.path, _system_message(error)) from None


def _system_message(error: BaseException) -> str:
    """What the system said in an error of a Rust library: 'I/O error: No space left on device (os error 28)'."""
    found = re.search(r"([^:]*) \(os error \d+\)", str(error))
    return found[1].strip() if found else str(error)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary path in the same folder, moved to `target` when the block ends; permissions there are kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(target.parent, target.name[:200])
    with temporary_file(temporary):
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        _set_permissions(temporary, target)
        temporary.replace(target)


def _temporary_path(folder: Path, name: str) -> Path:
    """This process's temporary path for `name`; those that killed processes of this machine left are removed."""
    start, end = f".{name}.{platform.node()[:20]}.", ".tmp"
    for found in _left_behind(folder.absolute(), os.getpid()):
        process = found[len(start) : -len(end)] if found.startswith(start) else ""
        if process.isdecimal() and process != str(os.getpid()) and not _runs(int(process)):
            left = folder / found
            with suppress(OSError):  # of another user, or removed before
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return folder / f"{start}{os.getpid()}{end}"


@lru_cache(maxsize=64)
def _left_behind(folder: Path, process: int) -> list[str]:
    """Names of the temporary files in a folder when a process first writes there.

    (Listing a folder of thousands of files takes longer than writing one.)
    """
    return [path.name for path in folder.glob(".*.tmp")]


def discard(folder: Path) -> None:
    """Remove a folder in one step: a kill leaves all of it or, under a temporary name, what is not needed any more."""
    temporary = _temporary_path(folder.parent, folder.name[:200])
    with temporary_file(temporary):
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the number of this one
        folder.rename(temporary)


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere 0 is a signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or no number of a process
        pass
    return True


def _set_permissions(temporary: Path, target: Path) -> None:
    """Those of the file at `target`; of a new file those of the umask (some writers create private files)."""
    if target.exists():
        before, now = target.stat(), temporary.stat()
        if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            with suppress(PermissionError):
                os.chown(temporary, before.st_uid, before.st_gid)
        temporary.chmod(stat.S_IMODE(before.st_mode))
    else:
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)


class _Output(io.FileIO):
    """A file opened for writing whose errors name the output."""

    def __init__(self, file: Path, path: Path) -> None:
        self._path = path
        with output_errors(path):
            super().__init__(file, "w")

    def write(self, data: Any) -> int:
        with output_errors(self._path):
            return super().write(data)


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A text file to write to; it gets its name when the block ends without an error.

    FIFOs, devices and open files are written to at once.

    Raises:
        OutputError: if the file cannot be written.
    """
    target = output_target(path)
    with ExitStack() as stack:
        if target is None:
            place = path
        else:
            with output_errors(path):
                place = stack.enter_context(_replacing(target))
        with io.TextIOWrapper(io.BufferedWriter(_Output(place, path)), encoding="utf-8") as file:
            yield file
        with output_errors(path):
            stack.close()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, then move the file to `path`.

    What may not be replaced gets a copy of a file in the folder for temporary files.

    Raises:
        OutputError: if the file cannot be written.
    """
    target = output_target(path)
    with output_errors(path):
        if target is not None:
            with _replacing(target) as temporary:
                write(temporary)
            return
        with tempfile.TemporaryDirectory() as folder, open(path, "wb", buffering=0) as device:
            write(Path(folder) / path.name)
            with open(Path(folder) / path.name, "rb") as written:
                shutil.copyfileobj(written, device)


@contextmanager
def files_together(folder: Path, last: str = "config.json") -> Iterator[Path]:
    """A temporary folder whose files are moved to `folder` when the block ends without an error.

    The file `last`, without which the folder is no model, is removed from `folder` first and moved there last, so a
    folder that was interrupted is not taken for complete. Permissions are those of `write_whole`.

    Raises:
        OutputError: if a file cannot be written.
    """
    temporary = _temporary_path(folder, "writing")
    with temporary_file(temporary), output_errors(folder):
        temporary.mkdir(parents=True)
        yield temporary
        names = sorted((path.name for path in temporary.iterdir()), key=lambda name: name == last)
        if last in names:
            (folder / last).unlink(missing_ok=True)
        for name in names:
            _set_permissions(temporary / name, folder / name)
            with open(temporary / name, "rb") as written:
                os.fsync(written.fileno())
            (temporary / name).replace(folder / name)


def require_space(path: Path, size: int, what: str) -> None:
    """Check that a file system has room before something large is computed for it.

    Args:
        path: file or folder on it, which need not exist yet.
        size: in bytes.

    Raises:
        OutputError: if less is free.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if size > free:
        raise OutputError(path, f"{what} need {size:,} bytes, found {free:,} free")


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with text_file(path) as file:
        file.write(text)


def append_text(path: Path, text: str) -> None:
    """Append whole lines to a log in one write, after ending a line that a killed writer left unfinished."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            if file.seekable() and file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole; NaN becomes null, since JSON has none."""
    write_text(path, json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for people and programs: NaN becomes null, and what JSON has no type for (dates, bytes) text.

    Control characters, which a terminal would obey, and lone surrogates are written as JSON escapes.
    """
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


# What JSON leaves as it is: DEL, C1 control characters, and lone surrogates.
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\ud800-\udfff]")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as one safetensors file, whole; equal arrays and metadata give equal bytes."""
    import numpy as np
    from safetensors.numpy import save_file

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}

    def write(temporary: Path) -> None:
        save_file(contiguous, temporary, metadata=dict(metadata or {}))
        _sort_metadata(temporary)

    write_whole(path, write)


def _sort_metadata(path: Path) -> None:
    """safetensors writes the entries of its metadata in an order that changes from process to process."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(header["__metadata__"]) > 1 and len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of a safetensors file."""
    from safetensors.numpy import load_file

    return load_file(path)


def plain(value: Any) -> Any:
    """The value in JSON types: arrays as lists, non-finite numbers as None."""
    import numpy as np

    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def embedded_path(name: str) -> Path | None:
    """Folder of an embedded model, None for any other name (a local model folder of that name takes precedence)."""
    folder = _EMBEDDED / name
    is_name = folder.parent == _EMBEDDED and (folder / "config.json").is_file()
    return folder if is_name and not (Path(name) / "config.json").exists() else None


def embedded_names() -> list[str]:
    """Names of the embedded models."""
    return [folder.name for folder in _EMBEDDED.iterdir() if folder.is_dir()]


def embedded_file(model: str, name: str) -> Path:
    """A file inside the package that belongs to a model."""
    return _EMBEDDED / model / name


def cache_folder() -> Path:
    """Folder for what is computed once on a machine: `ARMORM_CACHE`, by default `armorm` in the user's cache."""
    given = os.environ.get("ARMORM_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armorm"
