"""Models inside the package, which work offline: backbone `armorm-tiny`, and reward model `armorm-tiny-rm` on it.

The backbone's weights are stored once; the reward model's folder has only heads and config.
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED_BACKBONE = "armorm-tiny"
EMBEDDED_REWARD_MODEL = "armorm-tiny-rm"
_FOLDER = Path(__file__).parent / "embedded_models"


def tokenizer_path(name: str) -> Path | None:
    """Folder of an embedded model's tokenizer, None for any other name."""
    return embedded_path(EMBEDDED_BACKBONE) if embedded_path(name) is not None else None


def embedded_path(name: str) -> Path | None:
    """Folder of an embedded model, None for any other name (a local model folder of that name takes precedence)."""
    if name in (EMBEDDED_BACKBONE, EMBEDDED_REWARD_MODEL) and not (Path(name) / "config.json").exists():
        return _FOLDER / name
    return None
