"""Tiny random backbones of many families on disk, all with the embedded tokenizer.

Windows are shorter than the conversations of the tests, and caps low enough to act on random states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from armorm.backbone.decoder import settle_attention
from armorm.files import EMBEDDED_BACKBONE, embedded_path

_IDS = {"vocab_size": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that every token leaves its mark on the features
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WINDOW = {"sliding_window": 16}
_HALF = {"layer_types": ["sliding_attention", "full_attention"]}
_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}

# Name of the config class, and its settings.
_CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", {**_GROUPED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": (
        "Qwen3Config",
        {**_GROUPED, **_WINDOW, "head_dim": 8, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, **_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
    ),
    "gemma3_text": ("Gemma3TextConfig", {**_GROUPED, **_WINDOW, **_HALF, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "mistral": ("MistralConfig", {**_GROUPED, **_WINDOW}),
    "phi3": ("Phi3Config", {**_GROUPED, **_WINDOW}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "olmo2": ("Olmo2Config", _GROUPED),
    # A state instead of attention, or beside it.
    "mamba": ("MambaConfig", {**_IDS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
    "rwkv": (
        "RwkvConfig",
        {**_IDS, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 512},
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 16},
    ),
    "falcon_h1": ("FalconH1Config", {**_GROUPED, **_MAMBA, "head_dim": 8, "mamba_d_ssm": 64}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    # Positions that are learned, or written into the attention.
    "gpt2": (
        "GPT2Config",
        {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.2},
    ),
    "bloom": ("BloomConfig", {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    # A decoder with an eye.
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**_GROUPED, **_WINDOW, **_HALF, "head_dim": 8, "model_type": "gemma3_text"},
            "vision_config": {**_VISION, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 1,
        },
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": {**_GROUPED, "model_type": "llama"},
            "vision_config": {**_VISION, "image_size": 28, "patch_size": 14, "model_type": "clip_vision_model"},
        },
    ),
    # No decoders.
    "bert": ("BertConfig", {**_SIZES}),
    "t5": ("T5Config", {"vocab_size": 8192, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
}

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "gpt_neox", "olmo2")
WINDOWED = ("qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3")
STATEFUL = ("mamba", "rwkv", "recurrent_gemma", "falcon_h1", "qwen3_next")
OTHER_POSITIONS = ("gpt2", "bloom")
MULTIMODAL = ("gemma3", "llava")
# One for each kind of attention, positions, state and wrapper; fast tests are of these.
TYPICAL = ("llama", "gemma2", "gpt_neox", "mamba", "gpt2", "bloom", "gemma3")


def families(*names: str) -> list[Any]:
    """Families as parameters of a test, all but the typical ones for the slow run."""
    others = [pytest.mark.slow, pytest.mark.family]
    return [name if name in TYPICAL else pytest.param(name, marks=others) for name in names]


def config_of(family: str) -> PretrainedConfig:
    """A tiny config of a family."""
    name, settings = _CONFIGS[family]
    return getattr(transformers, name)(**settings)


def backbone_of(family: str, *, seed: int = 0, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A random backbone of a family, without a head, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config or config_of(family)).eval()
        settle_attention(model)  # transformers 5.20, the last for Python 3.10, ignores the cap otherwise
        if family in STATEFUL:  # whose own initialisation is so small that states hardly differ
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if weight.dim() == 2 and "A_log" not in name:
                        weight.normal_(0, 0.2)
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model with the embedded tokenizer."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path(EMBEDDED_BACKBONE)).save_pretrained(folder)
    return folder


def save_backbone(folder: Path, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random language model of a family, head included, with the embedded tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return save(AutoModelForCausalLM.from_config(config_of(family)).to(dtype), folder)
