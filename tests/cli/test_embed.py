"""`armorm embed`: everything once, refused rows listed, a second run computes nothing."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from armorm.cli.app import app
from armorm.features.store import Shard
from tests.helpers.commands import run


def embed(capsys, *arguments: object) -> dict:
    code, out, _ = run(capsys, "embed", *arguments, "--dtype", "float32", "--json")
    assert code == 0
    return json.loads(out)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What is {n % 3}?", "response": f"It is {n}."} for n in range(9)]
    lines += [lines[0], {"prompt": "No reply", "response": ""}, {"messages": "no list"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_features_are_computed_once_and_refused_rows_are_listed(rows, tmp_path, capsys):
    folder = tmp_path / "features"
    found = embed(capsys, str(rows), "--output", str(folder))
    assert (found["conversations"], found["unique"], found["prompts"], found["refused"]) == (10, 9, 3, 2)
    assert found["stored_before"] == 0
    assert found["tokens_computed"] < found["tokens_asked"]
    assert 0 < found["idle_share"] < 1
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in rejected] == [11, 12]
    shards = [Shard(path) for path in folder.glob("shard-*")]
    assert sum(len(shard.keys) for shard in shards) == 9
    assert sum(len(shard.prompt_keys) for shard in shards) == 3
    before = {path.name: path.read_bytes() for path in folder.glob("shard-*")}
    again = embed(capsys, str(rows), "--output", str(folder))
    assert (again["stored_before"], again["tokens_computed"], again["idle_share"]) == (9, 0, None)
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == before


def test_a_policy_that_would_lose_a_run_is_refused(rows, tmp_path):
    result = CliRunner().invoke(app, ["embed", str(rows), "--output", str(tmp_path / "f"), "--overflow", "error"])
    assert "expected skip or truncate_prompt" in " ".join(result.output.split())
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "dask"], "--engine: found 'dask', expected local or ray"),
        (["--workers", "2"], "require --engine ray"),
        (["--gpus-per-worker", "1"], "require --engine ray"),
    ],
)
def test_options_of_engines_are_checked_before_anything_is_read(tmp_path, options, told):
    result = CliRunner().invoke(app, ["embed", str(tmp_path / "absent"), "--output", str(tmp_path / "f"), *options])
    assert told in " ".join(result.output.split())


@pytest.mark.slow
def test_ray_workers_give_the_same_store(rows, tmp_path, capsys, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads here as a worker of one core has
    here, there = tmp_path / "here", tmp_path / "there"
    embed(capsys, str(rows), "--output", str(here))
    found = embed(
        capsys, str(rows), "--output", str(there), "--engine", "ray", "--workers", "1", "--cpus-per-worker", "1"
    )
    ray.shutdown()
    assert (found["unique"], found["refused"]) == (9, 2)
    for path in here.glob("*.safetensors"):
        assert (there / path.name).read_bytes() == path.read_bytes()
