"""A saved model that loads on machines without armorm, with `trust_remote_code=True`.

In:  the folder of a saved model, in either layout.
Out: `armorm/model/portable.py` beside its config, word for word, and the `auto_map` that points to it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from armorm.errors import CheckpointError
from armorm.files import write_json, write_text
from armorm.model.older_transformers import make_readable
from armorm.model.released import ARCHITECTURES

PORTABLE = Path(__file__).with_name("portable.py")
_MODULES = {"armorm": "modeling_armorm", "released": "modeling_custom"}


def write_portable(folder: Path, layout: Literal["armorm", "released"]) -> None:
    """Make a saved model self-contained; its config files become readable for transformers 4 too.

    Raises:
        CheckpointError: for a config that is not of the layout.
    """
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    classes = {"armorm": "ArmoRMForSequenceClassification"} if layout == "armorm" else ARCHITECTURES
    family = settings.get("model_type")
    if family not in classes:
        raise CheckpointError(
            f"{config}: model_type {family!r}, expected {' or '.join(classes)} in the {layout} layout"
        )
    module = _MODULES[layout]
    auto_map = {"AutoModelForSequenceClassification": f"{module}.{classes[family]}"}
    if layout == "armorm":
        auto_map["AutoConfig"] = f"{module}.ArmoRMConfig"
    write_text(folder / f"{module}.py", PORTABLE.read_text(encoding="utf-8"))
    write_json(config, settings | {"auto_map": auto_map})
    make_readable(folder)
