"""Rated rows behind a reward: a run's record, refitting without rows, label errors, the two commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from armorm import ArmoRM
from armorm.conversation import Conversation
from armorm.errors import StoreError
from armorm.evaluation.audits.label_errors import label_errors
from armorm.explain.row_influences import row_influences
from armorm.features.store import KEY, FeatureStore
from armorm.files import write_arrays
from armorm.heads.rated_record import FILE, RatedRecord, RatedRun
from armorm.objectives import Objective, ObjectiveError, ObjectiveSet
from tests.helpers.commands import run as command
from tests.helpers.conversations import chat

N, D = 90, 7
CONVERSATION = chat("How do I learn to juggle?", "Start with one ball, then take two.")


def ridge(features, ratings, penalty, intercept, start, weights) -> tuple[np.ndarray, float]:
    """Weights and intercept by plain float64 algebra, shrunk towards `start`; squared errors times `weights`."""
    x, residuals = features.astype(np.float64), ratings - features.astype(np.float64) @ start
    if not len(x):
        return start, 0.0
    shares = weights / weights.sum()
    mean, level = (shares @ x, shares @ residuals) if intercept else (np.zeros(x.shape[1]), 0.0)
    centred = x - mean
    gram = centred.T @ np.diag(weights) @ centred + penalty * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (weights * (residuals - level)))
    return start + weight, level - weight @ mean


@pytest.fixture(params=["plain", "intercept and start", "weights", "intercept, start and weights"])
def hand_made(request, tmp_path) -> RatedRun:
    """A run of 90 rows of 30 prompts and two sets; the second objective, of less is better, is rated on the first set."""
    rng = np.random.default_rng(0)
    objectives = ObjectiveSet([Objective.rated("a-help", 1, 5), Objective.rated("a-harm", 0, 4, direction="lower")])
    features = (rng.normal(size=(N, D)) + 0.5).astype(np.float32)
    ratings = np.column_stack([rng.integers(1, 6, N), rng.integers(0, 5, N)]).astype(np.float64)
    ratings[60:, 1] = np.nan
    keys = np.array([f"key {i:12d}" for i in range(N)], KEY)
    store = FeatureStore(tmp_path / "work" / "features", fingerprint={"weights": "w"}, hidden_size=D, dtype="float32")
    order = rng.permutation(N)
    for number, part in enumerate(np.array_split(order, 3)):
        store.write_shard(f"shard-x-{number:05d}.safetensors", keys[part], features[part], keys[:1], features[:1])
    start = rng.normal(size=(2, D)) / D if "start" in request.param else np.empty((0, 0))
    weights = np.exp(rng.normal(size=(N, 2))) if "weights" in request.param else np.empty((0, 0))
    record = RatedRecord(
        objectives=objectives,
        keys=keys,
        ratings=ratings,
        folds=np.arange(N) % 5,
        prompts=np.arange(N) % 30,
        sources=(np.arange(N) >= 60).astype(np.int64),
        files=np.zeros(N, np.int64),
        numbers=np.arange(1, N + 1),
        edits=np.zeros(N, np.int64),
        penalties=np.array([2.0, 0.5]),
        intercept="intercept" in request.param,
        start=start,
        prompt_texts=[f"prompt {i}" for i in range(30)],
        response_texts=[f"response {i}" for i in range(N)],
        source_names=["first", "second"],
        file_names=["rows.jsonl"],
        edit_names=[""],
        store="features",
        weights=weights,
    )
    record.save(tmp_path / "work" / FILE, "the key")
    found = RatedRun(tmp_path, record, store, np.stack([refit(record, features, c)[0] for c in (0, 1)]))
    write_arrays(
        tmp_path / "work" / "regression.safetensors", {"weight": found.weight.astype(np.float32)}, {"key": "the key"}
    )
    return found


def refit(record: RatedRecord, features: np.ndarray, column: int, without=()) -> tuple[np.ndarray, float]:
    """One objective on its rows, without some."""
    rows = np.setdiff1d(np.flatnonzero(~np.isnan(record.ratings[:, column])), without)
    start = record.start[column] if record.start.size else np.zeros(features.shape[1])
    ratings = record.objectives.to_reward(record.ratings)[rows, column]
    weights = record.weights[rows, column] if record.weights.size else np.ones(len(rows))
    return ridge(features[rows], ratings, record.penalties[column], record.intercept, start, weights)


def reward(fitted: tuple[np.ndarray, float], response: np.ndarray) -> float:
    return float(response.astype(np.float64) @ fitted[0] + fitted[1])


def assert_effects_are_those_of_refitting(run: RatedRun, column: int, found, response, rows: int) -> None:
    """Of the first `rows` rows, and of every prompt and set, within 1e-6."""
    record, features = run.record, run.store.responses(run.record.keys)
    full = reward(refit(record, features, column), response)
    rated = np.flatnonzero(~np.isnan(record.ratings[:, column]))
    np.testing.assert_array_equal(np.sort(found.rows), rated)
    assert len(found.rows) >= rows
    for row, effect in list(zip(found.rows, found.effects, strict=True))[:rows]:
        assert effect == pytest.approx(full - reward(refit(record, features, column, [row]), response), abs=1e-6)
    assert sorted(found.prompts) == sorted(set(record.prompts[rated]))
    for prompt, effect in list(zip(found.prompts, found.prompt_effects, strict=True))[:rows]:
        without = refit(record, features, column, np.flatnonzero(record.prompts == prompt))
        assert effect == pytest.approx(full - reward(without, response), abs=1e-6)
    assert set(found.source_effects) == {record.source_names[i] for i in set(record.sources[rated])}
    for source, effect in found.source_effects.items():
        gone = np.flatnonzero(record.sources == record.source_names.index(source))
        if record.intercept and not len(np.setdiff1d(rated, gone)):
            assert np.isnan(effect)
        else:
            without = refit(record, features, column, gone)
            assert effect == pytest.approx(full - reward(without, response), abs=1e-6)


@pytest.mark.parametrize("column", [0, 1])
def test_effects_are_those_of_refitting_without_a_row_a_prompt_and_a_set(hand_made, column):
    response = np.linspace(-1, 2, D)
    weight = hand_made.weight[column].astype(np.float32)
    name = hand_made.record.objectives.names[column]
    found = row_influences(hand_made.folder, name, response, weight, 0.25, 2.0)
    assert_effects_are_those_of_refitting(hand_made, column, found, response, 50)
    raising, lowering = found.strongest(3)
    assert [entry["effect"] for entry in raising] == sorted(found.effects, reverse=True)[:3]
    assert [entry["effect"] for entry in lowering] == sorted(found.effects)[:3]
    first = raising[0]
    row = first["row"] - 1
    assert first["prompt"] == f"prompt {row % 30}" and first["response"] == f"response {row}"
    assert first["rating"] == hand_made.record.ratings[row, column]
    assert (found.reward, found.coefficient) == (0.25, 2.0)


def test_disagreement_is_the_error_of_refitting_without_the_rating(hand_made):
    record, features = hand_made.record, hand_made.store.responses(hand_made.record.keys)
    found = label_errors(hand_made)
    assert len(found) == (~np.isnan(record.ratings)).sum()
    assert (np.diff(np.abs(found.deviations)) <= 0).all()
    for row, column, expected, deviation in zip(
        found.rows[:20], found.columns[:20], found.expected[:20], found.deviations[:20], strict=True
    ):
        predicted = reward(refit(record, features, column, [row]), features[row])
        raw = record.objectives[int(column)].to_raw(predicted)
        assert expected == pytest.approx(float(raw), abs=1e-6)
        assert np.sign(deviation) == np.sign(record.ratings[row, column] - raw)


def test_a_planted_error_is_found_first(hand_made):
    """Ratings follow the features but for one."""
    features = hand_made.store.responses(hand_made.record.keys)
    ratings = hand_made.record.ratings.copy()
    right = np.clip(1 + 0.5 * features.sum(1), 1, 5)
    ratings[:, 0] = right
    ratings[17, 0] = 1.0 if right[17] > 3 else 5.0
    planted = replace(hand_made, record=replace(hand_made.record, ratings=ratings))
    found = label_errors(planted, ["a-help"])
    assert found.rows[0] == 17
    entry = next(found.entries(1))
    assert entry["row"] == 18 and entry["objective"] == "a-help"
    assert abs(entry["expected"] - right[17]) < 1 < abs(entry["rating"] - right[17])


def test_what_a_folder_lacks_is_said_in_one_line(hand_made, tmp_path):
    folder, weight = hand_made.folder, hand_made.weight[0]
    with pytest.raises(ObjectiveError, match="did you mean a-help"):
        row_influences(folder, "a-hepl", np.ones(D), weight, 0.0, 1.0)
    with pytest.raises(StoreError, match="is not the one that this run fitted"):
        row_influences(folder, "a-help", np.ones(D), weight + 0.01, 0.0, 1.0)
    write_arrays(folder / "work" / "regression.safetensors", {"weight": hand_made.weight}, {"key": "another"})
    with pytest.raises(StoreError, match="is of other rows"):
        RatedRun.open(folder)
    (folder / "work" / FILE).unlink()
    with pytest.raises(StoreError, match=r"armorm train .* writes it"):
        RatedRun.open(folder)
    with pytest.raises(StoreError, match="expected the folder of a training run"):
        RatedRun.open(tmp_path / "elsewhere")


def test_missing_features_are_counted(hand_made):
    (hand_made.folder / "work" / "features" / "shard-x-00001.safetensors").unlink()
    with pytest.raises(StoreError, match="lacks the features of 30 of 90 rated rows"):
        RatedRun.open(hand_made.folder)


# --- a trained model -----------------------------------------------------------------------------


def test_a_trained_model_names_the_rows_of_its_run(small_run, tmp_path):
    rm, run, name = ArmoRM.from_pretrained(small_run, dtype="float32"), RatedRun.open(small_run), "harbour-is_safe"
    found = rm.influences(CONVERSATION, name)
    batch = rm.score([CONVERSATION])
    column = rm.objectives.position(name)
    assert (found.reward, found.coefficient) == (batch.rewards[0, column], batch.coefficients[0, column])
    _, features = rm.backbone.features(rm.backbone.template.encode([Conversation.from_messages(CONVERSATION)]))
    column = run.record.objectives.position(name)
    assert_effects_are_those_of_refitting(run, column, found, np.asarray(features)[0], 10)
    with pytest.raises(StoreError, match="expected the folder of a training run"):
        rm.influences(CONVERSATION, name, run=tmp_path)


def test_the_record_says_where_each_row_is(small_run):
    """Texts and ratings of rows, read again from their files."""
    record = RatedRun.open(small_run).record
    for row in range(0, len(record), 17):
        entry = record.describe(row)
        values = json.loads(Path(entry["file"]).read_text().splitlines()[entry["row"] - 1])
        assert entry["response"] and json.dumps(entry["response"])[1:-1] in json.dumps(values)
        assert json.dumps(entry["prompt"])[1:-1] in json.dumps(values)


def test_explain_lists_rows_and_json_has_them(capsys, small_run):
    given = ("explain", "--model", small_run, "--prompt", "How do I juggle?", "--response", "Start with one ball.")
    code, out, _ = command(capsys, *given, "--rows", 2, "--objective", "workshop-help")
    assert code == 0
    assert "rated rows that moved workshop-help" in out and "raise it" in out and "without all of" in out
    code, out, _ = command(capsys, *given, "--rows", 2, "--json")
    entry = json.loads(out)
    largest = max(entry["shares"], key=lambda share: abs(share["relative"]))
    assert entry["influences"]["objective"] == largest["name"]
    assert len(entry["influences"]["raising"]) == 2


def test_inspect_ranks_labels_as_lines_and_as_a_file(capsys, small_run, tmp_path):
    output = tmp_path / "labels.jsonl"
    code, out, err = command(capsys, "inspect", small_run, "--labels", "--output", output)
    assert code == 0 and "disagree most" in out and str(output) in err
    entries = [json.loads(line) for line in output.read_text().splitlines()]
    record = RatedRun.open(small_run).record
    assert {entry["objective"] for entry in entries} == {o.name for o in record.objectives if not o.compute}
    assert [abs(e["deviations"]) for e in entries] == sorted((abs(e["deviations"]) for e in entries), reverse=True)
    code, out, _ = command(capsys, "inspect", small_run, "--labels", "--objective", "market-overall", "--json")
    assert {entry["objective"] for entry in json.loads(out)} == {"market-overall"}
    code, _, _ = command(capsys, "inspect", small_run, "--objective", "market-overall")
    assert code == 2


def test_a_run_moved_elsewhere_still_has_its_rows(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "moved")
    assert len(RatedRun.open(tmp_path / "moved").record) == len(RatedRun.open(small_run).record)
