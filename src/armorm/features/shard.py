"""One shard of a feature store: a safetensors file, checksummed, read by memory mapping.

In:  keys and features of some conversations and prompts.
Out: a file, whole or absent; and `Shard`, which reads the rows that are asked for and no others.

    response_keys (m, 16) uint8, response_features (m, d)      metadata: crc32 of each tensor,
    prompt_keys   (q, 16) uint8, prompt_features   (q, d)      budget halvings

Features are float32 or bfloat16. A hidden state of a bfloat16 model is a bfloat16 number, so nothing is lost by
keeping it as such.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from armorm.errors import StoreError
from armorm.files import write_whole

KEY = "S16"  # keys are compared as 16 bytes; trailing zeros are no difference between keys of one length
DTYPES = ("float32", "bfloat16")
_NAMES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "U8": np.dtype("u1")}
_TENSORS = {"response_keys": "U8", "response_features": "", "prompt_keys": "U8", "prompt_features": ""}


def write_shard(path: Path, arrays: Mapping[str, np.ndarray], dtype: str, metadata: Mapping[str, str]) -> None:
    """Write a shard.

    Args:
        arrays: `response_keys`, `prompt_keys` of dtype `KEY`; `response_features`, `prompt_features` (., d) float32.
        dtype: of `DTYPES`, what features are stored in.
    """
    import torch
    from safetensors.torch import save_file

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    tensors: dict[str, torch.Tensor] = {}
    for name, array in arrays.items():
        if name.endswith("_keys"):
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).reshape(-1, 16).copy())
        else:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(kinds[dtype])
    sums = {
        name: f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}" for name, tensor in tensors.items()
    }
    # (One entry: the order of several is not the same in every file.)
    notes = json.dumps({"crc32": sums, **metadata}, sort_keys=True)
    write_whole(path, lambda temporary: save_file(tensors, temporary, {"armorm": notes}))


class Shard:
    """A shard on disk.

    Attributes:
        path: where it lies.
        metadata: what was noted with it.
        keys, prompt_keys: (m,) and (q,) of dtype `KEY`.

    Raises:
        StoreError: for a file that is not a whole shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(size) if 0 < size < 1 << 20 else b"null")
            self.metadata: dict[str, Any] = json.loads(header.pop("__metadata__")["armorm"])
            self._sums: dict[str, str] = self.metadata.pop("crc32")
            data = np.memmap(path, np.uint8, mode="r", offset=8 + size)
            self._arrays = {}
            for name, kind in _TENSORS.items():
                place = header[name]
                begin, end = place["data_offsets"]
                self._arrays[name] = data[begin:end].view(_dtype(place["dtype"], kind)).reshape(place["shape"])
            self.keys, self.prompt_keys = (
                np.ascontiguousarray(self._arrays[name]).view(KEY).reshape(-1)
                for name in ("response_keys", "prompt_keys")
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: damaged shard ({error})") from None

    def verify(self) -> None:
        """Compare every tensor with its checksum.

        Raises:
            StoreError: naming the file and the tensor.
        """
        for name, array in self._arrays.items():
            found, expected = f"{zlib.crc32(np.ascontiguousarray(array).data):08x}", self._sums.get(name)
            if found != expected:
                raise StoreError(f"{self.path}: damaged shard ({name} has checksum {found}, expected {expected})")

    def features(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows (n, d) float32 of `response_features` or `prompt_features`."""
        stored = self._arrays[name][rows]
        return stored if stored.dtype == np.float32 else from_bfloat16(stored)


def _dtype(found: str, expected: str) -> np.dtype:
    if expected and found != expected:
        raise ValueError(f"dtype {found}, expected {expected}")
    return _NAMES[found]


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits, uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
