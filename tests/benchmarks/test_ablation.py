"""The ablation: the published gate's fault is reproduced, verdicts follow their intervals, a small run fills the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from ablations import backbones  # noqa: E402
from ablations.findings import verdict  # noqa: E402
from ablations.published import fit_published  # noqa: E402


def task(p: int = 400, d: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts whose first feature says which of two rewards decides."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(p, d)).astype(np.float32)
    chosen, rejected = rng.random((2, p, 2))
    deciding = (prompts[:, 0] > 0).astype(int)
    rows = np.arange(p)
    swap = chosen[rows, deciding] < rejected[rows, deciding]
    chosen[swap], rejected[swap] = rejected[swap], chosen[swap]
    return prompts, chosen, rejected


@pytest.mark.slow
def test_the_published_axis_gives_every_objective_one_half_and_the_right_one_learns():
    prompts, chosen, rejected = task()
    rows = np.arange(len(prompts))
    accuracy = {}
    for axis in (1, -1):
        gate = fit_published(prompts, rows, chosen, rejected, axis=axis, steps=25)
        output = gate.weights(prompts)
        scale = float(gate.network.logit_scale.detach())
        accuracy[axis] = ((output[:, 0] * chosen - output[:, 1] * rejected).sum(1) > 0).mean()
        if axis == 1:
            np.testing.assert_allclose(output / scale, 0.5, atol=1e-6)
        else:
            np.testing.assert_allclose(output.sum(-1) / scale, 1.0, atol=1e-5)
            assert np.ptp(output[:, 0, 0] / scale) > 0.05
    uniform = ((chosen - rejected).sum(1) > 0).mean()
    assert accuracy[1] == uniform
    assert accuracy[-1] > uniform + 0.05


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"difference": 0.03, "interval": [0.01, 0.05], "p": 0.004}, "better (+0.030 [0.010, 0.050], p = 0.004)"),
        ({"difference": -0.03, "interval": [-0.05, -0.01], "p": 0.0004}, "worse (-0.030 [-0.050, -0.010], p < 0.001)"),
        (
            {"difference": 0.01, "interval": [-0.02, 0.04], "p": 0.4},
            "no significant difference (+0.010 [-0.020, 0.040], p = 0.400)",
        ),
        ({"difference": 0.2, "interval": None, "p": None}, "too few prompts for a test (+0.200)"),
    ],
)
def test_a_verdict_says_no_more_than_its_p_value(entry, words):
    assert verdict(entry) == words


def outcome(name: str, difference: float, p: float, ratings: float) -> dict:
    """Results of a backbone on which `uniform weights` are that far from the gate."""
    against = {"own sets": {"difference": difference, "interval": [difference - 0.02, difference + 0.02], "p": p}}
    figures = {
        "gate": {"own sets": {"value": 0.6}},
        "uniform weights": {"own sets": {"value": 0.6 + difference}, "against": against},
    }
    ways = {way: {"spearman": 0.3, "within_prompt": 0.7} for way in ("pairs within prompts", "pairs across prompts")}
    ways["ratings"] = {"spearman": ratings, "within_prompt": 0.7}
    return {
        "setting": {"backbone": {"name": name}},
        "methods": {"figures": figures},
        "joint": {"stage_1": {"a": {"spearman": 0.25}, "b": {"spearman": 0.75}}},
        "ratings_against_pairs": {"a": ways},
    }


def test_verdicts_are_counted_over_backbones():
    several = [outcome("one", -0.05, 0.01, 0.4), outcome("two", -0.01, 0.4, 0.25), outcome("three", 0.06, 0.02, 0.3)]
    lines = backbones.sentences(several)
    assert lines[0] == "**uniform weights** against the learned gate: better on 1, worse on 1 of 3."
    assert "+0.100 (one), -0.050 (two), +0.000 (three)" in lines[1]
    assert backbones.sentences(several[1:2])[0].endswith("no significant difference on any of 1.")
    table = backbones.table(several).markdown().splitlines()
    assert table[2].startswith(f"| {backbones.RATINGS} | 0.500 |")
    assert "| uniform weights | 0.550 | -0.050 [-0.070, -0.030] | 0.010 | 0.590 |" in table[4]


@pytest.fixture(scope="module")
def measured(small_recipe, small_run, tmp_path_factory):
    """A whole ablation of the small corpus, on features that are at hand."""
    folder = tmp_path_factory.mktemp("ablation")
    recipe, page = folder / "recipe.yaml", folder / "docs" / "findings.md"
    recipe.write_text(small_recipe.to_yaml())
    page.parent.mkdir()
    page.write_text((ROOT / "docs" / "findings.md").read_text())
    fingerprint = json.loads((small_run / "metrics.json").read_text())["backbone"]["fingerprint"]
    store = folder / "store"
    store.mkdir()
    (store / fingerprint[:16]).symlink_to(small_run / "work" / "features")
    command = [sys.executable, ROOT / "benchmarks" / "ablation.py", "--recipe", recipe, "--store", store]
    command += ["--seeds", "2", "--published-steps", "1", "--set", "gating.steps=50"]
    command += ["--output", folder / "ablation.json", "--findings", page]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_small_ablation_fills_the_page(measured):
    folder, printed = measured
    results = json.loads((folder / "ablation.json").read_text())
    assert "gate, not debiased" in printed
    page = (folder / "docs" / "findings.md").read_text()
    for name in re.findall(r"<!-- begin (\w+) -->", page):
        part = re.search(rf"<!-- begin {name} -->\n(.*?)<!-- end {name} -->", page, re.DOTALL)
        assert part is not None
        assert part[1].strip() or name in ("weights_picture", "quantiles_picture"), name
    value = results["methods"]["figures"]["uniform weights"]["own sets"]["value"]
    assert f"{value:.3f}" in page
    assert (folder / "docs" / "images" / "findings" / "methods.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_the_published_gate_is_uniform_weights_on_real_features(measured):
    results = json.loads((measured[0] / "ablation.json").read_text())
    figures = results["methods"]["figures"]
    published, uniform = (
        figures[n]["own sets"]["value"] for n in ("published script", "uniform weights, not debiased")
    )
    assert published == uniform
    assert results["methods"]["notes"]["published script"]["furthest_weight_from_half"] < 1e-6
