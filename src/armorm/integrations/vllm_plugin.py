"""The plugin that lets vLLM load reward models: `vllm serve FOLDER --runner pooling`.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), and `request_processor` in the one
that reads requests (`vllm.io_processor_plugins`). `register` names classes by strings, so a vLLM that serves another
model loads neither the model's code nor the templates'. What a config lacks for vLLM is set when it is read:

- The decoder's config is the text config, so that vLLM knows layers, heads and context.
- A model whose backbone is stored elsewhere gets its tokenizer from there.
- Requests are encoded by `RewardRenderer`, in vLLM's terms the tokenizer mode `armorm`; `RewardProcessor` answers
  `/pooling {"data": ...}`.
- There is one label, so `/score` and `/rerank` are routed.
- The prefix cache is off: states of tokens found in it never reach the pooler, neither that of the gate nor those that
  a mean needs.
"""

from __future__ import annotations

from typing import Any

from armorm.backbone.locate import backbone_path, require_same_weights
from armorm.errors import CheckpointError
from armorm.model.configuration import ArmoRMConfig
from armorm.model.released import ARCHITECTURES, from_released

NAME = "armorm"  # of the tokenizer mode, and of the request processor
EVERYTHING = "armorm_everything"  # of `PoolingParams.extra_kwargs`: all values, not only the score
SERVED = ("ArmoRMForSequenceClassification", *ARCHITECTURES.values())


class ServedConfig(ArmoRMConfig):
    """The config of a reward model as vLLM reads it: the decoder is its text config."""

    def __init__(self, **settings: Any) -> None:  # else transformers 5 writes one that only assigns the fields
        super().__init__(**settings)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The decoder's config; the config itself without one, as transformers makes to learn the defaults."""
        return self if self.backbone_config is None else self.backbone_config.get_text_config()  # type: ignore[union-attr]


class ModelSettings:
    """vLLM's settings for reward models; vLLM calls both functions when it has read a model's config."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Set where the tokenizer is, and how requests are encoded.

        Raises:
            CheckpointError: for a model without gate pattern, or with adapters apart from its backbone.
        """
        config = reward_config(model_config.hf_config)
        name, source = model_config.model, config.backbone_source
        if not config.gate_pattern:
            raise CheckpointError(
                f"{name}: the config has no gate_pattern, so vLLM cannot find the gate in token ids; expected a model "
                "whose chat template closes turns with special tokens"
            )
        if source.get("referenced"):
            if config.adapters:
                raise CheckpointError(
                    f"{name}: adapters apart from the backbone, which vLLM does not merge; expected a whole model: "
                    f"armorm export {name} FOLDER --self-contained"
                )
            require_same_weights(source["name"], source.get("sha256"), name)
            if model_config.tokenizer == name:
                model_config.tokenizer = backbone_path(source["name"], source.get("commit"))
                model_config.tokenizer_revision = source.get("commit")
        model_config.hf_config.num_labels = 1
        model_config.tokenizer_mode = NAME
        model_config.io_processor_plugin = model_config.io_processor_plugin or NAME

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Switch the prefix cache off.

        Raises:
            CheckpointError: for pipeline parallelism.
        """
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages != 1:
            raise CheckpointError(
                f"{vllm_config.model_config.model}: found --pipeline-parallel-size {stages}, expected 1: the "
                "heads of a reward model read the states of a whole decoder"
            )
        vllm_config.cache_config.enable_prefix_caching = False


def reward_config(hf_config: Any) -> ArmoRMConfig:
    """Our config of a model that vLLM has read, in either layout."""
    if isinstance(hf_config, ArmoRMConfig):
        return hf_config
    return ArmoRMConfig(**from_released(hf_config.to_dict()))


def register() -> None:
    """Tell vLLM about reward models; it may be called several times."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    for architecture in SERVED:
        ModelRegistry.register_model(architecture, "armorm.integrations.vllm_model:ServedRewardModel")
        MODELS_CONFIG_MAP[architecture] = ModelSettings
    if NAME not in RENDERER_REGISTRY.renderers:
        TokenizerRegistry.register(NAME, "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register(NAME, "armorm.integrations.vllm_requests", "RewardRenderer")


def request_processor() -> str:
    """Name of the class that reads and answers `/pooling {"data": ...}`."""
    return "armorm.integrations.vllm_requests.RewardProcessor"
