from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from armorm import ArmoRM
from armorm.client import RewardClient
from tests.helpers.commands import run
from tests.helpers.conversations import chat
from tests.helpers.servers import served

GOOD = {"prompt": "Just for fun, how do I learn to juggle?", "response": "Start with one ball."}


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(GOOD | {"id": "first"}),
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}),
        "{broken",
        json.dumps({"prompt": "Hi", "response": ""}),
        "",
        json.dumps({"prompt": "Hi"}),
        json.dumps({"messages": [{"role": "user", "content": "Hi"}]}),
        json.dumps(GOOD),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_score_writes_a_line_for_every_good_row_and_lists_the_others(capsys, rows, small_run, tmp_path):
    out = tmp_path / "scores.jsonl"
    code, _, err = run(capsys, "score", rows, "--model", small_run, "--output", out, "--dtype", "float32")
    assert code == 0
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["row"] for entry in scores] == [1, 2, 8]
    assert scores[0]["id"] == "first"
    assert scores[0]["score"] == pytest.approx(scores[2]["score"], abs=1e-5)
    expected = ArmoRM.from_pretrained(small_run, dtype="float32").score(
        [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]
    )
    assert scores[1]["score"] == pytest.approx(float(expected.scores[0]), abs=1e-5)
    refused = [json.loads(line) for line in (tmp_path / "scores.rejected.jsonl").read_text().splitlines()]
    assert scores[0]["prompt"] == GOOD["prompt"]
    assert [entry["row"] for entry in refused] == [3, 4, 6, 7]
    for entry, part in zip(
        refused,
        ("invalid JSON", "empty response", "'messages', or 'prompt' and 'response'", "role 'user'"),
        strict=True,
    ):
        assert part in entry["reason"]
    assert "scored 3 rows, rejected 4" in err
    assert "row 3: invalid JSON" in err


def test_a_list_of_rejected_rows_is_replaced_only_with_force(capsys, rows, small_run, tmp_path):
    listing = tmp_path / "scores.rejected.jsonl"
    listing.write_text("somebody's\n")
    options = ("--model", small_run, "--output", tmp_path / "scores.jsonl")
    code, _, err = run(capsys, "score", rows, *options)
    assert code == 1 and "scores.rejected.jsonl" in err and listing.read_text() == "somebody's\n"
    assert run(capsys, "score", rows, *options, "--force")[0] == 0
    assert len(listing.read_text().splitlines()) == 4
    rows.write_text(json.dumps(GOOD) + "\n")
    assert run(capsys, "score", rows, *options, "--force")[0] == 0
    assert listing.read_text() == ""


def test_details_of_a_score_sum_to_it(capsys, rows, small_run):
    code, out, _ = run(capsys, "score", rows, "--model", small_run, "--details")
    assert code == 0
    for line in out.splitlines():
        entry = json.loads(line)
        assert sum(entry["contributions"].values()) == pytest.approx(entry["score"], abs=1e-5)
        assert sum(entry["gating_weights"].values()) == pytest.approx(1, abs=1e-5)
        assert list(entry["rewards"]) == list(entry["contributions"])


def test_score_reads_standard_input(capsys, small_run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(GOOD).encode() + b"\n")))
    code, out, _ = run(capsys, "score", "-", "--model", small_run)
    assert code == 0
    assert json.loads(out)["row"] == 1


def test_normalised_scores_are_those_of_the_library(capsys, rows, small_run):
    _, out, _ = run(capsys, "score", rows, "--model", small_run, "--normalize")
    _, plain, _ = run(capsys, "score", rows, "--model", small_run)
    reference = ArmoRM.from_pretrained(small_run).reference
    normal, raw = ([json.loads(line)["score"] for line in text.splitlines()] for text in (out, plain))
    np.testing.assert_allclose(normal, (np.array(raw) - reference["score_mean"]) / reference["score_std"], atol=1e-4)


def test_a_file_of_refused_rows_only_fails(capsys, tmp_path, small_run):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x"}\n')
    code, out, err = run(capsys, "score", path, "--model", small_run)
    assert code == 1
    assert out == ""
    assert "no row could be scored" in err


def test_rows_of_another_kind_name_the_command_that_reads_them(capsys, tmp_path):
    pairs, several = tmp_path / "pairs.jsonl", tmp_path / "several.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    several.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"]}))
    for command in ("score", "explain"):
        for rows, other in ((pairs, "compare"), (several, "rank")):
            code, _, err = run(capsys, command, rows, "--model", "armorm-tiny-rm", "--dtype", "float32")
            assert code == 1 and f"'messages', or 'prompt' and 'response'; use armorm {other}\n" in err


def test_faults_are_one_line_and_never_a_traceback(capsys, tmp_path, rows, small_run):
    cases = [
        (("score", tmp_path / "absent.jsonl"), 1, "no such file"),
        (("score", rows, "--model", tmp_path / "nothing"), 1, "no such folder"),
        (("explain", rows, "--model", small_run, "--strict"), 1, "row 3: invalid JSON"),
        (("inspect", tmp_path / "absent.jsonl"), 1, "no such file"),
        (("train", tmp_path / "absent.yaml"), 2, f"absent.yaml: no such file or folder; looked for {tmp_path}/absent"),
        (("monitor", tmp_path / "absent.jsonl"), 1, "absent.jsonl: no such file or folder"),
    ]
    for arguments, expected, part in cases:
        code, _, err = run(capsys, *arguments)
        assert code == expected, (arguments, err)
        lines = [line for line in err.splitlines() if line.strip() and "Loading weights" not in line]
        assert len(lines) == 1, err
        assert part in lines[0]
        assert "Traceback" not in err


def test_bad_usage_exits_with_two(capsys):
    for arguments in (
        ("explain", "--prompt", "x"),
        ("explain", "rows.jsonl", "--prompt", "x", "--response", "y"),
        ("export", "armorm-tiny-rm", "x", "--layout", "nonsense"),
        ("nonsense",),
        ("train", "r.yaml", "--unknown"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2, arguments
        assert err


def test_every_command_has_help_with_an_example(capsys):
    for command in ("demo", "train", "score", "explain", "inspect", "export"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert "Example:" in out, command
        assert f"armorm {command}" in out


def test_help_keeps_tags_and_states_a_default_only_where_there_is_one(capsys):
    def shown(command: str) -> str:
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        return " ".join(out.replace("│", " ").split())

    assert "without their <think> block" in shown("serve")
    assert "armorm-small-rm (default)." in shown("score")
    required = shown("steer")
    assert "armorm-small-rm." in required and "armorm-small-rm (default)" not in required


def test_explain_prints_a_table_and_the_same_as_json(capsys, small_run, tmp_path):
    arguments = ("explain", "--model", small_run, "--prompt", GOOD["prompt"], "--response", GOOD["response"])
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, *arguments, "--html", page)
    assert code == 0
    assert "score" in out
    assert "workshop-help" in out
    html = page.read_text()
    assert "workshop-help" in html
    assert "<html" in html
    assert "http" not in html.split("</head>")[1]
    code, out, _ = run(capsys, *arguments, "--json")
    entry = json.loads(out)
    assert sum(share["contribution"] for share in entry["shares"]) == pytest.approx(entry["score"], abs=1e-5)


def test_train_dry_run_shows_the_plan_and_writes_nothing(capsys, small_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(small_recipe.to_yaml())
    code, out, _ = run(capsys, "train", path, "--output", tmp_path / "out", "--dry-run", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["counts"]["rated_train"] > 100
    assert shown["ratings"]["workshop-help"] > 10
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, "train", path, "--dry-run")
    assert "workshop-help" in out


def test_train_ends_with_a_model_and_its_metrics(capsys, small_recipe, small_run, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(small_recipe.to_yaml())
    finished = shutil.copytree(small_run, tmp_path / "run")
    code, out, _ = run(capsys, "train", path, "--output", finished, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((small_run / "metrics.json").read_text())
    code, out, _ = run(capsys, "train", path, "--output", finished)
    assert "workshop-help" in out
    assert "accuracy" in out


def test_train_refuses_a_faulty_override_with_two(capsys, small_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(small_recipe.to_yaml())
    code, _, err = run(capsys, "train", path, "--set", "gating.stepz=4")
    assert code == 2
    assert "gating.stepz: unknown key (did you mean steps?)" in err


def test_inspect_says_what_is_in_data(capsys, tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [
        {"prompt": f"p{i // 2}", "response": "r", "quality": i % 3, "note": "x", "split": "train"} for i in range(6)
    ]
    rows += [{"prompt": "p9", "response": "", "quality": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run(capsys, "inspect", path, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["rows"], found["prompts"], found["refused"]) == (7, 3, 1)
    quality = found["numbers"]["quality"]
    assert (quality["rated"], quality["lowest"], quality["highest"], quality["levels"]) == (6, 0, 2, 3)
    assert found["splits"] == {"train": 6}
    assert found["other columns"] == ["note"]
    assert "row 7" in found["problems"][0]
    _, text, _ = run(capsys, "inspect", path)
    assert "quality" in text
    assert "row 7" in text


def test_inspect_counts_candidates_as_rank_reads_them(capsys, tmp_path):
    path = tmp_path / "candidates.jsonl"
    rows = [{"prompt": "p", "responses": ["a", "b"]}, {"prompt": "q", "responses": ["a", ""]}, {"responses": ["a"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out, _ = run(capsys, "inspect", path, "--json")
    found = json.loads(out)
    assert (found["layout"], found["prompts"], found["refused"]) == ({"candidates": 1}, 1, 2)
    assert "responses[1]" in found["problems"][0] and "expected 'prompt'" in found["problems"][1]


def test_inspect_says_what_is_in_a_file_of_the_published_scripts(capsys, tmp_path):
    ratings = torch.tensor([[0.0, math.nan], [1.0, math.nan], [0.5, math.nan]])
    save_file({"embeddings": torch.ones(3, 4), "labels": ratings}, tmp_path / "ratings.safetensors")
    pairs = torch.ones(3, 2, 4)
    pairs[1, 0, 2] = math.inf
    save_file({"embeddings": pairs, "prompt_embeddings": torch.ones(3, 4)}, tmp_path / "pairs.safetensors")
    _, out, _ = run(capsys, "inspect", tmp_path / "ratings.safetensors", "--json")
    found = json.loads(out)
    assert (found["rows"], found["hidden_size"], found["labels"]) == (3, 4, "3 x 2")
    assert found["numbers"]["label 1"] == {
        "rated": 3, "missing": 0, "lowest": 0.0, "highest": 1.0, "mean": 0.5, "levels": 3
    }  # fmt: skip
    assert found["numbers"]["label 2"]["rated"] == 0
    _, out, _ = run(capsys, "inspect", tmp_path / "pairs.safetensors")
    assert "preference pairs" in out and "3 x 2 x 4" in out
    assert "embeddings: 1 rows with non-finite values" in out
    code, _, err = run(capsys, "inspect", tmp_path / "absent.safetensors")
    assert code == 1 and "cannot be read" in err


def test_inspect_says_what_is_in_pairs_models_and_features(capsys, small_recipe, small_run):
    _, out, _ = run(capsys, "inspect", Path(small_recipe.data_root) / "choices.jsonl", "--json")
    assert json.loads(out)["layout"].keys() == {"preference pairs"}
    _, out, _ = run(capsys, "inspect", small_run, "--json")
    found = json.loads(out)
    assert found["objectives"][0]["name"] == "workshop-help"
    _, out, _ = run(capsys, "inspect", small_run)
    assert "mean weight" in out
    _, out, _ = run(capsys, "inspect", small_run / "work" / "features", "--json")
    assert json.loads(out)["conversations"] > 100
    _, out, _ = run(capsys, "inspect", "armorm-tiny", "--json")
    assert json.loads(out)["model_type"] == "llama"


def test_the_installed_command_runs_and_knows_its_version():
    done = subprocess.run(
        [Path(sys.executable).with_name("armorm"), "--version"], capture_output=True, text=True, check=True
    )
    from armorm import __version__

    assert done.stdout.strip() == __version__


def test_a_tab_completes_commands_and_options():
    command = Path(sys.executable).with_name("armorm")
    for words, place, part in (("armorm ra", 1, "rank"), ("armorm rank --min", 2, "--min-margin")):
        given = {"_ARMORM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        done = subprocess.run([command], env={**os.environ, **given}, capture_output=True, text=True, check=True)
        assert part in done.stdout.splitlines()


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A pipe whose reader has gone away."""
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w", buffering=1) as pipe:
        yield pipe


def test_a_reader_that_goes_away_is_no_error(capsys, monkeypatch, rows, small_run, unread):
    monkeypatch.setattr(sys, "stdout", unread)
    _, _, err = run(capsys, "score", rows, "--model", small_run, "--details")
    assert "scored" not in err
    assert "Traceback" not in err
    assert "Exception" not in err


@pytest.mark.parametrize("command", [["inspect", "{rows}"], pytest.param(["score", "{rows}"], marks=pytest.mark.slow)])
def test_nor_is_it_when_the_process_ends(rows, unread, command):
    program, *options = (part.format(rows=rows) for part in ("armorm", *command))
    arguments = [Path(sys.executable).with_name(program), *options]
    done = subprocess.run(arguments, stdout=unread, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


# --- standard input ------------------------------------------------------------------------------


def piped(monkeypatch, text: str, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(text.encode()))
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stream)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD) + "\n",
        json.dumps([GOOD]),
        'prompt,response\n"{prompt}",{response}\n'.format(**GOOD),
        "\n" + json.dumps({"messages": chat(*GOOD.values())}) + "\n",
    ],
)
def test_what_is_piped_is_scored_and_explained(capsys, monkeypatch, small_run, text):
    piped(monkeypatch, json.dumps(GOOD) + "\n")
    _, expected, _ = run(capsys, "score", "-", "--model", small_run)
    piped(monkeypatch, text)
    code, out, _ = run(capsys, "score", "--model", small_run)
    assert code == 0
    assert json.loads(out)["score"] == json.loads(expected)["score"]
    piped(monkeypatch, text)
    code, out, _ = run(capsys, "explain", "--model", small_run, "--json")
    assert code == 0
    assert json.loads(out)["score"] == pytest.approx(json.loads(expected)["score"], abs=1e-5)


@pytest.mark.parametrize("command", ["score", "explain", "rank", "compare"])
def test_without_input_a_terminal_is_shown_an_example_and_an_empty_pipe_is_an_error(capsys, monkeypatch, command):
    piped(monkeypatch, "", terminal=True)
    code, out, err = run(capsys, command)
    assert (code, out) == (1, "")
    assert 'echo \'{"prompt": ' in err
    piped(monkeypatch, "")
    code, out, err = run(capsys, command)
    assert (code, out) == (1, "")
    assert "standard input: found no rows" in err


def test_compare_reads_pairs_of_every_layout_from_a_file_or_a_pipe(capsys, monkeypatch, small_run, tmp_path):
    prompt, good, bad = "How do I juggle?", "Start with one ball.", "No."
    options = ("--model", small_run, "--json")
    code, out, _ = run(capsys, "compare", "--prompt", prompt, good, bad, *options)
    expected = json.loads(out)
    rows = [
        {"id": "a", "prompt": prompt, "chosen": good, "rejected": bad},
        {"id": "b", "question": prompt, "responses": [good, bad]},
        {"id": "c", "Question": prompt, "Answer A": good, "Answer B": bad},
        {"id": "d", "chosen": chat(prompt, good), "rejected": chat(prompt, bad)},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, "compare", path, *options, "--html", tmp_path / "page.html")
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [(entry["row"], entry["id"]) for entry in found] == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    assert all(entry["margin"] == pytest.approx(expected["margin"], abs=1e-5) for entry in found)
    assert f"the chosen response scores higher in {2 * (expected['better'] == 'A')} of 2" in err
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>row ") == 4 and page.count(bad) >= 4
    piped(monkeypatch, "prompt,response\n" + "".join(f"{prompt},{text}\n" for text in (good, bad)))
    code, out, _ = run(capsys, "compare", *options)
    assert code == 0 and json.loads(out)["margin"] == pytest.approx(expected["margin"], abs=1e-5)


def test_compare_leaves_out_rows_without_two_responses_and_says_so(capsys, small_run, tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": ""},
        {"prompt": "q", "responses": ["a", "b", "c"]},
        {"prompt": "q", "responses": ["a", "b"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, "compare", path, "--model", small_run, "--json")
    assert code == 0 and json.loads(out)["row"] == 3
    assert "row 1, field 'rejected'" in err and "row 2: found 3 responses" in err and "rejected 2" in err
    assert run(capsys, "compare", path, "--model", small_run, "--strict")[0] == 1
    path.write_text(json.dumps(rows[1]))
    code, out, err = run(capsys, "compare", path)
    assert (code, out) == (1, "") and "expected 2 to compare" in err
    for arguments in (("one", "two"), ("--prompt", "q", "one")):
        code, _, err = run(capsys, "compare", *arguments)
        assert code == 2 and "--prompt" in err


def test_explain_leaves_out_rows_that_it_cannot_read_and_says_so(capsys, rows, small_run, tmp_path):
    code, out, err = run(capsys, "explain", rows, "--model", small_run, "--json")
    _, scored, _ = run(capsys, "score", rows, "--model", small_run)
    explained, scores = ([json.loads(line) for line in text.splitlines()] for text in (out, scored))
    assert code == 0 and [entry["row"] for entry in explained] == [entry["row"] for entry in scores]
    np.testing.assert_allclose([e["score"] for e in explained], [e["score"] for e in scores], atol=1e-5)
    assert "row 3: invalid JSON" in err and "explained 3 rows, rejected 4" in err
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "response": ""}\n')
    code, out, err = run(capsys, "explain", path, "--model", small_run)
    assert (code, out) == (1, "") and "row 1: response: found an empty response" in err


def test_explained_rows_keep_the_columns_of_the_input(capsys, small_run, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,model,prompt,response\na7,policy-2,What is 2+2?,4\n")
    code, out, _ = run(capsys, "explain", path, "--model", small_run, "--json")
    entry = json.loads(out)
    assert code == 0 and (entry["id"], entry["input_model"]) == ("a7", "policy-2")
    assert "response" not in entry


def test_prompts_that_were_cut_are_counted_and_marked(capsys, small_run, tmp_path):
    changed = tmp_path / "model"
    shutil.copytree(small_run, changed, ignore=shutil.ignore_patterns("work"))
    config = json.loads((changed / "config.json").read_text())
    config["limits"] = {"max_length": 64, "overflow": "truncate_prompt"}
    (changed / "config.json").write_text(json.dumps(config))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"prompt": "How do I do that? " * 40}) + "\n")
    code, out, err = run(capsys, "score", path, "--model", changed)
    assert code == 0
    assert [json.loads(line).get("truncated", False) for line in out.splitlines()] == [False, True]
    assert "1 with a truncated prompt" in err


# --- export --------------------------------------------------------------------------------------


def test_export_writes_either_layout_with_the_same_scores(capsys, small_run, tmp_path):
    conversation = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]
    original = ArmoRM.from_pretrained(small_run, dtype="float32")
    expected, weights = original.score(conversation), original.model.state_dict()
    for layout, architecture in (
        ("released", "LlamaForRewardModelWithGating"),
        ("armorm", "ArmoRMForSequenceClassification"),
    ):
        code, out, _ = run(capsys, "export", small_run, tmp_path / layout, "--layout", layout, "--json")
        assert code == 0
        files = json.loads(out)["files"]
        assert files["model.safetensors"] == (tmp_path / layout / "model.safetensors").stat().st_size
        assert json.loads((tmp_path / layout / "config.json").read_text())["architectures"] == [architecture]
        again = ArmoRM.from_pretrained(tmp_path / layout, dtype="float32")
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, weights[name]), name
        # The same weights at another place of their file may go through another kernel: the last bits are its own.
        np.testing.assert_allclose(again.score(conversation).scores, expected.scores, rtol=1e-6)
    code, out, _ = run(capsys, "inspect", tmp_path / "released", "--json")
    assert json.loads(out)["layout"] == "released"
    assert len(json.loads(out)["objectives"]) == len(expected.names)
    code, _, err = run(capsys, "export", tmp_path / "absent", tmp_path / "x")
    assert code == 1
    assert "no such folder" in err


@pytest.mark.slow
def test_one_text_has_one_number_in_every_command(capsys, tmp_path):
    prompt, response, other = "How do I learn to juggle?", "Start with one ball, and throw it in an arc.", "No."
    model = ("--model", "armorm-tiny-rm")
    rows, several = tmp_path / "rows.jsonl", tmp_path / "several.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt, "response": text}) + "\n" for text in (response, other)))
    several.write_text(json.dumps({"prompt": prompt, "responses": [response, other]}) + "\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": prompt, "chosen": response, "rejected": other}) + "\n")

    def found(*arguments: object) -> str:
        code, out, err = run(capsys, *arguments)
        assert code == 0, err
        return out

    results = tmp_path / "results.json"
    found("evaluate", "pairs", "--data", pairs, *model, "--output", results, "--json")
    rm = ArmoRM.from_pretrained("armorm-tiny-rm")
    numbers = {
        "score": json.loads(found("score", rows, *model).splitlines()[0])["score"],
        "explain": json.loads(found("explain", "--prompt", prompt, "--response", response, *model, "--json"))["score"],
        "compare": json.loads(found("compare", response, other, "--prompt", prompt, *model, "--json"))["scores"]["A"],
        "rank": json.loads(found("rank", several, *model))["scores"][0],
        "evaluate": json.loads(results.read_text())["examples"][0]["scores"][0],
        "Python": float(rm.score([chat(prompt, response)]).scores[0]),
    }
    with served(rm) as server:
        numbers["server"] = float(RewardClient(server.url).score([chat(prompt, response)]).scores[0])
    assert {name: number for name, number in numbers.items() if abs(number - numbers["score"]) > 1e-5} == {}
