"""A log is read while it grows: partial lines, rotation, truncation; alarms come as they are raised."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from armorm.data.rows import Row, line_rows
from armorm.monitoring.live import GrowingFile, LogWatch, followed_lines, watch_rows
from armorm.monitoring.log import MonitorError, log_steps, metrics_line, read_log, sample_line
from armorm.monitoring.summary import summarize_run
from tests.helpers.commands import run
from tests.helpers.simulated_runs import plant, simulated_run
from tests.helpers.small_models import reward_model


def lines_of(log, metrics=()) -> list[str]:
    """The log, written line by line; the metrics of a step follow its samples."""
    lines = []
    for place, samples in enumerate(log_steps(log)):
        for row in range(len(samples)):
            contributions = samples.contributions[row].tolist()
            lines.append(
                sample_line(
                    log.names,
                    contributions=contributions,
                    score=sum(contributions),
                    step=int(samples.step),
                    group=None if samples.groups is None else int(samples.groups[row]),
                    length=int(samples.lengths[row]),
                    rewards=samples.rewards[row].tolist(),
                )
            )
        if metrics:
            lines.append(metrics_line(int(samples.step), metrics[place]))
    return lines


@pytest.fixture(scope="module")
def hacked():
    log, metrics = plant(simulated_run(1, hack="objective"), 1, "entropy")
    return lines_of(log, metrics)


def rows_of(lines):
    return line_rows([line.encode() for line in lines], "run")


def test_a_growing_file_gives_whole_lines_whatever_the_writer_does(tmp_path):
    path = tmp_path / "log.jsonl"
    file = GrowingFile(path)
    assert list(file.lines()) == []  # does not exist yet
    path.write_bytes(b"one\ntw")
    assert list(file.lines()) == [b"one\n"]
    with path.open("ab") as writer:
        writer.write(b"o\nthree\n")
    assert list(file.lines()) == [b"two\n", b"three\n"]
    assert list(file.lines()) == []
    with path.open("ab") as writer:
        writer.write(b"four\nfive")  # the last line before a rotation, without an end
    path.rename(tmp_path / "log.jsonl.1")
    assert list(file.lines()) == [b"four\n"]  # the new file is not there yet
    path.write_bytes(b"six\n")
    assert list(file.lines()) == [b"five", b"six\n"]
    path.write_bytes(b"7\n")  # truncated: shorter than what was read
    assert list(file.lines()) == [b"7\n"]
    file.close()


def test_following_ends_after_idle_seconds_and_sees_what_a_slow_writer_writes(tmp_path):
    path = tmp_path / "log.jsonl"

    def write():
        for number in range(6):
            with path.open("ab") as writer:
                writer.write(f"{number}".encode())
                writer.flush()
                time.sleep(0.02)
                writer.write(b"\n")
            time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    found = list(followed_lines(path, idle_seconds=2.0))
    writer.join()
    assert found == [f"{number}\n".encode() for number in range(6)]


def test_alarms_of_a_followed_log_are_those_of_the_finished_one(hacked):
    watch = LogWatch("run")
    live = list(watch_rows(rows_of(hacked), watch))
    outcome = summarize_run(read_log(rows_of(hacked), "run"))
    assert {alarm.kind for alarm in live if alarm.warning} == {"one_objective", "entropy"}
    assert sorted(live, key=lambda a: (a.step, a.kind)) == sorted(outcome.alarms, key=lambda a: (a.step, a.kind))
    assert watch.state == "3,840 samples; 2 warnings, 2 notices"
    assert [alarm["sentence"] for alarm in outcome.to_dict()["alarms"]] == [a.sentence for a in outcome.alarms]


def test_rows_that_do_not_belong_are_counted_or_refused(hacked):
    watch = LogWatch("run", reference_steps=5)
    late, broken = hacked[0], '{"step": 3, "contributions": {"objective-0": "x"}}\n'
    lines = [*hacked[:140], late, "{\n", '{"other": 1}\n', *hacked[140:300]]
    assert list(watch_rows(rows_of(lines), watch)) == []
    assert watch.late == 1
    assert len(watch.skipped) == 2
    assert "skipped 1 samples" in watch.state
    assert re.search(r"skipped 2 lines, the first one row 142: invalid JSON", watch.state)
    with pytest.raises(MonitorError, match="row 1: found other objectives"):
        watch.add(next(iter(rows_of([broken]))))
    with pytest.raises(MonitorError, match="row 9: expected a step in every row or in none"):
        watch.add(Row("run", 9, {"contributions": {f"objective-{i}": 0.0 for i in range(8)}}))


def test_a_log_without_steps_is_watched_in_its_order():
    log, _ = plant(simulated_run(1, hack="objective"), 1)
    lines = [json.dumps({k: v for k, v in json.loads(line).items() if k != "step"}) + "\n" for line in lines_of(log)]
    watch = LogWatch("run")
    alarms = list(watch_rows(rows_of(lines), watch))
    assert any(alarm.kind == "one_objective" and alarm.sentence.startswith("Since row ") for alarm in alarms)


def test_the_command_prints_each_alarm_and_ends_at_the_first_warning_if_asked(capsys, hacked, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(hacked))
    code, out, err = run(capsys, "monitor", path, "--follow", "--idle", 0.2)
    assert code == 0
    assert re.search(r"^! step \d+: Since step \d+ the score grows only through objective-3: ", out, re.MULTILINE)
    assert "3,840 samples; 2 warnings, 2 notices" in err
    code, out, _ = run(capsys, "monitor", path, "--follow", "--idle", 0.2, "--json", "--fail-on-flag")
    assert code == 1
    found = [json.loads(line) for line in out.splitlines()]
    assert [alarm["warning"] for alarm in found].index(True) == len(found) - 1
    code, out, _ = run(capsys, "monitor", path, "--html", tmp_path / "run.html")
    assert "Alarms while the run went on:" in out
    assert "the entropy of the policy has fallen" in (tmp_path / "run.html").read_text()
    assert run(capsys, "monitor", path, "--idle", 1)[0] == 2
    assert run(capsys, "monitor", path, "--follow", "--html", tmp_path / "new.html")[0] == 2


def test_a_run_that_is_still_written_is_followed_by_another_process(hacked, tmp_path):
    path = tmp_path / "run.jsonl"
    follower = subprocess.Popen(
        [sys.executable, "-m", "armorm", "monitor", str(path), "--follow", "--json", "--fail-on-flag"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for start in range(0, len(hacked), 200):
            with Path(path).open("a") as writer:
                writer.write("".join(hacked[start : start + 200]))
            time.sleep(0.02)
        out, _ = follower.communicate(timeout=120)
    finally:
        follower.kill()
    assert follower.returncode == 1
    assert json.loads(out.splitlines()[-1])["kind"] in ("entropy", "one_objective")


def test_rows_of_text_are_scored_by_the_model_that_is_named(capsys, tmp_path):
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    rm = reward_model()
    rm.save_pretrained(folder)
    texts = ["Four.", "It is four, I think.", "Two and two make four, as everybody knows."]
    lines = [{"prompt": f"What is 2+{i % 2}?", "completion": texts[i % 3], "step": i // 6} for i in range(96)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = run(capsys, "monitor", rows, "--model", folder, "--dtype", "float32", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["samples"] == 96
    conversations = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in lines
    ]
    assert sum(found["score"]["series"]) / len(found["score"]["series"]) == pytest.approx(
        float(rm.score(conversations).scores.mean()), abs=1e-4
    )
    code, _, err = run(capsys, "monitor", rows)
    assert code == 1
    assert "--model" in err
