"""Whether a model may share prefixes, as its test found, remembered in the user's cache.

The test costs a few thousand tokens, as much as small work itself, so each machine runs it once for a model. A verdict
holds for the same weights, config, readout, dtype, device, library versions and code of this package; models that come
with code of their own are tested in each process. Weights are compared by the first values of each tensor: a model that
was trained further differs in all of them. A cache that cannot be read or written is as good as an empty one.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from armorm.backbone.readout import Readout
from armorm.backbone.weight_bytes import weight_bytes
from armorm.files import cache_folder, write_json
from armorm.version import __version__

_VALUES = 512  # of each tensor
_CODE = (
    "prefix_forward.py",
    "prefix_tree.py",
    "readout.py",
    "sharing_verdict.py",
    "tree_attention.py",
    "tree_blocks.py",
)


@dataclass(frozen=True)
class SharingVerdict:
    """Result of a test on some conversations.

    Attributes:
        fault: why the model must not share prefixes; empty if it may.
        tokens: sum of the lengths of the tested conversations.
        longest: the largest length.
    """

    fault: str
    tokens: int
    longest: int

    def covers(self, lengths: list[int], window: int | None) -> bool:
        """Whether a test on conversations of these lengths would say no more.

        Args:
            window: the model's sliding window, which only longer conversations test.
        """
        windowed = window is None or max(lengths) <= window or self.longest > window
        return bool(self.fault) or (2 * self.tokens >= sum(lengths) and windowed)


def remembered_verdict(model: PreTrainedModel, readout: Readout) -> SharingVerdict | None:
    """The verdict of an earlier test on this machine, None if there is none."""
    path = _path(model, readout)
    if path is None:
        return None
    try:
        return SharingVerdict(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember_verdict(model: PreTrainedModel, readout: Readout, verdict: SharingVerdict) -> None:
    """Keep a verdict for later processes."""
    path = _path(model, readout)
    if path is not None:
        with suppress(OSError):
            write_json(path, asdict(verdict))


def _path(model: PreTrainedModel, readout: Readout) -> Path | None:
    """File of the verdict; None for a model with code of its own, or whose weights are not in memory."""
    tensors = model.state_dict()
    if not type(model).__module__.startswith("transformers.") or any(t.is_meta for t in tensors.values()):
        return None
    device = model.device.type
    machine = torch.cuda.get_device_name(model.device) if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    config = model.config.get_text_config()
    versions = [torch.__version__, transformers.__version__, __version__]
    attention = config._attn_implementation
    settings = [model.config.to_json_string(use_diff=False), attention, readout.settings(), str(model.dtype)]
    digest_of = json.dumps([type(model).__name__, settings, device, machine, versions])
    digest = hashlib.blake2b(digest_of.encode(), digest_size=16)
    for name in _CODE:
        digest.update((Path(__file__).parent / name).read_bytes())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in weight_bytes(tensor, _VALUES):
            digest.update(part)
    return cache_folder() / "sharing" / f"{digest.hexdigest()}.json"
