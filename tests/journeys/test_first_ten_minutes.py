"""The first ten minutes of three users, with files of every layout: an engineer with samples, a team with a
spreadsheet of ratings, a researcher in a notebook. Each step fails on a stumble that a user could meet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest

from armorm import ArmoRM, evaluate
from armorm.data.sources import Location
from tests.helpers.commands import run
from tests.helpers.conversations import chat

pytestmark = pytest.mark.slow
MODEL = ("--model", "armorm-tiny-rm", "--dtype", "float32")
TEXTS = [(f"How do I fix a {thing}?", f"Take the {thing} apart, step {i}.") for i, thing in enumerate("abcdef")]


def turns(pair: tuple[str, str]) -> list[dict]:
    return chat(*pair)


def share_gpt(pair: tuple[str, str]) -> list[dict]:
    return [{"from": who, "value": text} for who, text in zip(("human", "gpt"), pair, strict=True)]


def argilla(pair: tuple[str, str]) -> dict:
    return {
        "fields": {"instruction": pair[0], "response": pair[1]},
        "responses": {"help": [{"value": 4}]},
        "status": "completed",
    }


LAYOUTS: dict[str, Callable[[tuple[str, str]], dict]] = {
    "messages": lambda pair: {"messages": turns(pair)},
    "prompt": lambda pair: {"prompt": pair[0], "response": pair[1]},
    "alpaca": lambda pair: {"instruction": pair[0], "input": "", "output": pair[1]},
    "sharegpt": lambda pair: {"conversations": share_gpt(pair)},
    "argilla": argilla,
    "ratings": lambda pair: {"prompt": pair[0], "response": pair[1], "ratings": {"help": 4}},
    "raters": lambda pair: {"prompt": pair[0], "response": pair[1], "help": [4, 5]},
    "tools": lambda pair: {"messages": turns(pair), "tools": [{"type": "function", "function": {"name": "f"}}]},
}


def write(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:  # as a spreadsheet or pandas writes it
        pandas.DataFrame(rows).to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


def piped(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# --- the engineer --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_engineer_scores_samples_of_every_layout_in_every_format(tmp_path, capsys, layout):
    rows = [{"id": f"r{i}", "policy": "v2", **LAYOUTS[layout](pair)} for i, pair in enumerate(TEXTS)]
    expected = None
    for kind in ("jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"):
        out = tmp_path / f"{kind}-scores.jsonl"
        code, _, err = run(capsys, "score", write(tmp_path / f"rows.{kind}", rows), *MODEL, "-o", out)
        assert code == 0, err
        scored = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(row["row"], row["id"], row["policy"]) for row in scored] == [(i + 1, f"r{i}", "v2") for i in range(6)]
        scores = [row["score"] for row in scored]
        expected = expected or scores
        np.testing.assert_allclose(scores, expected, atol=1e-5)


PAIRS: dict[str, Callable[[str, str, str], dict]] = {
    "chosen": lambda prompt, a, b: {"prompt": prompt, "chosen": a, "rejected": b},
    "whole": lambda prompt, a, b: {"chosen": chat(prompt, a), "rejected": chat(prompt, b)},
    "responses": lambda prompt, a, b: {"question": prompt, "responses": [a, b]},
    "columns": lambda prompt, a, b: {"Question": prompt, "Answer A": a, "Answer B": b},
    "sharegpt": lambda prompt, a, b: {
        "conversations": [{"from": "human", "value": prompt}],
        "chosen": {"from": "gpt", "value": a},
        "rejected": {"from": "gpt", "value": b},
    },
}


@pytest.mark.parametrize("layout", PAIRS)
def test_an_engineer_compares_and_ranks_pairs_of_every_layout_in_every_format(tmp_path, capsys, monkeypatch, layout):
    texts = [(f"How do I fix a {thing}?", f"Take the {thing} apart, then look.", "No.") for thing in "ab"]
    rows = [{"id": f"p{i}", **PAIRS[layout](*text)} for i, text in enumerate(texts)]
    expected = None
    for kind in ("jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"):
        path = write(tmp_path / f"pairs.{kind}", rows)
        code, out, err = run(capsys, "compare", path, *MODEL, "--json")
        assert code == 0, err
        found = [json.loads(line) for line in out.splitlines()]
        assert [(entry["row"], entry["id"]) for entry in found] == [(1, "p0"), (2, "p1")]
        margins = [entry["margin"] for entry in found]
        expected = expected or margins
        np.testing.assert_allclose(margins, expected, atol=1e-5)
        code, out, err = run(capsys, "rank", path, *MODEL)
        assert code == 0, err
        best = [json.loads(line)["best"] for line in out.splitlines()]
        assert best == [int(margin < 0) for margin in margins]
    piped(monkeypatch, "".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, "compare", *MODEL)
    assert code == 0 and "row 1" in out and "margin" in out, err
    assert "compared 2 pairs" in err


def test_an_engineer_pipes_ranks_and_overwrites_nothing(tmp_path, capsys, monkeypatch):
    row = {"prompt": "What is 2+2?", "response": "4"}
    piped(monkeypatch, json.dumps(row))
    code, out, err = run(capsys, "score", *MODEL)
    assert code == 0 and json.loads(out)["response"] == "4" and "example" not in err
    samples = write(
        tmp_path / "samples.jsonl",
        [
            {"id": i, "prompt": f"q{i // 3}", "response": text}
            for i, text in enumerate(("a b.", "Yes, so it is.", "") * 2)
        ],
    )
    ranked, pairs = tmp_path / "ranked.csv", tmp_path / "pairs.parquet"
    code, _, err = run(capsys, "rank", samples, *MODEL, "-o", ranked, "--pairs", pairs, "--min-margin", "0")
    assert code == 0 and "rejected 2 responses" in err
    table = list(csv.DictReader(ranked.open()))
    assert [json.loads(row["id"]) for row in table] == [[0, 1], [3, 4]]
    assert next(Location.find(pairs).rows()).kind == "pairs"
    before = ranked.read_bytes()
    code, _, err = run(capsys, "rank", samples, *MODEL, "-o", ranked)
    assert code == 1 and "--force" in err and ranked.read_bytes() == before
    assert run(capsys, "rank", samples, *MODEL, "-o", ranked, "--force")[0] == 0
    unknown = write(tmp_path / "unknown.jsonl", [{"question": "a", "model_text": "b"}])
    code, _, err = run(capsys, "score", unknown, *MODEL)
    assert code == 1 and "rename column 'model_text' to 'response'" in err


# --- the team ------------------------------------------------------------------------------------


def spreadsheet(path: Path, prompts: int, each: int) -> Path:
    rows = [
        {
            "Question": f"Question {i // each}: how do I fix a {'abcdefghij'[i // each % 10]}?",
            "Answer": ("Take it apart with care. " * (1 + i % 5)).strip(),
            "helpful": 1 + i % 5,
            "clear": 1 + (i * 7) % 5,
            "ticket_id": 1000 + i,
        }
        for i in range(prompts * each)
    ]
    rows[3]["Answer"], rows[4]["helpful"], rows[5]["helpful"] = None, "n/a", 45
    return write(path, rows)


@pytest.mark.parametrize(("prompts", "each"), [(60, 4), (120, 1)])
def test_a_team_goes_from_a_spreadsheet_to_a_report(tmp_path, capsys, prompts, each):
    table, recipe, model = spreadsheet(tmp_path / "ratings.csv", prompts, each), tmp_path / "r.yaml", tmp_path / "run"
    code, _, err = run(capsys, "init", table, "-o", recipe, "--yes", "--backbone", "armorm-tiny")
    assert code == 0, err
    for place in ("row 4, field 'response'", "row 5, field 'helpful'", "row 6, field 'helpful'"):
        assert place in err
    assert "1 to 5" in err and ("preference pairs, fewer than the 200 that a gate needs" in err) == (each == 1)
    code, _, err = run(capsys, "train", recipe, "-o", model, "--set", "gating.steps=20")
    assert code == 0, err
    assert "excluded: 1 rows that cannot be read" in err and "excluded: 2 rating cells" in err
    assert len((model / "rejected.jsonl").read_text().splitlines()) == 3
    assert run(capsys, "train", recipe, "-o", tmp_path / "strict", "--strict")[0] == 1
    code, out, err = run(capsys, "evaluate", "ratings", "-m", model, "-d", table, "--include-seen", "--json")
    assert code == 0, err
    assert "helpful" in out
    code, _, err = run(
        capsys, "report", model, "-d", table, "--include-seen", "-o", tmp_path / "r.html", "--perturbations", 0
    )
    assert code == 0, err
    assert "rank correlation" in err, "the verdict is printed"
    assert "standard deviations of the scores of" in (tmp_path / "r.html").read_text(), "so is the scale"
    more = spreadsheet(tmp_path / "more.csv", prompts, each)
    code, _, err = run(capsys, "extend", model, "--ratings", more, "-o", tmp_path / "extended", "--steps", 20)
    assert code == 0, err
    assert "more-helpful: scale 1 to 5 guessed" in err
    code, out, _ = run(capsys, "inspect", table, "--json")
    assert code == 0 and json.loads(out)["scales"]["helpful"] == [1, 5]
    code, _, err = run(capsys, "embed", table, "-o", tmp_path / "features", "--backbone", "armorm-tiny")
    assert code == 0, err


# --- the researcher ------------------------------------------------------------------------------


def test_a_researcher_sees_compact_tables_with_a_verdict_first():
    rm = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32")
    prompt, replies = TEXTS[0][0], [TEXTS[0][1], "No.", "I do not know."]
    conversation = turns((prompt, replies[0]))
    pairs = [{"prompt": f"{prompt} {i}", "chosen": replies[0], "rejected": replies[1]} for i in range(3)]
    compared, ranked, explained = rm.compare(prompt, *replies[:2]), rm.rank(prompt, replies), rm.explain(conversation)
    for shown in (compared, ranked, explained):
        assert 0 < shown._repr_html_().index(shown.verdict) < 200, "the verdict comes first"
    for shown in (rm, rm.objectives, rm.score(conversation), evaluate("pairs", rm, pairs, quiet=True)):
        page = shown._repr_html_()
        assert "<table" in page and len(page) < 8000
    for figure in (compared.plot(), explained.plot()):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_researcher_scores_frames_and_sets():
    rm = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32")
    expected = rm.score([turns(pair) for pair in TEXTS]).scores
    rows = [LAYOUTS["prompt"](pair) for pair in TEXTS]
    for data in (pandas.DataFrame(rows), datasets.Dataset.from_list(rows), rows, [LAYOUTS["alpaca"](p) for p in TEXTS]):
        np.testing.assert_allclose(rm.score(data).scores, expected, atol=1e-5)
    broken = pandas.DataFrame([*rows, {"prompt": "a", "response": None}])
    assert rm.score(broken, on_refused="skip").rejected[0][0] == len(rows)
