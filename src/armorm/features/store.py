"""Features on disk, addressed by content, so that they are computed once and outlive the run.

    manifest.json                 the backbone's fingerprint, d, dtype
    plan-<id>.safetensors         the conversations of each shard of one extraction, and how they are batched
    shard-<id>-<n>.safetensors    keys and features, written by `write_shard`
    part-<id>-<n>.safetensors     finished rows of a shard that is being computed (`Engine.features`)
    damaged-...                   shards that failed their checksum

A response feature is addressed by its token ids, a prompt feature by the ids up to the gate, and each is stored once;
another recipe on the same backbone, with any length limit, finds exactly the features that it needs. The plan is
written before the first forward pass, and a shard appears only when complete. A killed run follows the same plan,
computes only the missing shards, and ends with the same bytes. A store belongs to one backbone: another fingerprint
is rejected, and the error names the part that differs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union

import numpy as np

from armorm.errors import StoreError
from armorm.files import read_arrays, write_arrays, write_json, write_whole
from armorm.notebook import html_table
from armorm.progress import say

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "armorm-features"
VERSION = 2
BLOCK_ROWS = 8192
KEY = "S16"  # keys are compared as 16 bytes; trailing zeros make no difference between keys of equal length
DTYPES = ("float32", "bfloat16")
_TENSORS = ("response_keys", "response_features", "prompt_keys", "prompt_features")
Keys = Union[Sequence[bytes], np.ndarray]


class Fingerprinted(Protocol):
    """A backbone, in this process or in others."""

    @property
    def fingerprint_parts(self) -> Mapping[str, str]: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def response_size(self) -> int: ...


@dataclass(frozen=True)
class StoredPlan:
    """A plan as stored."""

    id: str  # part of the names of its shards
    shards: list[np.ndarray]  # keys of each shard, in order
    settings: dict[str, Any]  # of the engine


class FeatureStore:
    """A folder of features of one backbone.

    Args:
        fingerprint: of the backbone, by part: `weights`, `dtype`, `tokenizer`, `template`.
        hidden_size: d, of a prompt feature.
        response_size: of a response feature; d by default.
        dtype: of a new store; by default the backbone's if it is float32 or bfloat16, else float32.

    Attributes:
        shards: the complete ones.

    Raises:
        StoreError: for a folder that contains features of another backbone, or no feature store.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fingerprint: Mapping[str, str],
        hidden_size: int,
        response_size: int | None = None,
        dtype: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = dict(fingerprint)
        self.hidden_size, self.response_size = hidden_size, response_size or hidden_size
        if dtype is not None and dtype not in DTYPES:
            raise StoreError(f"{self.folder}: dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
        path = self.folder / "manifest.json"
        if path.exists() or any(self.folder.glob("shard-*.safetensors")):
            self.dtype = self._agreed(dtype)
        else:
            own = str(fingerprint.get("dtype"))
            self.dtype = dtype or (own if own in DTYPES else "float32")
            manifest = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint}
            sizes = {"hidden_size": hidden_size}
            sizes |= {} if self.response_size == hidden_size else {"response_size": self.response_size}
            write_json(path, {**manifest, **sizes, "dtype": self.dtype})
        self.shards: list[Shard] = []
        self._verified: set[str] = set()
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            self._open(shard)

    @classmethod
    def of(cls, folder: str | Path, backbone: Fingerprinted, dtype: str | None = None) -> FeatureStore:
        """The store of a backbone's features in a folder."""
        sizes = {"hidden_size": backbone.hidden_size, "response_size": backbone.response_size}
        return cls(folder, fingerprint=backbone.fingerprint_parts, dtype=dtype, **sizes)

    @classmethod
    def existing(cls, folder: str | Path) -> FeatureStore:
        """The store in a folder, whatever its backbone.

        Raises:
            StoreError: for a folder without one.
        """
        manifest = read_manifest(Path(folder))
        sizes = {name: manifest[name] for name in ("hidden_size", "response_size") if name in manifest}
        return cls(folder, fingerprint=manifest["fingerprint"], **sizes)

    def _agreed(self, dtype: str | None) -> str:
        """dtype of the existing store, which must be of this backbone, and have this dtype unless it is None."""
        found = read_manifest(self.folder)
        version, stored = found.get("version"), str(found.get("dtype"))
        if version != VERSION:
            raise StoreError(
                f"{self.folder}: a feature store of version {version}, expected {VERSION}; use a new folder"
            )
        differing = differing_parts(found["fingerprint"], self.fingerprint)
        if found.get("hidden_size") != self.hidden_size:
            differing.append("hidden_size")
        if differing:
            expected = "the same weights, dtype, tokenizer and template"
            if "dtype" in differing:
                expected = f"one in {found['fingerprint']['dtype']} (dtype), as these are"
            raise StoreError(
                f"{self.folder}: contains features of another backbone ({', '.join(differing)} differ); "
                f"expected {expected}, or an empty folder"
            )
        if dtype not in (None, stored):
            raise StoreError(f"{self.folder}: contains features as {stored}, expected {dtype} or an empty folder")
        return stored

    def __len__(self) -> int:
        """Number of conversations with stored features."""
        return len(self._responses.keys)

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.folder)!r}, {len(self):,} conversations, {self.prompt_count:,} prompts)"

    def _repr_html_(self) -> str:
        rows = [
            ["conversations", f"{len(self):,}"],
            ["prompts", f"{self.prompt_count:,}"],
            ["response feature", f"{self.response_size:,} numbers, {self.dtype}"],
            ["shards", f"{len(self.shards):,}"],
        ]
        return html_table(f"feature store {self.folder}", ["", ""], rows)

    @property
    def prompt_count(self) -> int:
        """Number of prompts with stored features."""
        return len(self._prompts.keys)

    def missing(self, keys: Keys) -> list[int]:
        """Positions of keys whose response feature is not stored, first occurrences only."""
        return self._missing(self._responses, keys)

    def missing_prompts(self, keys: Keys) -> list[int]:
        """Positions of keys whose prompt feature is not stored, first occurrences only."""
        return self._missing(self._prompts, keys)

    def has_prompts(self, keys: Keys, *, outside: str = "") -> np.ndarray:
        """Mask (n,) of the prompt features stored in a shard whose name does not start with `outside`."""
        places = self._prompts.find(np.asarray(keys, KEY))
        counts = np.array([not (outside and shard.path.name.startswith(outside)) for shard in self.shards], bool)
        found = places >= 0
        found[found] = counts[self._prompts.shard[places[found]]]
        return found

    def has_shard(self, name: str) -> bool:
        """Whether a shard is complete."""
        return (self.folder / name).exists()

    def plan(
        self,
        keys: Keys,
        order: Sequence[int] | np.ndarray,
        bounds: Sequence[int],
        settings: Mapping[str, Any] | None = None,
    ) -> StoredPlan:
        """The plan of this request: an earlier one if stored, else this one.

        Args:
            keys: of the requested conversations.
            order: positions to compute, shard after shard.
            bounds: end of each shard in `order`.
            settings: of the engine; an earlier plan keeps its own.

        Raises:
            StoreError: for a damaged plan.
        """
        from safetensors import SafetensorError

        keys = np.asarray(keys, KEY)
        digest = blake2b(np.unique(keys).tobytes(), digest_size=8)
        needed = keys[np.asarray(order, np.int64)]
        while True:
            name = digest.hexdigest()
            path = self.folder / f"plan-{name}.safetensors"
            if not path.exists():
                text = np.frombuffer(json.dumps(dict(settings or {}), sort_keys=True).encode(), np.uint8)
                rows = needed.view(np.uint8).reshape(-1, 16)
                write_arrays(path, {"keys": rows, "bounds": np.asarray(bounds, np.int64), "settings": text})
            try:
                arrays = read_arrays(path)
                planned = arrays["keys"].reshape(-1).view(KEY)
                ends = arrays["bounds"].tolist()
                found = json.loads(arrays["settings"].tobytes())
            except (SafetensorError, KeyError, ValueError) as error:
                raise StoreError(f"{path}: damaged plan ({error}); delete the file and run again") from None
            shards = [planned[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            left = [shard for i, shard in enumerate(shards) if not self.has_shard(shard_name(name, i))]
            if np.isin(needed, np.concatenate([np.empty(0, KEY), *left])).all():
                return StoredPlan(name, shards, found)
            digest.update(b"again")  # an older plan of this request no longer fits what is stored

    def write_shard(self, name: str, *arrays: Any, **options: Any) -> None:
        """Write one shard and make its features readable; arguments as of the function `write_shard`."""
        write_shard(self.folder / name, self.dtype, *arrays, **options)
        self.adopt(name)
        self._verified.add(name)

    def adopt(self, name: str) -> None:
        """Make a shard readable that was written after the store was opened, by this process or another."""
        if self._open(self.folder / name):
            self._forget_index()

    def read_new(self) -> None:
        """Make the shards readable that other processes have written since the store was opened."""
        known = {shard.path.name for shard in self.shards}
        found = [path for path in sorted(self.folder.glob("shard-*.safetensors")) if path.name not in known]
        if sum(self._open(path) for path in found):
            self.shards.sort(key=lambda shard: shard.path.name)
            self._forget_index()

    def bytes_of(self, responses: int, prompts: int) -> int:
        """Size on disk of so many response and prompt features."""
        width = 2 if self.dtype == "bfloat16" else 4
        return responses * (self.response_size * width + 16) + prompts * (self.hidden_size * width + 16)

    def verify(self, keys: Keys, prompt_keys: Keys) -> list[str]:
        """Check the checksums of each shard with these keys, once; returns the names of damaged ones.

        Damaged shards are renamed, and their features are missing from then on.
        """
        used = {
            self.shards[shard]
            for index, wanted in ((self._responses, keys), (self._prompts, prompt_keys))
            for places in [index.find(np.asarray(wanted, KEY))]
            for shard in np.unique(index.shard[places[places >= 0]])
        }
        damaged = []
        for shard in sorted(used, key=lambda shard: shard.path.name):
            if shard.path.name in self._verified:
                continue
            try:
                shard.verify()
                self._verified.add(shard.path.name)
            except StoreError as error:
                self._set_aside(shard.path, error)
                self.shards.remove(shard)
                damaged.append(shard.path.name)
        if damaged:
            self._forget_index()
        return damaged

    def responses(self, keys: Keys) -> np.ndarray:
        """Response features (n, d) float32 of keys, in order."""
        return self._gather(self._responses, "response_features", keys)

    def order(self, keys: Keys) -> np.ndarray:
        """Positions (n,) of response keys in the order of the shards, in which each file is read once."""
        places = self._responses.find(np.asarray(keys, KEY))
        return np.lexsort((self._responses.row[places], self._responses.shard[places]))

    def blocks(self, keys: np.ndarray, size: int = BLOCK_ROWS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Blocks of keys (n,), in the order of the shards: positions (b,) and response features (b, d) float32."""
        order = self.order(keys)
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield places, self.responses(keys[places])

    def prompts(self, keys: Keys) -> np.ndarray:
        """Prompt features (n, d) float32 of keys, in order."""
        return self._gather(self._prompts, "prompt_features", keys)

    def _gather(self, index: _Index, tensor: str, keys: Keys) -> np.ndarray:
        wanted = np.asarray(keys, KEY)
        places = index.find(wanted)
        if (places < 0).any():
            raise KeyError(bytes(wanted[places < 0][0]))
        width = self.response_size if tensor == "response_features" else self.hidden_size
        gathered = np.empty((len(wanted), width), np.float32)
        shards = index.shard[places]
        order = np.argsort(shards, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(here):
                gathered[here] = self.shards[shards[here[0]]].features(tensor, index.row[places[here]])
        return gathered

    @staticmethod
    def _missing(index: _Index, keys: Keys) -> list[int]:
        wanted = np.asarray(keys, KEY)
        absent = np.flatnonzero(index.find(wanted) < 0)
        _, first = np.unique(wanted[absent], return_index=True)
        return np.sort(absent[first]).tolist()

    def _open(self, path: Path) -> bool:
        try:
            self.shards.append(Shard(path))
        except StoreError as error:
            self._set_aside(path, error)
            return False
        return True

    def _set_aside(self, path: Path, error: StoreError) -> None:
        aside = path.with_name(f"damaged-{path.name}")
        path.replace(aside)
        say(f"{error}: renamed to {aside.name}; its features are computed again when needed")

    # Built on first use: sorting all keys again after every new shard would take longer than computing the shard.
    @cached_property
    def _responses(self) -> _Index:
        return _Index([shard.keys for shard in self.shards])

    @cached_property
    def _prompts(self) -> _Index:
        return _Index([shard.prompt_keys for shard in self.shards])

    def _forget_index(self) -> None:
        for name in ("_responses", "_prompts"):
            self.__dict__.pop(name, None)


class _Index:
    """Shard and row (m,) int32 of each of the sorted, distinct keys (m,), in the first shard that contains it."""

    def __init__(self, keys: Sequence[np.ndarray]) -> None:
        every = np.concatenate([np.empty(0, KEY), *keys])
        self.keys, first = np.unique(every, return_index=True)
        sizes = np.array([len(part) for part in keys], np.int64)
        starts = np.cumsum(sizes) - sizes
        self.shard = (np.searchsorted(starts + sizes, first, side="right")).astype(np.int32)
        self.row = (first - starts[self.shard] if len(first) else first).astype(np.int32)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Index of each key in `keys`, -1 if absent."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, -1)


def differing_parts(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Parts of two fingerprints that differ."""
    return [part for part in sorted({*one, *other}) if one.get(part) != other.get(part)]


def shard_name(plan: str, number: int) -> str:
    return f"shard-{plan}-{number:05d}.safetensors"


def part_path(shard: Path) -> Path:
    """The file of finished rows of a shard that is being computed."""
    return shard.with_name(shard.name.replace("shard-", "part-", 1))


def dtype_for(folder: str | Path | None, dtype: str = "auto") -> str:
    """The dtype to load a backbone in for a store: `auto` is that of the features in the folder, if it has some."""
    if folder is None or dtype != "auto" or not (Path(folder) / "manifest.json").is_file():
        return dtype
    return str(read_manifest(Path(folder))["fingerprint"].get("dtype", dtype))


def read_manifest(folder: Path) -> dict:
    """The manifest of a store; a `StoreError` for a folder without one."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: no feature store ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StoreError(f"{folder}: manifest.json is not of a feature store")
    return found


def write_shard(
    path: Path,
    dtype: str,
    response_keys: Keys,
    response_features: np.ndarray,
    prompt_keys: Keys,
    prompt_features: np.ndarray,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a shard; `dtype`, one of `DTYPES`, is that in which the features (m, d) and (q, d) are stored."""
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    arrays = (response_keys, response_features, prompt_keys, prompt_features)
    for name, array in zip(_TENSORS, arrays, strict=True):
        if name.endswith("_keys"):
            tensors[name] = torch.from_numpy(np.array(array, KEY).view(np.uint8).reshape(-1, 16))
        else:
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(getattr(torch, dtype))
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    # (One entry, because the order of several varies from file to file.)
    notes = json.dumps({"crc32": sums, **(metadata or {})}, sort_keys=True)
    write_whole(path, lambda temporary: save_file(tensors, temporary, {"armorm": notes}))


def _checksum(tensor: Tensor) -> str:
    import torch

    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


class Shard:
    """A shard on disk, mapped into memory.

    Attributes:
        metadata: as given to `write_shard`.
        keys, prompt_keys: (m,) and (q,) of dtype `KEY`.

    Raises:
        StoreError: for a file that is not a complete shard.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self.metadata: dict[str, Any] = json.loads(file.metadata()["armorm"])
                self._tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in _TENSORS}
            self._sums: dict[str, str] = self.metadata.pop("crc32")
            self.keys, self.prompt_keys = (
                self._tensors[name].numpy().view(KEY).reshape(-1) for name in ("response_keys", "prompt_keys")
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: damaged shard ({error})") from None

    def verify(self) -> None:
        """Compare every tensor with its checksum; a `StoreError` names the file and the tensor."""
        for name, tensor in self._tensors.items():
            found, expected = _checksum(tensor), self._sums.get(name)
            if found != expected:
                raise StoreError(f"{self.path}: damaged shard ({name} has checksum {found}, expected {expected})")

    def features(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows (n, d) float32 of `response_features` or `prompt_features`."""
        import torch

        return self._tensors[name].index_select(0, torch.from_numpy(rows)).float().numpy()
