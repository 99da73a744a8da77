"""Constructed objectives in a recipe: from the sets that they name to the metrics of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from armorm import Recipe, train
from armorm.backbone.likelihood import load_language_model, reply_log_likelihoods, without_prompt
from armorm.data.constructs import OTHER_REPLY
from armorm.data.ratings import OWN_REPLY
from armorm.errors import RecipeError
from armorm.training.cost import DEVICES
from armorm.training.dataset import read_training_data
from armorm.training.dry_run import dry_run
from armorm.training.relevance import label_relevance
from armorm.training.stages import add_computed
from tests.helpers.data_files import write_rows

THINGS = "rivers clocks bread violins comets owls glass chess salt kites tunnels maps bees candles bridges paint"
BASE = """
ratings:
  - {data: rated.jsonl, objectives: {quality: [0, 4]}}
  - {construct: answers-the-question, from: [rated, pairs, other.jsonl]}
preferences:
  - {data: pairs.jsonl}
  - {from_ratings: answers-the-question, margin: 0.5}
evaluation:
  - {benchmark: pairs, data: bench.jsonl}
"""


def question(number: int, kind: str) -> str:
    things = THINGS.split()
    return f"Name {number} {kind} facts about {things[number % 16]} and {things[(number * 5 + 3) % 16]}, {number % 7} long."


def answer(number: int, kind: str) -> str:
    return f"{kind} fact {number}: there are {number + 3} of them, and Mary saw it in Paris."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rated rows, pairs and other conversations, with splits; one training prompt of each is evaluated on."""

    def rows(kind: str, count: int) -> list[dict]:
        return [
            {"prompt": question(i, kind), "response": answer(i, kind), "split": "test" if i % 4 == 0 else "train"}
            for i in range(count)
        ]

    def pair(row: dict) -> dict:
        return {"prompt": row["prompt"], "chosen": row["response"], "rejected": "Bad.", "split": row["split"]}

    rated, other, pairs = rows("rated", 40), rows("other", 24), rows("pairs", 24)
    write_rows(tmp_path / "rated.jsonl", *[row | {"quality": i % 5} for i, row in enumerate(rated)])
    write_rows(tmp_path / "other.jsonl", *[row | {"grade": i % 2} for i, row in enumerate(other)])
    write_rows(tmp_path / "pairs.jsonl", *map(pair, pairs))
    evaluated = [{**pair(some[1]), "split": "test"} for some in (rated, other, pairs)]
    write_rows(tmp_path / "bench.jsonl", *evaluated)
    return tmp_path


def recipe(folder: Path, text: str) -> Recipe:
    return Recipe.from_text(f"data_root: {folder}\n{text}")


def test_rows_start_from_every_set_that_is_named_and_keep_its_splits(folder):
    data = read_training_data(recipe(folder, BASE))
    table = data.table
    assert table.objectives.names == ["rated-quality", "answers-the-question"]
    own = [i for i, edit in enumerate(table.edits) if edit == OWN_REPLY]
    train, test = set(data.train_rows.tolist()), set(data.test_rows.tolist())
    kinds = {kind: [i for i in own if f"{kind} fact" in table.conversations[i].response] for kind in ("rated", "other")}
    # a quarter of the prompts are test prompts, and one training prompt of each set is evaluated on
    assert [sum(i in part for i in kinds["rated"]) for part in (train, test)] == [29, 10]
    assert [sum(i in part for i in kinds["other"]) for part in (train, test)] == [17, 6]
    assert len(own) == 29 + 10 + 2 * (17 + 6)
    assert all(np.isnan(table.ratings[i, 0]) for i in own)
    [report] = data.constructs
    assert (report.train, report.test) == (2 * 63, 2 * 22)
    assert report.sources == ["rated", "pairs", "other"]
    assert report.left_out == {"whose prompt is evaluated on": 3}
    counts = data.counts()
    assert (counts["constructed_train"], counts["constructed_test"]) == (126, 44)


def test_neither_an_evaluated_prompt_nor_its_reply_is_trained_on(folder):
    data = read_training_data(recipe(folder, BASE))
    table = data.table
    evaluated = {pair.prompt_key for pair in data.evaluations["bench"]}
    replies = {pair.chosen.response for pair in data.evaluations["bench"]}
    for role, rows in (("train", data.train_rows), ("test", data.test_rows)):
        tests = {i for i in rows if int(table.conversations[i].prompt[-1].content.split()[1]) % 4 == 0}
        assert len(tests) == (0 if role == "train" else len(rows))
        borrowed = [i for i in rows if table.edits and table.edits[i] == OTHER_REPLY]
        assert borrowed
        for i in borrowed:
            assert (int(table.conversations[i].response.split()[2].rstrip(":")) % 4 == 0) == (role == "test")
    trained = [table.conversations[i] for i in data.train_rows]
    assert evaluated.isdisjoint(c.prompt_key for c in trained)
    assert replies.isdisjoint(c.response for c in trained)


def test_constructed_ratings_give_pairs_within_prompts(folder):
    data = read_training_data(recipe(folder, BASE))
    made = [pair for pair in data.pairs if pair.source == "answers-the-question"]
    assert len(made) == 63
    assert sum(pair.source == "answers-the-question" for pair in data.test_pairs) == 22
    assert all(pair.chosen.prompt_key == pair.rejected.prompt_key and pair.margin == 1 for pair in made)
    assert all("fact" in pair.chosen.response for pair in made)


def test_only_replies_with_the_requested_ratings_are_used(folder):
    text = BASE.replace("[rated, pairs, other.jsonl]", "[{set: rated, where: {rated-quality: [3, 4]}}, "
                        "{set: other.jsonl, where: {grade: [1, 1]}}]")  # fmt: skip
    table = read_training_data(recipe(folder, text)).table
    numbers = {kind: set[int]() for kind in ("rated", "other")}
    for conversation, edit in zip(table.conversations, table.edits, strict=True):
        if edit == OWN_REPLY:
            kind, _, number = conversation.response.split()[:3]
            numbers[kind].add(int(number.rstrip(":")))
    assert numbers["rated"] == {i for i in range(40) if i % 5 >= 3}
    assert numbers["other"] == {i for i in range(24) if i % 2 and i != 1}


def test_the_same_recipe_gives_the_same_rows_and_another_seed_others(folder):
    def rows(seed: int) -> list[str]:
        return [c.key for c in read_training_data(recipe(folder, f"seed: {seed}\n{BASE}")).table.conversations]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_measured_objectives_and_reference_leave_constructed_rows_out(folder):
    data = read_training_data(recipe(folder, BASE))
    train = np.arange(len(data.table))
    table = add_computed(data.table, [("verbosity", "response_length")], list(range(len(data.table))), train)
    measured = ~np.isnan(table.ratings[:, -1])
    assert measured.tolist() == [edit == "" for edit in table.edits]
    assert table.objectives[-1].high == pytest.approx(np.percentile(np.log1p(np.arange(40)), 99))


def test_natural_rows_without_rated_sets_are_the_sides_of_pairs_or_else_the_good_replies(folder):
    text = BASE.replace("  - {data: rated.jsonl, objectives: {quality: [0, 4]}}\n", "").replace("rated, ", "")
    text = text.replace("  - {construct", "  - {construct: fluent, from: [other.jsonl]}\n  - {construct")
    table = read_training_data(recipe(folder, text)).table
    assert [edit == "" for edit in table.edits] == table.natural.tolist()
    assert int(table.natural.sum()) == 2 * 24
    text = text.replace("  - {data: pairs.jsonl}\n", "").replace("[pairs, ", "[")
    table = read_training_data(recipe(folder, text)).table
    natural = [table.conversations[i] for i in np.flatnonzero(table.natural)]
    assert len({c.key for c in natural}) == len(natural) == 17 + 6
    assert all("fact" in c.response for c in natural)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("answers-the-question, from", "answers-the-qestion, from"),
         r"ratings\.1\.construct: unknown construct .*did you mean answers-the-question"),
        (("[rated,", "[ratde,"), r"ratings\.1\.from\.0: no set of the recipe \(did you mean rated\?\), and ratde: no such"),
        (("[rated,", "[{set: rated, where: {rated-qualty: [1, 2]}},"),
         r"ratings\.1\.from\.0\.where: unknown objective 'rated-qualty' \(did you mean rated-quality\?\)"),
        (("[rated,", "[{set: rated, where: {rated-quality: [2.5, 2.6]}},"),
         r"ratings\.1\.from\.0\.where: no reply of 'rated' has rated-quality from 2\.5 to 2\.6"),
        (("pairs, other", "{set: pairs, where: {grade: [1, 1]}}, other"),
         r"ratings\.1\.from\.1\.where: 'pairs' is a preference set, expected a rated one"),
        (("[rated, pairs, other.jsonl]", "[{set: rated, prompts: harmful}]"),
         r"ratings\.1: no training reply is fit for answers-the-question \(39 to harmful prompts; 1 whose prompt is"),
        (("from: [rated, pairs, other.jsonl]", "name: rated-quality, from: [rated]"), "'rated-quality' is defined twice"),
        (("  - {data: pairs.jsonl}", "  - {data: pairs.jsonl, source: rated}"),
         r"ratings\.1\.from\.0: 'rated' is ratings\.0 and preferences\.0, expected the data of one"),
        (("margin: 0.5}", "margin: 0.5}\n  - {from_ratings: fluent, margin: 0.5}"),
         r"preferences\.2\.from_ratings: unknown objective 'fluent'"),
        (("[rated, pairs, other.jsonl]", "[{set: other.jsonl, where: {grad: [1, 1]}}]"),
         r"other\.jsonl, field 'grad': no row has it \(did you mean grade\?\)"),
    ],
)  # fmt: skip
def test_faults_are_refused_in_one_line(folder, change, message):
    with pytest.raises(Exception, match=message) as fault:
        read_training_data(recipe(folder, BASE.replace(*change)))
    assert "\n" not in str(fault.value)


def test_keys_of_a_construct_need_one(folder):
    with pytest.raises(RecipeError, match=r"ratings\.0: variants needs construct, found data$"):
        recipe(folder, BASE.replace("[0, 4]}}", "[0, 4]}, variants: 5}"))
    with pytest.raises(RecipeError, match=r"ratings\.1: construct needs from"):
        recipe(folder, BASE.replace(", from: [rated, pairs, other.jsonl]", ""))


def test_a_recipe_that_is_written_reads_back_the_same(folder):
    given = recipe(folder, BASE)
    assert "from:" in given.to_yaml()
    assert Recipe.from_text(given.to_yaml()) == given


def test_a_dry_run_counts_the_edited_conversations(folder):
    with_it = dry_run(recipe(folder, BASE), DEVICES["h100"])
    without = dry_run(
        recipe(folder, BASE.replace("from: [rated, pairs, other.jsonl]", "from: [rated], rows: 1")), DEVICES["h100"]
    )
    assert with_it.data is not None
    assert with_it.work.conversations > without.work.conversations
    assert "ratings.1.from.2" in [entry["place"] for entry in with_it.sets]


def test_relevance_is_labelled_by_the_backbone_and_scaled_by_training_rows(folder, tmp_path):
    text = "backbone: {model: armorm-tiny, device: cpu, dtype: float32}\n" + BASE.replace(
        "answers-the-question, from: [rated, pairs, other.jsonl]", "relevance, from: [rated], rows: 8"
    )
    given = recipe(folder, text.replace("from_ratings: answers-the-question", "from_ratings: rated-quality"))
    before = read_training_data(given)
    column = before.table.objectives.position("relevance")
    assert np.isnan(before.table.ratings[:, column]).all()
    after = label_relevance(given, before, tmp_path / "likelihoods.safetensors")
    labels, edits = after.table.ratings[:, column], np.array(after.table.edits)
    constructed = np.zeros(len(edits), bool)
    constructed[[*before.train_rows, *before.test_rows]] = True
    constructed &= edits != ""
    assert np.array_equal(~np.isnan(labels), constructed)
    objective = after.table.objectives[column]
    training = labels[after.train_rows][constructed[after.train_rows]]
    assert (objective.low, objective.high) == pytest.approx(tuple(np.percentile(training, (1, 99))))
    assert (objective.source, objective.direction) == ("constructed", "higher")
    language_model = load_language_model("armorm-tiny", device="cpu")
    for row in np.flatnonzero(constructed)[:3]:
        conversation = after.table.conversations[row]
        encoded = language_model.template.encode([conversation, without_prompt(conversation)])
        given_prompt, alone = reply_log_likelihoods(language_model, encoded)
        assert labels[row] == pytest.approx(given_prompt - alone, abs=1e-3)


def test_relevance_gives_no_pairs(folder):
    text = BASE.replace("answers-the-question", "relevance")
    with pytest.raises(RecipeError, match=r"preferences\.1\.from_ratings: 'relevance' is measured by the backbone"):
        read_training_data(recipe(folder, text))


@pytest.mark.slow
def test_a_run_reports_accuracy_on_unseen_templates_and_says_how_labels_are_made(
    small_recipe, small_features, tmp_path
):
    ratings = [entry.model_dump(by_alias=True) for entry in small_recipe.ratings if entry.data] + [
        {"construct": name, "from": ["workshop", "harbour"]} for name in ("fluent", "courteous", "relevance")
    ]
    values = small_recipe.model_dump() | {"ratings": ratings, "quantiles": None, "joint": None}
    values["preferences"] = [*values["preferences"], {"from_ratings": "courteous", "margin": 0.5}]
    model = train(Recipe.from_dict(values), tmp_path, features=small_features, quiet=True)
    assert [o.source for o in model.objectives][-3:] == ["constructed"] * 3
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = metrics["evaluation"]["constructs"]
    assert set(found) == {"fluent", "courteous", "relevance"}
    assert found["relevance"]["pairs"] > 5
    assert (tmp_path / "work" / "likelihoods.safetensors").exists()
    assert found["fluent"]["pairs"] > 5
    assert found["fluent"]["accuracy"] > 0.8
    assert set(found["fluent"]["edits"]) <= {"words shuffled", "phrase looped"}
    assert (
        model.reference["rows"]
        == metrics["data"]["counts"]["rated_train"] - metrics["data"]["counts"]["constructed_train"]
    )
    card = (tmp_path / "README.md").read_text()
    assert "| fluent | a reply 1; its words shuffled, or one of its phrases looped, 0 | workshop, harbour |" in card
