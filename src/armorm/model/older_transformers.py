"""What transformers 5 writes, said in the words of transformers 4 as well, so that either reads a saved model.

In:  the folder of a saved model.
Out: its `config.json` and `tokenizer_config.json` with both kinds of names; what was there keeps its meaning.

Read by transformers 4 as they stand, those files fail or, worse, mislead: `rope_parameters` is passed over and the
default `rope_theta` taken, which moves every score of a Llama 3 without a word; tokenizers of the class
`TokenizersBackend`, or with a list of extra special tokens, cannot be loaded. (`tests/compat` reads such folders.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armorm.files import write_json


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
