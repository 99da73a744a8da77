"""`armorm inspect`: summary of a data set, a model or a feature store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import RenderableType
from rich.text import Text
from typer import Argument, BadParameter, Option

from armorm.backbone.locate import backbone_path
from armorm.cli import completion
from armorm.cli.label_errors import inspect_labels
from armorm.cli.options import JsonOption, Place, SplitOption
from armorm.cli.output import emit, facts, table
from armorm.data.sources import Location
from armorm.errors import CheckpointError, StoreError

if TYPE_CHECKING:
    from armorm.features.store import Shard

_LAYOUTS = {"pairs": "preference pairs"}
_EMPTY: tuple[Any, ...] = (None, {}, [])


def inspect(
    what: Annotated[
        str,
        Argument(
            help="Data (file, folder or hub id; - for standard input), a model folder, or a feature store.",
            autocompletion=completion.data,
        ),
    ],
    split: SplitOption = None,
    labels: Annotated[
        bool, Option("--labels", help="Training run: the ratings that disagree most with all others.")
    ] = False,
    objective: Annotated[
        list[str] | None,
        Option(
            autocompletion=completion.objectives,
            metavar="NAME",
            help="With --labels: only these (default: all rated ones).",
        ),
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", help="With --labels: file of JSON lines for all ratings."), Place.FILE
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Summarise data, a model or a feature store: counts, scales, objectives, missing ratings, problems.

    With `--labels`, rank the ratings of a training run by their leave-one-out error in standard deviations: probable
    label errors first.

    Example: `armorm inspect ratings.jsonl`
    """
    if labels:
        inspect_labels(Path(what), objective or [], output, as_json)
        return
    if objective or output:
        raise BadParameter("--objective and --output need --labels")
    folder = Path(backbone_path(what))
    if what == "-":
        found = _data(Location.standard_input())
    elif folder.suffix == ".safetensors":
        found = _shard(folder) if folder.name.startswith("shard-") and folder.is_file() else _published(folder)
    elif (folder / "manifest.json").is_file():
        found = _store(folder)
    elif (folder / "config.json").is_file():
        found = _model(folder)
    else:
        found = _data(Location.find(what, split=split))
    emit(found, *([] if as_json else _tables(found)), as_json=as_json)


def _data(location: Location) -> dict[str, Any]:
    """Counts over all rows; what is invalid is counted, and the first five shown."""
    from armorm.data.inspection import inspect_set
    from armorm.data.rejections import SHOWN

    found = inspect_set(location)
    rejected = found.rejections
    rows = found.rows + len(rejected.rows)
    return {
        "kind": "data",
        "name": location.name,
        "rows": rows,
        "layout": {_LAYOUTS.get(kind, kind): count for kind, count in found.kinds.items()},
        "prompts": found.prompts,
        "splits": dict(found.splits),
        "numbers": {name: _column(list(values.elements()), found.rows) for name, values in found.numbers.items()},
        "scales": {guess.column: [guess.low, guess.high] for guess in found.guesses},
        "other columns": sorted(found.other),
        "refused": len(rejected.rows),
        "problems": [str(error) for error in (*rejected.rows[:SHOWN], *rejected.cells[:SHOWN])],
    }


def _column(values: Sequence[float], rows: int) -> dict[str, Any]:
    return {
        "rated": len(values),
        "missing": rows - len(values),
        "lowest": min(values, default=None),
        "highest": max(values, default=None),
        "mean": fmean(values) if values else None,
        "levels": len(set(values)),
    }


def _model(folder: Path) -> dict[str, Any]:
    from armorm.backbone.model_files import read_object
    from armorm.model.config_schema import settings_fault

    config = read_object(folder / "config.json", CheckpointError)
    found: dict[str, Any] = {"kind": "model", "name": str(folder), "model_type": config.get("model_type", "")}
    if "num_objectives" in config:
        from armorm.model.configuration import is_released
        from armorm.model.released import from_released

        if is_released(config):
            found["layout"] = "released"
            config = from_released(config)
    if config.get("model_type") != "armorm":
        return found | {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size") if key in config}
    if fault := settings_fault(config):
        raise CheckpointError(f"{folder / 'config.json'}, {fault}")
    keys = ("objectives", "debiasing", "steering", "reference", "limits", "provenance", "gate_pattern")
    found |= {key: config.get(key) for key in keys}
    found["gate"] = {key: config.get(key) for key in ("gating_hidden_dim", "gating_n_hidden", "gating_temperature")}
    return found


def _store(folder: Path) -> dict[str, Any]:
    from armorm.features.store import FeatureStore, read_manifest

    manifest = read_manifest(folder)
    store = FeatureStore.existing(folder)
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
        "computed with a halved budget": [shard.path.name for shard in store.shards if shard.metadata.get("halvings")],
        "set aside": sorted(path.name for path in folder.glob("damaged-*")),
        "problems": [f"{shard.path.name}: {fault}" for shard in store.shards if (fault := _fault(shard))],
    }


def _shard(path: Path) -> dict[str, Any]:
    from armorm.features.store import Shard

    shard = Shard(path)
    fault = _fault(shard)
    return {
        "kind": "one shard of features",
        "name": str(path),
        "conversations": len(shard.keys),
        "prompts": len(shard.prompt_keys),
        "problems": [fault] if fault else [],
    }


def _fault(shard: Shard) -> str:
    """What is wrong with a shard; empty if its checksums match."""
    try:
        shard.verify()
    except StoreError as error:
        return str(error).partition(": ")[2] + "; recomputed when its features are next requested"
    return ""


def _published(path: Path) -> dict[str, Any]:
    import numpy as np

    from armorm.features.published import read_published

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
    if labels is not None:
        found["numbers"] = {
            f"label {number}": _column(values[np.isfinite(values)].tolist(), len(values))
            for number, values in enumerate(labels.T, 1)
        }
    found["problems"] = [
        f"{name}: {int((~np.isfinite(array)).any(-1).sum()):,} rows with non-finite values"
        for name, array in arrays.items()
        if name != "labels" and not np.isfinite(array).all()
    ]
    return found


def _tables(found: dict[str, Any]) -> list[RenderableType]:
    separate = {"numbers", "scales", "problems", "objectives", "reference"}
    shown = {name: _readable(value) for name, value in found.items() if name not in separate and value not in _EMPTY}
    parts: list[RenderableType] = [facts(shown.items())]
    if found.get("numbers"):
        numbers = table("\ncolumn", "\nrated", "\nmissing", "\nlowest", "\nhighest", "\nmean", "\nlevels")
        for name, entry in found["numbers"].items():
            ends = ("-" if entry[key] is None else f"{entry[key]:.4g}" for key in ("lowest", "highest", "mean"))
            numbers.add_row(name, f"{entry['rated']:,}", f"{entry['missing']:,}", *ends, f"{entry['levels']:,}")
        parts.append(numbers)
    if found.get("objectives"):
        from armorm.objectives import ObjectiveSet
        from armorm.training.summary import objectives_table

        names = [objective["name"] for objective in found["objectives"]]
        weights = (found.get("reference") or {}).get("gating_weights")
        columns = {"mean weight": {n: f"{w:.1%}" for n, w in zip(names, weights, strict=True)}} if weights else {}
        parts += ["", objectives_table(ObjectiveSet.from_dicts(found["objectives"]), columns)]
    return parts + [Text.assemble(("problem", "red"), f" {problem}") for problem in found.get("problems", ())]


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(entry)}" for key, entry in value.items() if entry not in _EMPTY)
    if isinstance(value, list):
        return " ".join(_readable(entry) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
