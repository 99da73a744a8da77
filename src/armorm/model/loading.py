"""Loading a reward model: model, tokenizer, and the record of the prompts that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from armorm.backbone.chat_template import ChatTemplate
from armorm.backbone.decoder import Backbone, Placement, require_decoder
from armorm.backbone.devices import resolve_devices
from armorm.backbone.locate import CONFIG_ERRORS, SMALL, backbone_path
from armorm.backbone.model_files import CONFIG, require_tokenizer
from armorm.backbone.readout import Readout
from armorm.data.seen_prompts import SeenPrompts
from armorm.errors import BackboneError, CheckpointError
from armorm.files import DEFAULT_REWARD_MODEL, EMBEDDED_BACKBONE, embedded_path
from armorm.hub_access import hub_if_it_answers, not_loaded, require_folder, require_spelling
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification, tokenizer_path


@dataclass(frozen=True)
class RewardModelSource:
    """The backbone of a reward model, for workers (`features/ray_workers.py`): arguments of `load_parts`."""

    name: str
    dtype: str = "auto"
    device: str = "auto"

    def load(self) -> Backbone:
        """The backbone."""
        model, tokenizer, _ = load_parts(self.name, self.dtype, self.device)
        return backbone_of(model, tokenizer, self.name)

    def template(self) -> ChatTemplate:
        """Its chat template."""
        return self.load().template


def backbone_of(model: ArmoRMForSequenceClassification, tokenizer: Any, name: str) -> Backbone:
    """The decoder inside a reward model, with its chat template."""
    backbone = Backbone(name, model.model, tokenizer, Readout.from_settings(model.config.readout))
    backbone.template.reasoning = model.config.limits.get("reasoning", "keep")
    return backbone


def compute_on(backbone: Backbone, device: str) -> None:
    """Let further devices, or workers of Ray, compute the features of a loaded model, in its dtype.

    Args:
        device: as of `ArmoRM.from_pretrained`.

    Raises:
        BackboneError: for an unknown device, or more workers than the cluster has resources for.
        MissingExtraError: without Ray.
    """
    kind, colon, count = device.partition(":")
    if kind != "ray":
        backbone.replicate(resolve_devices(device)[1:])
        return
    if colon and not (count.isdecimal() and int(count)):
        raise BackboneError(f"device {device!r}, expected ray, or ray:N with the number of workers")
    from armorm.features.ray_workers import RayWorkers

    dtype = str(backbone.model.dtype).removeprefix("torch.")
    backbone.workers = RayWorkers(RewardModelSource(backbone.name, dtype), int(count) if count else None)


def load_parts(
    name: str | Path, dtype: str, device: str, **kwargs: Any
) -> tuple[ArmoRMForSequenceClassification, PreTrainedTokenizerBase, SeenPrompts]:
    """The parts of a reward model; arguments and errors are those of `ArmoRM.from_pretrained`."""
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    require_spelling(str(name))
    require_folder(str(name))
    if str(name) in (SMALL, EMBEDDED_BACKBONE) and not Path(name).exists():
        raise CheckpointError(f"{name}: a backbone, expected a reward model such as {DEFAULT_REWARD_MODEL}")
    placement = Placement.for_scores(dtype.removeprefix("torch."), device)
    folder = embedded_path(str(name)) or Path(name)
    try:
        config = ArmoRMConfig.from_pretrained(name) if (folder / CONFIG).is_file() else None
        if config is not None and not config.backbone_source.get("referenced"):
            require_tokenizer(folder, CheckpointError)
        with hub_if_it_answers(folder), _no_bar() if embedded_path(str(name)) else nullcontext():  # (it takes a second)
            model = ArmoRMForSequenceClassification.from_pretrained(name, dtype=placement.load_dtype, **kwargs)
            options = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
            other = kwargs.get("backbone")
            path = tokenizer_path(str(name), model.config) if other is None else backbone_path(other)
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            seen = SeenPrompts.load(str(name), **options)
    except (OSError, ValueError, *CONFIG_ERRORS, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        why = not_loaded(folder, error)
        raise CheckpointError(f"{name}: cannot be loaded as a reward model: {why}") from error
    placement.apply(model, backbone=model.model, move="device_map" not in kwargs)
    if not model.config.backbone_source.get("referenced"):  # (else it was checked when it was loaded)
        require_decoder(model.eval().model, str(name))
    return model.eval(), tokenizer, seen


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the progress bar of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
