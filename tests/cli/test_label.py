"""`armorm label`: a judge behind a real chat server rates replies by a rubric."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("httpx")

from tests.helpers.chat_server import chat_served
from tests.helpers.commands import run

RUBRIC = """
about: Replies of a shop.
objectives:
  - {name: polite, question: "How polite is the reply?", range: [1, 5], anchors: {1: insults, 5: friendly}}
  - {name: wordy, question: "How wordy is the reply?", range: [0, 3], direction: lower}
"""
PAIRS = RUBRIC + 'pairs: {question: "Which reply is better?", objective: polite}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("ARMORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def place(tmp_path):
    """A folder with a rubric, and 24 prompts with two replies each; 16 of the prompts have own ratings."""
    (tmp_path / "rubric.yaml").write_text(RUBRIC)
    rows = []
    for i in range(24):
        for polite in (1, 5):
            own = {"polite": max(polite - 1, 1)} if i < 16 else {}
            rows.append({"prompt": f"Question {i}?", "response": f"Reply {polite} {'.' * (i % 7)}", **own})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def asked(body):
    return body["messages"][-1]["content"]


def answer(body):
    """Politeness as the reply says; wordiness 2; the verdict of a judge that prefers whatever comes first."""
    text = asked(body)
    if "How wordy" in text:
        return "Rating: 2"
    if "Which reply" in text:
        return "Verdict: A"
    politeness = re.search(r"Reply (\d)", text)
    return f"Rating: {politeness[1]}"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def label(capsys, place, url, *more, output="labels.jsonl", rubric="rubric.yaml"):
    return run(
        capsys,
        *("label", place / "rows.jsonl", "--rubric", place / rubric, "--judge", url),
        *("--output", place / output, *more),
    )


def test_ratings_are_written_for_training_and_agreement_is_measured(capsys, place):
    with chat_served(answer) as served:
        code, out, err = label(capsys, place, served.url, "--json")
        assert code == 0, err
        assert len(served.requests) == 96
    found = rows_of(place / "labels.jsonl")
    assert [(row["polite"], row["wordy"]) for row in found[:2]] == [(1, 2), (5, 2)]
    assert found[1]["messages"][-1]["content"] == "Reply 5 "
    assert not (place / "labels.rejected.jsonl").exists()
    report = json.loads(out)
    polite = report["agreement"]["polite"]
    assert polite["Spearman"]["n"] == 32 and polite["Spearman"]["value"] == pytest.approx(1)
    assert polite["Spearman"]["interval"] is None  # 16 prompts
    assert polite["bias"]["value"] == pytest.approx(0.5)
    assert report["agreement"]["wordy"]["Spearman"]["value"] is None  # nobody rated it
    assert "small-chat: 96 requests for 48 replies (0 answered before), about" in " ".join(err.split())
    code, out, err = run(capsys, "inspect", place / "labels.jsonl", "--json")
    assert code == 0, err
    assert "polite" in out


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.rejected.jsonl"])
def test_no_file_is_overwritten_unasked(capsys, place, name):
    (place / name).write_text("mine\n")
    with chat_served(answer) as served:
        code, _, err = label(capsys, place, served.url)
        assert code == 1 and "exists already" in err and not served.requests
    assert (place / name).read_text() == "mine\n"


def test_the_ratings_file_extends_a_model(capsys, place):
    with chat_served(answer) as served:
        assert label(capsys, place, served.url)[0] == 0
    code, out, err = run(
        capsys,
        *("extend", "armorm-tiny-rm", "--ratings", place / "labels.jsonl", "--objective", "polite=1:5"),
        *("--output", place / "model"),
    )
    assert code == 0, err
    assert "labels-polite" in out


def test_cost_is_shown_and_a_dry_run_asks_nothing(capsys, place):
    with chat_served(answer) as served:
        command = ("label", place / "rows.jsonl", "--rubric", place / "rubric.yaml", "--judge", served.url)
        code, out, err = run(capsys, *command, "--dry-run", "--json")
        assert code == 0, err
        cost = json.loads(out)
        assert (cost["requests"], cost["replies"], cost["answered"]) == (96, 48, 0)
        assert cost["prompt_tokens"] > 96 * 50
        code, out, _ = run(capsys, *command, "--dry-run")
        assert "[Reply to rate]" in out and "How polite is the reply?\nRate it from 1 to 5:\n1: insults" in out
        assert not served.requests
        code, _, err = run(capsys, *command)
        assert code == 2 and "--output" in err


def test_answers_are_kept_and_everything_that_decides_them_is_their_key(capsys, place):
    with chat_served(answer) as served:

        def sent(*more, rubric="rubric.yaml"):
            before = len(served.requests)
            code, _, err = label(capsys, place, served.url, "--force", "--rows", "4", *more, rubric=rubric)
            assert code == 0, err
            return len(served.requests) - before

        first = sent()
        assert first > 0
        assert sent() == 0
        assert sent("--max-tokens", "100") == first
        assert sent("--seed", "3") == first
        assert sent("--judge-model", "other") == first
        assert sent("--structured") == first
        (place / "changed.yaml").write_text(RUBRIC.replace("How polite", "How kind"))
        assert sent(rubric="changed.yaml") == first // 2  # the other objective's answers still count


def test_bad_answers_are_listed_and_their_cells_are_empty(capsys, place):
    def closing(body):
        return "" if "Question 7?" in asked(body) else "Rating: 9" if "Question 8?" in asked(body) else answer(body)

    with chat_served(closing) as served:
        code, out, err = label(capsys, place, served.url)
    assert code == 0, err
    assert "8 bad answers of 96 (polite 4, wordy 4)" in out
    listed = rows_of(place / "labels.rejected.jsonl")
    assert [(entry["row"], entry["objective"]) for entry in listed[:3]] == [
        (15, "polite"),
        (15, "wordy"),
        (16, "polite"),
    ]
    assert "expected a rating from 1 to 5" in listed[0]["reason"]
    assert rows_of(place / "labels.jsonl")[14]["polite"] is None
    with chat_served(lambda body: "") as served:
        code, out, err = label(capsys, place, served.url, output="none.jsonl")
    assert code == 1
    assert "no answer of 96 is valid" in err
    assert not (place / "none.jsonl").exists()


def test_a_request_that_the_server_rejects_costs_its_cells_alone(capsys, place):
    long = {"prompt": "Long?", "response": "Reply 3 " + "word " * 300}
    with open(place / "rows.jsonl", "a") as file:
        file.write(json.dumps(long) + "\n")
    with chat_served(answer, most_characters=1500) as served:
        code, out, err = label(capsys, place, served.url)
    assert code == 0, err
    assert "2 bad answers" in out
    assert "400, too long" in (place / "labels.rejected.jsonl").read_text()


def test_pairs_are_asked_in_both_orders_and_position_bias_is_found(capsys, place):
    (place / "pairs.yaml").write_text(PAIRS)
    with chat_served(answer) as served:
        code, out, err = label(capsys, place, served.url, "--json", rubric="pairs.yaml")
        assert code == 0, err
        assert len(served.requests) == 96 + 48
    found = json.loads(out)["pairs"]
    assert found["first"]["value"] == 1 and found["consistent"]["value"] == 0
    assert found["agreement"] == {"value": 0.5, "n": 16, "interval": None}
    assert (place / "labels.pairs.jsonl").read_text() == ""  # no reply won over both orders

    def best(body):
        text = asked(body)
        return (
            f"Verdict: {'A' if text.index('Reply 5') < text.index('Reply 1') else 'B'}"
            if "Reply A" in text
            else answer(body)
        )

    with chat_served(best) as served:
        code, out, err = label(capsys, place, served.url, "--json", "--force", rubric="pairs.yaml")
    assert json.loads(out)["pairs"]["agreement"]["value"] == 1
    chosen = rows_of(place / "labels.pairs.jsonl")
    assert len(chosen) == 24 and all(row["chosen"].startswith("Reply 5") for row in chosen)


def test_a_killed_run_goes_on_where_it_ended(place):
    def slow(body):
        time.sleep(0.1)
        return answer(body)

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with chat_served(slow) as served:
        command = [sys.executable, "-m", "armorm", "label", place / "rows.jsonl", "--rubric", place / "rubric.yaml"]
        command += ["--judge", served.url, "--output", place / "labels.jsonl", "--connections", "4"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        while len(served.requests) < 20 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert "answers are kept in" in " ".join(err.split())
        assert not (place / "labels.jsonl").exists()
        time.sleep(1)
        done = len(served.requests)
        assert 20 <= done < 80
        subprocess.run(command, env=environment, check=True, timeout=300)
        assert 96 <= len(served.requests) <= 96 + 8
    assert len(rows_of(place / "labels.jsonl")) == 48
    assert not Path(f"{place / 'labels.jsonl'}.partial").exists()


def test_the_key_comes_from_the_environment_and_is_written_nowhere(capsys, place, monkeypatch):
    with chat_served(answer, key="secret-1") as served:
        code, _, err = label(capsys, place, served.url, "--judge-model", "small-chat")
        assert code == 1 and "401, no valid API key" in err
        monkeypatch.setenv("ARMORM_JUDGE_KEY", "secret-1")
        code, out, err = label(capsys, place, served.url)
        assert code == 0, err
        monkeypatch.delenv("ARMORM_JUDGE_KEY")
        monkeypatch.setenv("OTHER", "secret-2")
        more = ("--api-key-env", "OTHER", "--seed", "1", "--judge-model", "small-chat", "--force")
        code, out2, err2 = label(capsys, place, served.url, *more)
        assert code == 1
        code, _, err3 = label(capsys, place, served.url, "--api-key-env", "ABSENT", "--force")
        assert code == 1 and "ABSENT is empty or absent" in err3
        code, _, err4 = label(capsys, place, served.url.replace("://", "://any:secret-1@"))
        assert code == 2
    written = "".join(path.read_text() for path in place.rglob("*") if path.is_file())
    assert "secret" not in written + out + err + out2 + err2 + err4


def test_a_wrong_column_and_an_unreadable_file_are_one_line(capsys, place):
    (place / "wrong.yaml").write_text(RUBRIC.replace("name: polite,", "name: polite, column: polight,"))
    with chat_served(answer) as served:
        code, _, err = label(capsys, place, served.url, rubric="wrong.yaml")
        assert code == 1 and "no row has it (did you mean polite?)" in err
        code, _, err = label(capsys, place, served.url, rubric="absent.yaml")
        assert code == 1 and "absent.yaml: no such file or folder; looked for" in err
        assert not served.requests


@pytest.mark.slow
def test_a_small_real_model_labels_by_a_schema(capsys, place, small_backbone_path):
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    try:
        from chat_server import chat_server, generator
    finally:
        sys.path.pop(0)
    with chat_server(generator(str(small_backbone_path)), "armorm-small") as url:
        more = ("--structured", "--rows", "1", "--json", "--judge-model", "armorm-small")
        code, out, err = label(capsys, place, url, *more)
        assert code == 0, err
        free = ("--rows", "1", "--json", "--max-tokens", "8", "--force")
        code, _, err = label(capsys, place, url, *free)
    report = json.loads(out)
    assert report["bad"] == {"polite": 0, "wordy": 0}
    assert all(row["polite"] in range(1, 6) and row["wordy"] in range(4) for row in rows_of(place / "labels.jsonl"))
    # Free text of so small a model has no rating, which is an error and no empty file.
    assert code == 1 and "no answer of" in err and "expected a rating from 1 to 5" in err
