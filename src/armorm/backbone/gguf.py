"""GGUF files as backbones: dequantised and converted to safetensors once, in the user's cache.

The cache is keyed by the file's SHA-256 and the version of transformers, which converts weights and tokenizer: another
file, a changed one, or another version is converted anew. Quantised weights are dequantised and stored in bfloat16,
whose rounding is far below that of the quantisation; files in float32, float16 or bfloat16 keep their dtype. Reading
needs the package `gguf` (extra `gguf`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from armorm.errors import BackboneError, MissingExtraError
from armorm.files import cache_folder, files_together, write_json
from armorm.progress import progress, say

SUFFIX = ".gguf"
SOURCE = "source.json"  # beside the converted weights: file name and sha256
_CONVERSION = 1  # part of the key: raised when the conversion changes
_UNQUANTISED = {"F32": "float32", "F16": "float16"}  # dtype that is kept; matrices in any other give bfloat16
_CHUNK = 1 << 24
# What gguf and transformers raise for a damaged file.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with progress(f"checksum of {file.name}", size, "bytes") as advance, file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def converted_folder(sha256: str) -> Path:
    """Folder in the cache for the conversion of a file; it exists once the file was converted."""
    return cache_folder() / "gguf" / f"{sha256}-{_CONVERSION}-{version('transformers')}"


def convert(file: Path, sha256: str | None = None) -> Path:
    """Folder with safetensors, tokenizer and config of a GGUF file, converted on first use.

    Args:
        sha256: of the file, if it was computed before.

    Raises:
        BackboneError: for a file that does not exist or cannot be converted.
        MissingExtraError: without the package `gguf`.
    """
    if not file.is_file():
        raise BackboneError(f"backbone {file}: no such file")
    sha256 = sha256 or _known_sha256(file)
    folder = converted_folder(sha256)
    if not (folder / SOURCE).is_file():
        say(f"{file.name}: converting to safetensors, once, into {folder}")
        _whole_folder(folder, lambda target: _convert(file, sha256, target))
    return folder


def _convert(file: Path, sha256: str, target: Path) -> None:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtraError(
            f"{file.name}: reading GGUF files needs the package gguf: pip install 'armorm[gguf]'"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
        dtype = _UNQUANTISED.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, **_dequantized()
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except _DAMAGED as error:
        raise BackboneError(f"backbone {file}: cannot be read as GGUF: {type(error).__name__}: {error}") from error
    with files_together(target) as temporary:
        model.to(getattr(torch, dtype)).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    write_json(target / SOURCE, {"file": file.name, "sha256": sha256})


def _dequantized() -> dict[str, object]:
    """Settings that make transformers dequantise: needed from some version 5 on, the only way before."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _known_sha256(file: Path) -> str:
    """SHA-256 of a file, remembered for its path, size and time of change."""
    status, index = file.stat(), cache_folder() / "gguf" / "files.json"
    entry = [str(file.resolve()), status.st_size, status.st_mtime_ns]
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    found: str | None = known.get(json.dumps(entry))
    if found is None:
        found = file_sha256(file)
        write_json(index, {**known, json.dumps(entry): found})
    return found


def _whole_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder that gets its name when it is complete; of two processes that do so at once, one wins."""
    target = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        fill(target)
        try:
            target.rename(folder)
        except OSError:
            if not (folder / SOURCE).is_file():
                raise
    finally:
        shutil.rmtree(target, ignore_errors=True)
