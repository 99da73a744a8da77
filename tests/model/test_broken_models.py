"""Broken or hostile model folders: one line that names file and field, at once, and never a NaN score."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from armorm.backbone.decoder import Backbone
from armorm.backbone.model_files import integer_weights
from armorm.errors import ArmormError, BackboneError, CheckpointError, ConversationError
from armorm.files import EMBEDDED_BACKBONE, EMBEDDED_REWARD_MODEL, embedded_path
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.reward_model import ArmoRM
from tests.helpers.commands import run
from tests.helpers.conversations import chat
from tests.helpers.examples import examples
from tests.helpers.small_models import reward_model, tokenizer

CHAT = chat("Hi", "Yes.")
SECONDS = 2.0  # of the processor, so that other programs do not count


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    reward_model().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy of the model; files are links until they are replaced."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def replace(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    replace(folder, "config.json", json.dumps(config).encode())


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> ArmoRM:
    return ArmoRM.from_pretrained(folder, dtype="float32", device="cpu")


def refusal(folder: Path, kind: type[ArmormError] = CheckpointError) -> str:
    start = time.process_time()
    with pytest.raises(kind) as caught:
        Backbone.load(folder, dtype="float32", device="cpu") if kind is BackboneError else load(folder)
    assert time.process_time() - start < SECONDS
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b"null", b'"x"', b"", b'{"model_type": "arm', b"\xff\xfe{", b"[" * 99_999]
)
def test_a_config_that_is_no_object_is_refused(broken, content):
    replace(broken, "config.json", content)
    assert f"{broken / 'config.json'}: " in refusal(broken)


def test_a_missing_config_is_refused(broken):
    replace(broken, "config.json", None)
    assert "config.json" in refusal(broken)


FIELDS: list[tuple[tuple[str | int, ...], Any]] = [
    (("backbone_config",), None),
    (("backbone_config",), [1]),
    (("backbone_config", "model_type"), 7),
    (("backbone_config", "hidden_size"), "x"),
    (("backbone_config", "hidden_size"), -32),
    (("backbone_config", "hidden_size"), 10**12),
    (("backbone_config", "hidden_size"), 64),
    (("backbone_config", "num_attention_heads"), 3),
    (("backbone_config", "num_hidden_layers"), 1_000_000),
    (("backbone_config", "num_hidden_layers"), 900),
    (("backbone_config", "num_hidden_layers"), 1.5),
    (("backbone_config", "vocab_size"), 9999),
    (("backbone_config", "vocab_size"), True),
    (("objectives",), {}),
    (("objectives",), []),
    (("objectives", 0), "helpful"),
    (("objectives", 0), {"name": 3}),
    (("gating_n_hidden",), 1_000_000),
    (("gating_n_hidden",), -1),
    (("gating_hidden_dim",), 0),
    (("gating_temperature",), 0),
    (("gating_temperature",), float("nan")),
    (("regression_bias",), "no"),
    (("gate_pattern",), ["a"]),
    (("limits",), {"max_length": -1}),
    (("limits",), {"overflow": "cut"}),
    (("reference", "score_mean"), float("inf")),
    (("reference", "reward_means"), [1.0]),
    (("readout",), {"pooling": "max"}),
    (("quantiles",), {"objectives": ["nobody"], "levels": [0.5]}),
    (("uncertainty",), {"rows": 5}),
    (("steering",), 5),
]


@pytest.mark.parametrize(("place", "value"), FIELDS)
def test_a_field_that_no_model_can_have_is_refused_by_its_name(broken, place, value):
    def change(config: dict[str, Any]) -> None:
        *keys, last = place
        found: Any = config
        for key in keys:
            found = found[key]
        found[last] = value

    change_config(broken, change)
    message = refusal(broken)
    assert f"{broken / 'config.json'}, field {place[0]}" in message


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"model": 3}', b'{"version": "1.0", "mod', b"{}"])
def test_a_missing_or_cut_tokenizer_is_refused(broken, content):
    replace(broken, "tokenizer.json", content)
    assert f"{broken / 'tokenizer.json'}: " in refusal(broken)


@pytest.mark.parametrize("kind", ["model", "backbone"])
def test_decoder_weights_of_integers_are_refused_by_name_unless_the_config_says_quantized(saved, tmp_path, kind):
    folder = tmp_path / kind
    shutil.copytree(saved if kind == "model" else embedded_path(EMBEDDED_BACKBONE), folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    save_file(tensors | {name: tensors[name].to(torch.int32)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert f"{folder / 'model.safetensors'}: tensor {name} holds I32, expected floating-point numbers" in refusal(
        folder, CheckpointError if kind == "model" else BackboneError
    )
    settings = {"quantization_config": {"quant_method": "bitsandbytes"}}
    assert not integer_weights(folder, "model*.safetensors", settings, "model." if kind == "model" else "")


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, -1])
def test_weights_that_are_cut_off_are_refused_by_name(broken, saved, kept):
    whole = (saved / "model.safetensors").read_bytes()
    replace(broken, "model.safetensors", whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    assert f"{broken / 'model.safetensors'}: found " in refusal(broken)


def test_a_backbone_whose_weights_are_cut_off_is_refused_by_name(tmp_path):
    backbone(tmp_path)
    replace(tmp_path, "model.safetensors", (tmp_path / "model.safetensors").read_bytes()[:-1])
    assert f"{tmp_path / 'model.safetensors'}: found " in refusal(tmp_path, BackboneError)


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"model": '])
def test_a_backbone_without_a_whole_tokenizer_is_refused(tmp_path, content):
    backbone(tmp_path)
    replace(tmp_path, "tokenizer.json", content)
    assert f"{tmp_path / 'tokenizer.json'}: " in refusal(tmp_path, BackboneError)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 1_000_000), ("num_attention_heads", 3), ("hidden_size", "x"), ("vocab_size", 77)],
)
def test_a_backbone_with_an_impossible_config_is_refused(tmp_path, field, value):
    backbone(tmp_path)
    change_config(tmp_path, lambda config: config.update({field: value}))
    assert f"{tmp_path / 'config.json'}, field {field}" in refusal(tmp_path, BackboneError)


def backbone(folder: Path) -> None:
    for path in embedded_path(EMBEDDED_BACKBONE).iterdir():
        (folder / path.name).symlink_to(path)


HEADS = ["regression_layer.weight", "reward_transform_matrix", "gating.layers.1.bias", "gating.logit_scale"]


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_heads_that_are_not_finite_are_refused_by_their_name(broken, name, value):
    change_weights(broken, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    message = refusal(broken)
    assert f"tensor {name} has 1 values that are not finite" in message


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_integers_are_refused_by_their_name(broken, name):
    change_weights(broken, lambda tensors: tensors.update({name: tensors[name].int()}))
    assert f"tensor {name} holds I32, expected floating-point numbers" in refusal(broken)


def test_a_backbone_that_is_not_finite_is_refused(broken):
    change_weights(broken, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert "not finite" in refusal(broken, ArmormError)


def test_heads_in_their_own_file_are_checked_too(tmp_path):
    for path in embedded_path(EMBEDDED_REWARD_MODEL).iterdir():
        (tmp_path / path.name).symlink_to(path)
    heads = load_file(tmp_path / "heads.safetensors")
    (tmp_path / "heads.safetensors").unlink()
    heads["regression_layer.weight"][0, 0] = float("nan")
    save_file(heads, tmp_path / "heads.safetensors")
    assert "tensor regression_layer.weight has 1 values that are not finite" in refusal(tmp_path)


def test_a_score_that_is_not_finite_is_an_error_or_a_rejected_row():
    rm = copy.deepcopy(reward_model())
    rm.model.model.embed_tokens.weight.data[tokenizer().encode("zebra", add_special_tokens=False)[0]] = float("nan")
    with pytest.raises(ConversationError, match="conversation 1: the model's score is not a finite number"):
        rm.score([CHAT, chat("zebra", "Yes.")])
    batch = rm.score([CHAT, chat("zebra", "Yes."), CHAT], on_refused="skip")
    assert batch.rows.tolist() == [0, 2]
    assert batch.rejected == [(1, "the model's score is not a finite number")]
    assert torch.isfinite(torch.from_numpy(batch.scores)).all()


def test_objectives_are_bound_to_their_heads(broken):
    change_config(broken, lambda config: config["objectives"].reverse())
    assert "field objectives: names or their order" in refusal(broken)


def test_a_model_without_a_digest_is_loaded(broken):
    change_config(broken, lambda config: config.pop("heads_digest"))
    assert load(broken).score([CHAT]).scores == load(broken).score([CHAT]).scores


@pytest.mark.parametrize("layout", ["armorm", "released"])
def test_a_saved_model_has_the_digest_of_what_was_saved(tmp_path, layout):
    rm = reward_model().steer({"code-style": 2.0})
    rm.save_pretrained(tmp_path, layout=layout)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len((config.get("armorm") or config)["heads_digest"]) == 32
    assert load(tmp_path).score([CHAT]).scores == pytest.approx(rm.score([CHAT]).scores, abs=1e-5)
    entries = (config.get("armorm") or config)["objectives"]
    entries[0]["name"], entries[1]["name"] = entries[1]["name"], entries[0]["name"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "names or their order" in refusal(tmp_path)


def test_heads_that_were_trained_further_are_saved_with_their_own_digest(saved, tmp_path):
    rm = load(saved)
    with torch.no_grad():
        rm.model.regression_layer.weight.add_(1)
    rm.model.save_pretrained(tmp_path)
    rm.tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).score([CHAT]).scores == rm.score([CHAT]).scores


_OLDER = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 does not check types")


@_OLDER
@pytest.mark.parametrize(("field", "value"), [("attention_bias", None), ("attention_dropout", False), ("head_dim", 5)])
def test_a_field_that_transformers_rejects_is_named_in_one_line(broken, field, value):
    change_config(broken, lambda config: config["backbone_config"].update({field: value}))
    assert field in refusal(broken)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**12), 10**12), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.lists(st.integers(-3, 3), max_size=3),
)  # fmt: skip


def break_config(folder: Path, draw: st.DataObject) -> None:
    """Put something else at one place of config.json, or cut the file."""
    config = json.loads((folder / "config.json").read_text())
    if draw.draw(st.integers(0, 9), "cut") == 0:
        text = json.dumps(config)
        replace(folder, "config.json", text[: draw.draw(st.integers(0, len(text) - 1), "at")].encode())
        return
    found: Any = config
    key = draw.draw(st.sampled_from(sorted(config)), "key")
    while isinstance(found[key], (dict, list)) and found[key] and draw.draw(st.booleans(), "deeper"):
        found = found[key]
        key = draw.draw(st.sampled_from(sorted(found) if isinstance(found, dict) else range(len(found))), "key")
    found[key] = draw.draw(JUNK, "value")
    replace(folder, "config.json", json.dumps(config).encode())


def load_or_one_line(saved: Path, folder: Path, draw: st.DataObject) -> None:
    for path in folder.iterdir():
        path.unlink()
    for path in saved.iterdir():
        (folder / path.name).symlink_to(path)
    break_config(folder, draw)
    start = time.process_time()
    try:
        scores = load(folder).score([CHAT]).scores
    except ArmormError as error:
        assert "\n" not in str(error)
        assert str(error)
    else:
        assert torch.isfinite(torch.from_numpy(scores)).all()
    assert time.process_time() - start < 2 * SECONDS


options = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=examples(15), **options)
@given(draw=st.data())
def test_any_broken_config_is_refused_in_one_line_or_scores(saved, tmp_path_factory, draw):
    load_or_one_line(saved, tmp_path_factory.mktemp("broken"), draw)


@pytest.mark.slow
@settings(max_examples=examples(200), **options)
@given(draw=st.data())
def test_any_of_many_broken_configs_is_refused_in_one_line_or_scores(saved, tmp_path_factory, draw):
    load_or_one_line(saved, tmp_path_factory.mktemp("broken"), draw)


@pytest.mark.parametrize("command", ["score", "compare", "inspect", "explain"])
@pytest.mark.parametrize("content", ["[]", '{"model_type": "armorm", "objectives": 3}', '{"architectures": 3}'])
def test_commands_end_with_one_line_for_a_broken_config(broken, capsys, tmp_path, command, content):
    replace(broken, "config.json", content.encode())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "response": "Yes"}\n')
    arguments: dict[str, tuple[object, ...]] = {
        "score": (rows, "--model", broken),
        "compare": ("yes", "no", "--prompt", "Hi", "--model", broken),
        "explain": ("--prompt", "Hi", "--response", "Yes", "--model", broken),
        "inspect": (broken,),
    }
    code, out, err = run(capsys, command, *arguments[command])
    lines = [line for line in err.splitlines() if line.startswith("armorm: ")]
    if command == "inspect" and content == '{"architectures": 3}':
        assert (code, lines) == (0, [])  # a config of another kind
        return
    assert (code, out) == (1, "")
    assert len(lines) == 1
    assert "config.json" in lines[0] or "model_type" in lines[0]
    assert "Traceback" not in err


def test_nan_in_a_copied_column_is_null_in_the_output(tmp_path, capsys, saved):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"id": NaN, "prompt": "Hi", "response": "Yes"}\n{"id": [1, Infinity], "prompt": "Hi", "response": "No"}\n'
    )
    code, out, _ = run(capsys, "score", path, "--model", saved)
    assert code == 0
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert [row["id"] for row in rows] == [None, [1, None]]


@_OLDER
def test_a_model_of_the_hub_is_checked_in_the_cache(broken, tmp_path):
    change_config(broken, lambda config: config.pop("heads_digest"))
    change_weights(broken, lambda tensors: tensors.update({"gating.logit_scale": tensors["gating.logit_scale"].int()}))
    cached = tmp_path / "hub" / "models--owner--rm"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("a" * 40)).symlink_to(broken)
    with pytest.raises(CheckpointError, match=r"tensor gating\.logit_scale holds I32, expected floating-point"):
        ArmoRMForSequenceClassification.from_pretrained("owner/rm", cache_dir=tmp_path / "hub", local_files_only=True)
