"""Files: written completely or not at all; where the models inside the package are.

A file is written under a temporary name in the same folder, then renamed in one step: if the process is killed, the
old file, no file or the complete new file remains. Logs are appended to by whole lines.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

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
    return f"{name} is a demonstration: a tiny backbone, whose verdicts mean little; the default model is another"


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


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A text file to write to; it gets its name when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder, then move the file to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(_mode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _mode() -> int:
    """Permissions of a new file under the current umask (some writers create private files)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Append whole lines to a log in one write, after ending a line that a killed writer left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if file.tell():
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
    """Write arrays as one safetensors file, whole."""
    import numpy as np
    from safetensors.numpy import save_file

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_whole(path, lambda temporary: save_file(contiguous, temporary, metadata=dict(metadata or {})))


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


def embedded_file(model: str, name: str) -> Path:
    """A file inside the package that belongs to a model."""
    return _EMBEDDED / model / name


def cache_folder() -> Path:
    """Folder for what is computed once on a machine: `ARMORM_CACHE`, by default `armorm` in the user's cache."""
    given = os.environ.get("ARMORM_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "armorm"
