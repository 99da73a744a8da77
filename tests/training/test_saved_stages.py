"""Every input of a stage, changed alone: the stages that read it are fitted again, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from armorm import Recipe, train
from armorm.training import saved_stages
from tests.helpers.shared_folders import shared_folder

HEADS = {"joint", "gate", "quantiles"}
PAIRS = {"first_gate", *HEADS}
ALL = {"regression", *PAIRS}
RECORDS = {"statistics", "rated_rows"}  # of the regression
Change = Callable[[Path], None]


def edit(name: str, change: Callable[[list[dict]], object]) -> Change:
    """A change of the rows of a file."""

    def apply(folder: Path) -> None:
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return apply


def first(rows: list[dict], split: str) -> dict:
    return next(row for row in rows if row["split"] == split)


def hold_out(rows: list[dict]) -> None:
    prompt = first(rows, "train")["messages"][:-1]
    for row in rows:
        if row["messages"][:-1] == prompt:
            row["split"] = "test"


def swap_sides(rows: list[dict]) -> None:
    row = first(rows, "train")
    row["chosen"], row["rejected"] = row["rejected"], row["chosen"]


def grow_evaluation(folder: Path) -> None:
    """A prompt that is trained on, without pairs, is evaluated on as well."""
    row = json.loads((folder / "rated.jsonl").read_text().splitlines()[0])
    pair = {"prompt": row["messages"][:-1], "chosen": "Yes, gladly.", "rejected": "No.", "split": "test"}
    edit("bench", lambda rows: rows.append(pair))(folder)


def some_reference(folder: Path) -> None:
    lines = (folder / "rated.jsonl").read_text().splitlines(keepends=True)
    (folder / "reference.jsonl").write_text("".join(lines[:80]))


RATED = "ratings=[{data: rated.jsonl, objectives: {help: [0, 4], length: %s}}]"
CHANGES: dict[str, tuple[list[str], Change | None, set[str]]] = {
    "nothing": ([], None, set()),
    "only the name and the evaluation": (["name=other", "evaluation=[]"], None, set()),
    "a test rating": ([], edit("rated", lambda rows: first(rows, "test").update(help=2.5)), set()),
    "a training rating": ([], edit("rated", lambda rows: first(rows, "train").update(help=2.5)), ALL),
    "which rows are test rows": ([], edit("rated", hold_out), ALL),
    "what is evaluated on": ([], grow_evaluation, ALL),
    "a scale": ([RATED % "[-1, 7]"], None, ALL),
    "a direction": ([RATED % "{range: [0, 7], direction: lower}"], None, ALL),
    "penalties": (["regression.alphas=[0.1, 1]"], None, ALL),
    "weights of objectives": (["regression.weights={rated-help: 2}"], None, ALL),
    "margins": ([], edit("choices", lambda rows: [row.update(margin=1 + i % 3) for i, row in enumerate(rows)]), PAIRS),
    "sides of a pair": ([], edit("choices", swap_sides), PAIRS),
    "a source": (["preferences=[{data: choices.jsonl, source: other}]"], None, PAIRS),
    "weights of sets": (["preferences=[{data: choices.jsonl, weight: 2}]"], None, PAIRS),
    "balance of sets": (["gating.balance=equal"], None, PAIRS),
    "the reference": (["reference={data: reference.jsonl}"], some_reference, PAIRS),
    "the debiasing": (["debias.level=within_prompt"], None, PAIRS),
    "settings of the gate": (["gating.label_smoothing=0.1"], None, PAIRS),
    "the seed": (["seed=1"], None, PAIRS),
    "settings of joint training": (["joint.r2_price=0.5"], None, HEADS),
    "settings of the quantiles": (["quantiles.levels=[0.8]"], None, {"quantiles"}),
    "no joint training": (["joint=null"], None, {"gate", "quantiles"}),
}


def train_here(folder: Path, small_recipe: Recipe, overrides: list[str], features: Path) -> None:
    """Train in `folder/run` on `folder/data`, which the recipe calls by the same name wherever the folder is."""
    recipe = Recipe.from_text(
        small_recipe.to_yaml(),
        [
            "data_root=data",
            RATED % "[0, 7]",
            "debias.against=[rated-length]",
            "evaluation=[{benchmark: pairs, data: bench.jsonl}]",
            "joint={pair_weights: [0.3]}",
            "quantiles={levels: [0.5]}",
            "gating.steps=2",
            "gating.hidden_size=4",
            "gating.margin=1",
            *overrides,
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(recipe, folder / "run", features=features, quiet=True)


@pytest.fixture(scope="module")
def finished(small_recipe, small_run, tmp_path_factory) -> Path:
    """A folder with data, and a run on them with all stages; the features are those of `small_run`."""

    def write(folder: Path) -> None:
        shutil.copytree(small_run / "work" / "features", folder / "features")
        (folder / "data").mkdir()
        rated, pairs = [], []
        for path in sorted(Path(small_recipe.data_root).glob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            if path.stem != "choices":
                rated += [{name: row[name] for name in ("messages", "split")} for row in rows]
            else:
                pairs = rows
        rated.sort(key=lambda row: row["split"], reverse=True)  # a training row is the first
        for number, row in enumerate(rated):
            row |= {"help": number % 5, "length": min(len(row["messages"][-1]["content"]) // 100, 7)}
        pairs = [
            row | {"margin": 1 + i % 2} for i, row in enumerate(pairs) if row["prompt"] != rated[0]["messages"][:-1]
        ]
        for name, rows in (("rated", rated), ("choices", pairs), ("bench", [first(pairs, "test")])):
            (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train_here(folder, small_recipe, [], folder / "features")

    return shared_folder(tmp_path_factory, "stages", write)


def written(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "work").glob("*.safetensors")}


def fitted_again(finished: Path, folder: Path, small_recipe: Recipe, overrides: list[str], change: Change | None):
    for name in ("data", "run"):
        shutil.copytree(finished / name, folder / name)
    if change is not None:
        change(folder / "data")
    before = written(folder / "run")
    assert set(before) == {*ALL, *RECORDS}
    train_here(folder, small_recipe, overrides, finished / "features")
    return {name for name, time in written(folder / "run").items() if time != before[name]} - RECORDS


FAST = ("nothing", "which rows are test rows", "what is evaluated on", "margins", "settings of the quantiles")
EACH = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow], id=name) for name in CHANGES]


@pytest.mark.parametrize("changed", EACH)
def test_the_stages_that_read_what_changed_are_fitted_again_and_no_others(finished, tmp_path, small_recipe, changed):
    overrides, change, expected = CHANGES[changed]
    assert fitted_again(finished, tmp_path, small_recipe, overrides, change) == expected


@pytest.mark.parametrize(
    ("stage", "expected"), [("regression", ALL), ("first_gate", PAIRS), ("joint", HEADS), ("gate", {"gate"})]
)
@pytest.mark.slow
def test_another_version_of_a_stage_fits_it_again(finished, tmp_path, small_recipe, monkeypatch, stage, expected):
    monkeypatch.setitem(saved_stages.VERSIONS, stage, saved_stages.VERSIONS[stage] + 1)
    assert fitted_again(finished, tmp_path, small_recipe, [], None) == expected
