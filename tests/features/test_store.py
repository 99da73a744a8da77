"""The store: addressed by content, of one backbone, its files whole or absent, its damage named."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from armorm.errors import StoreError
from armorm.features.store import FeatureStore, StoredPlan, shard_name

D = 4


def keys(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in numbers]


def features(*numbers: int) -> np.ndarray:
    return np.array([[number + axis / 8 for axis in range(D)] for number in numbers], np.float32).reshape(-1, D)


def open_store(folder: Path, weights: str = "one", dtype: str | None = None) -> FeatureStore:
    return FeatureStore(folder, fingerprint={"weights": weights, "dtype": "float32"}, hidden_size=D, dtype=dtype)


def as_lists(plan: StoredPlan) -> list[list[bytes]]:
    """Keys of each shard at their full length."""
    return [[bytes(key).ljust(16, b"\0") for key in shard] for shard in plan.shards]


def write(store: FeatureStore, number: int, responses: tuple[int, ...], prompts: tuple[int, ...]) -> Path:
    name = shard_name("0123", number)
    store.write_shard(name, keys(*responses), features(*responses), keys(*prompts), features(*prompts))
    return store.folder / name


@pytest.fixture
def store(tmp_path) -> FeatureStore:
    """Two shards: responses 1, 2, 3 with prompt 10, responses 4, 5 with prompts 11 and 12."""
    store = open_store(tmp_path / "features")
    write(store, 0, (1, 2, 3), (10,))
    write(store, 1, (4, 5), (11, 12))
    return store


# --- content addressing --------------------------------------------------------------------------


def test_features_are_read_by_key_in_the_order_asked_for(store):
    for again in (store, open_store(store.folder)):
        assert (len(again), again.prompt_count) == (5, 3)
        assert again.responses(keys(5, 1, 4, 1, 3)).tolist() == features(5, 1, 4, 1, 3).tolist()
        assert again.prompts(keys(12, 10, 12)).tolist() == features(12, 10, 12).tolist()
        assert again.responses([]).shape == again.prompts([]).shape == (0, D)
        assert again.responses(keys(1)).dtype == np.float32


def test_features_of_many_shards_are_read_in_any_order(store):
    for number in range(2, 12):
        write(store, number, tuple(range(10 * number, 10 * number + 5)), ())
    numbers = np.random.default_rng(0).permutation([10 * number + row for number in range(2, 12) for row in range(5)])
    numbers = np.concatenate([numbers, numbers[:7]])
    np.testing.assert_array_equal(store.responses(keys(*numbers.tolist())), features(*numbers.tolist()))


def test_missing_names_each_key_that_is_not_there_once(store):
    assert store.missing(keys(1, 6, 2, 7, 6, 7, 8)) == [1, 3, 6]
    assert store.missing_prompts(keys(10, 1, 13, 1)) == [1, 2]
    assert store.missing(keys(1, 2, 3, 4, 5)) == store.missing_prompts(keys(10, 11, 12)) == []


def test_prompts_and_responses_do_not_answer_for_each_other(store):
    assert store.missing(keys(10)) == [0]
    assert store.missing_prompts(keys(1)) == [0]


def test_has_prompt_can_leave_a_plan_out(store):
    assert store.has_prompts(keys(10, 1, 12)).tolist() == [True, False, True]
    assert store.has_prompts(keys(10, 1), outside="shard-9999-").tolist() == [True, False]
    assert store.has_prompts(keys(10, 1), outside="shard-0123-").tolist() == [False, False]


def test_a_shard_holds_what_the_format_says(store):
    arrays = load_file(store.folder / shard_name("0123", 1))
    assert arrays["response_keys"].tolist() == [list(key) for key in keys(4, 5)]
    assert arrays["prompt_keys"].tolist() == [list(key) for key in keys(11, 12)]
    assert arrays["response_features"].tolist() == features(4, 5).tolist()
    assert arrays["prompt_features"].tolist() == features(11, 12).tolist()


def test_a_shard_without_prompts_of_its_own_can_be_read(store):
    write(store, 2, (6,), ())
    assert open_store(store.folder).responses(keys(6)).tolist() == features(6).tolist()
    assert open_store(store.folder).prompt_count == 3


# --- one backbone, one store ---------------------------------------------------------------------


def test_features_of_another_backbone_are_refused(store):
    with pytest.raises(StoreError, match=r"contains features of another backbone \(weights differ\)"):
        open_store(store.folder, "two")
    with pytest.raises(StoreError, match=r"another backbone \(hidden_size differ\)"):
        FeatureStore(store.folder, fingerprint={"weights": "one", "dtype": "float32"}, hidden_size=D + 1)


@pytest.mark.parametrize("text", ["{}", '{"format": "other"}', "[]", "no json", ""])
def test_a_folder_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=f"{tmp_path}: "):
        open_store(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_shards_whose_manifest_is_gone_are_refused(store):
    (store.folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=f"{store.folder}: no feature store"):
        open_store(store.folder, "two")


# --- whole or absent -----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_shard_is_named_and_set_aside(store, share, capsys):
    path = store.folder / shard_name("0123", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    again = open_store(store.folder)
    assert len(again) == 3
    assert again.missing(keys(1, 4, 5)) == [1, 2]
    assert not again.has_shard(path.name)
    assert (store.folder / f"damaged-{path.name}").read_bytes() == whole[: int(len(whole) * share)]
    assert f"{path}: damaged shard" in capsys.readouterr().err


def test_a_bit_that_flipped_is_found_named_and_set_aside(store, capsys):
    path = store.folder / shard_name("0123", 1)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    again = open_store(store.folder)
    assert again.verify(keys(1, 2), keys(10)) == []  # of another shard
    assert again.verify(keys(4), []) == [path.name]
    assert again.missing(keys(4, 5, 1)) == [0, 1]
    assert "_keys has checksum" in capsys.readouterr().err
    assert again.verify(keys(4), []) == []


def test_a_file_of_other_arrays_under_a_shards_name_is_set_aside(store, capsys):
    path = store.folder / shard_name("0123", 7)
    save_file({"something": np.zeros(3)}, path)
    assert len(open_store(store.folder)) == 5
    assert f"{path}: damaged shard" in capsys.readouterr().err


def test_bfloat16_features_take_half_the_room_and_come_back_as_their_nearest(tmp_path):
    values = np.array([[1.0, 1.00390625, -3.14159, 1e-30]], np.float32)
    store = open_store(tmp_path, dtype="bfloat16")
    store.write_shard(shard_name("0123", 0), keys(1), values, keys(10), values)
    again = open_store(tmp_path)
    assert again.dtype == "bfloat16"
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(again.responses(keys(1)), expected)
    assert np.array_equal(again.prompts(keys(10)), expected)
    stored = load_torch(tmp_path / shard_name("0123", 0))["response_features"]
    assert stored.dtype == torch.bfloat16
    with pytest.raises(StoreError, match="contains features as bfloat16, expected float32 or"):
        open_store(tmp_path, dtype="float32")


def test_a_store_of_an_older_version_is_refused(store):
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(StoreError, match="a feature store of version 1, expected 2; use a new folder"):
        open_store(store.folder)


def test_half_written_files_are_ignored(store):
    whole = (store.folder / shard_name("0123", 0)).read_bytes()
    half = store.folder / f".{shard_name('0123', 2)}.4711.tmp"
    half.write_bytes(whole[: len(whole) // 2])
    again = open_store(store.folder)
    assert len(again) == 5
    assert not again.has_shard(shard_name("0123", 2))
    write(again, 2, (6,), ())
    assert len(open_store(store.folder)) == 6


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from armorm.features.store import FeatureStore, shard_name

store = FeatureStore(sys.argv[1], fingerprint={"weights": "one"}, hidden_size=1024)
for number in range(10_000):
    rows = [(number * 1000 + row).to_bytes(16, "little") for row in range(1000)]
    values = np.full((1000, 1024), number, np.float32)
    store.write_shard(shard_name("0123", number), rows, values, rows[:1], values[:1])
"""


def test_every_shard_of_a_writer_that_was_killed_is_whole(tmp_path):
    folder = tmp_path / "features"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)])
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shard-*"))) < 3:
        assert writer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    writer.kill()
    writer.wait()
    shards = len(list(folder.glob("shard-*")))
    store = FeatureStore(folder, fingerprint={"weights": "one"}, hidden_size=1024)
    assert (len(store), store.prompt_count) == (1000 * shards, shards)
    last = [((shards - 1) * 1000 + row).to_bytes(16, "little") for row in range(1000)]
    assert (store.responses(last) == shards - 1).all()


def test_a_write_that_fails_leaves_nothing_behind(store):
    before = sorted(store.folder.iterdir())
    with pytest.raises(ValueError, match="could not convert"):
        store.write_shard(shard_name("0123", 2), keys(6), np.array([["x"] * D]), [], features())
    assert sorted(store.folder.iterdir()) == before
    assert store.missing(keys(6)) == [0]


# --- plans ---------------------------------------------------------------------------------------


def test_a_request_keeps_the_plan_that_was_written_first(tmp_path):
    store = open_store(tmp_path)
    request = keys(3, 1, 2)
    plan = store.plan(request, [2, 0, 1], [2, 3], {"mechanism": "tree", "budget": 100})
    assert as_lists(plan) == [keys(2, 3), keys(1)]
    store.write_shard(shard_name(plan.id, 0), keys(2, 3), features(2, 3), keys(10), features(10))
    # What is left is asked for in another order, cut in another way and with other settings: the written plan holds.
    again = open_store(tmp_path)
    assert again.missing(keys(1, 2, 3)) == [0]
    found = again.plan(keys(1, 2, 3), [0], [1], {"mechanism": "plain"})
    assert (found.id, as_lists(found), found.settings) == (
        plan.id,
        as_lists(plan),
        {"mechanism": "tree", "budget": 100},
    )


def test_another_request_has_another_plan(tmp_path):
    store = open_store(tmp_path)
    first = store.plan(keys(1, 2), [0, 1], [2])
    second = store.plan(keys(1, 2, 3), [0, 1, 2], [3])
    assert first.id != second.id
    assert as_lists(second) == [keys(1, 2, 3)]


def test_a_plan_whose_shards_are_all_there_does_not_serve_again(tmp_path):
    store = open_store(tmp_path)
    plan = store.plan(keys(1, 2), [0], [1])
    store.write_shard(shard_name(plan.id, 0), keys(1), features(1), keys(10), features(10))
    other = store.plan(keys(1, 2), [1], [1])
    assert other.id != plan.id
    assert as_lists(other) == [keys(2)]
    assert store.plan(keys(1, 2), [1], [1]).id == other.id


def test_a_damaged_plan_is_named_with_the_way_out(tmp_path):
    store = open_store(tmp_path)
    plan = store.plan(keys(1, 2), [0, 1], [2])
    path = tmp_path / f"plan-{plan.id}.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StoreError, match=f"{path}: damaged plan .*; delete the file and run again"):
        store.plan(keys(1, 2), [0, 1], [2])
    path.unlink()
    assert store.plan(keys(1, 2), [0, 1], [2]).id == plan.id


def test_the_manifest_is_readable(store):
    assert json.loads((store.folder / "manifest.json").read_text()) == {
        "format": "armorm-features",
        "version": 2,
        "fingerprint": {"weights": "one", "dtype": "float32"},
        "hidden_size": D,
        "dtype": "float32",
    }
