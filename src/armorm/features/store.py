"""Features on disk: addressed by content, so that they are computed once and outlive the run.

In:  features of encoded conversations, with their keys.
Out: a folder of safetensors shards and a manifest.

    manifest.json                 the backbone's fingerprint, d, dtype
    plan-<id>.safetensors         which conversations each shard of one extraction holds
    shard-<id>-<n>.safetensors    response_keys (m, 16), response_features (m, d),
                                  prompt_keys (q, 16), prompt_features (q, d)

A response feature is addressed by its token ids, a prompt feature by the ids up to the gate, and each
is stored once. The plan is written before the first forward pass; a shard appears only when complete.
A run that was killed follows the same plan, computes only the shards that are missing, and so ends
with the same bytes. A store belongs to one backbone: another one's fingerprint is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from armorm.errors import StoreError
from armorm.files import read_arrays, write_arrays, write_json

FORMAT = "armorm-features"
KEY_BYTES = 16


class FeatureStore:
    """A folder of features of one backbone.

    Attributes:
        folder: where it lies.
        hidden_size: d.

    Raises:
        StoreError: for a folder that holds features of another backbone, or something else altogether.
    """

    def __init__(self, folder: str | Path, *, fingerprint: str, hidden_size: int) -> None:
        self.folder = Path(folder)
        self.hidden_size = hidden_size
        manifest = {"format": FORMAT, "version": 1, "fingerprint": fingerprint, "hidden_size": hidden_size}
        path = self.folder / "manifest.json"
        if path.exists() or any(self.folder.glob("shard-*.safetensors")):
            found = read_manifest(self.folder)
            differing = [name for name, value in manifest.items() if found.get(name) != value]
            if differing:
                raise StoreError(
                    f"{self.folder}: holds features of another backbone ({', '.join(differing)} differ); "
                    "expected the same weights, dtype, tokenizer and template, or an empty folder"
                )
        else:
            write_json(path, manifest)
        self._responses: dict[bytes, tuple[str, int]] = {}
        self._prompts: dict[bytes, tuple[str, int]] = {}
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            self._index(shard.name)

    def __len__(self) -> int:
        """Number of conversations whose features are here."""
        return len(self._responses)

    @property
    def prompt_count(self) -> int:
        """Number of prompts whose features are here."""
        return len(self._prompts)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of keys whose response feature is not here yet, first occurrences only."""
        return _missing(self._responses, keys)

    def missing_prompts(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of keys whose prompt feature is not here yet, first occurrences only."""
        return _missing(self._prompts, keys)

    def has_prompt(self, key: bytes, *, outside: str = "") -> bool:
        """Whether a prompt feature is here, in a shard whose name does not start with `outside`."""
        return key in self._prompts and not (outside and self._prompts[key][0].startswith(outside))

    def has_shard(self, name: str) -> bool:
        """Whether a shard is complete."""
        return (self.folder / name).exists()

    def plan(self, keys: Sequence[bytes], order: Sequence[int], bounds: Sequence[int]) -> tuple[str, list[list[bytes]]]:
        """The plan of this request: the one written before, or this one.

        Args:
            keys: key of each requested conversation.
            order: positions to compute, shard after shard.
            bounds: where each shard ends in `order`.

        Returns:
            the plan's id, and the keys of each of its shards.

        Raises:
            StoreError: for a damaged plan.
        """
        from safetensors import SafetensorError

        digest = blake2b(b"".join(sorted(set(keys))), digest_size=8)
        needed = {keys[i] for i in order}
        while True:
            name = digest.hexdigest()
            path = self.folder / f"plan-{name}.safetensors"
            if not path.exists():
                rows = np.frombuffer(b"".join(keys[i] for i in order), np.uint8).reshape(-1, KEY_BYTES)
                write_arrays(path, {"keys": rows, "bounds": np.asarray(bounds, np.int64)})
            try:
                arrays = read_arrays(path)
                planned, ends = [row.tobytes() for row in arrays["keys"]], arrays["bounds"].tolist()
            except (SafetensorError, KeyError) as error:
                raise StoreError(f"{path}: damaged plan ({error}); delete the file and run again") from None
            shards = [planned[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            open_shards = [shard for i, shard in enumerate(shards) if not self.has_shard(shard_name(name, i))]
            if needed <= {key for shard in open_shards for key in shard}:
                return name, shards
            digest.update(b"again")  # what an older plan of the same request found or wrote is gone

    def write_shard(
        self,
        name: str,
        response_keys: Sequence[bytes],
        response_features: np.ndarray,
        prompt_keys: Sequence[bytes],
        prompt_features: np.ndarray,
    ) -> None:
        """Write one shard, whole, and make its features readable."""
        arrays: dict[str, np.ndarray] = {
            "response_keys": np.frombuffer(b"".join(response_keys), np.uint8).reshape(-1, KEY_BYTES),
            "response_features": response_features.astype(np.float32, copy=False),
            "prompt_keys": np.frombuffer(b"".join(prompt_keys), np.uint8).reshape(-1, KEY_BYTES),
            "prompt_features": prompt_features.astype(np.float32, copy=False),
        }
        write_arrays(self.folder / name, arrays)
        self._index(name)

    def responses(self, keys: Sequence[bytes]) -> np.ndarray:
        """Response features (n, d) float32 of keys, in order."""
        return self._gather(self._responses, keys, "response_features")

    def prompts(self, keys: Sequence[bytes]) -> np.ndarray:
        """Prompt features (n, d) float32 of keys, in order."""
        return self._gather(self._prompts, keys, "prompt_features")

    def _gather(self, index: dict[bytes, tuple[str, int]], keys: Sequence[bytes], tensor: str) -> np.ndarray:
        from safetensors import safe_open

        gathered = np.empty((len(keys), self.hidden_size), np.float32)
        wanted: dict[str, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            shard, row = index[key]
            wanted.setdefault(shard, []).append((position, row))
        for shard, places in wanted.items():
            with safe_open(self.folder / shard, framework="np") as file:
                rows = file.get_tensor(tensor)
                positions, sources = np.array(places).T
                gathered[positions] = rows[sources]
        return gathered

    def _index(self, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / name, framework="np") as file:
                for keys, index in (("response_keys", self._responses), ("prompt_keys", self._prompts)):
                    for row, key in enumerate(file.get_tensor(keys)):
                        index.setdefault(key.tobytes(), (name, row))
        except SafetensorError as error:
            raise StoreError(f"{self.folder / name}: damaged shard ({error}); delete the file and run again") from None


def shard_name(plan: str, number: int) -> str:
    """File name of one shard of a plan."""
    return f"shard-{plan}-{number:05d}.safetensors"


def _missing(index: Mapping[bytes, tuple[str, int]], keys: Sequence[bytes]) -> list[int]:
    first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in index}
    return sorted(first.values())


def read_manifest(folder: Path) -> dict:
    """The manifest of a store.

    Raises:
        StoreError: where the folder holds none, or something else under that name.
    """
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: no feature store ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StoreError(f"{folder}: manifest.json is not that of a feature store")
    return found
