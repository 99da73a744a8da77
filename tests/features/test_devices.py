"""Several devices: the numbers of one, every device at work, and one error for all. (Two threads of the processor.)"""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from armorm.backbone.decoder import Backbone
from armorm.backbone.devices import replica, resolve_devices
from armorm.cli.app import app
from armorm.errors import BackboneError
from armorm.features import engine as engines
from armorm.features.extract import extract
from armorm.features.store import FeatureStore
from armorm.features.workers import run_on
from tests.features.test_extract import DIALOGUES, encoded_by
from tests.helpers.forward_passes import before_each_pass
from tests.helpers.servers import served
from tests.helpers.small_models import reward_model


@pytest.fixture(scope="module")
def pair(llama_folder) -> tuple[Backbone, Backbone]:
    """The same backbone on one device and on two."""
    load = lambda device: Backbone.load(llama_folder, dtype="float32", device=device)  # noqa: E731
    return load("cpu"), load("cpu,cpu")


def test_names_of_devices_are_resolved_or_refused():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert len(resolve_devices("all")) == max(count, 1) and len(resolve_devices("auto")) == 1
    assert resolve_devices("cpu, cpu") == [torch.device("cpu")] * 2
    with pytest.raises(BackboneError, match="device 'gpu', expected auto, all, cpu, cuda"):
        resolve_devices("gpu")
    with pytest.raises(BackboneError, match=f"device 'cuda:99': this machine has {count} CUDA devices"):
        resolve_devices("cpu,cuda:99")


def test_a_replica_on_the_same_device_shares_its_weights_and_not_its_modules(pair):
    model = pair[0].model
    other = replica(model, torch.device("cpu"))
    assert other is not model
    for (name, first), second in zip(model.named_parameters(), other.parameters(), strict=True):
        assert first is not second and first.data_ptr() == second.data_ptr(), name


@pytest.mark.parametrize("sharing", [False, True])
def test_two_devices_give_the_features_of_one_and_both_compute(pair, sharing):
    single, double = pair
    encoded = encoded_by(single)
    expected = extract(single, encoded, batch_tokens=200, sharing=sharing)
    double.sharing_verdict = single.sharing_verdict  # (else the first device is tested alone)
    threads = [set(), set()]
    models = [double.model, double.replicas[0].model]
    together = threading.Barrier(2, timeout=20)  # passed once both compute

    def seen(number):
        if threading.get_ident() not in threads[number]:
            threads[number].add(threading.get_ident())
            together.wait()

    with before_each_pass(models[0], lambda ids: seen(0)), before_each_pass(models[1], lambda ids: seen(1)):
        found = extract(double, encoded, batch_tokens=200, sharing=sharing)
    np.testing.assert_allclose(found.response, expected.response, atol=1e-5)
    np.testing.assert_allclose(found.prompt, expected.prompt, atol=1e-5)
    assert all(threads) and threads[0].isdisjoint(threads[1])


def test_a_store_has_the_same_bytes_from_two_devices(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "SHARD_TOKENS", 150)
    files = []
    for backbone, name in zip(pair, ("one", "two"), strict=True):
        extract(backbone, encoded_by(backbone), FeatureStore.of(tmp_path / name, backbone), batch_tokens=200)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")})
    assert len(files[0]) > 3 and files[0] == files[1]


def test_an_error_on_one_device_ends_the_work_and_is_raised(pair):
    tasks = []

    def compute(engine, task, advance):
        tasks.append(task)
        if task == 3:
            raise BackboneError("no room")

    with pytest.raises(BackboneError, match="no room"):
        run_on(engines.Engine(pair[1], 100), range(1000), compute, lambda count: None)
    assert len(tasks) < 1000


def test_the_command_line_scores_on_several_devices(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Say {i}", "response": f"{i} " * (i + 1)}) + "\n" for i in range(12))
    )
    scores = []
    for devices in ("cpu", "cpu,cpu"):
        output = tmp_path / f"{devices}.jsonl"
        command = ["score", str(rows), "--model", "armorm-tiny-rm", "--devices", devices, "--output", str(output)]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        scores.append([json.loads(line)["score"] for line in output.read_text().splitlines()])
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_a_server_computes_on_every_device_and_answers_the_same():
    rm = reward_model(seed=8)
    expected = rm.score(DIALOGUES).scores
    rm.backbone.replicate(resolve_devices("cpu"))
    used = [set(), set()]
    first, second = (
        before_each_pass(backbone.model, lambda ids, number=number: used[number].add(threading.get_ident()))
        for number, backbone in enumerate([rm.backbone, rm.backbone.replicas[0]])
    )
    with first, second, served(rm) as server:
        for _ in range(20):
            body = server.post("/v1/reward", conversations=DIALOGUES, include=[]).json()
            np.testing.assert_allclose([row["score"] for row in body["results"]], expected, atol=1e-5)
            if all(used):
                break
    assert all(used) and used[0].isdisjoint(used[1])
