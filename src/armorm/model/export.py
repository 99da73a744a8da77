"""A saved model that loads on machines without armorm, with `trust_remote_code=True`.

In:  the folder of a saved model, in either layout.
Out: `armorm/model/portable.py` beside its config, word for word, and the `auto_map` that points to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from armorm.errors import CheckpointError
from armorm.files import write_json, write_text
from armorm.model.released import ARCHITECTURES

PORTABLE = Path(__file__).with_name("remote_code.py")

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


def make_readable(folder: Path) -> None:
    """Add the older names to the config files of a folder; done twice, it changes nothing more."""
    for name, older in (("config.json", older_config), ("tokenizer_config.json", older_tokenizer_config)):
        path = folder / name
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        written = older(found)
        if written != found:
            write_json(path, written)


def older_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings with the older names of its rotary embeddings and windows, in a backbone's config too."""
    written = {**settings, **older_rope(settings), **older_windows(settings)}
    if isinstance(settings.get("backbone_config"), Mapping):
        written["backbone_config"] = older_config(settings["backbone_config"])
    return written


def older_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and its like, from `rope_parameters`; nothing where there are none."""
    rope = settings.get("rope_parameters") or {}
    main = rope.get("full_attention", rope)  # by kind of layer where those differ (Gemma 3)
    if "rope_theta" not in main:
        return {}
    older = {"rope_theta": main["rope_theta"], "rope_scaling": None}
    if main.get("rope_type", "default") != "default":
        apart = ("rope_theta", "partial_rotary_factor")
        older["rope_scaling"] = {key: value for key, value in main.items() if key not in apart}
    if "partial_rotary_factor" in main:
        older["partial_rotary_factor"] = main["partial_rotary_factor"]
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if settings.get("model_type") == "gpt_neox":
        older |= {"rotary_emb_base": main["rope_theta"], "rotary_pct": main.get("partial_rotary_factor", 1.0)}
    return older


def older_windows(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window_pattern`, where every so many layers one attends to everything."""
    everything = [kind == "full_attention" for kind in settings.get("layer_types") or ()]
    if all(everything) or not any(everything):
        return {}
    period = everything.index(True) + 1
    regular = everything == [(i + 1) % period == 0 for i in range(len(everything))]
    return {"sliding_window_pattern": period} if regular else {}


def older_tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings under the class and the names that transformers 4 has; transformers 5 takes them too."""
    written = dict(settings)
    if written.get("tokenizer_class") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Of this class transformers 4 returns token types by default, which decoders have none of.
        written.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    return written


def require_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the id of a repository, before anything is saved or sent.

    Raises:
        ValueError: saying what is wrong with it.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)


def files_to_send(folder: Path) -> list[tuple[str, int]]:
    """Name and size in bytes of every file that an upload of the folder sends."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Send a folder; a repository or branch that does not exist is created.

    Args:
        private: whether a new repository is private; by default as its owner has it.
        token: by default the one that `hf auth login` keeps.
        revision: branch; by default `main`.

    Returns:
        the address of the commit.

    Raises:
        OSError: as huggingface_hub has it, where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = commit_message or "Upload reward model"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message).commit_url
