"""The models inside the package: names that work offline.

`armorm-tiny` is the backbone, `armorm-tiny-rm` a whole reward model on it. The backbone's weights are
stored once; the reward model's folder holds its heads and config only.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED_BACKBONE = "armorm-tiny"
EMBEDDED_REWARD_MODEL = "armorm-tiny-rm"
_FOLDER = Path(__file__).parent / "embedded_models"


def tokenizer_path(name: str) -> Path | None:
    """Folder of an embedded model's tokenizer, or None for any other name."""
    return embedded_path(EMBEDDED_BACKBONE) if embedded_path(name) is not None else None


def embedded_path(name: str) -> Path | None:
    """Folder of an embedded model, or None for any other name (a model folder of that name goes first)."""
    if name in (EMBEDDED_BACKBONE, EMBEDDED_REWARD_MODEL) and not (Path(name) / "config.json").exists():
        return _FOLDER / name
    return None
