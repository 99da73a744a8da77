"""Extraction: everything once, in any order, across kills; and the numbers of a plain forward pass."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.errors import StoreError
from armorm.features import engine as engines
from armorm.features.extract import Features, extract
from armorm.features.store import FeatureStore
from tests.helpers.backbones import save_backbone
from tests.helpers.conversations import chat

ROOT = Path(__file__).parents[2]
WORDS = ["sun", "rain", "wind", "snow", "fog", "hail", "frost", "heat"]
# Twelve prompts with four replies each, of very different lengths, in no order.
DIALOGUES = [
    chat(f"Tell me about {WORDS[prompt % 8]} {prompt}.", f"{WORDS[reply]} " * (1 + (7 * prompt + 11 * reply) % 30))
    for reply in range(4)
    for prompt in range(12)
]
SMALL_SHARDS = 150


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def backbone(model_folder) -> Backbone:
    return Backbone.load(model_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def encoded(backbone) -> list[EncodedConversation]:
    return encoded_by(backbone)


@pytest.fixture(scope="module")
def expected(backbone, encoded) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and response features of each conversation, alone."""
    pairs = [backbone.features([one]) for one in encoded]
    return np.concatenate([prompt for prompt, _ in pairs]), np.concatenate([response for _, response in pairs])


@pytest.fixture
def batches(backbone, monkeypatch) -> list[list[EncodedConversation]]:
    """The batches that went through the backbone since the test began."""
    seen: list[list[EncodedConversation]] = []
    forward = backbone.features

    def features(batch: Sequence[EncodedConversation]) -> tuple[np.ndarray, np.ndarray]:
        seen.append(list(batch))
        return forward(batch)

    monkeypatch.setattr(backbone, "features", features)
    return seen


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(engines, "SHARD_TOKENS", SMALL_SHARDS)


PASSES = 5


def extract_and_hang(model_folder: str, folder: str) -> None:
    """Extract until `PASSES` forward passes are done, say so, and wait to be killed."""
    torch.set_num_threads(1)
    backbone = Backbone.load(model_folder, dtype="float32", device="cpu")
    engines.SHARD_TOKENS = SMALL_SHARDS
    forward = backbone.features
    done = 0

    def features(batch: Sequence[EncodedConversation]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal done
        if done == PASSES:
            print("in the middle", flush=True)
            time.sleep(600)
        done += 1
        return forward(batch)

    backbone.features = features
    extract(backbone, encoded_by(backbone), store_at(Path(folder), backbone), batch_tokens=200)


@pytest.fixture(scope="module", autouse=True)
def extraction_in_another_process(model_folder, tmp_path_factory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """An extraction for one test to kill; it starts here, since its imports take longer than all other tests."""
    folder = tmp_path_factory.mktemp("killed") / "features"
    call = f"import tests.features.test_extract as t; t.extract_and_hang({str(model_folder)!r}, {str(folder)!r})"
    with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        yield process, folder
        process.kill()


def encoded_by(backbone: Backbone) -> list[EncodedConversation]:
    return backbone.template.encode([Conversation.from_messages(messages) for messages in DIALOGUES])


def store_at(folder: Path, backbone: Backbone) -> FeatureStore:
    return FeatureStore.of(folder, backbone)


def tokens(batches: list[list[EncodedConversation]]) -> int:
    return sum(len(encoded) for batch in batches for encoded in batch)


def assert_features(found: Features, expected: tuple[np.ndarray, np.ndarray]) -> None:
    for features, wanted in zip((found.prompt[found.prompt_index], found.response), expected, strict=True):
        assert features.dtype == np.float32
        assert features.shape == wanted.shape
        assert (np.linalg.norm(features - wanted, axis=1) <= 1e-5 * np.linalg.norm(wanted, axis=1)).all()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored_keys(folder: Path, name: str) -> list[bytes]:
    from safetensors.numpy import load_file

    shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    return [row.tobytes() for shard in shards for row in shard[name]]


# --- numbers and order ---------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_features_are_those_of_each_conversation_alone_in_the_order_given(
    backbone, encoded, expected, tmp_path, small_shards, stored
):
    store = store_at(tmp_path, backbone) if stored else None
    features = extract(backbone, encoded, store, batch_tokens=300)
    assert_features(features, expected)
    assert len(features) == 48
    assert len(features.prompt) == 12
    if stored:
        assert len(list(tmp_path.glob("shard-*"))) > 2
        order = np.random.default_rng(0).permutation(48)
        shuffled = extract(backbone, [encoded[i] for i in order], store_at(tmp_path, backbone))
        assert np.array_equal(shuffled.response, features.response[order])
        assert np.array_equal(shuffled.prompt[shuffled.prompt_index], features.prompt[features.prompt_index[order]])


@pytest.mark.parametrize("stored", [False, True])
def test_nothing_gives_empty_features(backbone, tmp_path, stored):
    features = extract(backbone, [], store_at(tmp_path, backbone) if stored else None)
    assert features.response.shape == features.prompt.shape == (0, 32)
    assert len(features) == 0


def test_batches_keep_to_their_budget(backbone, encoded, batches):
    extract(backbone, encoded, batch_tokens=200)
    assert len(batches) > 3
    assert all(len(batch) * max(map(len, batch)) <= 200 for batch in batches)


def test_taking_rows_keeps_each_with_its_prompt(backbone, encoded):
    features = extract(backbone, encoded)
    rows = [40, 3, 15, 3, 27]
    taken = features.take(rows)
    assert np.array_equal(taken.response, features.response[rows])
    assert np.array_equal(taken.prompt[taken.prompt_index], features.prompt[features.prompt_index[rows]])
    assert len(taken.prompt) == 2  # conversations 3, 15 and 27 share a prompt
    assert len(features.take([])) == 0


# --- everything once -----------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_duplicates_are_computed_once(backbone, encoded, expected, batches, tmp_path, small_shards, stored):
    repeated = [*encoded, *encoded[::-1], *encoded[:5]]
    features = extract(backbone, repeated, store_at(tmp_path, backbone) if stored else None)
    assert tokens(batches) == sum(map(len, encoded))
    order = [*range(48), *range(47, -1, -1), *range(5)]
    assert_features(features, (expected[0][order], expected[1][order]))


def test_a_store_computes_nothing_twice_across_requests(backbone, encoded, expected, batches, tmp_path, small_shards):
    extract(backbone, encoded[:20], store_at(tmp_path, backbone))
    assert tokens(batches) == sum(map(len, encoded[:20]))
    before = files(tmp_path)
    batches.clear()
    assert_features(extract(backbone, encoded[5:15], store_at(tmp_path, backbone)), tuple(e[5:15] for e in expected))
    assert batches == []
    assert files(tmp_path) == before
    assert_features(extract(backbone, encoded, store_at(tmp_path, backbone)), expected)
    assert tokens(batches) == sum(map(len, encoded[20:]))
    assert before.items() <= files(tmp_path).items()


def test_each_prompt_and_each_response_is_stored_once(backbone, encoded, tmp_path, small_shards):
    for request in (encoded[:30], encoded, encoded[10:40]):
        extract(backbone, request, store_at(tmp_path, backbone))
    assert len(list(tmp_path.glob("shard-*"))) > 2
    prompts, responses = stored_keys(tmp_path, "prompt_keys"), stored_keys(tmp_path, "response_keys")
    assert sorted(prompts) == sorted({conversation.prompt_key for conversation in encoded})
    assert sorted(responses) == sorted(conversation.key for conversation in encoded)


def test_a_store_of_another_backbone_is_refused(backbone, encoded, tmp_path, tmp_path_factory):
    extract(backbone, encoded[:3], store_at(tmp_path, backbone))
    other = Backbone.load(save_backbone(tmp_path_factory.mktemp("other"), seed=1), dtype="float32", device="cpu")
    with pytest.raises(StoreError, match="another backbone"):
        store_at(tmp_path, other)


# --- killed, deleted, damaged --------------------------------------------------------------------


def test_a_deleted_shard_is_computed_again_and_nothing_else(backbone, encoded, batches, tmp_path, small_shards):
    expected = extract(backbone, encoded, store_at(tmp_path, backbone), batch_tokens=200)
    before = files(tmp_path)
    for shard in sorted(tmp_path.glob("shard-*")):
        shard.unlink()
        batches.clear()
        again = extract(backbone, encoded, store_at(tmp_path, backbone), batch_tokens=200)
        assert 0 < tokens(batches) < sum(map(len, encoded)) / 2
        assert files(tmp_path) == before
        assert np.array_equal(again.response, expected.response)
        assert np.array_equal(again.prompt, expected.prompt)


def test_a_deleted_plan_costs_nothing_that_was_computed(backbone, encoded, batches, tmp_path, small_shards):
    expected = extract(backbone, encoded, store_at(tmp_path, backbone))
    for plan in tmp_path.glob("plan-*"):
        plan.unlink()
    batches.clear()
    again = extract(backbone, encoded, store_at(tmp_path, backbone))
    assert batches == []
    assert np.array_equal(again.response, expected.response)
    sorted(tmp_path.glob("shard-*"))[1].unlink()
    assert_features(
        extract(backbone, encoded, store_at(tmp_path, backbone)),
        (expected.prompt[expected.prompt_index], expected.response),
    )
    assert tokens(batches) < sum(map(len, encoded)) / 2


def test_prompts_whose_shard_belonged_to_another_request_are_computed_again(backbone, encoded, expected, tmp_path):
    first, second = encoded[:12], encoded[12:24]  # the same prompts, other replies
    extract(backbone, first, store_at(tmp_path, backbone))
    (shard,) = tmp_path.glob("shard-*")
    extract(backbone, second, store_at(tmp_path, backbone))
    shard.unlink()
    for _ in range(2):
        features = extract(backbone, second, store_at(tmp_path, backbone))
        assert_features(features, tuple(e[12:24] for e in expected))
    assert_features(extract(backbone, encoded[:24], store_at(tmp_path, backbone)), tuple(e[:24] for e in expected))


def test_a_damaged_shard_is_named_and_computed_again(backbone, encoded, batches, tmp_path, small_shards, capsys):
    expected = extract(backbone, encoded, store_at(tmp_path, backbone), batch_tokens=200)
    before = files(tmp_path)
    shard = sorted(tmp_path.glob("shard-*"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 16  # one bit, somewhere in the features
    shard.write_bytes(data)
    batches.clear()
    again = extract(backbone, encoded, store_at(tmp_path, backbone), batch_tokens=200)
    assert f"{shard}: damaged shard" in capsys.readouterr().err
    assert 0 < tokens(batches) < sum(map(len, encoded)) / 2
    assert np.array_equal(again.response, expected.response)
    assert np.array_equal(again.prompt, expected.prompt)
    found = files(tmp_path)
    assert found.pop(f"damaged-{shard.name}") == bytes(data)
    assert found == before


def test_a_killed_extraction_resumes_and_ends_with_the_same_bytes(
    backbone, encoded, batches, tmp_path, small_shards, extraction_in_another_process
):
    process, killed = extraction_in_another_process
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    process.kill()  # SIGKILL, as `kill -9`
    assert process.wait() == -9

    uninterrupted = tmp_path / "uninterrupted"
    expected = extract(backbone, encoded, store_at(uninterrupted, backbone), batch_tokens=200)
    assert len(batches) > PASSES
    shards = sorted(uninterrupted.glob("shard-*"))
    before = files(killed)
    done = sorted(killed.glob("shard-*"))
    assert 0 < len(done) < len(shards)

    batches.clear()
    store = store_at(killed, backbone)
    missing = [encoded[i] for i in store.missing([conversation.key for conversation in encoded])]
    resumed = extract(backbone, encoded, store, batch_tokens=200)
    assert tokens(batches) == sum(map(len, missing)) < sum(map(len, encoded))
    assert files(killed) == files(uninterrupted)
    assert before.items() <= files(killed).items()
    for name in ("response", "prompt", "prompt_index"):
        assert np.array_equal(getattr(resumed, name), getattr(expected, name))
