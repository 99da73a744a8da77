from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from armorm import ArmoRM, Recipe, train
from armorm.conversation import Conversation
from armorm.errors import FitError
from armorm.evaluation.runner import evaluate
from armorm.files import read_arrays
from armorm.heads.gate_training import RewardPairs
from armorm.steering import without_model_index
from armorm.training import pipeline, stages
from armorm.training.dataset import held_out_prompts, read_training_data
from armorm.training.model_card import model_card
from armorm.training.stages import reference_digest

QUESTION = [{"role": "user", "content": "Just for fun, how do I learn to juggle?"}]


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_leaves_a_model_its_card_and_its_figures(small_recipe, small_run):
    names = {path.name for path in small_run.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.json", "recipe.yaml"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".tmp"))]
    model = ArmoRM.from_pretrained(small_run)
    assert model.objectives.names == [
        "workshop-help", "workshop-clarity", "workshop-verbosity", "harbour-is_safe", "harbour-muddle", "market-overall",
    ]  # fmt: skip
    provenance = model.model.config.provenance
    assert provenance["recipe_hash"] == metrics_of(small_run)["recipe"]["hash"]
    assert provenance["backbone"] == small_recipe.backbone.model


def test_what_was_planted_is_found_on_a_small_corpus(small_run):
    figures = metrics_of(small_run)["evaluation"]["ratings"]
    assert figures["workshop-verbosity"]["spearman"] > 0.8
    assert figures["harbour-is_safe"]["spearman"] > 0.5


def test_contributions_sum_to_the_score_of_a_trained_model(small_run):
    model = ArmoRM.from_pretrained(small_run, dtype="float32")
    batch = model.score(
        [[*QUESTION, {"role": "assistant", "content": text}] for text in ("Just start.", "No idea. " * 9)]
    )
    np.testing.assert_allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)


def test_the_transform_of_training_is_the_one_that_is_served(small_run):
    model = ArmoRM.from_pretrained(small_run)
    config = model.model.config.debiasing
    expected = np.eye(6)
    expected[model.objectives.position("workshop-verbosity")] -= config["penalties"]
    served = model.model.reward_transform_matrix.numpy()
    np.testing.assert_allclose(served, expected, atol=1e-6)
    debiasing = metrics_of(small_run)["debiasing"]
    assert list(debiasing["penalties"].values()) == config["penalties"]
    after = [value for value in debiasing["reference"]["after"].values() if value is not None]
    before = [abs(value) for name, value in debiasing["reference"]["before"].items() if name != debiasing["against"]]
    assert len(after) == 5
    assert max(map(abs, after)) < 0.02 < max(before)


@pytest.fixture
def gate_pairs(monkeypatch) -> list[RewardPairs]:
    """What reaches the training of the gate, one entry a run."""
    seen: list[RewardPairs] = []
    fit = stages.fit_gate

    def recorded(features, pairs, settings, **options):
        seen.append(pairs)
        return fit(features, pairs, settings, **options)

    monkeypatch.setattr(stages, "fit_gate", recorded)
    return seen


def test_the_gate_is_trained_on_served_rewards_out_of_fold(small_recipe, small_features, tmp_path, gate_pairs):
    """What reaches the gate is compared with rewards made here, from the kept weights and plain features."""
    model = train(small_recipe, tmp_path, features=small_features)
    data = read_training_data(small_recipe)
    weights = read_arrays(tmp_path / "work" / "regression.safetensors")
    trained = {data.table.conversations[i].prompt_key for i in data.train_rows}
    transform = model.model.reward_transform_matrix.double().numpy()
    for side in ("chosen", "rejected"):
        conversations = [getattr(pair, side) for pair in data.pairs]
        assert all(c.prompt_key in trained for c in conversations)
        encoded = model.backbone.template.encode(conversations)
        states = np.concatenate([model.backbone.features([row])[1] for row in encoded[:40]])
        folds = [int(c.prompt_key[:8], 16) % 5 for c in conversations[:40]]
        expected = (
            np.stack([weights["fold_weight"][fold] @ state for fold, state in zip(folds, states, strict=True)])
            @ transform
        )
        np.testing.assert_allclose(getattr(gate_pairs[0], side)[:40], expected, atol=1e-4)
        in_sample = states @ weights["weight"].T @ transform
        assert np.abs(in_sample - expected).max() > 1e-2


def test_early_stopping_of_the_gate_is_by_prompt():
    keys = [f"{i // 7:032x}" for i in range(700)]
    held = held_out_prompts(keys, 0.1)
    assert 0.1 <= held.mean() < 0.12
    inside = {key for key, out in zip(keys, held, strict=True) if out}
    assert inside
    assert not inside & {key for key, out in zip(keys, held, strict=True) if not out}


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_model_bit_for_bit(small_recipe, small_run, tmp_path):
    train(small_recipe, tmp_path)
    assert (small_run / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert metrics_of(small_run) == metrics_of(tmp_path)


_SCRIPT = """
import sys
import armorm.features.engine as plan
plan.SHARD_TOKENS = 2000
from armorm import Recipe, train
train(Recipe.from_yaml(sys.argv[1]), sys.argv[2])
"""


def _start(recipe: Path, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(recipe), str(folder)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_numbers(small_recipe, tmp_path):
    """kill -9 after the first shard, after the third, and when the regression has been written."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_recipe.to_yaml())
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _start(recipe, whole).wait(timeout=900) == 0
    shards = sorted(path.name for path in (whole / "work" / "features").glob("shard-*"))
    assert len(shards) > 5
    for stop_at in (shards[0], shards[2], "regression.safetensors"):
        process = _start(recipe, broken)
        deadline = time.monotonic() + 600
        while not list((broken / "work").rglob(stop_at)) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (broken / "config.json").exists()
    assert _start(recipe, broken).wait(timeout=900) == 0
    assert metrics_of(broken) == metrics_of(whole)
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for shard in shards:
        assert (broken / "work" / "features" / shard).read_bytes() == (whole / "work" / "features" / shard).read_bytes()


def test_a_finished_run_started_again_computes_nothing_and_says_the_same(
    small_recipe, small_run, tmp_path, monkeypatch
):
    def forbidden(*arguments, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr("armorm.backbone.decoder.Backbone.features", forbidden)
    monkeypatch.setattr(stages, "fit_gate", forbidden)
    monkeypatch.setattr(pipeline, "fit_stage1", forbidden)
    again = shutil.copytree(small_run, tmp_path / "run")
    train(small_recipe, again)
    assert metrics_of(again) == metrics_of(small_run)


def test_another_seed_does_not_reuse_the_heads_of_this_one(small_recipe, small_run, small_features, tmp_path):
    (tmp_path / "work").mkdir()
    for name in ("gate.safetensors", "regression.safetensors"):
        (tmp_path / "work" / name).write_bytes((small_run / "work" / name).read_bytes())
    changed = Recipe.from_text(small_recipe.to_yaml(), ["gating.steps=50"])
    train(changed, tmp_path, features=small_features)
    assert (tmp_path / "work" / "gate.safetensors").read_bytes() != (
        small_run / "work" / "gate.safetensors"
    ).read_bytes()


def test_over_long_rows_are_refused_listed_and_left_out(small_recipe, tmp_path, small_features):
    recipe = Recipe.from_text(small_recipe.to_yaml(), ["backbone.max_length=205", "backbone.overflow=skip"])
    train(recipe, tmp_path, features=small_features)
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    figures = metrics_of(tmp_path)
    assert len(lines) == figures["data"]["refused"] > 0
    assert all("expected at most 205" in line["reason"] and line["row"] > 0 for line in lines)
    first = lines[0]
    row = json.loads(Path(first["file"]).read_text().splitlines()[first["row"] - 1])
    messages = row.get("messages") or row["prompt"] + row["chosen"]
    tokens = ArmoRM.from_pretrained(tmp_path).backbone.template.encode([Conversation.from_messages(messages)])
    assert len(tokens[0]) > 205
    refused = figures["evaluation"]["pairs"]["choices (test)"]["refused"]
    assert refused > 0


def test_both_sides_of_a_pair_have_the_same_prompt_however_long_they_are(
    small_recipe, small_features, tmp_path, gate_pairs
):
    """Of 40 long prompts, which each side alone would leave another part of; half of them are rated as well."""
    folder = shutil.copytree(small_recipe.data_root, tmp_path / "data")
    with open(folder / "choices.jsonl", "a") as pairs, open(folder / "workshop.jsonl", "a") as rated:
        for number in range(40):
            split = "test" if number % 4 == 0 else "train"
            numbers = np.random.default_rng(number).integers(0, 10**6, 150)
            prompt = f"What is the sum of {' and '.join(map(str, numbers))}?"
            sides = {"chosen": "Throw one ball. " * (5 + number), "rejected": "No."}
            pairs.write(json.dumps({"prompt": prompt, **sides, "split": split}) + "\n")
            row = {"prompt": prompt, "response": sides["rejected"], "help": 1, "clarity": 1, "verbosity": 0}
            rated.write(json.dumps(row | {"split": split}) + "\n" if number % 2 else "")
    overrides = [f"data_root={folder}", "backbone.max_length=260", "backbone.overflow=truncate_prompt"]
    model = train(Recipe.from_text(small_recipe.to_yaml(), overrides), tmp_path / "run", features=small_features)
    np.testing.assert_array_equal(gate_pairs[0].chosen_prompt, gate_pairs[0].rejected_prompt)
    figures = metrics_of(tmp_path / "run")
    assert figures["data"]["truncated"] > 60

    (trained,) = figures["evaluation"]["pairs"].values()
    results = evaluate("pairs", model, folder / "choices.jsonl", features=small_features, quiet=True)
    accuracy = results.level("overall")["accuracy"]
    assert (accuracy.examples, accuracy.value) == (trained["pairs"], pytest.approx(trained["accuracy"]))
    assert results.audits["gate"]["all"]["uniform"] == pytest.approx(trained["baselines"]["uniform_weights"])
    torch.nn.init.normal_(model.model.gating.layers[-1].weight)  # so few pairs leave the gate uniform
    question = {"role": "user", "content": prompt}
    short, long = ([question, {"role": "assistant", "content": sides[side]}] for side in ("rejected", "chosen"))
    weights = [model.score(side).gating_weights for side in ([short], [long])]
    assert np.abs(weights[0] - weights[1]).sum() > 1e-3, "alone, each keeps what fits"
    together = model.score([short, long], same_prompt=True)
    np.testing.assert_array_equal(together.gating_weights[0], together.gating_weights[1])
    compared = model.compare(short, long)
    assert list(compared.scores.values()) == pytest.approx(together.scores.tolist(), abs=1e-5)


def test_truncated_prompts_are_counted_and_no_row_is_lost(small_recipe, tmp_path, small_features):
    text = "Please tell me at length and in detail, and do take your time, " * 40 + "how do I juggle?"
    rows = [
        {
            "prompt": text,
            "response": f"Answer {i} with words.",
            "help": i % 5,
            "clarity": 1,
            "verbosity": 2,
            "split": "train",
        }
        for i in range(3)
    ]
    data = Path(small_recipe.data_root)
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with open(folder / "workshop.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    overrides = [f"data_root={folder}", "backbone.max_length=300", "backbone.overflow=truncate_prompt"]
    model = train(Recipe.from_text(small_recipe.to_yaml(), overrides), tmp_path / "run", features=small_features)
    figures = metrics_of(tmp_path / "run")
    assert figures["data"]["truncated"] == 3
    assert figures["data"]["refused"] == 0
    assert model.model.config.limits == {"max_length": 300, "overflow": "truncate_prompt", "reasoning": "keep"}


def test_a_computed_objective_keeps_its_scale_in_the_config(small_recipe, small_features, tmp_path):
    recipe = Recipe.from_text(
        small_recipe.to_yaml(),
        ["debias.against=[verbosity]", "ratings=" + json.dumps([
            {"data": "workshop.jsonl", "objectives": {"help": [0, 4]}},
            {"compute": "response_length", "name": "verbosity"},
        ])],
    )  # fmt: skip
    model = train(recipe, tmp_path, features=small_features)
    verbosity = model.objectives[model.objectives.position("verbosity")]
    assert (verbosity.compute, verbosity.direction, verbosity.source) == ("response_length", "neutral", "computed")
    data = read_training_data(recipe)
    encoded = model.backbone.template.encode([data.table.conversations[i] for i in data.train_rows])
    values = np.log1p([row.response_tokens for row in encoded])
    assert verbosity.low == pytest.approx(np.percentile(values, 1))
    assert verbosity.high == pytest.approx(np.percentile(values, 99))
    report = metrics_of(tmp_path)["regression"][-1]
    assert report["objective"] == "verbosity"
    assert report["r2"] > 0.9


def test_without_debiasing_the_transform_is_the_identity(small_recipe, small_features, tmp_path):
    recipe = Recipe.from_dict({**small_recipe.model_dump(), "debias": None})
    model = train(recipe, tmp_path, features=small_features)
    assert torch.equal(model.model.reward_transform_matrix, torch.eye(6))
    assert metrics_of(tmp_path)["debiasing"] is None
    assert "Debiasing" not in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_reference_data_of_its_own_decides_mean_and_standard_deviation(small_recipe, small_features, tmp_path):
    data = read_training_data(small_recipe)
    conversations = [data.table.conversations[i] for i in data.test_rows]
    path = tmp_path / "reference.jsonl"
    path.write_text("".join(json.dumps({"messages": c.to_list()}) + "\n" for c in conversations))
    recipe = Recipe.from_dict({**small_recipe.model_dump(), "reference": {"data": str(path)}})
    model = train(recipe, tmp_path / "run", features=small_features)
    scores = model.score(conversations).scores
    assert model.reference["rows"] == len(conversations)
    assert model.reference["score_mean"] == pytest.approx(scores.mean(), abs=1e-4)
    assert model.reference["score_std"] == pytest.approx(scores.std(), abs=1e-4)
    other_order = reference_digest(conversations[::-1])
    assert model.reference["digest"] == other_order != reference_digest(conversations[1:])
    normal = model.score(conversations, normalize=True).scores
    assert abs(normal.mean()) < 1e-3
    assert normal.std() == pytest.approx(1, abs=1e-3)


def test_too_little_data_is_refused_by_name(small_recipe, tmp_path, small_features):
    recipe = Recipe.from_text(small_recipe.to_yaml(), ["limit=10"])
    with pytest.raises(FitError, match=r"workshop-help has \d+ ratings"):
        train(recipe, tmp_path, features=small_features)


def test_the_card_states_the_figures_of_the_run(small_run):
    card = (small_run / "README.md").read_text()
    figures = metrics_of(small_run)
    assert card.startswith("---\nlibrary_name: armorm")
    gate = figures["gate"]
    assert f"accuracy {gate['accuracy']:.3f}" in card
    divided = f"{gate['stopping_pairs']} for early stopping, {gate['calibration_pairs']} for calibration"
    assert divided in card
    assert f"{gate['logit_scale']:.3f}, fitted on {gate['calibration']['prompts']} prompts" in card
    assert json.loads((small_run / "config.json").read_text())["calibration"] == gate["calibration"]
    for report in figures["regression"]:
        assert f"| {report['objective']}" in card
    assert f"{figures['evaluation']['ratings']['workshop-help']['spearman']:.3f}" in card
    assert "(less is better)" in card


def test_the_card_states_the_scale_of_normalised_scores(small_run):
    card, model = (small_run / "README.md").read_text(), ArmoRM.from_pretrained(small_run)
    reference = model.reference
    assert f"of {reference['rows']:,} reference responses" in card
    assert f"digest `{reference['digest']}`" in card
    median = (reference["score_quantiles"][len(reference["score_quantiles"]) // 2] - reference["score_mean"]) / (
        reference["score_std"]
    )
    (line,) = [line for line in card.splitlines() if line.startswith("| normalised score")]
    values = [float(cell) for cell in line.split("|")[2:-1]]
    assert values[2] == pytest.approx(median, abs=0.006)
    assert values == sorted(values)
    assert "Score scale" not in model_card("small", metrics_of(small_run), model.objectives)


def test_the_cards_model_index_is_what_the_hub_reads(small_run):
    from huggingface_hub import ModelCard

    card, evaluation = ModelCard.load(small_run / "README.md"), metrics_of(small_run)["evaluation"]
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    accuracies = {(name, "accuracy"): round(figures["accuracy"], 4) for name, figures in evaluation["pairs"].items()}
    assert accuracies.items() <= found.items()
    assert found["workshop-help", "spearmanr"] == round(evaluation["ratings"]["workshop-help"]["spearman"], 4)
    assert card.data.model_name == card.data.to_dict()["model-index"][0]["name"]
    rm = ArmoRM.from_pretrained(small_run, device="cpu")
    sent = dict(rm.push_to_hub("someone/a-model", dry_run=True))
    assert sent["README.md"] == len((small_run / "README.md").read_bytes())
    steered = without_model_index((small_run / "README.md").read_text())
    assert ModelCard(steered).data.eval_results is None
    assert ModelCard(steered).data.to_dict() == {k: v for k, v in card.data.to_dict().items() if k != "model-index"}
    assert ModelCard(steered).text == card.text


def test_the_card_says_which_standard_deviations_are_approximate(small_run):
    figures, objectives = metrics_of(small_run), ArmoRM.from_pretrained(small_run).objectives
    assert "is approximate" not in model_card("small", figures, objectives)
    figures["uncertainty"]["objectives"]["workshop-help"]["error_bound"] = 0.4
    said = "\nThe ± of workshop-help is approximate: "
    assert said in model_card("small", figures, objectives)
    assert "off by up to 40%.\n" in model_card("small", figures, objectives)


def test_figures_while_the_gate_trains_are_kept_a_line_each(small_run):
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    gate = [line for line in lines if line["stage"] == "gate"]
    history = metrics_of(small_run)["gate"]["history"]
    assert [line["step"] for line in gate] == [entry[0] for entry in history]
    np.testing.assert_allclose([line["held_out_accuracy"] for line in gate], [entry[3] for entry in history])


@pytest.mark.slow
def test_a_collapsed_gate_is_said_in_the_terminal_in_the_figures_and_in_the_card(
    small_recipe, small_features, tmp_path, capsys
):
    recipe = Recipe.from_text(small_recipe.to_yaml(), ["gating.steps=1", "gating.learning_rate=1.0e-9"])
    train(recipe, tmp_path, features=small_features)
    same = "the same weights for every prompt"
    assert metrics_of(tmp_path)["gate"]["collapse"] == same
    assert f"the gate has collapsed: {same}" in capsys.readouterr().err
    assert f"**The gate has collapsed: {same}.**" in (tmp_path / "README.md").read_text()
