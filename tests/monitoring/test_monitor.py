"""Logs are written by what scores and read by `armorm monitor`; with the embedded model, under real selection."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from armorm import ArmoRM
from armorm.data.rows import Row, line_rows
from armorm.data.synthetic import generate
from armorm.integrations.trl import reward_funcs
from armorm.monitoring.log import MonitorError, append_samples, read_log, sample_line
from armorm.monitoring.render import monitor_page
from armorm.monitoring.summary import summarize_run
from tests.helpers.commands import run
from tests.helpers.simulated_runs import simulated_run
from tests.helpers.small_models import reward_model


def write_log(path, log):
    append_samples(
        path,
        (
            sample_line(
                log.names,
                contributions=row.tolist(),
                score=float(row.sum()),
                step=int(step),
                length=int(length),
                rewards=None if log.rewards is None else rewards.tolist(),
            )
            for row, step, length, rewards in zip(log.contributions, log.steps, log.lengths, log.rewards, strict=True)
        ),
    )


@pytest.fixture(scope="module")
def hacked(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "hacked.jsonl"
    write_log(path, simulated_run(1, hack="objective", honest=1.0))
    return path


def test_what_is_written_is_read_back(tmp_path):
    log, path = simulated_run(0, steps=3, samples=4, k=4), tmp_path / "log.jsonl"
    write_log(path, log)
    read = read_log(line_rows(path.read_bytes().splitlines(), "log"), "log")
    assert read.names == log.names
    assert read.steps.tolist() == log.steps.tolist()
    assert read.contributions == pytest.approx(log.contributions, rel=1e-6)
    assert read.rewards == pytest.approx(log.rewards, rel=1e-6)
    assert read.lengths.tolist() == np.floor(log.lengths).tolist()
    assert read.uncertainty is None
    assert read.groups is None


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_of_scores_is_read_as_lines_are(tmp_path, capsys, suffix):
    rm = reward_model()
    rm.save_pretrained(tmp_path / "model")
    rows = [
        {"step": i // 8, "prompt": f"Question {i % 4}?", "response": f"word {i} " * (1 + i % 5)} for i in range(160)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name in ("log.jsonl", f"log{suffix}"):
        scored = run(
            capsys, "score", tmp_path / "rows.jsonl", "--model", tmp_path / "model", "--details", "-o", tmp_path / name
        )
        code, output, _ = run(capsys, "monitor", tmp_path / name, "--json")
        assert (scored[0], code) == (0, 0)
        found.append(json.loads(output))
    assert found[0] == found[1]


def test_a_line_that_was_cut_off_is_skipped_and_reported_and_writing_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    line = sample_line(["a", "b"], contributions=[0.1, 0.2], score=0.3, step=1)
    path.write_text(line + line[:20])
    append_samples(path, [line, line])
    read = read_log(line_rows(path.read_bytes().splitlines(), "log"), "log")
    assert len(read) == 3
    assert [row for row, _ in read.skipped] == [2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"step": 1, "score": 0.5}], "row 1: contributions: found None, expected an object"),
        (
            [{"contributions": {"a": 1}}, {"contributions": {"b": 1}}],
            "row 2: found objectives different from row 1 (a, b)",
        ),
        ([{"step": 1, "contributions": {"a": 1}}, {"contributions": {"a": 1}}], "row 2: found no step"),
        ([{"contributions": {"a": float("nan")}}], "row 1: contributions.a: found nan, expected a finite number"),
        ([{"contributions": {"a": 1}, "length": -1}], "row 1: length: found -1, expected a length >= 0"),
    ],
)
def test_rows_that_do_not_fit_are_named(rows, message):
    with pytest.raises(MonitorError, match=re.escape(message)):
        read_log([Row("log", number, values) for number, values in enumerate(rows, 1)], "log")


def test_the_command_says_where_a_hack_began_in_text_json_and_page(capsys, hacked, tmp_path):
    page = tmp_path / "run.html"
    code, out, err = run(capsys, "monitor", hacked, "--html", page)
    assert code == 0
    assert re.search(r"Since step (4\d|5\d|6\d|7\d) .* the score grows only\s+through objective-3", out)
    assert "wrote" in err
    code, out, _ = run(capsys, "monitor", hacked, "--json", "--fail-on-flag")
    assert code == 1
    found = json.loads(out)
    (flag,) = found["flags"]
    assert flag["objective"] == "objective-3"
    assert flag["sentence"] in page.read_text(encoding="utf-8")
    assert found["objectives"][0]["name"] == "objective-3"
    assert found["score"]["change"] == pytest.approx(sum(drift["change"] for drift in found["objectives"]))
    assert any("no uncertainty" in note for note in found["notes"])


def test_a_page_asks_no_network_and_escapes_names():
    log = simulated_run(1)
    log.names[0] = "<script>alert(1)</script>"
    page = monitor_page(summarize_run(log), "a<b")
    assert "<script" not in page
    assert "a&lt;b" in page
    assert not re.search(r"https?://|src=|url\(|@import", page)
    assert page.count("<figure") == 8 + 3


def test_distance_is_from_the_reference_where_a_model_is_named_and_else_from_the_start():
    log = simulated_run(2, honest=1.0)
    assert summarize_run(log).distance_from == "the run's own first tenth"
    home = log.rewards.mean(0)
    outcome = summarize_run(log, {"names": log.names, "reward_means": home.tolist()})
    assert outcome.distance_from == "the model's reference data"
    first = log.rewards[log.steps < log.steps.max() / 10].mean(0)
    expected = np.sqrt((((first - home) / log.rewards.std(0)) ** 2).mean())
    assert outcome.distance.start == pytest.approx(expected, rel=0.2)
    assert outcome.distance.series[-1] > outcome.distance.series[len(outcome.distance.series) // 2]


def test_scored_rows_with_a_step_are_a_log(capsys, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "log.jsonl"
    texts = ["Four.", "It is four, I think.", "Two and two make four, as everybody knows."]
    lines = [{"prompt": "What is 2+2?", "response": texts[i % 3], "step": i // 6, "group": 0} for i in range(96)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "model"
    reward_model().save_pretrained(folder)
    run(capsys, "score", rows, "--model", folder, "--details", "--output", out, "--dtype", "float32")
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [i // 6 for i in range(96)]
    assert len({entry["length"] for entry in entries}) == 3
    code, text, _ = run(capsys, "monitor", out, "--model", folder)
    assert code == 0
    assert "distance from the reference" in text
    assert "No flag: the score has hardly changed." in text


def test_trls_reward_function_logs_every_completion_with_its_step(tmp_path):
    rm, log = reward_model(), tmp_path / "run.jsonl"
    functions = reward_funcs(rm, ["ultra-helpful", "code-style"], log_file=log, refused=None)
    prompts, completions = ["Name a river.", "Hi!", "Name a river.", "Hi!"], ["The Rhine.", "Hello.", "Elbe", ""]

    class State:
        global_step = 7

    for function in functions:
        function(prompts, completions, completion_ids=[[1, 2, 3], [1], [1, 2], []], trainer_state=State())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["step"], line["group"], line["length"]) for line in lines] == [(7, 0, 3), (7, 1, 1), (7, 0, 2)]
    batch = rm.score(
        [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
            for p, c in zip(prompts[:3], completions[:3], strict=True)
        ]
    )
    for line, contributions in zip(lines, batch.contributions, strict=True):
        assert list(line["contributions"].values()) == pytest.approx(contributions.tolist(), abs=1e-6)


def pressed(batch, choose, prompts, steps=60, samples=24, seed=0):
    """A run by best of n on real scores: the pressure grows from 1 to 6 responses, `choose` says which is taken."""
    generator = np.random.default_rng(seed)
    rows, at = [], []
    for step in range(steps):
        for prompt in generator.integers(0, prompts, samples):
            drawn = prompt * 6 + generator.permutation(6)[: 1 + int(generator.random() < step / steps) * 5]
            rows.append(drawn[np.argmax(choose[drawn])])
            at.append(step)
    lines = [
        sample_line(
            batch.names,
            contributions=batch.contributions[row].tolist(),
            score=float(batch.contributions[row].sum()),
            step=step,
            length=int(batch.response_tokens[row]),
        )
        for row, step in zip(rows, at, strict=True)
    ]
    return read_log(line_rows([line.encode() for line in lines], "run"), "run")


@pytest.fixture(scope="module")
def embedded_scores():
    """Scores of six responses to each of 40 prompts by the embedded model."""
    rows = [row for row in generate(0) if row.prompt < 40]
    rm = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu")
    return rm.score([row.messages for row in sorted(rows, key=lambda row: row.prompt)])


@pytest.mark.slow
def test_selection_by_the_whole_score_of_the_embedded_model_is_not_flagged(embedded_scores):
    outcome = summarize_run(pressed(embedded_scores, embedded_scores.scores, 40))
    assert outcome.score.change > 0.5
    assert outcome.flags == []


@pytest.mark.slow
def test_a_policy_that_games_one_objective_of_the_embedded_model_is_flagged(embedded_scores):
    batch = embedded_scores
    column = int(np.argmax(batch.contributions.std(0)))
    log = pressed(batch, np.zeros(len(batch)), 40)
    hacked = log.steps >= 30
    ramp = (log.steps[hacked] - 30) / 30
    log.contributions[hacked, column] += 2 * log.scores.std() * ramp
    (flag,) = summarize_run(log).flags
    assert flag.objective == batch.names[column]
    assert abs(flag.began - 30) <= 6
