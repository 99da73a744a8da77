"""Extending a model: new objectives, more ratings, the gate trained on; from the command line, and what stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from armorm import ArmoRM
from armorm.errors import FitError
from armorm.training.extend import extend
from tests.helpers.commands import exit_code
from tests.helpers.small_models import reward_model, sets_to_add

POLITE, RUDE = "Thank you for asking, please do try it this way.", "Go away, that is a silly thing to ask."


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """120 responses to 60 prompts, one polite and one rude; pairs that prefer the polite one."""
    folder = tmp_path_factory.mktemp("ours")
    prompts = [f"How do I {verb} a {thing}?" for verb in ("paint", "mend", "sell", "find", "lift", "wash")
               for thing in ("boat", "chair", "kite", "lamp", "drum", "coat", "clock", "fence", "shelf", "wheel")]  # fmt: skip
    rated, pairs = [], []
    for number, prompt in enumerate(prompts):
        split = "test" if number % 5 == 0 else "train"
        for text, level in ((POLITE, 4), (RUDE, 1)):
            response = f"{text} Step {number}."
            rated.append({"prompt": prompt, "response": response, "politeness": level + number % 2, "split": split})
        pairs.append({"prompt": prompt, "chosen": f"{POLITE} {number}", "rejected": f"{RUDE} {number}"})
    write(folder / "ours.jsonl", rated)
    write(folder / "pairs.jsonl", [{**pair, "split": "train"} for pair in pairs * 4])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    reward_model().save_pretrained(folder)
    return folder


def test_a_new_objective_from_the_command_line(data, model, tmp_path, capsys):
    """Old rows of W, old weights against each other and the old transform stay; the new objective is learned."""
    code = exit_code("extend", model, "--ratings", data / "ours.jsonl", "--objective", "politeness=1:5", "-o", tmp_path)
    assert code == 0
    assert "ours-politeness" in capsys.readouterr().out
    before, after = ArmoRM.from_pretrained(model, dtype="float32"), ArmoRM.from_pretrained(tmp_path, dtype="float32")
    assert after.objectives.names == [*before.objectives.names, "ours-politeness"]
    old, new = (rm.model.regression_layer.weight.detach().numpy() for rm in (before, after))
    np.testing.assert_array_equal(new[:4], old)
    np.testing.assert_array_equal(after.transform[:4, :4], before.transform)
    verbosity = before.objectives.position("verbosity")
    penalty = after.transform[verbosity, 4]
    assert abs(penalty) > 1e-3, "debiased against the model's own bias"
    assert after.model.config.debiasing["penalties"] == [
        *before.model.config.debiasing["penalties"], pytest.approx(-penalty)
    ]  # fmt: skip
    conversations = [[{"role": "user", "content": f"How do I tie a knot, {i}?"}, {"role": "assistant", "content": text}]
                     for i in range(4) for text in (POLITE, RUDE)]  # fmt: skip
    plain, extended = before.score(conversations), after.score(conversations)
    np.testing.assert_allclose(extended.rewards[:, :4], plain.rewards, atol=1e-5)
    shares = extended.gating_weights[:, :4] / extended.gating_weights[:, :4].sum(1, keepdims=True)
    np.testing.assert_allclose(shares, plain.gating_weights, atol=1e-5)
    politeness = after.objectives.to_raw(extended.rewards)[:, 4]
    assert (politeness[::2] > politeness[1::2]).all()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["evaluation"]["ratings"]["ours-politeness"]["within_prompt"] == 1.0
    assert metrics["data"]["rated_test"] == 24
    assert "| ours-politeness |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("share", [None, 0.4])
def test_without_preferences_new_objectives_get_their_share(data, model, tmp_path, share):
    extended = extend(model, sets_to_add(model, data / "ours.jsonl"), tmp_path, share=share, quiet=True)
    mean = extended.reference["gating_weights"][4]
    assert extended.model.config.calibration is None, "the scale is not that of these objectives"
    assert mean == pytest.approx(1 / 5 if share is None else share, abs=0.02)


def test_with_preferences_the_gate_is_trained_on(data, model, tmp_path, capsys):
    code = exit_code(
        "extend", model, "--ratings", data / "ours.jsonl", "--objective", "politeness=1:5", "--steps", 100,
        "--preferences", data / "pairs.jsonl", "--json", "-o", tmp_path,
    )  # fmt: skip
    assert code == 0
    gate = json.loads(capsys.readouterr().out)["gate"]
    assert gate["pairs"] + gate["held_out_pairs"] == 240
    assert gate["best_step"] > 0
    losses = {step: loss for step, _, loss, _ in gate["history"]}
    assert losses[gate["best_step"]] < losses[0], "better than where it started"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["calibration"] == gate["calibration"]
    assert config["calibration"]["pairs"] == gate["calibration_pairs"]
    old, new = (ArmoRM.from_pretrained(folder, dtype="float32").model.gating for folder in (model, tmp_path))
    assert new.layers[-1].weight.shape[0] == 5
    assert (new.layers[-1].weight[:4] - old.layers[-1].weight).abs().max() > 1e-3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["gate"] * len(gate["history"])


def test_more_ratings_of_an_objective_are_added_to_those_it_was_fitted_on(data, model, tmp_path):
    """Half of the rows, then the others: the row of W is that of a fit on all of them."""
    lines = (data / "ours.jsonl").read_text().splitlines(keepends=True)
    halves = [tmp_path / name / "ours.jsonl" for name in ("even", "odd")]
    for half, rows in zip(halves, (lines[::2], lines[1::2]), strict=True):
        half.parent.mkdir()
        half.write_text("".join(rows))
    folders, source = [tmp_path / name for name in ("first", "second", "whole")], str(model)
    for folder, path in zip(folders, (*halves, data / "ours.jsonl"), strict=True):
        start = source if folder.name != "second" else str(folders[0])
        extend(start, sets_to_add(start, path, "politeness=1:5"), folder, quiet=True)
    first, second, whole = (ArmoRM.from_pretrained(folder).model.regression_layer.weight for folder in folders)
    assert (second[:4] == first[:4]).all()
    assert (second[4] - first[4]).abs().max() > 1e-4
    np.testing.assert_allclose(second[4].detach(), whole[4].detach(), atol=1e-4)


def test_more_ratings_without_the_old_statistics_are_refused(data, model, tmp_path):
    path = write(tmp_path / "code.jsonl", [json.loads(line) for line in (data / "ours.jsonl").read_text().splitlines()])
    path.write_text(path.read_text().replace("politeness", "style"))
    sets = sets_to_add(model, path, "style=0:10")
    with pytest.raises(FitError, match="statistics of the old ratings"):
        extend(model, sets, tmp_path / "more", quiet=True)


def test_an_objective_written_otherwise_is_rejected(data, model, tmp_path, capsys):
    for text in ("politeness", "politeness=5:1", "politeness=1:5:up"):
        code = exit_code("extend", model, "--ratings", data / "ours.jsonl", "--objective", text, "-o", tmp_path)
        assert code == 2
        assert "expected COLUMN=LOW:HIGH" in capsys.readouterr().err


def test_the_models_own_folder_is_not_overwritten(data, model):
    sets = sets_to_add(model, data / "ours.jsonl")
    with pytest.raises(FitError, match="own folder"):
        extend(model, sets, model, quiet=True)
