"""`armorm inspect`: what is in a data set, a model or a feature store."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.embedded import embedded_path
from armorm.errors import DataError, StoreError

if TYPE_CHECKING:
    import numpy as np

    from armorm.features.store import Shard

_STRUCTURE = {"messages", "prompt", "response", "responses", "chosen", "rejected"}


def inspect(
    what: Annotated[str, typer.Argument(help="Data (file, folder, hub id), a model folder, or a feature store.")],
    split: Annotated[str | None, typer.Option(help="Split of a hub set or a saved folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is in it: objectives, scales, counts, missing ratings, problems.

    Example: `armorm inspect ratings.jsonl`
    """
    folder = embedded_path(what) or Path(what)
    if folder.suffix == ".safetensors":
        found = _published(folder)
    elif (folder / "manifest.json").is_file():
        found = _store(folder)
    elif (folder / "config.json").is_file():
        found = _model(folder)
    else:
        found = _data(Location.find(what, split=split))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        Console(highlight=False).print(*_tables(found), sep="\n")


def _data(location: Location) -> dict[str, Any]:
    """Counts over all rows; faults are counted, the first ones shown."""
    rows = 0
    prompts: set[str] = set()
    splits: Counter[str] = Counter()
    faults: list[str] = []
    fault_count = 0
    numbers: dict[str, list[float]] = {}
    other: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for row in location.rows_or_faults():
        rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            kinds[_kind(row)] += 1
            prompts.add(_prompt_key(row))
        except DataError as error:
            fault_count += 1
            faults += [str(error)] if len(faults) < 5 else []
            continue
        splits[str(row.values.get("split") or "")] += 1
        for name in row.values:
            value = row.value(name)
            if name in _STRUCTURE or name == "split":
                continue
            if isinstance(value, (bool, int, float)) and not (isinstance(value, float) and math.isnan(value)):
                numbers.setdefault(name, []).append(float(value))
            elif value is not None:
                other[name] += 1
    columns = {
        name: {
            "rated": len(values),
            "missing": rows - len(values),
            "lowest": min(values),
            "highest": max(values),
            "mean": sum(values) / len(values),
            "levels": len(set(values)),
        }
        for name, values in numbers.items()
        if name not in other
    }
    return {
        "kind": "data",
        "name": location.name,
        "rows": rows,
        "layout": dict(kinds),
        "prompts": len(prompts),
        "splits": {name: count for name, count in splits.items() if name},
        "numbers": columns,
        "other columns": sorted(other),
        "refused": fault_count,
        "problems": faults,
    }


def _kind(row: Row) -> str:
    if "chosen" in row.values and "rejected" in row.values:
        return "preference pairs"
    return "candidates" if row.values.get("responses") is not None else "conversations"


def _prompt_key(row: Row) -> str:
    from armorm.data.preferences import preference_pair
    from armorm.evaluation.best_of_n import read_candidates

    kind = _kind(row)
    if kind == "preference pairs":
        return preference_pair(row).prompt_key
    if kind == "conversations":
        return row.conversation().prompt_key
    held = next(read_candidates([row]))
    for fault in held.faults.values():
        raise row.error(fault)
    return next(conversation.prompt_key for conversation in held.conversations if conversation is not None)


def _model(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"kind": "model", "name": str(folder), "model_type": config.get("model_type", "")}
    if "num_objectives" in config:
        from armorm.model.released import from_released, is_released

        if is_released(config):
            found["layout"] = "released"
            config = from_released(config)
    if config.get("model_type") != "armorm":
        return found | {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key in config}
    keys = ("objectives", "debiasing", "steering", "reference", "limits", "provenance", "gate_pattern")
    found |= {key: config.get(key) for key in keys}
    found["gate"] = {key: config.get(key) for key in ("gating_hidden_dim", "gating_n_hidden", "gating_temperature")}
    return found


def _store(folder: Path) -> dict[str, Any]:
    from armorm.features.store import FeatureStore, read_manifest

    manifest = read_manifest(folder)
    store = FeatureStore(
        folder,
        fingerprint=manifest.get("fingerprint", {}),
        hidden_size=manifest.get("hidden_size", 0),
    )
    halved = [shard.path.name for shard in store.shards if shard.metadata.get("halvings")]
    damaged = sorted(path.name for path in folder.glob("damaged-*"))
    problems = [f"{shard.path.name}: {fault}" for shard in store.shards if (fault := _fault(shard))]
    return {
        "kind": "features",
        "name": str(folder),
        "conversations": len(store),
        "prompts": store.prompt_count,
        "hidden_size": manifest["hidden_size"],
        "dtype": store.dtype,
        "shards": len(store.shards),
        "megabytes": round(sum(shard.path.stat().st_size for shard in store.shards) / 1e6, 1),
        "fingerprint": manifest["fingerprint"],
        "computed with a halved budget": halved,
        "set aside": damaged,
        "problems": problems,
    }


def _published(path: Path) -> dict[str, Any]:
    """A feature file of the published scripts, or one shard of a store."""
    import numpy as np

    from armorm.features.store import Shard

    if path.name.startswith("shard-") and path.is_file():
        shard = Shard(path)
        fault = _fault(shard)
        return {
            "kind": "one shard of features",
            "name": str(path),
            "conversations": len(shard.keys),
            "prompts": len(shard.prompt_keys),
            "problems": [fault] if fault else [],
        }
    arrays = read_published([path])
    embeddings, labels = arrays["embeddings"], arrays.get("labels")
    found: dict[str, Any] = {
        "kind": "features of the published scripts",
        "name": str(path),
        "rows": len(embeddings),
        "hidden_size": embeddings.shape[-1],
        "layout": "preference pairs" if labels is None else "conversations",
        "megabytes": round(path.stat().st_size / 1e6, 1),
        **{name: " x ".join(map(str, array.shape)) for name, array in arrays.items()},
    }
    problems = [
        f"{name}: {int((~np.isfinite(array)).any(-1).sum()):,} rows that are not finite"
        for name, array in arrays.items()
        if name != "labels" and not np.isfinite(array).all()
    ]
    if labels is not None:
        found["numbers"] = {
            f"label {column}": {
                "rated": int(np.isfinite(values).sum()),
                "missing": int((~np.isfinite(values)).sum()),
                **_extent(values[np.isfinite(values)]),
            }
            for column, values in enumerate(labels.T, 1)
        }
    return found | {"problems": problems}


def read_published(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Feature files of the published scripts (RLHFlow/RLHF-Reward-Modeling), joined in the order given.

    Returns:
        float32 arrays by tensor name: `embeddings` (n, d) with `labels` (n, k), or `embeddings` (n, 2, d) of pairs,
        chosen first, with `prompt_embeddings` (n, 2, d) or (n, d).

    Raises:
        StoreError: naming file and tensor, what was found and what was expected.
    """
    import numpy as np

    if not paths:
        raise StoreError("found no files of embeddings, expected at least one")
    parts = [_published_tensors(path) for path in paths]
    first = {name: array.shape[1:] for name, array in parts[0].items()}
    for path, part in zip(paths, parts, strict=True):
        found = {name: array.shape[1:] for name, array in part.items()}
        if found != first:
            raise StoreError(f"{path}: found {found} for each row, expected {first} as in {paths[0]}")
    return {name: np.concatenate([part[name] for part in parts]) for name in first}


def _published_tensors(path: Path) -> dict[str, np.ndarray]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shape = shapes.get("embeddings", ())
    if len(shape) != 2 and (len(shape) != 3 or shape[1] != 2):
        found = shape or "no such tensor"
        raise StoreError(f"{path}: tensor 'embeddings': found {found}, expected (n, d) or (n, 2, d)")
    n, d = shape[0], shape[-1]
    name = "labels" if len(shape) == 2 else "prompt_embeddings"
    other = shapes.get(name, ())
    if other not in ((n, 2, d), (n, d)) if name != "labels" else len(other) != 2 or other[0] != n:
        expected = f"({n}, k)" if name == "labels" else f"({n}, 2, {d}) or ({n}, {d})"
        raise StoreError(f"{path}: tensor '{name}': found {other or 'no such tensor'}, expected {expected}")
    for key in ("embeddings", name):
        if tensors[key].dtype not in (torch.float32, torch.bfloat16):
            raise StoreError(f"{path}: tensor '{key}': found {tensors[key].dtype}, expected float32 or bfloat16")
    return {key: tensors[key].float().numpy() for key in ("embeddings", name)}


def _extent(values: np.ndarray) -> dict[str, float | None]:
    if not len(values):
        return {"lowest": None, "highest": None, "mean": None, "levels": 0}
    return {
        "lowest": float(values.min()),
        "highest": float(values.max()),
        "mean": float(values.mean(dtype="float64")),
        "levels": len(set(values.tolist())),
    }


def _fault(shard: Shard) -> str:
    """What is wrong with a shard; empty where its checksums hold."""
    try:
        shard.verify()
    except StoreError as error:
        return str(error).partition(": ")[2] + "; it is computed again when its features are asked for"
    return ""


def _tables(found: dict[str, Any]) -> list[Any]:
    head = Table(box=None, pad_edge=False, show_header=False)
    head.add_column(style="bold")
    head.add_column()
    skipped = {"numbers", "problems", "objectives", "reference"}
    for name, value in found.items():
        if name not in skipped and value not in (None, {}, []):
            head.add_row(name, _readable(value))
    parts: list[Any] = [head]
    if found.get("numbers"):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("\nnumbers", "\nrated", "\nmissing", "\nlowest", "\nhighest", "\nmean", "\nlevels"):
            table.add_column(name, justify="left" if "numbers" in name else "right")
        for name, entry in found["numbers"].items():
            table.add_row(
                name,
                f"{entry['rated']:,}",
                f"{entry['missing']:,}",
                *("-" if entry[k] is None else f"{entry[k]:.4g}" for k in ("lowest", "highest", "mean")),
                f"{entry['levels']:,}",
            )
        parts.append(table)
    if found.get("objectives"):
        from armorm.objectives import ObjectiveSet
        from armorm.training.summary import objectives_table

        reference = found.get("reference") or {}
        names = [objective["name"] for objective in found["objectives"]]
        columns = {}
        if reference.get("gating_weights"):
            columns["mean weight"] = {n: f"{w:.1%}" for n, w in zip(names, reference["gating_weights"], strict=True)}
        parts += ["", objectives_table(ObjectiveSet.from_dicts(found["objectives"]), columns)]
    parts += [f"[red]problem[/red] {problem}" for problem in found.get("problems", ())]
    return parts


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(entry)}" for key, entry in value.items() if entry not in (None, {}, []))
    if isinstance(value, list):
        return " ".join(_readable(entry) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
