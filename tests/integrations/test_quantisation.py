"""A quantised backbone under unquantised heads, by the quantisers that run without a GPU (`make test-integrations`)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from armorm import ArmoRM
from tests.helpers.backbones import backbone_of, config_of
from tests.helpers.conversations import chat
from tests.helpers.small_models import reward_model

pytestmark = pytest.mark.slow

CONVERSATIONS = [
    chat("What is the capital of France?", "Paris, on the river Seine."),
    chat("Hi!", "Hello."),
    chat("Tell me about rivers.", "They flow. " * 12),
]


def torchao() -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto() -> QuantoConfig:
    if importlib.util.find_spec("optimum") is None:
        pytest.skip("optimum-quanto is not installed")
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


def bitsandbytes(**settings) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**settings)


def eight_bit() -> BitsAndBytesConfig:
    return bitsandbytes(load_in_8bit=True)


def four_bit() -> BitsAndBytesConfig:
    return bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def rm() -> ArmoRM:
    """Wide enough for blocks of 64 weights."""
    config = config_of("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    return reward_model(backbone=backbone_of("llama", config=config))


@pytest.fixture(scope="module")
def folder(rm, tmp_path_factory):
    path = tmp_path_factory.mktemp("rm")
    rm.save_pretrained(path)
    return path


# How far scores may move, in standard deviations (four bits of random weights are noise), and how far with company:
# bitsandbytes picks the columns that stay in half precision by looking at the whole batch.
@pytest.mark.parametrize(
    ("settings", "error", "company"),
    [(torchao, 0.2, 1e-5), (quanto, 0.2, 1e-5), (eight_bit, 0.2, 0.05), (four_bit, 2, 1e-5)],
)
def test_the_backbone_is_quantised_and_the_heads_are_not(rm, folder, settings, error, company):
    options = {"quantization_config": settings(), "device_map": "cpu", "dtype": torch.float32}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    plain = rm.model.state_dict()
    for name in ("q_proj", "o_proj"):
        weight = getattr(model.model.layers[0].self_attn, name).weight
        assert type(weight) is not torch.nn.Parameter, f"{name} is not quantised"
    for part in (model.regression_layer, *model.gating.layers):
        assert type(part) is torch.nn.Linear
        assert type(part.weight) is torch.nn.Parameter
    for name, tensor in model.state_dict().items():
        if not name.startswith("model."):
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, plain[name]), name

    expected = rm.score(CONVERSATIONS).scores
    read = ArmoRM.from_pretrained(folder, quantization_config=settings(), device_map="cpu", dtype="float32")
    scores = read.score(CONVERSATIONS).scores
    assert 0 < abs(scores - expected).max() < error * expected.std()
    alone = [float(read.score([conversation]).scores[0]) for conversation in CONVERSATIONS]
    assert scores.tolist() == pytest.approx(alone, abs=company)
