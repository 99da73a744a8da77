"""The released layout: a checkpoint made to its description, against a few lines that compute what it means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, Gemma2Config, LlamaConfig

from armorm import ArmoRM
from armorm.errors import CheckpointError
from armorm.model.configuration import ArmoRMConfig
from armorm.model.export import to_released
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.released import GATE_PATTERNS
from armorm.objectives import RELEASED_OBJECTIVES
from tests.helpers.conversations import chat
from tests.helpers.small_models import PENALTIES, changed, reward_model

PAD = {"llama": 128256, "gemma2": 0}
HEAD_NAMES = [
    *(f"gating.layers.{i}.{part}" for i in range(4) for part in ("weight", "bias")),
    "gating.logit_scale",
    "regression_layer.weight",
    "reward_transform_matrix",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def backbone_config(family: str) -> LlamaConfig | Gemma2Config:
    if family == "llama":
        return LlamaConfig(vocab_size=128257, bos_token_id=128000, eos_token_id=128001, pad_token_id=128256, **SIZES)
    return Gemma2Config(vocab_size=3000, head_dim=8, sliding_window=8, pad_token_id=0, **SIZES)


def write_checkpoint(
    folder: Path, family: str = "llama", *, k: int = 19, hidden: int = 24, shard: str = "1GB", **settings: object
) -> dict[str, torch.Tensor]:
    """A checkpoint of the layout with random weights: bfloat16 backbone, float32 heads, float32 in the config."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        backbone = AutoModel.from_config(backbone_config(family)).bfloat16()
    state = {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    shapes = [(hidden, 32), (hidden, hidden), (hidden, hidden), (k, hidden)]
    for i, shape in enumerate(shapes):
        state[f"gating.layers.{i}.weight"] = torch.randn(shape, generator=generator) * 0.5
        state[f"gating.layers.{i}.bias"] = torch.randn(shape[0], generator=generator)
    state["gating.logit_scale"] = torch.tensor([1.3])
    state["regression_layer.weight"] = torch.randn(k, 32, generator=generator) * 0.1
    transform = torch.eye(k)
    transform[4 % k] -= torch.rand(k, generator=generator)
    transform[4 % k, 4 % k] = 0
    state["reward_transform_matrix"] = transform
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, folder, max_shard_size=shard)
    name = {"llama": "LlamaForRewardModelWithGating", "gemma2": "Gemma2ForRewardModelWithGating"}[family]
    config = backbone_config(family).to_dict() | {
        "architectures": [name],
        "auto_map": {"AutoModelForSequenceClassification": f"modeling_custom.{name}"},
        "torch_dtype": "float32",
        "num_objectives": k,
        "gating_temperature": 10,
        "gating_hidden_dim": hidden,
        "gating_n_hidden": 3,
        **settings,
    }
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    return state


def rows(family: str, lengths: tuple[int, ...] = (5, 9, 14)) -> list[list[int]]:
    """Rows of ids with the gate pattern, once early (an earlier turn's) and once where it counts."""
    generator = torch.Generator().manual_seed(3)
    pattern = GATE_PATTERNS[family]

    def words(count: int) -> list[int]:
        return torch.randint(300, 2000, (count,), generator=generator).tolist()

    return [[*words(length), *pattern, *words(length), *pattern, *words(2 * length)] for length in lengths]


def padded(rows: list[list[int]], pad: int, side: str = "right") -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor(
        [row + [pad] * (width - len(row)) if side == "right" else [pad] * (width - len(row)) + row for row in rows]
    )


@torch.no_grad()
def computed(state: dict[str, torch.Tensor], family: str, ids: torch.Tensor, dtype: torch.dtype) -> dict:
    """As in the checkpoint's own code: no mask, the pad id marks the end of the text, the last match is the gate."""
    backbone = AutoModel.from_config(backbone_config(family), attn_implementation="eager").to(dtype).eval()
    backbone.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    hidden = backbone(ids).last_hidden_state
    pattern = torch.tensor(GATE_PATTERNS[family])
    found = {"rewards": [], "gating_output": [], "score": [], "hidden_state": [], "prompt_embedding": []}
    for row, states in zip(ids, hidden, strict=True):
        ends = torch.nonzero(row == PAD[family])
        last = states[(int(ends[0]) if len(ends) else 0) - 1].float()
        gate = max(i for i in range(len(row) - 4) if torch.equal(row[i : i + 5], pattern))
        x = states[gate].float()
        for i in range(4):
            x = state[f"gating.layers.{i}.weight"] @ x + state[f"gating.layers.{i}.bias"]
            x = x.relu() if i < 3 else x
        weights = (x / 10).softmax(0) * state["gating.logit_scale"]
        rewards = state["regression_layer.weight"] @ last
        found["rewards"].append(rewards)
        found["gating_output"].append(weights)
        found["score"].append((weights * (rewards @ state["reward_transform_matrix"])).sum())
        found["hidden_state"].append(states[int(ends[0]) - 1 if len(ends) else -1])
        found["prompt_embedding"].append(states[gate])
    return {name: torch.stack(values) for name, values in found.items()}


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["1GB", "4MB"])
@pytest.mark.parametrize(("family", "k", "hidden"), [("llama", 19, 24), ("llama", 5, 8), ("gemma2", 19, 24)])
def test_a_released_checkpoint_scores_as_it_is_described(tmp_path, family, k, hidden, shard):
    state = write_checkpoint(tmp_path, family, k=k, hidden=hidden, shard=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4MB" and family == "llama")
    model = ArmoRMForSequenceClassification.from_pretrained(tmp_path, dtype="float32", attn_implementation="eager")
    ids = padded(rows(family), PAD[family])
    with torch.no_grad():
        output = model(ids)
    expected = computed(state, family, ids, torch.float32)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(output, name), values, rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(output.logits, output.score[:, None])


def test_the_backbone_keeps_the_dtype_of_its_weights_and_the_heads_float32(tmp_path):
    state = write_checkpoint(tmp_path)
    model = ArmoRMForSequenceClassification.from_pretrained(tmp_path)
    assert model.model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if name.startswith("model.") else torch.float32), name
        assert torch.equal(tensor, state[name]), name
    assert model.config.dtype == torch.bfloat16
    wide = ArmoRMForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict().values()} == {torch.float32}


def test_the_config_knows_what_the_layout_leaves_unsaid(tmp_path):
    write_checkpoint(tmp_path)
    config = ArmoRMForSequenceClassification.from_pretrained(tmp_path).config
    assert config.objective_set == RELEASED_OBJECTIVES
    assert config.gate_pattern == [128009, 128006, 78191, 128007, 271]
    assert (config.pad_token_id, config.gating_temperature, config.gating_n_hidden) == (128256, 10, 3)
    assert config.debiasing["against"] == ["helpsteer-verbosity"]
    assert config.backbone_config.model_type == "llama"
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_the_nineteen_stand_at_bin_centres():
    rewards = RELEASED_OBJECTIVES.to_reward([0, 1, 2, 3, 4, 1, 1, 3, 5, 2, 1, 5, 1, 10, 1, 2, 3, 4, 5])
    assert rewards.tolist() == pytest.approx(
        [0.1, 0.3, 0.5, 0.7, 0.9, 0.05, 0.1, 0.5, 0.9, 0.3, 1.0, 0.9, 0.1, 0.95, 0.1, 0.3, 0.5, 0.7, 0.9]
    )
    helpsteer = RELEASED_OBJECTIVES.to_raw([0.6] * 19)[:5]
    assert helpsteer.tolist() == pytest.approx([0.6 * 5 - 0.5] * 5)
    assert [objective.name for objective in RELEASED_OBJECTIVES if objective.direction == "neutral"] == [
        "helpsteer-verbosity"
    ]


def test_a_relative_takes_the_names_of_its_labels(tmp_path):
    write_checkpoint(tmp_path, k=3, hidden=8, id2label={"0": "kind", "1": "true", "2": "short"})
    assert ArmoRMConfig.from_pretrained(tmp_path).objective_set.names == ["kind", "true", "short"]
    write_checkpoint(tmp_path, k=3, hidden=8)
    assert ArmoRMConfig.from_pretrained(tmp_path).objective_set.names == ["objective-1", "objective-2", "objective-3"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_decides_wherever_there_is_one(tmp_path, side):
    state = write_checkpoint(tmp_path)
    model = ArmoRMForSequenceClassification.from_pretrained(tmp_path, dtype="float32")
    texts = rows("llama")
    texts[0][7] = PAD["llama"]  # a pad id inside the text
    expected = torch.cat([model(torch.tensor([row]), torch.ones(1, len(row))).score for row in texts])
    for pad in (PAD["llama"], 128001, 77):
        ids = padded(texts, pad, side)
        mask = padded([[1] * len(row) for row in texts], 0, side)
        torch.testing.assert_close(model(ids, mask).score, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(  # and without one, pads at the ends are taken off
        model(padded(texts, PAD["llama"], side)).score, expected, rtol=1e-5, atol=1e-5
    )
    assert not torch.isclose(
        computed(state, "llama", padded(texts, PAD["llama"]), torch.float32)["score"][0], expected[0]
    )


def test_rows_without_the_gate_pattern_are_refused_with_what_was_looked_for(tmp_path):
    write_checkpoint(tmp_path)
    model = ArmoRMForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"rows \[1\] have no gate pattern \[128009, 128006, 78191, 128007, 271\]"):
        model(padded([rows("llama")[0], list(range(300, 340))], PAD["llama"]))


def test_other_peoples_llama_models_stay_what_they_are(tmp_path):
    write_checkpoint(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig
    settings = json.loads((tmp_path / "config.json").read_text())
    plain = {key: value for key, value in settings.items() if not key.startswith(("gating", "num_obj", "auto_map"))}
    (tmp_path / "config.json").write_text(json.dumps(plain | {"architectures": ["LlamaForSequenceClassification"]}))
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)).__module__.startswith("transformers.")
    with pytest.raises(CheckpointError, match="model_type 'llama', expected 'armorm'"):
        ArmoRMForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gating.layers.2.bias", None, "missing gating.layers.2.bias"),
        ("reward_transform_matrix", None, "missing reward_transform_matrix"),
        ("model.layers.1.mlp.up_proj.weight", None, "missing model.layers.1.mlp.up_proj.weight"),
        ("score.weight", torch.zeros(1, 32), "unexpected score.weight"),
        (
            "regression_layer.weight",
            torch.zeros(18, 32),
            r"mismatched regression_layer.weight \(shape \[18, 32\], expected \[19, 32\]\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor(tmp_path, name, change, said):
    state = write_checkpoint(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    state.pop(name, None)
    if change is not None:
        state[name] = change
    save_torch_state_dict(state, tmp_path)
    with pytest.raises(CheckpointError, match=said):
        ArmoRMForSequenceClassification.from_pretrained(tmp_path)


def test_the_object_loads_it_with_its_tokenizer(tmp_path):
    rm = changed(reward_model(), steering={})
    rm.save_pretrained(tmp_path, layout="released")
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    read = ArmoRM.from_pretrained(tmp_path, dtype="float32")
    assert read.explain(conversation).score == pytest.approx(rm.explain(conversation).score, abs=1e-5)


# --- steered -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steering",
    [
        {"multiply": {"ultra-helpful": 3.0, "beaver-harm": 0.2}},
        {"drop": ["code-style"]},
        {"multiply": {"ultra-helpful": 0.5}, "drop": ["beaver-harm"], "debias_strength": 0.25},
    ],
)
def test_a_steering_by_factors_is_taken_into_the_weights(tmp_path, steering):
    plain = reward_model()
    rm = plain.steer(**steering)
    rm.save_pretrained(tmp_path, layout="released", self_contained=True)
    conversations = [chat("Hi", "Hello there."), chat("Why?", "Because it is so, and has been for ever.")]
    read = ArmoRM.from_pretrained(tmp_path, dtype="float32")
    expected, found = rm.score(conversations), read.score(conversations)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.gating_weights, expected.gating_weights, atol=1e-6)
    assert abs(expected.scores - plain.score(conversations).scores).max() > 1e-3
    assert read.model.config.steering == {}, "applied once, by the weights"
    assert read.model.config.provenance["steering"] == rm.model.config.steering
    for name in steering.get("drop", ()):
        assert (found.gating_weights[:, read.objectives.position(name)] == 0).all()
    assert all(torch.isfinite(tensor).all() for tensor in read.model.state_dict().values())


# --- writing -------------------------------------------------------------------------------------


def test_what_is_written_is_the_released_layout_and_nothing_is_lost(tmp_path):
    rm = reward_model(dtype=torch.bfloat16)
    rm.save_pretrained(tmp_path, layout="released")
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForRewardModelWithGating"]
    assert settings["model_type"] == "llama"
    assert settings["torch_dtype"] == "bfloat16"
    assert {key: settings[key] for key in ("num_objectives", "gating_temperature", "gating_hidden_dim")} == {
        "num_objectives": 4,
        "gating_temperature": 2.0,
        "gating_hidden_dim": 16,
    }
    assert settings["gating_n_hidden"] == 1
    read = ArmoRM.from_pretrained(tmp_path, dtype="bfloat16")
    assert read.objectives == rm.objectives
    for field in ("gate_pattern", "reference", "limits", "debiasing"):
        assert getattr(read.model.config, field) == getattr(rm.model.config, field), field
    assert read.model.config.debiasing["penalties"] == PENALTIES
    before, after = rm.model.state_dict(), read.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_released_checkpoint_survives_our_own_layout(tmp_path):
    state = write_checkpoint(tmp_path / "released")
    model = ArmoRMForSequenceClassification.from_pretrained(tmp_path / "released")
    model.save_pretrained(tmp_path / "ours")
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert isinstance(read, ArmoRMForSequenceClassification)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.state_dict().items())
    assert read.config.objective_set == RELEASED_OBJECTIVES
    assert "auto_map" not in json.loads((tmp_path / "ours" / "config.json").read_text())


def test_what_does_not_fit_the_layout_is_refused_with_every_reason():
    rm = reward_model(intercept=True)
    steered = rm.steer({"code-style": 2.0}, pin={"ultra-helpful": 0.5}, blend={"share": 0.5})
    with pytest.raises(
        CheckpointError, match=r"its rewards have an intercept.*it is steered by pin and blend, the layout"
    ):
        to_released(steered.model.config, torch.float32)
    config = changed(rm, regression_bias=False).model.config
    config.backbone_config = AutoConfig.for_model("qwen2")
    with pytest.raises(CheckpointError, match="its backbone is qwen2, the layout supports llama and gemma2"):
        to_released(config, torch.float32)
