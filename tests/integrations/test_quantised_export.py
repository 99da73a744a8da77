"""Models with integer weights: written, read again with the same scores, refused beyond the stated drift (torchao)."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from armorm import ArmoRM
from armorm.model.quantized import ScoreDrift
from tests.helpers.backbones import backbone_of, config_of
from tests.helpers.commands import run
from tests.helpers.small_models import reward_model


def test_drift_is_in_deviations_of_the_scores_and_decisions_are_between_rows_of_a_prompt():
    before, after = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.5, 0.4, 2.0, 3.0])
    drift = ScoreDrift.between(before, after, ["a", "a", "b", "b"])
    assert (drift.rows, drift.pairs, drift.flipped) == (4, 2, 0.5)
    assert drift.largest == pytest.approx(0.6 / before.std())
    assert drift.root_mean_square == pytest.approx(np.sqrt((0.5**2 + 0.6**2) / 4) / before.std())
    assert ScoreDrift.between(before, after, ["a", "b", "c", "d"]).pairs == 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model wide enough for groups of 32 weights, with bfloat16 weights."""
    config = config_of("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    rm = reward_model(backbone=backbone_of("llama", config=config))
    place = tmp_path_factory.mktemp("rm")
    rm.save_pretrained(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_what_is_written_is_read_again_with_the_scores_whose_drift_was_printed(capsys, folder, tmp_path, bits):
    pytest.importorskip("torchao")
    rows = tmp_path / "rows.jsonl"
    texts = ["Paris, on the river Seine.", "No.", "Hello! It may be Paris, if I am not mistaken.", "They flow. " * 9]
    rows.write_text(
        "".join(json.dumps({"prompt": f"What is {i}?", "response": t}) + "\n" for i in range(3) for t in texts)
    )
    code, out, _ = run(
        capsys, "export", folder, tmp_path / bits, "--quantize", bits, "--data", rows, "--max-drift", 3, "--json"
    )
    assert code == 0
    told = json.loads(out)
    conversations = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": t}]
        for i in range(3)
        for t in texts
    ]
    read = ArmoRM.from_pretrained(tmp_path / bits, dtype="weights", device_map="cpu")
    weight = read.model.model.layers[0].self_attn.q_proj.weight
    assert "Int" in type(weight).__name__, "the weights are not quantised"
    before = ArmoRM.from_pretrained(folder, dtype="weights", device="cpu").score(conversations).scores
    assert len(read.backbone.fingerprint) == 32
    code, out, _ = run(capsys, "score", rows, "--model", tmp_path / bits, "--dtype", "weights", "--device", "cpu")
    assert code == 0
    printed = [json.loads(line)["score"] for line in out.splitlines()]
    assert printed == pytest.approx(read.score(conversations).scores.tolist(), abs=1e-4)
    prompts = [str(i) for i in range(3) for _ in texts]
    drift = ScoreDrift.between(before, read.score(conversations).scores, prompts)
    assert (drift.rows, drift.pairs) == (12, 18)
    assert told["drift"]["root_mean_square"] == pytest.approx(drift.root_mean_square, abs=1e-5)
    assert told["drift"]["flipped"] == drift.flipped
    assert drift.root_mean_square > 0
    code, _, err = run(
        capsys, "export", folder, tmp_path / "no", "--quantize", bits, "--data", rows,
        "--max-drift", drift.root_mean_square / 2,
    )  # fmt: skip
    assert code == 1
    assert "nothing was written" in " ".join(err.split())
    assert not (tmp_path / "no").exists()


def test_quantize_takes_no_other_layout(capsys, folder, tmp_path):
    assert run(capsys, "export", folder, tmp_path / "x", "--quantize", "int8", "--layout", "released")[0] == 2
    assert run(capsys, "export", folder, tmp_path / "x", "--data", folder)[0] == 2


def test_without_torchao_the_extra_is_named(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    code, _, err = run(capsys, "export", folder, tmp_path / "x", "--quantize", "int8")
    assert code == 1
    assert "armorm[quantize]" in err
