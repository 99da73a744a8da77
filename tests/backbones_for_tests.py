"""Tiny random backbones of several families on disk, all with the embedded tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from armorm.embedded import EMBEDDED_BACKBONE, embedded_path

_SIZES = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that every token leaves its mark on the features
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config_of(family: str) -> PretrainedConfig:
    """A tiny config of a family."""
    shared_heads = {**_SIZES, "num_key_value_heads": 2}
    return {
        "llama": lambda: LlamaConfig(**shared_heads),
        "qwen2": lambda: Qwen2Config(**shared_heads),
        "gemma2": lambda: Gemma2Config(**shared_heads, head_dim=8, sliding_window=16),
        "mistral": lambda: MistralConfig(**shared_heads, sliding_window=16),
        "phi3": lambda: Phi3Config(**shared_heads),
        "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    }[family]()


FAMILIES = ("llama", "qwen2", "gemma2", "mistral", "phi3", "gpt_neox")


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
