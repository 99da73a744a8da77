"""The backbone: features equal the plain model's, whatever the batch; models that are not decoders are rejected by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel, T5Config, T5Model

from armorm import ArmoRM
from armorm.backbone import decoder
from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import (
    Backbone,
    Placement,
    fast_bfloat16,
    is_out_of_memory,
    length_sorted_batches,
    settle_attention,
)
from armorm.conversation import Conversation
from armorm.errors import BackboneError
from armorm.files import embedded_path
from tests.helpers.backbones import FAMILIES, families, save, save_backbone
from tests.helpers.conversations import chat

DIALOGUES = [
    chat("Hi", "Hello."),
    chat("Why is the sky blue?", "Sunlight is scattered by the air; blue light more than red. " * 3),
    chat("One", "two", "three " * 12, "four"),
    chat("Write a loop.", "for number in range(10):\n    print(number)\n"),
]


@pytest.fixture(scope="module")
def backbone(llama_folder) -> Backbone:
    return Backbone.load(llama_folder, dtype="float32", device="cpu")


def encoded_by(backbone: Backbone) -> list[EncodedConversation]:
    return backbone.template.encode([Conversation.from_messages(messages) for messages in DIALOGUES])


@torch.inference_mode()
def plain_features(model: PreTrainedModel, encoded: EncodedConversation, left: int) -> tuple[np.ndarray, np.ndarray]:
    """Both features by the transformers model alone, one conversation, with a mask, padded on the left."""
    ids = torch.tensor([[7] * left + encoded.ids.tolist()])
    mask = torch.tensor([[0] * left + [1] * len(encoded)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state[0]
    return hidden[left + encoded.gate_position].numpy(), hidden[-1].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    distance = np.linalg.norm(found - expected, axis=-1)
    assert (distance <= tolerance * np.linalg.norm(expected, axis=-1)).all(), distance


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families(*FAMILIES))
def test_features_equal_those_of_the_plain_model_one_by_one_and_padded_on_the_left(family, tmp_path):
    path = save_backbone(tmp_path, family)
    backbone = Backbone.load(path, dtype="float32", device="cpu")
    encoded = encoded_by(backbone)
    prompt, response = backbone.features(encoded)
    assert prompt.shape == response.shape == (len(encoded), backbone.hidden_size)
    assert prompt.dtype == response.dtype == np.float32
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    settle_attention(model)
    for row, conversation in enumerate(encoded):
        for left in (0, 5):
            expected_prompt, expected_response = plain_features(model, conversation, left)
            assert_close(prompt[row], expected_prompt, 1e-5)
            assert_close(response[row], expected_response, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_features_do_not_depend_on_the_batch(llama_folder, dtype, tolerance):
    backbone = Backbone.load(llama_folder, dtype=dtype, device="cpu")
    encoded = encoded_by(backbone)
    alone = [np.concatenate(features) for features in zip(*(backbone.features([one]) for one in encoded), strict=True)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0], [2, 2, 0, 2, 3, 3, 3]):
        together = backbone.features([encoded[row] for row in order])
        for found, expected in zip(together, alone, strict=True):
            assert_close(found, expected[order], tolerance)
    # The tolerance is far below what tells two conversations apart.
    assert np.linalg.norm(alone[1][0] - alone[1][1]) > 0.5 * np.linalg.norm(alone[1][0])


def test_features_are_read_at_the_gate_and_at_the_last_token(backbone):
    first, second = backbone.template.encode(
        [Conversation.from_messages(chat("Why?", reply)) for reply in ("Because.", "No reason at all.")]
    )
    prompt, response = backbone.features([first, second])
    assert_close(prompt[0], prompt[1], 1e-5)
    assert np.linalg.norm(response[0] - response[1]) > 0.1 * np.linalg.norm(response[0])
    changed = EncodedConversation(first.ids, first.gate_position - 1, first.response_tokens)
    assert np.linalg.norm(backbone.features([changed])[0][0] - prompt[0]) > 0.1 * np.linalg.norm(prompt[0])


def test_padding_needs_no_padding_token_that_the_model_knows(llama_folder):
    backbone = Backbone.load(llama_folder, dtype="float32", device="cpu")
    expected = backbone.features(encoded_by(backbone))
    backbone.tokenizer.add_special_tokens({"pad_token": "<|a pad token beyond the embedding|>"})
    assert backbone.tokenizer.pad_token_id >= 8192
    for found, features in zip(backbone.features(encoded_by(backbone)), expected, strict=True):
        assert_close(found, features, 1e-5)


# --- loading -------------------------------------------------------------------------------------


def test_the_embedded_backbone_loads_by_name_offline(tiny_backbone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tiny_backbone.hidden_size == tiny_backbone.model.config.hidden_size
    assert tiny_backbone.max_length == tiny_backbone.model.config.max_position_embeddings
    assert not tiny_backbone.template.forgeable
    prompt, response = tiny_backbone.features(encoded_by(tiny_backbone))
    assert np.isfinite(prompt).all()
    assert np.isfinite(response).all()


def test_a_folder_with_the_name_of_an_embedded_model_goes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert (embedded_path("armorm-tiny") / "config.json").is_file()
    assert embedded_path("armorm-large") is None
    (tmp_path / "armorm-tiny").mkdir()
    assert embedded_path("armorm-tiny") is not None, "a folder without a model is not one"
    (tmp_path / "armorm-tiny" / "config.json").write_text("{}")
    assert embedded_path("armorm-tiny") is None


def test_the_language_model_head_is_not_loaded(backbone, llama_folder):
    assert "lm_head.weight" in load_file(llama_folder / "model.safetensors")
    assert not [name for name, _ in backbone.model.named_parameters() if "head" in name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_load_in_the_dtype_that_was_asked_for(llama_folder, dtype):
    assert Backbone.load(llama_folder, dtype=dtype, device="cpu").model.dtype == getattr(torch, dtype)


def test_small_models_run_in_float32_where_the_processor_has_no_fast_bfloat16(tmp_path):
    path = save_backbone(tmp_path, dtype=torch.bfloat16)
    expected = torch.bfloat16 if fast_bfloat16() else torch.float32
    assert Backbone.load(path, device="cpu").model.dtype == expected


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_on_a_processor_without_it_is_said_to_be_slow(monkeypatch, capsys, fast):
    monkeypatch.setattr(decoder, "fast_bfloat16", lambda: fast)
    decoder._say_once.cache_clear()
    Placement.choose("bfloat16", "cpu")
    Placement.choose("bfloat16", "cpu")
    assert capsys.readouterr().err.count("bfloat16 is slow on this processor") == int(not fast)


def test_models_that_score_run_in_float32_on_a_processor_unless_told_otherwise():
    scoring = Placement.for_scores("auto", "cpu")
    assert (scoring.load_dtype, scoring.widen) == ("auto", True)
    assert Placement.for_scores("bfloat16", "cpu").load_dtype == torch.bfloat16
    assert ArmoRM.from_pretrained("armorm-tiny-rm", device="cpu").model.dtype == torch.float32


def test_an_unknown_dtype_is_refused_with_the_nearest_name(llama_folder):
    with pytest.raises(BackboneError, match=r"dtype 'bfloat61', expected auto, .* \(did you mean bfloat16\?\)"):
        Backbone.load(llama_folder, dtype="bfloat61")


def test_an_encoder_is_refused_by_name(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    path = save(BertModel(BertConfig(vocab_size=8192, **sizes)), tmp_path)
    with pytest.raises(BackboneError, match=f"backbone {path}: bert looks ahead"):
        Backbone.load(path, dtype="float32", device="cpu")


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    path = save(T5Model(T5Config(vocab_size=8192, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)), tmp_path)
    with pytest.raises(BackboneError, match=f"backbone {path}: t5 is an encoder-decoder"):
        Backbone.load(path, dtype="float32", device="cpu")


@pytest.fixture
def broken(llama_folder, tmp_path):
    """A function that writes a copy of the backbone with other weights."""

    def write(weights: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / "broken"
        shutil.copytree(llama_folder, path)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return write


def test_missing_weights_are_refused_with_their_names(llama_folder, broken):
    weights = load_file(llama_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(BackboneError, match=r"the weights lack 1 tensors: layers\.1\.mlp\.up_proj\.weight"):
        Backbone.load(broken(weights), device="cpu")


def test_weights_of_another_shape_are_refused_with_their_names(llama_folder, broken):
    weights = load_file(llama_folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    with pytest.raises(BackboneError, match=r"in another shape 1 tensors: layers\.0\.mlp\.up_proj\.weight"):
        Backbone.load(broken(weights), device="cpu")


def test_a_damaged_weight_file_is_refused_in_one_line(llama_folder, broken):
    path = broken(load_file(llama_folder / "model.safetensors"))
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackboneError, match=f"{path}/model.safetensors: found .* the file may be cut off"):
        Backbone.load(path, device="cpu")


def test_pickled_weights_are_not_read(llama_folder, broken):
    weights = load_file(llama_folder / "model.safetensors")
    path = broken(weights)
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"no file named model\.safetensors"):
        Backbone.load(path, device="cpu")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BackboneError, match=f"backbone {tmp_path}: "):
        Backbone.load(tmp_path)


# --- fingerprint ---------------------------------------------------------------------------------


def test_fingerprint_is_the_same_for_the_same_backbone_however_it_was_used(llama_folder, backbone):
    again = Backbone.load(llama_folder, dtype="float32", device="cpu")
    again.tokenizer(["a long text", "a"], padding=True, truncation=True, max_length=2)
    again.features(encoded_by(again))
    assert again.fingerprint == backbone.fingerprint


def test_fingerprint_differs_with_weights_dtype_tokenizer_and_template(llama_folder, backbone, tmp_path):
    def loaded(dtype: str = "float32") -> Backbone:
        return Backbone.load(llama_folder, dtype=dtype, device="cpu")

    weights, template, tokenizer = loaded(), loaded(), loaded()
    with torch.no_grad():
        weights.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    template.tokenizer.chat_template += " "
    tokenizer.tokenizer.add_tokens(["anewword"])
    others = [weights, template, tokenizer, loaded("bfloat16")]
    assert len({backbone.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_errors_that_mean_out_of_memory_are_told_from_others():
    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")
    windows = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")
    cuda = torch.cuda.OutOfMemoryError("x")
    assert all(map(is_out_of_memory, (cpu, windows, cuda, MemoryError(), RuntimeError("HIP Out Of Memory"))))
    assert not any(map(is_out_of_memory, (RuntimeError("shapes do not fit"), ValueError("out of memory"))))


# --- batches of similar length -----------------------------------------------------------------------

_lengths = st.lists(st.integers(0, 300), max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(lengths=_lengths, budget=st.integers(1, 1000))
def test_every_conversation_is_in_one_batch_and_batches_keep_to_their_budget(lengths, budget):
    batches = length_sorted_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(lengths=_lengths, budget=st.integers(1, 1000))
def test_longer_conversations_come_first_and_no_batch_could_take_another(lengths, budget):
    batches = length_sorted_batches(lengths, budget)
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * max(1, lengths[batch[0]]) > budget


def padding_share(lengths, batches) -> float:
    computed = sum(int(lengths[batch].max()) * len(batch) for batch in batches)
    return 1 - lengths.sum() / computed


def test_sorting_leaves_little_padding_on_lengths_as_they_are_in_real_data():
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, 5000).astype(int) + 10
    by_length = padding_share(lengths, length_sorted_batches(lengths, 8192))
    as_they_come = padding_share(lengths, [np.arange(start, start + 40) for start in range(0, 5000, 40)])
    assert by_length < 0.05 < as_they_come


def test_nothing_makes_no_batches():
    assert length_sorted_batches([], 100) == []
