"""Self-contained models on machines without armorm: the same scores on every version of transformers.

Checkpoints are written here, with armorm; a program in each environment, where armorm cannot be imported, loads them
with `trust_remote_code=True` and writes down what they give. What armorm gives is what is expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from armorm.model.export import make_self_contained
from armorm.model.modeling import ArmoRMForSequenceClassification
from tests.helpers.backbones import backbone_of, config_of
from tests.helpers.conversations import chat
from tests.helpers.environments import CURRENT, NEWER, OLDER, results
from tests.helpers.small_models import reward_model

pytestmark = pytest.mark.slow

CONVERSATIONS = [
    chat("What is the capital of France?", "Paris, on the river Seine."),
    chat("Name a prime.", "Seven.", "And one that is larger, with a reason?", "Eleven: nothing but one divides it."),
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
# As config.json of the published checkpoint has them, but for the sizes.
RELEASED = {
    "llama": {
        "architectures": ["LlamaForRewardModelWithGating"],
        "model_type": "llama",
        "vocab_size": 128257,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rope_scaling": None,
    },
    "gemma2": {
        "architectures": ["Gemma2ForRewardModelWithGating"],
        "model_type": "gemma2",
        "vocab_size": 3000,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "attn_logit_softcapping": 0.5,
    },
}
GATES = {"llama": [128009, 128006, 78191, 128007, 271], "gemma2": [107, 108, 106, 2516, 108], "armorm": [2, 5]}


@dataclass(frozen=True)
class Checkpoint:
    """A folder, with what is needed to make ids for it."""

    folder: Path
    gate: list[int]
    bos: int
    pad: int
    narrow: bool = False  # whether its backbone is stored in bfloat16


# --- checkpoints ---------------------------------------------------------------------------------


def write_released(folder: Path, family: str, shard: str) -> None:
    """A checkpoint of the released layout: backbone in bfloat16, heads in float32, float32 in the config."""
    settings = {**SIZES, **RELEASED[family]}
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        backbone = AutoModel.from_config(AutoConfig.for_model(**settings))
    state = {f"model.{name}": tensor.bfloat16() for name, tensor in backbone.state_dict().items()}
    for i, (rows, columns) in enumerate([(24, 32), (24, 24), (24, 24), (19, 24)]):
        state[f"gating.layers.{i}.weight"] = torch.randn(rows, columns, generator=generator) * 0.5
        state[f"gating.layers.{i}.bias"] = torch.randn(rows, generator=generator)
    state["gating.logit_scale"] = torch.tensor([1.3])
    state["regression_layer.weight"] = torch.randn(19, 32, generator=generator) * 0.1
    state["reward_transform_matrix"] = torch.eye(19) - torch.rand(19, 19, generator=generator) * 0.2
    folder.mkdir()
    save_torch_state_dict(state, folder, max_shard_size=shard)
    gate = {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 24, "gating_n_hidden": 3}
    (folder / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float32", **gate}))
    make_self_contained(folder, "released")


def write_armorm(folder: Path, **options: Any) -> None:
    """A steered model of ours with everything that a config can say; its positions are those of Llama 3.1."""
    config = config_of("llama")
    config.rope_parameters = dict(LLAMA3_ROPE)
    rm = reward_model(backbone=backbone_of("llama", config=config), intercept=True)
    rm.steer({"ultra-helpful": 2.0}, drop=["code-style"]).save_pretrained(folder, self_contained=True, **options)


def write_hub_cache(checkpoint: Path, folder: Path) -> None:
    """What a download from the hub leaves on disk, of the model `acme/reward`."""
    snapshot = folder / "models--acme--reward" / "snapshots" / ("0" * 39 + "1")
    snapshot.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (folder / "models--acme--reward" / "refs").mkdir()
    (folder / "models--acme--reward" / "refs" / "main").write_text(snapshot.name)


def altered(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint with other tensors."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


# Capped, windowed, with two kinds of positions, with names of its own for them, without rotary ones.
FAMILIES = ("gemma2", "mistral", "gemma3_text", "gpt_neox", "gpt2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("checkpoints")
    write_armorm(root / "armorm")
    write_armorm(root / "armorm-sharded", max_shard_size="300KB")
    narrow = reward_model(backbone=backbone_of("llama").bfloat16())
    narrow.save_pretrained(root / "armorm-bfloat16", self_contained=True)
    for family in FAMILIES:
        reward_model(backbone=backbone_of(family)).save_pretrained(root / f"armorm-{family}", self_contained=True)
    reward_model(backbone=backbone_of("llama")).save_pretrained(
        root / "armorm-as-released", layout="released", self_contained=True
    )
    write_released(root / "released", "llama", "1GB")
    write_released(root / "released-sharded", "llama", "5MB")
    write_released(root / "released-gemma2", "gemma2", "1GB")
    for name in ("armorm-sharded", "released-sharded"):
        assert len(list((root / name).glob("*.safetensors"))) > 1
    ours = {
        path.name: Checkpoint(path, GATES["armorm"], 1, 0, path.name == "armorm-bfloat16")
        for path in root.glob("armorm*")
    }
    published = {
        "released": Checkpoint(root / "released", GATES["llama"], 128000, 128256, True),
        "released-sharded": Checkpoint(root / "released-sharded", GATES["llama"], 128000, 128256, True),
        "released-gemma2": Checkpoint(root / "released-gemma2", GATES["gemma2"], 2, 0, True),
    }
    return ours | published


NAMES = [
    "armorm",
    "armorm-sharded",
    "armorm-bfloat16",
    *(f"armorm-{family}" for family in FAMILIES),
    "armorm-as-released",
    "released",
    "released-sharded",
    "released-gemma2",
]

# --- what is asked of each -----------------------------------------------------------------------

INPUTS = [
    "right, masked",
    "left, masked",
    "right, no mask",
    "left, no mask",
    "gates given",
    "gates elsewhere",
    "without the gate",
]


def inputs_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Three rows of ids, in each of the ways that `INPUTS` names; an early match of the pattern is not the gate."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(300, 2000, (count,), generator=generator).tolist()

    gate = checkpoint.gate
    rows = [[checkpoint.bos, *words(n), *gate, *words(n), *gate, *words(2 * n)] for n in (4, 7, 11)]
    rows[0][-2] = checkpoint.pad  # a pad id inside the text is text
    width = max(map(len, rows))
    right = [row + [checkpoint.pad] * (width - len(row)) for row in rows]
    left = [[checkpoint.pad] * (width - len(row)) + row for row in rows]
    right_mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    left_mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    gates = [1 + 2 * n + len(gate) for n in (4, 7, 11)]
    return [
        {"input_ids": right, "attention_mask": right_mask},
        {"input_ids": left, "attention_mask": left_mask},
        {"input_ids": right},
        {"input_ids": left},
        {"input_ids": right, "attention_mask": right_mask, "gate_positions": gates},
        {"input_ids": right, "attention_mask": right_mask, "gate_positions": [1, 2, 3]},
        {"input_ids": [words(20)], "attention_mask": [[1] * 20]},
    ]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    tokens = reward_model().tokenizer
    return [tokens.apply_chat_template(conversation, tokenize=False) for conversation in CONVERSATIONS]


@pytest.fixture(scope="module")
def expected(checkpoints) -> Callable[[str, str], list[dict[str, torch.Tensor]]]:
    """What armorm gives for the inputs of a checkpoint, but for the last of them."""

    def compute(name: str, dtype: str) -> list[dict[str, torch.Tensor]]:
        checkpoint = checkpoints[name]
        model = ArmoRMForSequenceClassification.from_pretrained(checkpoint.folder, dtype=getattr(torch, dtype))
        with torch.no_grad():
            outputs = [
                model(**{key: torch.tensor(values) for key, values in inputs.items()})
                for inputs in inputs_of(checkpoint)[:-1]
            ]
        return [{key: output[key].float() for key in output} for output in outputs]

    return compute


@pytest.fixture(scope="module", params=[CURRENT, NEWER, OLDER])
def found(request, checkpoints, texts, tmp_path_factory) -> dict[str, Any]:
    """What the program wrote down in an environment, by job."""
    root = tmp_path_factory.mktemp(f"jobs-{request.param}")
    jobs: list[dict[str, Any]] = []
    for name, checkpoint in checkpoints.items():
        job = {"source": str(checkpoint.folder), "inputs": inputs_of(checkpoint)}
        jobs.append({**job, "name": f"{name} float32", "dtype": "float32"})
    for name in ("armorm", "armorm-bfloat16", "released", "released-sharded", "released-gemma2"):
        for dtype in (None, "auto", "bfloat16", "float16"):
            job = {"source": str(checkpoints[name].folder), "inputs": inputs_of(checkpoints[name])[:2]}
            jobs.append({**job, "name": f"{name} {dtype}", "dtype": dtype})
    for name in ("armorm", "released"):
        options = {"torch_dtype": "float16"}
        jobs.append({"name": f"{name} older name", "source": str(checkpoints[name].folder), "options": options})
    for job in jobs:
        if job["name"] in ("armorm float32", "released None"):
            job["save"] = str(root / f"saved {job['name']}")
        if job["name"] in ("armorm float32", "armorm-as-released float32"):
            job |= {"texts": texts, "conversation": CONVERSATIONS[0]}
    write_hub_cache(checkpoints["armorm-sharded"].folder, root / "hub")
    jobs.append(
        {
            "name": "hub",
            "source": "acme/reward",
            "options": {"cache_dir": str(root / "hub")},
            "inputs": inputs_of(checkpoints["armorm"]),
        }
    )
    faults: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
        "head": lambda state: state.pop("gating.layers.0.bias"),
        "transform": lambda state: state.pop("reward_transform_matrix"),
        "backbone": lambda state: state.pop("model.norm.weight"),
        "more": lambda state: state.update({"score.weight": torch.zeros(1, 32)}),
        "shape": lambda state: state.update({"gating.logit_scale": torch.ones(2)}),
    }
    for layout in ("armorm", "released"):
        for fault, change in faults.items():
            folder = altered(checkpoints[layout].folder, root / f"{layout}-{fault}", change)
            jobs.append({"name": f"{layout} without {fault}", "source": str(folder)})
    return results(request.param, "remote_code.py", {"jobs": jobs}, root) | {"version": request.param}


def assert_same(outputs: dict[str, Any], expected: dict[str, torch.Tensor], tolerance: float, label: str) -> None:
    assert set(outputs) == set(expected), outputs.get("error", label)
    for name, values in expected.items():
        computed = torch.tensor(outputs[name])
        torch.testing.assert_close(
            computed, values, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{label}, {name}: {text}"
        )


# --- what each gives -----------------------------------------------------------------------------


def test_the_environment_is_what_it_is_called_and_has_no_armorm(found):
    version = {CURRENT: "5."}.get(found["version"], f"{found['version']}.")
    assert found["transformers"].startswith(version)
    assert found["armorm"] is False


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_armorm(found, expected, name):
    job = found[f"{name} float32"]
    module = "modeling_custom" if "released" in name else "modeling_armorm"
    assert job["class"].startswith("transformers_modules.")
    assert f".{module}." in job["class"]
    assert job["training"] is False
    known = expected(name, "float32")
    for label, outputs, values in zip(INPUTS, job["outputs"], known, strict=False):
        assert_same(outputs, values, 1e-5, label)
    scores = known[0]["score"]
    assert (scores - scores.roll(1)).abs().min() > 1e-3, "rows should differ for the comparison to mean something"
    assert (scores - known[5]["score"]).abs().max() > 1e-3, "and so should the score at another gate"


@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side_with_or_without_a_mask_is_one_score(found, name):
    scores = [outputs["score"] for outputs in found[f"{name} float32"]["outputs"][:5]]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(scores[:1] * 5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_the_gate_is_refused_with_what_was_looked_for(found, checkpoints, name):
    error = found[f"{name} float32"]["outputs"][-1]["error"]
    assert f"rows [0] have no gate pattern {checkpoints[name].gate}" in error


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["armorm", "armorm-bfloat16", "released", "released-sharded", "released-gemma2"])
def test_heads_are_float32_whatever_the_backbone_is(found, checkpoints, expected, name, dtype):
    job = found[f"{name} {dtype}"]
    stored = "bfloat16" if checkpoints[name].narrow else "float32"
    used = stored if dtype in (None, "auto") else dtype
    assert job["backbone"] == [f"torch.{used}"]
    assert job["heads"] == ["torch.float32"]
    if used != "float16":
        for outputs, values in zip(job["outputs"], expected(name, used)[:2], strict=False):
            assert_same(outputs, values, {"float32": 1e-5, "bfloat16": 0.1}[used], used)
    assert torch.tensor(job["outputs"][0]["score"]).isfinite().all()


@pytest.mark.parametrize("name", ["armorm", "released"])
def test_the_dtype_may_be_asked_for_by_its_older_name(found, name):
    job = found[f"{name} older name"]
    assert (job["backbone"], job["heads"]) == (["torch.float16"], ["torch.float32"])


@pytest.mark.parametrize("name", ["armorm", "armorm-as-released"])
def test_the_tokenizer_beside_it_reads_the_same_everywhere(found, checkpoints, texts, name):
    job = found[f"{name} float32"]
    tokens = reward_model().tokenizer
    assert job["rendered"] == texts[0]
    assert job["ids"] == [tokens(text, add_special_tokens=False)["input_ids"] for text in texts]
    model = ArmoRMForSequenceClassification.from_pretrained(checkpoints[name].folder, dtype=torch.float32)
    batch = tokens(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        scores = model(batch["input_ids"], batch["attention_mask"]).score
    torch.testing.assert_close(torch.tensor(job["mapping"]["score"]), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["armorm", "armorm-as-released"])
def test_the_pipeline_gives_the_plain_score(found, name):
    job = found[f"{name} float32"]
    for pipeline in ("pipeline", "pipeline of the folder"):
        assert [entry["label"] for entry in job[pipeline]] == ["LABEL_0", "LABEL_0"]
        scores = [entry["score"] for entry in job[pipeline]]
        assert scores == pytest.approx(job["mapping"]["score"], abs=1e-5), pipeline


def test_a_model_from_the_hub_is_that_of_the_folder(found, expected):
    for outputs, values in zip(found["hub"]["outputs"], expected("armorm", "float32"), strict=False):
        assert_same(outputs, values, 1e-5, "hub")


@pytest.mark.parametrize("name", ["armorm float32", "released None"])
def test_what_is_saved_again_scores_the_same(found, name):
    job = found[name]
    torch.testing.assert_close(
        torch.tensor(job["again"]["score"]), torch.tensor(job["outputs"][0]["score"]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("layout", ["armorm", "released"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("head", "missing gating.layers.0.bias"),
        ("transform", "missing reward_transform_matrix"),
        ("backbone", "missing model.norm.weight"),
        ("more", "unexpected score.weight"),
        ("shape", "mismatched gating.logit_scale"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_tensor(found, layout, fault, said):
    assert said in found[f"{layout} without {fault}"].get("error", "it was loaded")


def test_steering_acts(found):
    """An objective that the first checkpoint's config drops has no weight."""
    gating_output = torch.tensor(found["armorm float32"]["outputs"][0]["gating_output"])
    assert gating_output[:, 2].tolist() == [0.0, 0.0, 0.0]
    assert (gating_output[:, [0, 1, 3]] > 0).all()
