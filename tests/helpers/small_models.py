"""Small reward models for tests: a random Llama, the embedded tokenizer, random heads, four objectives."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, PreTrainedModel

from armorm.backbone.readout import LAST_TOKEN, Readout
from armorm.data.inspection import rated_sets
from armorm.data.ratings import RatedSet
from armorm.files import EMBEDDED_BACKBONE, embedded_path
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.objectives import Objective, ObjectiveSet, parse_scale
from armorm.reward_model import ArmoRM

OBJECTIVES = ObjectiveSet(
    [
        Objective.rated("ultra-helpful", 1, 5),
        Objective.rated("beaver-harm", 0, 4, direction="lower"),
        Objective.rated("code-style", 0, 10),
        Objective("verbosity", "computed", 0.0, 6.0, 6.0, 0.0, "neutral", "response_length"),
    ]
)
PENALTIES = [0.4, -0.3, 0.1, 1.0]
REFERENCE = {
    "rows": 500,
    "score_mean": 0.25,
    "score_std": 0.5,
    "score_quantiles": [i / 50 - 1 for i in range(101)],
    "reward_means": [0.6, 0.3, 0.5, 0.4],
    "gating_weights": [0.4, 0.3, 0.2, 0.1],
}


_SIZES = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


@cache
def tokenizer():
    """The embedded backbone's tokenizer."""
    return AutoTokenizer.from_pretrained(embedded_path(EMBEDDED_BACKBONE))


def llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random two-layer decoder that reads the embedded tokenizer's ids."""
    config = LlamaConfig(**_SIZES, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(config).to(dtype).eval()


def reward_model(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    intercept: bool = False,
    backbone: PreTrainedModel | None = None,
    objectives: ObjectiveSet = OBJECTIVES,
    readout: Readout = LAST_TOKEN,
) -> ArmoRM:
    """A whole reward model whose gate weighs the objectives unequally and by the prompt; verbosity is debiased."""
    backbone, tokens = backbone or llama(seed, dtype), tokenizer()
    verbosity = next(name for name in objectives.names if "verbosity" in name)
    penalties = PENALTIES if objectives == OBJECTIVES else torch.linspace(-0.5, 0.5, len(objectives)).tolist()
    penalties[objectives.names.index(verbosity)] = 1.0
    config = ArmoRMConfig(
        backbone_config=backbone.config,
        objectives=objectives.to_dicts(),
        gating_temperature=2.0,
        gating_hidden_dim=16,
        gating_n_hidden=1,
        regression_bias=intercept,
        pad_token_id=tokens.pad_token_id,
        reference=REFERENCE if objectives == OBJECTIVES else {},
        debiasing={"against": [verbosity], "metric": "spearman", "level": "pooled", "penalties": penalties},
        readout=readout.settings(),
        provenance={"backbone": "random"},
    )
    model = ArmoRMForSequenceClassification.assemble(backbone, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*model.regression_layer.parameters(), *model.gating.layers.parameters()):
            parameter.normal_(0, 0.3, generator=generator)
        model.gating.logit_scale.fill_(1.7)
        model.reward_transform_matrix[objectives.names.index(verbosity)] -= torch.tensor(penalties)
    whole = ArmoRM(model, tokens, "small")
    model.config.gate_pattern = whole.backbone.template.gate_pattern()
    return whole


def changed(rm: ArmoRM, **settings: Any) -> ArmoRM:
    """The same weights under a config with other settings."""
    config = copy.deepcopy(rm.model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    other = copy.copy(rm)
    other.model = rm.model.with_config(config)
    return other


def small_classifier(folder: Path) -> Path:
    """A random Llama with one logit, saved with a chat template."""
    # The pad id is that of the end of turn, as in the models that make chosen equal rejected.
    config = LlamaConfig(**_SIZES, max_position_embeddings=256, num_labels=1, pad_token_id=2)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def weight_files(folder: Path) -> list[str]:
    """Names of the files in a folder that hold weights, in whatever format."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))


def sets_to_add(model: str | Path, path: Path, *scales: str) -> list[RatedSet]:
    """A file's ratings as `armorm extend MODEL --ratings FILE --objective SCALE` reads them."""
    known = ArmoRMConfig.from_pretrained(model).objective_set
    return rated_sets(known, [str(path)], dict(map(parse_scale, scales)))[0]
