from __future__ import annotations

import json
from pathlib import Path

import pytest

from armorm.data.synthetic import RECIPE
from armorm.errors import RecipeError
from armorm.training.recipe import Recipe

MINIMAL = """
ratings:
  - {data: a.jsonl, objectives: {quality: [0, 4]}}
preferences:
  - {data: b.jsonl}
"""
ROOT = Path(__file__).parents[2]


def refusal(extra: str, base: str = MINIMAL, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(base + extra, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_minimal_recipe_has_the_published_defaults():
    recipe = Recipe.from_text(MINIMAL)
    assert recipe.regression.alphas == tuple(10.0**e for e in range(-4, 5))
    assert not recipe.regression.intercept
    gating = recipe.gating
    assert (gating.hidden_size, gating.hidden_layers, gating.temperature, gating.dropout) == (1024, 3, 10, 0.2)
    assert (gating.learning_rate, gating.weight_decay, gating.steps, gating.batch_size) == (1e-3, 0, 2000, 1024)
    assert recipe.backbone.overflow == "error"


def test_the_recipe_of_the_design_is_accepted(monkeypatch):
    monkeypatch.delenv("ARMORM_DATA", raising=False)
    recipe = Recipe.from_text(
        """
name: truthful-and-safe
seed: 0
backbone: {model: armorm-tiny, dtype: bfloat16, max_length: 2048, overflow: error}
data_root: ${ARMORM_DATA:-../shared/data}
ratings:
  - {data: ratings/truthfulqa.jsonl.gz, objectives: {truthfulqa-truthful: [0, 1], truthfulqa-informative: [0, 1]}}
  - {preset: helpsteer}
  - {compute: response_length, name: verbosity}
preferences:
  - {data: preferences/convarg.jsonl.gz, max_pairs_per_prompt: 50}
  - {from_ratings: truthfulqa-truthful, margin: 0.5}
reference: ratings
regression: {alphas: [0.0001, 0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000], intercept: false, validation: by_prompt}
debias: {against: [verbosity], metric: spearman, level: pooled}
gating: {hidden_size: 1024, hidden_layers: 3, temperature: 10, logit_scale: fit, dropout: 0.2, learning_rate: 0.001, steps: 2000, batch_size: 1024}
evaluation:
  - {benchmark: pairs, data: benchmarks/llmbar.jsonl.gz}
"""
    )
    assert recipe.data_root == "../shared/data"
    assert recipe.ratings[0].objectives["truthfulqa-truthful"].range == (0.0, 1.0)
    assert recipe.preferences[1].margin == 0.5


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("gatting: {steps: 3}", ["gatting", "did you mean gating?"]),
        ("gating: {stepz: 3}", ["gating.stepz", "did you mean steps?"]),
        ("backbone: {max_lenght: 3}", ["backbone.max_lenght", "did you mean max_length?"]),
        ("seed: -1", ["seed", "-1", "greater than or equal to 0"]),
        ("seed: many", ["seed", "'many'", "integer"]),
        ("debias: {against: [verbosity], metric: spearmn}", ["debias.metric", "'spearmn'", "did you mean spearman?"]),
        ("debias: {against: []}", ["debias.against", "at least 1"]),
        ("debias: {against: [verbosity], keep: {quality: [length]}}", ["debias", "'length', which is not in against"]),
        ("debias: {against: [verbosity], keep: {verbosity: []}}", ["debias", "verbosity, which is a bias"]),
        ("regression: {alphas: [1, 0]}", ["regression.alphas", "found 0", "penalties > 0"]),
        ("regression: {validation: at_random}", ["regression.validation", "by_prompt"]),
        ("gating: {dropout: 1}", ["gating.dropout", "less than 1"]),
        ("gating: {logit_scale: 0}", ["gating.logit_scale"]),
        ("evaluation: [{benchmark: pears}]", ["evaluation.0.benchmark", "'pears'", "did you mean pairs?"]),
        (
            "evaluation: [{benchmark: pairs, data: a/x.jsonl}, {benchmark: ppe}, {benchmark: pairs, data: b/x.jsonl}]",
            ["evaluation: 0 and 2 are both named 'x'"],
        ),
        (
            "evaluation: [{benchmark: ppe, data: a}, {benchmark: judgebench, name: ppe}]",
            ["evaluation: 0 and 1 are both named 'ppe'"],
        ),
        ("evaluation: [{benchmark: ratings, data: x.jsonl}]", ["evaluation.0", "expected no data"]),
        ("reference: {dat: x}", ["reference.dat", "did you mean data?"]),
        ("backbone: {overflow: truncate}", ["backbone.overflow", "truncate_prompt"]),
        ("backbone: {workers: 2}", ["backbone", "workers and gpus_per_worker need engine: ray"]),
        ("backbone: {engine: dask}", ["backbone.engine", "'dask'", "local"]),
        ("limit: 0", ["limit", "0"]),
    ],
)
def test_a_fault_is_named_by_its_path_and_the_nearest_right_name(extra, parts):
    message = refusal(extra)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("{data: a.jsonl}", "needs objectives"),
        ("{data: a.jsonl, preset: helpsteer, objectives: {q: [0, 1]}}", "data and preset"),
        ("{objectives: {q: [0, 1]}}", "none of data, preset, compute"),
        ("{data: a.jsonl, objectives: {q: [1, 1]}}", "ratings.0.objectives.q.range"),
        ("{data: a.jsonl, objectives: {q: [4, 0]}}", "low < high"),
        ("{data: a.jsonl, objectives: {q: {range: [0, 4], direction: down}}}", "ratings.0.objectives.q.direction"),
        ("{data: a.jsonl, objectives: {q: {rnge: [0, 4]}}}", "did you mean range?"),
        ("{preset: helpsteer, objectives: {q: [0, 1]}}", "objectives need data"),
        ("{data: a.jsonl, name: x, objectives: {q: [0, 1]}}", "name needs compute"),
    ],
)
def test_a_faulty_rating_entry_is_refused(entry, part):
    assert part in refusal("", f"ratings:\n  - {entry}\npreferences:\n  - {{data: b.jsonl}}\n")


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("{data: b.jsonl, from_ratings: quality}", "exactly one"),
        ("{max_pairs_per_prompt: 3}", "exactly one"),
        ("{from_ratings: quality}", "margin > 0"),
        ("{data: b.jsonl, margin: 1}", "margin needs from_ratings"),
        ("{data: b.jsonl, max_pairs_per_prompt: 0}", "preferences.0.max_pairs_per_prompt"),
    ],
)
def test_a_faulty_preference_entry_is_refused(entry, part):
    base = f"ratings:\n  - {{data: a.jsonl, objectives: {{quality: [0, 4]}}}}\npreferences:\n  - {entry}\n"
    assert part in refusal("", base)


def test_keys_that_stand_twice_are_refused():
    assert "'seed' occurs twice" in refusal("seed: 1\nseed: 2\n")


def test_text_that_is_no_yaml_is_refused_in_one_line():
    assert "not valid YAML" in refusal("gating: {steps: 1")
    assert "expected keys and values" in refusal("", "- just\n- a list\n")


def test_a_missing_recipe_file_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.yaml: no such file or folder; looked for /.*absent\.yaml$"):
        Recipe.from_yaml(tmp_path / "absent.yaml")


def test_data_instead_of_a_recipe_and_an_empty_file_are_refused_with_the_next_step(tmp_path):
    data, empty = tmp_path / "mine.csv", tmp_path / "empty.yaml"
    data.write_text("prompt,response,x\na,b,1\n")
    empty.write_text("")
    with pytest.raises(RecipeError, match=r"a recipe is YAML; armorm init .*mine\.csv writes one$"):
        Recipe.from_yaml(data)
    with pytest.raises(RecipeError, match=r"empty\.yaml: found an empty file, expected keys and values$"):
        Recipe.from_yaml(empty)


def test_overrides_reach_keys_lists_and_new_sections():
    overrides = [
        "gating.steps=7",
        "ratings.0.data=c.jsonl",
        "debias.against=[verbosity]",
        "regression.alphas=[1, 2e-3]",
    ]
    recipe = Recipe.from_text(MINIMAL, overrides)
    assert recipe.gating.steps == 7
    assert recipe.ratings[0].data == "c.jsonl"
    assert recipe.debias is not None
    assert recipe.debias.against == ("verbosity",)
    assert recipe.regression.alphas == (1.0, 0.002)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("gating.steps", "expected key=value"),
        ("ratings.3.data=x", "expected a number from 0 to 0"),
        ("ratings.first.data=x", "'first'"),
        ("gating.stepz=1", "did you mean steps?"),
        ("seed.deep=1", "seed"),
        ("gating=[", "override"),
    ],
)
def test_a_faulty_override_is_refused(override, part):
    assert part in refusal("seed: 1\n", overrides=(override,))


def test_environment_variables_fill_in_with_their_default(monkeypatch):
    text = MINIMAL + "data_root: ${ARMORM_TEST_ROOT:-/fallback}/sets\n"
    monkeypatch.delenv("ARMORM_TEST_ROOT", raising=False)
    assert Recipe.from_text(text).data_root == "/fallback/sets"
    monkeypatch.setenv("ARMORM_TEST_ROOT", "/elsewhere")
    assert Recipe.from_text(text).data_root == "/elsewhere/sets"


def test_an_unset_variable_without_default_is_refused(monkeypatch):
    monkeypatch.delenv("ARMORM_TEST_ROOT", raising=False)
    assert "ARMORM_TEST_ROOT is not set" in refusal("data_root: ${ARMORM_TEST_ROOT}\n")


def test_the_hash_changes_with_any_value_and_with_nothing_else():
    same = Recipe.from_text(MINIMAL + "seed: 0\n")
    assert Recipe.from_text(MINIMAL).hash == same.hash
    assert Recipe.from_text(MINIMAL, ["seed=1"]).hash != same.hash
    assert Recipe.from_text(MINIMAL, ["ratings.0.objectives.quality=[0, 5]"]).hash != same.hash


def test_a_recipe_written_out_reads_back_the_same():
    recipe = Recipe.from_text(RECIPE)
    again = Recipe.from_text(recipe.to_yaml())
    assert again == recipe
    assert again.hash == recipe.hash


def test_the_recipes_of_the_repository_are_valid():
    names = {Recipe.from_yaml(path).name for path in (ROOT / "recipes").glob("*.yaml")}
    assert {"demo", "real-small"} <= names


def test_the_demo_recipe_of_the_repository_is_the_embedded_one():
    assert (ROOT / "recipes" / "demo.yaml").read_text() == RECIPE


@pytest.mark.parametrize("name", ["../model", "a/b", "a\\b", "..", ".", "", "a\x1b[2J", "x" * 300])
def test_a_name_that_is_no_plain_name_is_refused(name):
    with pytest.raises(RecipeError, match="name"):
        Recipe.from_text(f"name: {json.dumps(name)}\n{MINIMAL}")


VARIABLES = """
name: ${ARMORM_TEST_NAME:-plain}
seed: ${ARMORM_TEST_SEED:-3}
data_root: ${ARMORM_TEST_ROOT:-/fallback}/sets
ratings:
  - {data: "${ARMORM_TEST_ROOT:-a}.jsonl", source: a, objectives: {quality: [0, "${ARMORM_TEST_HIGH:-4}"]}}
  - {construct: complete, from: ["${ARMORM_TEST_SET:-a}"]}
preferences:
  - {data: b.jsonl}
report_to: ${ARMORM_TEST_TRACKER:-tensorboard}
"""


def test_a_recipe_is_stored_with_its_variables_and_not_with_what_they_hold(monkeypatch):
    for name, value in (("NAME", "hidden-name"), ("SEED", "77701"), ("ROOT", "/hidden-root"), ("HIGH", "88801")):
        monkeypatch.setenv(f"ARMORM_TEST_{name}", value)
    recipe = Recipe.from_text(VARIABLES, ["backbone.model=${ARMORM_TEST_ROOT}/model"])
    assert (recipe.name, recipe.seed, recipe.data_root) == ("hidden-name", 77701, "/hidden-root/sets")
    assert recipe.ratings[0].objectives["quality"].range == (0, 88801)
    text = recipe.to_yaml()
    assert not any(value in text for value in ("hidden-", "77701", "88801"))
    assert text.count("${ARMORM_TEST_") == 8
    again = Recipe.from_text(text)
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.to_yaml() == text
    copied = recipe.model_copy(update={"limit": 5})
    assert "hidden-" not in copied.to_yaml()


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "SECRET"])
def test_a_variable_that_holds_credentials_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "hf_abc")
    message = refusal(f"data_root: ${{{name}}}\n")
    assert name in message
    assert "data_root" in message
    assert "hf_abc" not in message


def test_a_recipe_in_another_encoding_is_refused_by_its_name(tmp_path):
    (tmp_path / "a.yaml").write_bytes(MINIMAL.encode("utf-16"))
    with pytest.raises(RecipeError, match=r"a\.yaml: cannot be read: found text in UTF-16, expected UTF-8"):
        Recipe.from_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_numbers_that_are_not_finite_are_refused(value):
    assert "gating.learning_rate" in refusal(f"gating: {{learning_rate: {value}}}\n")
    assert "ratings.0.objectives.q.range" in refusal(
        "", f"ratings:\n  - {{data: a.jsonl, objectives: {{q: [0, {value}]}}}}\npreferences:\n  - {{data: b.jsonl}}\n"
    )


def test_paths_of_data_start_at_data_root_else_the_recipes_folder_else_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "project" / "sets").mkdir(parents=True)
    (tmp_path / "cwd" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    ratings = "ratings: [{data: a.jsonl, objectives: {good: [0, 1]}}]\n"
    path = Path("../project/recipe.yaml")

    def root(text: str, *overrides: str) -> str:
        path.write_text(ratings + text)
        return Recipe.from_yaml(path, overrides).data_root

    assert root("") == "."
    assert root("data_root: sets\n") == "../project/sets"
    assert root("data_root: other\n") == "other"  # not in the recipe's folder
    assert root("data_root: absent\n") == "absent"
    assert root(f"data_root: {tmp_path}\n") == str(tmp_path)
    assert root("", "data_root=sets") == "sets"  # of a command line
    (tmp_path / "project" / "a.jsonl").write_text("{}\n")
    assert root("") == "../project"
    stored = Recipe.from_yaml(path).to_yaml()
    (tmp_path / "cwd" / "stored.yaml").write_text(stored)
    assert Recipe.from_yaml("stored.yaml").data_root == "../project"
