"""The preview of a steering: every figure against two models that are scored apart, and the command that saves it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from armorm import ArmoRM, evaluate
from armorm.backbone.readout import LAST_TOKEN, Readout
from armorm.evaluation.steering_preview import preview
from armorm.evaluation.tables import preview_tables
from tests.helpers.commands import run
from tests.helpers.small_models import reward_model

POLICY = {
    "multiply": {"beaver-harm": 6.0},
    "drop": ["code-style"],
    "pin": {"ultra-helpful": 0.1},
    "debias_strength": 0.0,
}
WORDS = ["the", "plan", "is", "short", "simple", "follow", "these", "points", "and", "check", "what", "you", "see"]


@pytest.fixture(scope="module", params=[LAST_TOKEN, Readout("last+mean", "mean")], ids=["last", "last+mean"])
def rm(request):
    return reward_model(readout=request.param)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)

    def text() -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(2, 30))))

    return [
        {
            "prompt": f"Question {i // 2}: {text()}",
            "chosen": text(),
            "rejected": text(),
            "subset": ("odd", "even")[i % 2],
        }
        for i in range(70)
    ]


@pytest.fixture(scope="module")
def pairs(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def found(rm, pairs):
    return preview(rm, rm.steer(**POLICY), pairs)


def margins(rm, rows) -> np.ndarray:
    sides = [
        rm.score(
            [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}] for row in rows]
        )
        for side in ("chosen", "rejected")
    ]
    return sides[0].scores.astype(np.float64) - sides[1].scores


def test_flips_and_accuracy_are_those_of_two_models_scored_apart(rm, rows, found):
    old, new = margins(rm, rows), margins(rm.steer(**POLICY), rows)
    assert found.flips["to_right"] == int(((old <= 0) & (new > 0)).sum()) > 0
    assert found.flips["to_wrong"] == int(((old > 0) & (new <= 0)).sum()) > 0
    assert found.flips["share"] == pytest.approx(((old > 0) != (new > 0)).mean())
    overall = found.accuracy["all"]
    assert (overall["before"], overall["after"]) == pytest.approx(((old > 0).mean(), (new > 0).mean()))
    assert overall["difference"] == pytest.approx((found.flips["to_right"] - found.flips["to_wrong"]) / 70)
    low, high = overall["interval"]
    assert low <= overall["difference"] <= high
    odd = np.array([row["subset"] == "odd" for row in rows])
    assert found.accuracy["odd"]["after"] == pytest.approx((new > 0)[odd].mean())
    assert found.by_subset["odd"]["to_right"] == int(((old <= 0) & (new > 0))[odd].sum())


def test_flips_are_told_apart_by_length(rm, rows, found):
    old, new = margins(rm, rows), margins(rm.steer(**POLICY), rows)
    longer = np.array([len(row["chosen"]) - len(row["rejected"]) for row in rows])
    winner_before, winner_after = np.sign(old) * np.sign(longer), np.sign(new) * np.sign(longer)
    assert found.by_length["to_shorter"] == int(((winner_before > 0) & (winner_after < 0)).sum())
    assert found.by_length["to_longer"] == int(((winner_before < 0) & (winner_after > 0)).sum())


def test_length_goes_with_the_score_as_measured_apart(rm, rows, found):
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    conversations = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in texts]
    for view, model in (("before", rm), ("after", rm.steer(**POLICY))):
        expected = spearmanr(model.score(conversations).scores, [len(r) for _, r in texts]).statistic
        assert found.length[view]["correlation"] == pytest.approx(expected, abs=2e-3)


def test_weights_are_means_over_prompts(rm, rows, found):
    prompts = list({row["prompt"]: row for row in rows}.values())
    conversations = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}] for row in prompts
    ]
    for place, model in enumerate((rm, rm.steer(**POLICY))):
        means = model.score(conversations).gating_weights.mean(0)
        np.testing.assert_allclose([pair[place] for pair in found.weights.values()], means, atol=1e-5)
    assert found.weights["ultra-helpful"][1] == pytest.approx(0.1, abs=1e-6)
    assert found.weights["code-style"][1] == 0


def test_the_changed_pairs_are_named_by_row_and_hold_no_text_as_values(rows, found):
    sizes = [abs(flip.after - flip.before) for flip in found.changed]
    assert sizes == sorted(sizes, reverse=True)
    assert len(found.changed) == found.flips["to_right"] + found.flips["to_wrong"]
    flip = found.changed[0]
    assert flip.better.response == rows[flip.row - 1]["chosen"]
    assert flip.decided_by
    assert rows[flip.row - 1]["chosen"] not in json.dumps(found.to_dict())


def test_nothing_steered_flips_nothing(rm, pairs):
    found = preview(rm, rm.steer(), pairs)
    assert found.flips == {"to_right": 0, "to_wrong": 0, "share": 0.0}
    assert found.changed == []
    assert found.accuracy["all"]["difference"] == 0


def test_the_tables_fit_and_hold_the_figures(found):
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(preview_tables(found))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for part in (f"{100 * found.accuracy['all']['after']:.1f}", "code-style is dropped", "to right", "even"):
        assert part in text


# --- the command ---------------------------------------------------------------------------------


def test_the_command_previews_saves_and_what_is_saved_is_what_was_seen(capsys, rm, pairs, tmp_path):
    rm.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "README.md").write_text("# plain\n\nText.\n")
    policy = tmp_path / "policy.yaml"
    policy.write_text("multiply: {beaver-harm: 6}\ndebias_strength: 0\n")
    code, out, err = run(
        capsys, "steer", tmp_path / "plain", "--policy", policy, "--drop", "code-style", "--pin", "ultra-helpful=0.1",
        "--pairs", pairs, "--output", tmp_path / "steered", "--dtype", "float32", "--json",
    )  # fmt: skip
    assert code == 0, err
    seen = json.loads(out)
    read = ArmoRM.from_pretrained(tmp_path / "steered", dtype="float32")
    assert read.model.config.steering == seen["steering"] == rm.steer(**POLICY).model.config.steering
    accuracy = evaluate("pairs", read, pairs, quiet=True).level("overall")["accuracy"].value
    assert accuracy == pytest.approx(seen["accuracy"]["all"]["after"])
    card = (tmp_path / "steered" / "README.md").read_text()
    assert "**This model is steered**" in card and f"| accuracy | {seen['accuracy']['all']['before']:.3f} |" in card
    assert card.endswith("Text.\n")


def test_the_command_says_what_is_wrong(capsys, rm, pairs, tmp_path):
    rm.save_pretrained(tmp_path / "plain")
    policy = tmp_path / "policy.yaml"
    policy.write_text("multiply: {beaver-harmm: 6}\n")
    for arguments, expected, part in (
        (("--pairs", pairs), 2, "expected --policy, --multiply"),
        (("--drop", "code-style"), 2, "expected --pairs to preview"),
        (("--pin", "code-style", "--pairs", pairs), 2, "OBJECTIVE=NUMBER"),
        (
            ("--policy", policy, "--pairs", pairs),
            1,
            "policy.yaml: unknown objective 'beaver-harmm' (did you mean beaver-harm?)",
        ),
        (("--drop", "verbosity", "--pairs", pairs), 1, "cannot be dropped"),
    ):
        code, _, err = run(capsys, "steer", tmp_path / "plain", *arguments)
        assert code == expected, err
        assert part in " ".join(err.split()), err
