"""Writing models for others: the released layout, self-contained folders, older transformers, the Hub.

A self-contained folder has a copy of `remote_code.py` and an `auto_map` that points to it, so it loads without armorm
(`trust_remote_code=True`). Transformers 4 knows other names for some settings; they are written next to the new ones.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from armorm.errors import CheckpointError
from armorm.files import files_together, require_space, write_json, write_text
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import HEADS, ArmoRMForSequenceClassification
from armorm.model.released import ARCHITECTURES, NOT_BACKBONE, OWN_FIELDS
from armorm.model.remote_code import UNCERTAINTY_BUFFERS, record_heads, steered_transform, steering_terms

REMOTE_CODE = Path(__file__).with_name("remote_code.py")
_NEVER = -1e30  # added to a logit of the gate, it gives a weight of exactly 0
Layout = Literal["armorm", "released"]
_MODULES = {"armorm": "modeling_armorm", "released": "modeling_custom"}


def save_model(
    model: ArmoRMForSequenceClassification,
    tokenizer: Any,
    folder: Path,
    *,
    layout: Layout,
    self_contained: bool,
    heads_only: bool = False,
    max_shard_size: int | str,
) -> None:
    """Write model, config and tokenizer; arguments are those of `ArmoRM.save_pretrained`."""
    if heads_only:
        if layout != "armorm" or self_contained:
            raise CheckpointError("heads alone fit only the armorm layout, and are not self-contained")
        save_heads(model, folder)
        return
    state, dtype = model.state_dict(), model.model.dtype
    record_heads(model.config, state)
    if layout == "released":
        state = {name: tensor for name, tensor in state.items() if name not in UNCERTAINTY_BUFFERS}
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    if dtype == torch.float32 and all(bool((tensor.bfloat16() == tensor).all()) for tensor in backbone.values()):
        state, dtype = state | {name: tensor.bfloat16() for name, tensor in backbone.items()}, torch.bfloat16
    config = copy.deepcopy(model.config)
    config.backbone_source.pop("referenced", None)
    settings = to_released(config, dtype) if layout == "released" else None
    if settings is not None and config.steering:
        config, state = folded(config, state)
        settings = to_released(config, dtype)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    require_space(folder, size, "the weights")
    with files_together(folder) as temporary:
        model.with_config(config).save_pretrained(temporary, state_dict=state, max_shard_size=max_shard_size)
        config.dtype = dtype  # transformers writes the dtype in memory, and would read the file in it
        config.save_pretrained(temporary)
        if settings is not None:
            write_json(temporary / "config.json", settings)
        tokenizer.save_pretrained(temporary)
        make_readable(temporary)
        if model.adapters is not None and layout == "armorm":
            model.adapters.write(temporary)
        if self_contained:
            make_self_contained(temporary, layout)


def save_heads(model: ArmoRMForSequenceClassification, folder: Path) -> None:
    """Write heads and config only; the config names the backbone and its hash.

    Raises:
        CheckpointError: for a model that does not know where its backbone comes from, or has trained it.
    """
    source = model.config.backbone_source
    if not source.get("sha256") and not source.get("commit"):
        raise CheckpointError(
            f"the model has no hash of its backbone ({source.get('name') or 'unknown'}): save it whole"
        )
    record_heads(model.config, model.state_dict())
    config = copy.deepcopy(model.config)
    config.backbone_source["referenced"] = True
    heads = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not name.startswith("model.")}
    if model.config.adapters and model.adapters is None:
        raise CheckpointError("the model was fine-tuned with adapters, which are not in its folder: save it whole")
    with files_together(folder) as temporary:
        if model.config.adapters and model.adapters is not None:
            model.adapters.write(temporary)
        save_file(heads, temporary / HEADS, metadata={"format": "pt"})
        config.save_pretrained(temporary)


def make_self_contained(folder: Path, layout: Layout) -> None:
    """Add the remote code to a saved model; its config files become readable by transformers 4 too.

    Raises:
        CheckpointError: for a config of another layout.
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
    write_text(folder / f"{module}.py", REMOTE_CODE.read_text(encoding="utf-8"))
    write_json(config, settings | {"auto_map": auto_map})
    make_readable(folder)


def folded(config: ArmoRMConfig, state: Mapping[str, torch.Tensor]) -> tuple[ArmoRMConfig, dict[str, torch.Tensor]]:
    """A steered model as an unsteered one: factors go into the gate's last bias, debiasing strength into the transform.

        softmax((W h + b) / temperature + log factor) = softmax((W h + b + temperature * log factor) / temperature)

    The steering is recorded in the config's `provenance`. Dropped objectives get a bias so low that their weight is
    exactly 0. The config must fit the released layout; `state` holds all tensors.
    """
    factors, _, _, strength = steering_terms(config)
    config, state = copy.deepcopy(config), dict(state)
    bias = f"gating.layers.{config.gating_n_hidden}.bias"
    if factors is not None:
        shift = config.gating_temperature * torch.tensor(factors, dtype=torch.float64).log()
        state[bias] = (state[bias].cpu().double() + shift).clamp(min=_NEVER).float()
    transform = state["reward_transform_matrix"].cpu().double()
    state["reward_transform_matrix"] = steered_transform(transform, strength).float()
    config.provenance |= {"steering": config.steering}
    config.steering, config.calibration = {}, None
    record_heads(config, state)
    return config, state


def to_released(config: ArmoRMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Settings of the released layout for a model of ours with weights of `dtype`.

    Raises:
        CheckpointError: listing everything that does not fit.
    """
    found = []
    family = getattr(config.backbone_config, "model_type", "")
    if family not in ARCHITECTURES:
        found.append(f"its backbone is {family}, the layout supports {' and '.join(ARCHITECTURES)}")
    if config.regression_bias:
        found.append("its rewards have an intercept, the layout has none")
    fixed = [key for key in ("pin", "blend") if config.steering.get(key)]
    if fixed:
        found.append(f"it is steered by {' and '.join(fixed)}, the layout has no weights apart from the gate's")
    if config.readout:
        found.append("it reads another layer, or means over tokens, the layout the last token of the last layer")
    if config.quantiles:
        found.append("it has quantile heads, the layout has none")
    if found:
        raise CheckpointError(f"the model does not fit the released layout: {'; '.join(found)}")
    assert config.backbone_config is not None and not isinstance(config.backbone_config, dict)
    settings = config.backbone_config.to_dict()
    for field in NOT_BACKBONE:
        settings.pop(field, None)
    return settings | {
        "architectures": [ARCHITECTURES[family]],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "pad_token_id": config.pad_token_id,
        "num_labels": 1,
        "problem_type": "regression",
        "num_objectives": len(config.objectives),
        "gating_temperature": config.gating_temperature,
        "gating_hidden_dim": config.gating_hidden_dim,
        "gating_n_hidden": config.gating_n_hidden,
        "armorm": {field: getattr(config, field) for field in OWN_FIELDS},
    }


def make_readable(folder: Path) -> None:
    """Add the names of transformers 4 to the config files of a folder (idempotent)."""
    for name, older in (("config.json", older_config), ("tokenizer_config.json", older_tokenizer_config)):
        path = folder / name
        if not path.exists():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        written = older(found)
        if written != found:
            write_json(path, written)


def older_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model with the older names of its rotary embeddings and windows, also in a backbone's config."""
    written = {**settings, **older_rope(settings), **older_windows(settings)}
    if isinstance(settings.get("backbone_config"), Mapping):
        written["backbone_config"] = older_config(settings["backbone_config"])
    return written


def older_rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and related fields, from `rope_parameters`; empty without."""
    rope = settings.get("rope_parameters") or {}
    main = rope.get("full_attention", rope)  # by kind of layer if those differ (Gemma 3)
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
    """`sliding_window_pattern`, if every n-th layer attends to everything; else empty."""
    everything = [kind == "full_attention" for kind in settings.get("layer_types") or ()]
    if all(everything) or not any(everything):
        return {}
    period = everything.index(True) + 1
    regular = everything == [(i + 1) % period == 0 for i in range(len(everything))]
    return {"sliding_window_pattern": period} if regular else {}


def older_tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a tokenizer under the class and names of transformers 4, which transformers 5 accepts too."""
    written = dict(settings)
    if written.get("tokenizer_class") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Transformers 4 returns token types by default for this class; decoders have none.
        written.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    return written


def require_repo_id(repo_id: str) -> None:
    """Raise ValueError for an invalid repository id, before anything is saved or sent."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)


def files_to_send(folder: Path) -> list[tuple[str, int]]:
    """Name and size in bytes of every file that an upload of the folder sends."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def upload_saved(
    save: Callable[[Path], None], repo_id: str, *, card: str = "", dry_run: bool = False, **options: Any
) -> str | list[tuple[str, int]]:
    """Save into a temporary folder and upload that; arguments, result and errors as of `ArmoRM.push_to_hub`.

    Args:
        save: writes the model into a folder.
        card: text of its README.md; empty for none.
        options: as of `upload`.
    """
    require_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        if card:
            write_text(folder / "README.md", card)
        return files_to_send(folder) if dry_run else upload(folder, repo_id, **options)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Send a folder; a missing repository or branch is created. Arguments are those of `ArmoRM.push_to_hub`.

    Returns:
        URL of the commit.

    Raises:
        OSError: by huggingface_hub, if the Hub rejects the request or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = commit_message or "Upload reward model"
    return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message).commit_url
