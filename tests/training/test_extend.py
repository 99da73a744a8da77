"""Extending a model: new objectives, more ratings, the gate trained on; from the command line, and what stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from armorm import ArmoRM, Recipe, train
from armorm.conversation import Conversation
from armorm.data.decontamination import prompt_groups
from armorm.data.seen_prompts import SeenPrompts
from armorm.data.sources import Location
from armorm.errors import FitError
from armorm.heads.regression import fit_from_statistics
from armorm.heads.statistics import RatingStatistics
from armorm.training import stages
from armorm.training.extend import extend
from armorm.training.finetune.record import Finetuned
from tests.helpers.commands import exit_code
from tests.helpers.shared_folders import shared_folder
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
    assert gate["pairs"] + gate["held_out_pairs"] == 192, "prompts of test ratings are not trained on"
    assert gate["best_step"] > 0
    losses = {step: loss for step, _, loss, _ in gate["history"]}
    assert losses[gate["best_step"]] < losses[0], "better than where it started"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["calibration"] == gate["calibration"]
    assert gate["stopping_pairs"] == gate["held_out_pairs"], "too few to divide,"
    assert config["calibration"] is None, "so the scale is no calibration"
    old, new = (ArmoRM.from_pretrained(folder, dtype="float32").model.gating for folder in (model, tmp_path))
    assert new.layers[-1].weight.shape[0] == 5
    assert (new.layers[-1].weight[:4] - old.layers[-1].weight).abs().max() > 1e-3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["gate"] * len(gate["history"])


@pytest.fixture(scope="module")
def trained(small_recipe, small_run, tmp_path_factory) -> Path:
    """A run whose recipe evaluates on pairs and has settings of its own."""

    def fill(folder: Path) -> None:
        write(folder / "bench.jsonl", [preferred(f"Is {number} a prime number?", "test") for number in range(5)])
        features = shutil.copytree(small_run / "work" / "features", folder / "features")
        overrides = [
            f"evaluation=[{{benchmark: pairs, data: {folder / 'bench.jsonl'}}}]",
            "regression.alphas=[3.0]",
            "regression.weights={workshop-help: 20}",
            "gating.label_smoothing=0.2",
            "gating.steps=3",
            "seed=5",
            "test_share=0.5",
        ]
        train(Recipe.from_text(small_recipe.to_yaml(), overrides), folder / "run", features=features, quiet=True)

    return shared_folder(tmp_path_factory, "to-extend", fill) / "run"


def preferred(prompt: str, split: str = "train") -> dict:
    return {"prompt": prompt, "chosen": POLITE, "rejected": RUDE, "split": split}


def test_pairs_of_prompts_that_are_evaluated_on_do_not_train_the_gate(data, trained, tmp_path, small_recipe):
    """Five prompts of a validation split, of the recipe's benchmark, of its test pairs, of new test rows; each 4 times."""
    rows = [json.loads(line) for line in (Path(small_recipe.data_root) / "choices.jsonl").read_text().splitlines()]
    tested = list(dict.fromkeys(row["prompt"][0]["content"] for row in rows if row["split"] == "test"))
    rated = [json.loads(line) for line in (data / "ours.jsonl").read_text().splitlines()]
    also = list(dict.fromkeys(row["prompt"] for row in rated if row["split"] == "test"))
    pairs = [preferred(f"Which number comes after {number}?") for number in range(60)]
    pairs += [preferred(f"How old is tree {number}?", "validation") for number in range(5)]
    pairs += [preferred(f"is {number} a prime number") for number in range(5)]
    pairs += [preferred(prompt) for prompt in (*tested[:5], *also[:5])]
    write(tmp_path / "pairs.jsonl", pairs * 4)
    location = Location.find(str(tmp_path / "pairs.jsonl"))
    extend(trained, sets_to_add(trained, data / "ours.jsonl"), tmp_path / "out", preferences=[location], quiet=True)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["gate"]["pairs"] + metrics["gate"]["held_out_pairs"] == metrics["data"]["pairs"] == 240
    assert metrics["data"]["left_out"] == {
        "pairs of other splits": 20,
        "training pairs whose prompt is evaluated on": 40,
        "training pairs whose prompt is evaluated on, written otherwise": 20,
    }


def test_a_share_of_the_prompts_is_held_out_as_the_recipe_says(data, trained, tmp_path):
    rows = [json.loads(line) for line in (data / "ours.jsonl").read_text().splitlines()]
    path = write(tmp_path / "ours.jsonl", [{n: v for n, v in row.items() if n != "split"} for row in rows])
    extend(trained, sets_to_add(trained, path), tmp_path / "out", quiet=True)
    counts = json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]
    assert counts["rated_train"] + counts["rated_test"] == 120
    assert 30 < counts["rated_test"] < 90


def test_settings_are_those_of_the_recipe_that_trained_the_model(data, trained, tmp_path, monkeypatch):
    seen = []
    fit = stages.fit_gate

    def recorded(features, pairs, settings, **options):
        seen.append((settings, options["seed"]))
        return fit(features, pairs, settings, **options)

    monkeypatch.setattr(stages, "fit_gate", recorded)
    rows = [json.loads(line) for line in (data / "ours.jsonl").read_text().splitlines()]
    path = write(tmp_path / "workshop.jsonl", [row | {"help": row["politeness"] - 1} for row in rows])
    pairs = [Location.find(str(data / "pairs.jsonl"))]
    extend(trained, sets_to_add(trained, path, "help=0:4"), tmp_path / "out", preferences=pairs, quiet=True)
    ((settings, seed),) = seen
    assert (settings.label_smoothing, settings.steps, settings.hidden_size, seed) == (0.2, 3, 16, 5)
    (report,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["regression"]
    assert (report["objective"], report["alpha"]) == ("workshop-help", 3.0)
    statistics = RatingStatistics.load(tmp_path / "out" / "work" / "statistics.safetensors")
    heads = [
        fit_from_statistics(statistics, alphas=[3.0], weights=weights).weight[statistics.names.index("workshop-help")]
        for weights in ({"workshop-help": 20}, {})
    ]
    model = ArmoRM.from_pretrained(tmp_path / "out")
    served = model.model.regression_layer.weight[model.objectives.position("workshop-help")].detach().numpy()
    np.testing.assert_allclose(served, heads[0], atol=1e-5)
    assert np.abs(served - heads[1]).max() > 1e-3
    assert (tmp_path / "out" / "recipe.yaml").read_text() == (trained / "recipe.yaml").read_text()


def test_what_the_backbone_was_fine_tuned_on_is_excluded(data, trained, tmp_path):
    moved = shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("features"))
    rows = [json.loads(line) for line in (data / "ours.jsonl").read_text().splitlines()]
    known = [Conversation.from_prompt(row["prompt"], row["response"]) for row in rows[10:30]]
    (moved / "work" / "backbone").mkdir()
    seen = SeenPrompts.of({"fine-tuning": known}, prompt_groups(known))
    Finetuned(seen, [], np.zeros((0, 320)), {}).write(moved / "work" / "backbone")
    extend(moved, sets_to_add(moved, data / "ours.jsonl"), tmp_path / "out", quiet=True)
    counts = json.loads((tmp_path / "out" / "metrics.json").read_text())["data"]
    assert (counts["rated_train"], counts["rated_test"]) == (96 - 16, 24 - 4)
    assert counts["left_out"]["rated training rows whose prompt the backbone was fine-tuned on"] == 16


def test_a_recipe_whose_data_are_gone_is_reported(data, trained, tmp_path, capsys):
    moved = shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("features"))
    text = (moved / "recipe.yaml").read_text()
    (moved / "recipe.yaml").write_text(text.replace("bench.jsonl", "gone.jsonl"))
    extend(moved, sets_to_add(moved, data / "ours.jsonl"), tmp_path / "out")
    told = " ".join(capsys.readouterr().err.split())
    assert "prompts that the model's recipe evaluates on are not excluded (evaluation.0.data: " in told


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


def test_prompts_that_the_model_was_trained_on_are_no_test_rows_and_are_passed_on(data, model, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    extend(model, sets_to_add(model, data / "ours.jsonl", "politeness=1:5"), first, quiet=True)
    rows = [json.loads(line) for line in (data / "ours.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["split"] == "train"][:20]
    moved = [{**row, "split": "test", "politeness": 5} for row in trained]
    later = write(tmp_path / "ours.jsonl", [*moved, *({**row, "response": row["response"] + " So."} for row in rows)])
    extended = extend(first, sets_to_add(first, later, "politeness=1:5"), second)
    assert "excluded: 20 rated test rows whose prompt was seen in training" in capsys.readouterr().err
    metrics = json.loads((second / "metrics.json").read_text())
    assert metrics["data"]["rated_test"] == 24
    assert metrics["data"]["seen"] == {"prompts": 48, "ratings": 48, "pairs": 0, "fine-tuning": 0}
    assert extended.seen.partial, "the first model had no record"
