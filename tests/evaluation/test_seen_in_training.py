"""Prompts that a model was trained on are named and left out of what is evaluated."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from armorm import ArmoRM, evaluate
from armorm.conversation import Conversation
from armorm.data.decontamination import prompt_groups
from armorm.data.seen_prompts import FILE, SeenPrompts
from armorm.errors import DataError
from armorm.evaluation.margin_calibration import calibrate
from armorm.evaluation.results import NothingHeldOutError, Results
from armorm.evaluation.tables import results_tables
from armorm.report.page import report
from armorm.training.dataset import read_training_data
from tests.cli.test_evaluate import run
from tests.evaluation.test_margin_calibration import pairs_file
from tests.helpers.small_models import reward_model

QUESTIONS = [
    f"How do I mend a {thing}, when nobody is at home?" for thing in ("boat", "chair", "kite", "lamp", "drum", "coat")
]


def asked(question: str) -> Conversation:
    return Conversation.from_prompt(question, "Like this.")


def trained(**used: list[str]) -> ArmoRM:
    """A model that was trained on these questions, by role."""
    rm = reward_model()
    conversations = {role: [asked(question) for question in questions] for role, questions in used.items()}
    groups = prompt_groups([c for role in conversations.values() for c in role])
    rm.seen = SeenPrompts.of(conversations, groups)
    return rm


@pytest.fixture
def rated(tmp_path) -> Path:
    """Two rated responses to each question, without a split column."""
    rows = [
        {"prompt": question, "response": f"{reply} {place}", "code-style": place + 3 * index}
        for place, question in enumerate(QUESTIONS)
        for index, reply in enumerate(("Look for glue.", "No idea."))
    ]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    rows = [{"prompt": question, "chosen": "Look for glue.", "rejected": "No idea."} for question in QUESTIONS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shown(results: Results) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(results_tables(results))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_seen_prompts_are_named_by_use_and_left_out_however_they_are_written(rated, pairs, tmp_path):
    rm = trained(ratings=[QUESTIONS[0].upper(), QUESTIONS[1]], pairs=[QUESTIONS[1], QUESTIONS[2]])
    results = evaluate("ratings", rm, rated, quiet=True, output=tmp_path / "results.json")
    assert results.counts["examples"] == 6 and results.counts["prompts"] == 3
    expected = {"ratings": 2, "pairs": 2, "fine-tuning": 0}
    assert results.data["seen"] == {
        "examples": 6, "prompts": 3, "roles": expected, "of": 12, "partial": False, "included": False,
    }  # fmt: skip
    assert "seen in training: 6 of 12 examples (prompts: 3; ratings 2, pairs 2), skipped" in shown(results)
    assert Results.load(tmp_path / "results.json").data["seen"] == results.data["seen"]
    results = evaluate("pairs", rm, pairs, quiet=True)
    assert results.counts["examples"] == 3 and results.data["seen"]["examples"] == 3
    everything = evaluate("pairs", rm, pairs, quiet=True, include_seen=True)
    assert everything.counts["examples"] == 6
    assert "seen in training: 3 of 6 examples (prompts: 3; ratings 2, pairs 2), included" in shown(everything)


def test_nothing_left_is_one_line(rated, tmp_path, capsys):
    rm = trained(ratings=QUESTIONS)
    with pytest.raises(NothingHeldOutError, match="seen in training: 12 of 12 examples"):
        evaluate("ratings", rm, rated, quiet=True)
    rm.save_pretrained(tmp_path / "model")
    arguments = ("evaluate", "ratings", "--data", rated, "--model", tmp_path / "model", "--dtype", "float32")
    code, out, err = run(capsys, *arguments)
    assert code == 1 and not out
    assert "seen in training: 12 of 12 examples" in err.splitlines()[-1] and "--include-seen" in err.splitlines()[-1]
    code, out, _ = run(capsys, *arguments, "--include-seen", "--json")
    assert code == 0 and json.loads(out)["counts"]["examples"] == 12


def test_a_model_without_a_record_says_that_it_is_unknown(rated, tmp_path):
    reward_model().save_pretrained(tmp_path / "older")
    assert not (tmp_path / "older" / FILE).exists()
    results = evaluate("ratings", str(tmp_path / "older"), rated, quiet=True)
    assert results.counts["examples"] == 12
    assert "seen in training: unknown, the model has no record of it" in shown(results)
    assert "seen in training: none" in shown(evaluate("ratings", trained(pairs=["What else?"]), rated, quiet=True))


@pytest.mark.parametrize("layout", ["armorm", "released"])
def test_the_record_is_saved_loaded_steered_and_sent_with_the_model(layout, tmp_path):
    rm = trained(pairs=QUESTIONS)
    rm.steer({"code-style": 2.0}).save_pretrained(tmp_path, layout=layout)
    again = ArmoRM.from_pretrained(tmp_path, device="cpu")
    assert again.seen.find([asked(question) for question in (*QUESTIONS, "What else?")]).tolist() == [2] * 6 + [0]
    assert FILE in dict(again.push_to_hub("someone/a-model", dry_run=True))


def test_the_report_leaves_them_out_and_warns_where_nothing_is_left(rated, pairs):
    page, found = report(trained(ratings=QUESTIONS[:2], pairs=QUESTIONS), [rated, pairs])
    assert found["notices"][0]["title"] == "The model was trained on all prompts of the ratings"
    assert "ratings, seen in training: 12 of 12 examples (prompts: 6; ratings 2, pairs 6), skipped" in page
    assert not found["evaluations"] and found["data"]["conversations"] == 0
    _, found = report(trained(ratings=QUESTIONS[:2]), [rated, pairs])
    assert [entry["counts"]["examples"] for entry in found["evaluations"]] == [8, 4]
    assert found["data"]["conversations"] == 16
    _, found = report(trained(ratings=QUESTIONS[:2]), [rated, pairs], include_seen=True)
    assert [entry["counts"]["examples"] for entry in found["evaluations"]] == [12, 6]


def test_calibration_leaves_them_out(tmp_path):
    pairs = pairs_file(tmp_path / "pairs.jsonl", 60, 1.0)
    found, settings = calibrate(trained(ratings=[f"question {i}" for i in range(8)]), pairs)
    assert (found.pairs, settings["seen"]["examples"], settings["seen"]["of"]) == (52, 8, 60)
    with pytest.raises(DataError, match=r"pairs of 49 prompts, .* \(seen in training: 11 of 60 examples"):
        calibrate(trained(pairs=[f"question {i}" for i in range(11)]), pairs)


def test_a_trained_model_knows_its_prompts(small_recipe, small_run, small_features, tmp_path):
    """Rows of training and test without their split: the latter are what is evaluated."""
    data, rm = read_training_data(small_recipe), ArmoRM.from_pretrained(small_run)
    rows, used = data.table.conversations, {"ratings": 1, "pairs": 2}
    bits = rm.seen.find(rows)
    assert (bits[data.train_rows] & used["ratings"]).all() and not bits[data.test_rows].any()
    assert (rm.seen.find([pair.chosen for pair in data.pairs]) & used["pairs"]).all()
    source = Path(small_recipe.data_root) / "workshop.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    unlabelled = tmp_path / "workshop.jsonl"
    unlabelled.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "split"}) + "\n" for row in lines))
    options = {"features": small_features, "dtype": "float32", "device": "cpu", "quiet": True}
    plain, known = (evaluate("ratings", small_run, path, **options) for path in (source, unlabelled))
    tested = sum(row["split"] == "test" for row in lines)
    assert known.data["seen"]["examples"] == len(lines) - tested > 0
    assert known.counts["examples"] == tested and known.metrics == plain.metrics
    prompts = json.loads((small_run / "metrics.json").read_text())["data"]["seen"]["prompts"]
    assert prompts == len({row.prompt_key for row in rows}) - len({rows[i].prompt_key for i in data.test_rows})
    assert (
        f"- prompts seen in training: {prompts} (ratings {prompts}, pairs {prompts});"
        in (small_run / "README.md").read_text()
    )
