"""Fine-tuning in two processes: the numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from armorm import ArmoRM, Recipe, train
from armorm.backbone.decoder import Backbone
from armorm.errors import FitError
from armorm.training.featurize import source_of
from armorm.training.finetune import run as stage
from armorm.training.finetune.collator import PromptTree
from armorm.training.finetune.processes import Processes
from armorm.training.finetune.trainer import in_multiples


def test_a_process_alone_has_all_the_work():
    alone = Processes.join()
    assert (alone, alone.steps_of(3), alone.gather("x"), alone.device("auto")) == (Processes(), 3, ["x"], "auto")
    with alone.first():
        alone.wait()


def test_a_rank_without_other_processes_is_no_part_of_anything(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert Processes.named() == Processes()


def test_a_tuned_backbone_is_what_workers_load(small_recipe, tmp_path):
    section = small_recipe.backbone.model_copy(update={"revision": "abc"})
    tuned, plain = source_of(section, tmp_path / "backbone"), source_of(section)
    assert (tuned.name, tuned.revision) == (str(tmp_path / "backbone"), None)
    assert (plain.name, plain.revision, plain.layer) == (section.model, "abc", section.layer)


def test_batches_that_cannot_be_divided_are_refused_with_a_number_that_can():
    assert Processes(1, 2).steps_of(4) == 2
    with pytest.raises(FitError, match=r"finetune\.accumulation 3: expected a multiple of the 2 processes.*=4\)"):
        Processes(0, 2).steps_of(3)


def test_the_largest_batches_are_halved_until_every_step_has_as_many():
    trees = [PromptTree((number,), ((0,),), 10) for number in range(7)]
    batches = in_multiples([trees[:5], trees[5:]], 3)
    assert len(batches) == 3 and sorted(map(len, batches)) == [2, 2, 3]
    assert sorted(tree.rows[0] for batch in batches for tree in batch) == list(range(7))
    assert len(in_multiples([[tree] for tree in trees], 4)) == 7  # none has two trees


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_end_with_the_weights_of_one(small_recipe, method, tmp_path, monkeypatch):
    """In float32: losses and gradients of every step to 0.1%, the weights to 3% of their change, each matrix to 10%.

    Gradients are summed in another order, and Adam magnifies the rounding of small ones: in one process, a processor's
    other instructions (ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS, ONEDNN_MAX_CPU_ISA) moved the weights by 1%, one
    matrix by 3%.
    """
    monkeypatch.setattr(stage, "fast_bfloat16", lambda: False)
    settings = [
        f"finetune.method={method}", "finetune.share=0.5", "finetune.epochs=1", "finetune.batch_tokens=1024",
        "finetune.accumulation=2", "finetune.dropout=0", "finetune.lora_dropout=0", "finetune.preference_weight=0.5",
        "finetune.preference_epochs=1", "finetune.validation_share=0.25", "finetune.eval_steps=4", "backbone.device=cpu",
        "backbone.dtype=float32", "limit=400",
    ]  # fmt: skip
    recipe = Recipe.from_text(small_recipe.to_yaml(), settings)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    one, two = tmp_path / "one", tmp_path / "two"
    train(Recipe.from_yaml(path), one, quiet=True)
    done = run_two(tmp_path, "train", str(path), "--output", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done in") == 1 and done.stdout.count("model, card and metrics") == 1
    name = "adapters.safetensors" if method == "lora" else "model.safetensors"
    first, second = (load_file(folder / "work" / "backbone" / name) for folder in (one, two))
    assert first.keys() == second.keys()
    before = Backbone.load(recipe.backbone.model, dtype="float32", device="cpu").model.state_dict()
    changes = {key: tensor - before.get(key, 0) for key, tensor in first.items() if not key.endswith("lora_A.weight")}
    differences = {key: second[key] - first[key] for key, change in changes.items() if change.norm() > 0}
    assert len(differences) > 5
    assert norm(differences.values()) <= 0.03 * norm(changes.values())
    found = {key: float(difference.norm() / changes[key].norm()) for key, difference in differences.items()}
    assert max(found.values()) <= 0.1, found
    curves = [json.loads((folder / "work" / "backbone" / "training_curve.json").read_text()) for folder in (one, two)]
    for entry, other in zip(*(curve["validation"] for curve in curves), strict=True):
        assert other == pytest.approx(entry, abs=1e-3)
    for stage_name in ("preferences", "ratings"):
        steps = [[(entry["loss"], entry["grad_norm"]) for entry in curve[stage_name]] for curve in curves]
        np.testing.assert_allclose(steps[1], steps[0], rtol=1e-3)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    scores = [ArmoRM.from_pretrained(folder).score(conversation).scores for folder in (one, two)]
    torch.testing.assert_close(*map(torch.from_numpy, scores), atol=0.02, rtol=0)  # heads and gate are fitted to it


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


IN_FLOAT32 = """
from armorm.cli.app import main
from armorm.training.finetune import run
run.fast_bfloat16 = lambda: False
main()
"""


def run_two(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of armorm in two processes, in float32 as the test."""
    script = folder / "in_float32.py"
    script.write_text(IN_FLOAT32)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
