"""Extraction: everything once, in any order, across kills; and the numbers of a plain forward pass."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.errors import StoreError
from armorm.features import engine as engines
from armorm.features import store as stores
from armorm.features.extract import Features, extract
from armorm.features.store import FeatureStore
from armorm.locks import FILE as LOCK
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
def backbone(llama_folder) -> Backbone:
    return Backbone.load(llama_folder, dtype="float32", device="cpu")


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
    """The batches that went through the backbone since the test began; they are padded, not shared."""
    monkeypatch.setattr(engines, "LEAST_SAVING", 10**9)
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


def extract_until(stop: Callable[[], None], backbone: Backbone, folder: Path) -> None:
    """Extract until `PASSES` forward passes are done, then stop."""
    forward = backbone.features
    done = 0

    def features(batch: Sequence[EncodedConversation]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal done
        if done == PASSES:
            stop()
        done += 1
        return forward(batch)

    backbone.features = features
    try:
        extract(backbone, encoded_by(backbone), store_at(folder, backbone), batch_tokens=200, sharing=False)
    finally:
        backbone.features = forward


def interrupted(backbone: Backbone, folder: Path) -> None:
    """An extraction stopped by an error after some passes."""

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        extract_until(stop, backbone, folder)


def killed(backbone: Backbone, folder: Path) -> None:
    """An extraction in a process of its own that gets SIGKILL, as by `kill -9`, after some passes."""
    call = f"import tests.features.test_extract as t; t.extract_and_hang({backbone.name!r}, {str(folder)!r})"
    with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.kill()
        assert process.wait() == -9


def extract_and_hang(model: str, folder: str) -> None:
    """Extract until `PASSES` forward passes are done, say so, and wait to be killed."""

    def stop() -> None:
        print("in the middle", flush=True)
        time.sleep(600)

    torch.set_num_threads(1)
    engines.SHARD_TOKENS = SMALL_SHARDS
    extract_until(stop, Backbone.load(model, dtype="float32", device="cpu"), Path(folder))


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
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != LOCK}


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


def test_keys_are_sorted_as_often_for_many_shards_as_for_a_few(backbone, encoded, tmp_path, small_shards, monkeypatch):
    made = []
    monkeypatch.setattr(stores, "_Index", lambda keys, make=stores._Index: made.append(len(keys)) or make(keys))
    counts = []
    for name, rows in (("few", encoded[:12]), ("many", encoded)):
        store = store_at(tmp_path / name, backbone)
        extract(backbone, rows, store)
        counts.append((len(store.shards), len(made)))
        made.clear()
    (few, sorts), (many, more_sorts) = counts
    assert many > few > 1
    assert more_sorts == sorts


def test_a_shard_that_cannot_be_written_ends_the_run(backbone, encoded, expected, tmp_path, small_shards, monkeypatch):
    store = store_at(tmp_path, backbone)
    write = store.write_shard

    def fail_at_the_fourth(name: str, **shard) -> None:
        if len(store.shards) == 3:
            raise OSError("no space")
        write(name, **shard)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_shard", fail_at_the_fourth)
        with pytest.raises(OSError, match="no space"):
            extract(backbone, encoded, store)
    assert len(list(tmp_path.glob("shard-*"))) == 3
    assert_features(extract(backbone, encoded, store), expected)


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


@pytest.mark.parametrize("stop", [interrupted, pytest.param(killed, marks=pytest.mark.slow)])
def test_a_stopped_extraction_resumes_and_ends_with_the_same_bytes(
    backbone, encoded, batches, tmp_path, small_shards, stop
):
    stopped = tmp_path / "stopped"
    stop(backbone, stopped)
    batches.clear()

    uninterrupted = tmp_path / "uninterrupted"
    expected = extract(backbone, encoded, store_at(uninterrupted, backbone), batch_tokens=200)
    assert len(batches) > PASSES
    shards = sorted(uninterrupted.glob("shard-*"))
    # (A shard may be half written, under another name, when the process is killed.)
    before = {name: content for name, content in files(stopped).items() if not name.endswith(".tmp")}
    done = sorted(stopped.glob("shard-*"))
    assert 0 < len(done) < len(shards)

    batches.clear()
    store = store_at(stopped, backbone)
    missing = [encoded[i] for i in store.missing([conversation.key for conversation in encoded])]
    resumed = extract(backbone, encoded, store, batch_tokens=200)
    assert tokens(batches) == sum(map(len, missing)) < sum(map(len, encoded))
    assert files(stopped) == files(uninterrupted)
    assert before.items() <= files(stopped).items()
    for name in ("response", "prompt", "prompt_index"):
        assert np.array_equal(getattr(resumed, name), getattr(expected, name))
