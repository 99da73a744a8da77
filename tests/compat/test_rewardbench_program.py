"""rewardbench's own program scores a self-contained model as armorm does (`make test-compat`)."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest

from tests.helpers.environments import ROOT, environment
from tests.helpers.small_models import reward_model

pytestmark = pytest.mark.slow
PAIRS = [("Name a river.", "The Rhine flows north.", "No."), ("2+2?", "It is 4.", "Perhaps it is 5, or so."), ("Hi!", "Hello there.", "Go away now, please.")]  # fmt: skip


def test_the_program_of_rewardbench_gives_the_scores_of_the_model(tmp_path):
    folder = environment("rewardbench")
    rm = reward_model()
    rm.save_pretrained(tmp_path / "model", self_contained=True)

    def chat(prompt, reply):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]

    data = tmp_path / "pairs.jsonl"
    rows = [{"chosen": chat(p, good), "rejected": chat(p, bad)} for p, good, bad in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [
            *(folder / "bin" / "python", "-m", "armorm.integrations.rewardbench", "--model", str(tmp_path / "model")),
            *("--trust_remote_code", "--dataset", str(data), "--load_json", "--batch_size", "2"),
            *("--output_dir", str(tmp_path / "results")),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "src"),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hub"),
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (written,) = list(tmp_path.rglob("*_outputs.jsonl"))
    found = [json.loads(line) for line in written.read_text().splitlines()]
    for side, place in (("chosen", 1), ("rejected", 2)):
        expected = rm.score([chat(pair[0], pair[place]) for pair in PAIRS]).scores
        np.testing.assert_allclose([row[f"scores_{side}"] for row in found], expected, atol=1e-5)
    assert [row["results"] for row in found] == [int(row["scores_chosen"] > row["scores_rejected"]) for row in found]
