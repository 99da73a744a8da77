"""Debiasing against several objectives at once in a run, and what the run says about held-out rows."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from armorm import ArmoRM, Recipe, train
from armorm.report.page import report
from armorm.training.dataset import read_training_data
from armorm.training.summary import metrics_summary

BIASES = ["workshop-verbosity", "market-overall"]


@pytest.fixture(scope="module")
def run(small_recipe, small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("biases") / "run"
    recipe = Recipe.from_text(small_recipe.to_yaml(), [f"debias.against=[{', '.join(BIASES)}]"])
    train(recipe, folder, features=small_run / "work" / "features", quiet=True)
    return folder


def test_all_biases_are_removed_at_once_on_the_reference_data(run):
    debiasing = json.loads((run / "metrics.json").read_text())["debiasing"]
    assert list(debiasing["biases"]) == BIASES
    for bias in BIASES:
        after = {name: value for name, value in debiasing["biases"][bias]["after"].items() if name not in BIASES}
        before = [debiasing["biases"][bias]["before"][name] for name in after]
        assert max(map(abs, after.values())) < 0.03 < max(map(abs, before))


def test_what_remains_on_held_out_rows_is_printed_for_every_bias(run):
    metrics = json.loads((run / "metrics.json").read_text())
    stability = metrics["debiasing"]["stability"]
    assert list(stability) == BIASES
    console = Console(file=io.StringIO(), width=80)
    console.print(metrics_summary(metrics))
    summary, card = console.file.getvalue(), (run / "README.md").read_text()
    html = report(ArmoRM.from_pretrained(run))[0]
    for bias, of in stability.items():
        assert f"{bias}, predicted" in summary
        assert f"### {bias}" in card
        assert f"{bias}, predicted" in html
        left = of["predicted"]["pooled"]["objectives"]["workshop-help"]["after"]
        line = next(row for row in card.split(f"### {bias}")[1].splitlines() if row.startswith("| workshop-help |"))
        assert line.split("|")[5].strip() == f"{round(left, 3) + 0.0:.3f}"


def test_card_and_report_print_weight_beside_reliability(run):
    model = ArmoRM.from_pretrained(run)
    known = {objective.name: objective.reliability for objective in model.objectives}
    assert all(found is not None and 0 < found.value < 1 and found.epistemic_variance > 0 for found in known.values())
    gate = json.loads((run / "metrics.json").read_text())["gate"]
    card, html = (run / "README.md").read_text().split("## Gate")[1], report(ArmoRM.from_pretrained(run))[0]
    weights = dict(zip(model.objectives.names, gate["mean_weights"], strict=True))
    for name, found in known.items():
        cells = next(row for row in card.splitlines() if row.startswith(f"| {name} |")).split("|")
        assert (cells[2].strip(), cells[3].strip()) == (f"{weights[name]:.4f}", f"{found.value:.3f}")
    assert ">reliability</th>" in html


def test_the_reliability_is_that_of_ratings_and_uncertainty_computed_here(run, small_recipe):
    model = ArmoRM.from_pretrained(run, dtype="float32")
    data = read_training_data(small_recipe)
    table, rows = data.table, data.train_rows
    reports = json.loads((run / "metrics.json").read_text())["regression"]
    uncertainty = model.score([table.conversations[i] for i in rows]).uncertainty
    mapped = table.objectives.to_reward(table.ratings[rows])
    for column, (objective, entry) in enumerate(zip(model.objectives, reports, strict=True)):
        found = objective.reliability
        error, signal = float((uncertainty[:, column] ** 2).mean()), entry["r2"] * float(np.nanvar(mapped[:, column]))
        assert found.r2 == entry["r2"]
        assert found.epistemic_variance == pytest.approx(error, rel=0.01)
        assert found.signal_variance == pytest.approx(signal, rel=1e-3)
        assert found.value == pytest.approx(signal / (signal + error), rel=0.01)
