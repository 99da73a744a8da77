"""`armorm evaluate`, `rank` and `compare`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.commands import run
from tests.helpers.marked_scorer import FIXTURES

MARKS = "tests.helpers.marked_scorer:marked"
PAIRS = FIXTURES / "pairs.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from tests.helpers.small_models import reward_model

    folder = tmp_path_factory.mktemp("model")
    reward_model().save_pretrained(folder)
    return folder


def test_evaluate_prints_a_table_writes_a_file_and_compares_with_another(capsys, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    code, out, err = run(capsys, "evaluate", "pairs", "--data", PAIRS, "--scorer", MARKS, "--output", first)
    assert code == 0
    assert "40.0" in out
    assert "row 4" in err
    assert f"wrote {first}" in err.replace("\n", "")
    code, out, _ = run(
        capsys, "evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "-o", second, "--against", first, "--json"
    )
    found = json.loads(out)
    assert found["overall"]["accuracy"]["value"] == pytest.approx(0.4)
    assert found["against"]["overall"]["accuracy"]["difference"] == 0
    assert "examples" not in found
    assert json.loads(second.read_text())["examples"]


def test_several_places_of_data_are_read_together(capsys):
    code, out, _ = run(
        capsys,
        *("evaluate", "rewardbench", "--data", FIXTURES / "rewardbench.jsonl", "--data", FIXTURES / "prior"),
        *("--scorer", MARKS, "--json"),
    )
    assert code == 0
    assert json.loads(out)["sections"]["Prior Sets"]["value"] == 0.5


def test_two_models_are_measured_side_by_side_in_one_command(capsys, tmp_path, model):
    output, beside = tmp_path / "first.json", tmp_path / "first.against.json"
    arguments = ("evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "-o", output, "--dtype", "float32")
    code, out, err = run(capsys, *arguments, "--against", "tests.helpers.marked_scorer:longer", "--json")
    assert code == 0
    # By marks p1 and p4 are right; by length p1, p2 and p4 (tests/evaluation/benchmarks/test_pairs.py).
    found = json.loads(out)["against"]["overall"]["accuracy"]
    assert (found["first"], found["second"]) == (pytest.approx(0.4), pytest.approx(0.6))
    assert found["difference"] == pytest.approx(-0.2)
    assert json.loads(beside.read_text())["model"]["name"] == "tests.helpers.marked_scorer:longer"
    code, out, err = run(capsys, *arguments, "--against", model)
    assert code == 0
    assert f"{MARKS} against" in out
    assert "difference" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert beside.name in err
    assert json.loads(beside.read_text())["model"]["kind"] == "armorm"


def test_what_cannot_be_compared_is_refused_before_any_work(capsys, tmp_path):
    results = tmp_path / "results.json"
    assert (
        run(capsys, "evaluate", "judgebench", "-d", FIXTURES / "judgebench", "--scorer", MARKS, "-o", results)[0] == 0
    )
    for against, part in ((results, "results of judgebench, expected pairs"), (tmp_path / "absent", "absent")):
        output = tmp_path / "r.json"
        code, _, err = run(
            capsys, "evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "--against", against, "-o", output
        )
        assert code == 1
        assert part in err
        assert "Traceback" not in err
        assert not output.exists()


def test_a_published_set_without_a_network_names_the_option_for_files(capsys, monkeypatch):
    import datasets
    import huggingface_hub

    for place in (huggingface_hub.constants, datasets.config):  # read on import
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("armorm.data.hub.hub_answers", lambda: False)
    code, _, err = run(capsys, "evaluate", "judgebench", "--scorer", MARKS)
    assert code == 1 and "not in the local cache" in err and err.endswith("below data_root, or pass --data FILE\n")


def test_bad_usage_is_two_and_a_fault_in_data_is_one_line(capsys, tmp_path):
    for arguments, expected, part in (
        (("evaluate",), 2, "benchmark"),
        (("evaluate", "rewardbnch", "--scorer", MARKS), 2, "rewardbench"),
        (("evaluate", "pairs", "--scorer", MARKS), 2, "--data"),
        (("evaluate", "pairs", "-d", tmp_path / "absent.jsonl", "--scorer", MARKS), 1, "no such file"),
        (("evaluate", "pairs", "-d", PAIRS, "--scorer", "nowhere"), 1, "module:function"),
        (("evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "--against", PAIRS), 1, "cannot be read"),
        (("evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "-o", tmp_path), 1, "is a folder, expected a file"),
        (("evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "--features", PAIRS), 1, "is a file, expected a folder"),
        (("evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "-o", PAIRS / "r.json"), 1, "pairs.jsonl"),
        (("evaluate", "pairs", "-d", PAIRS, "--scorer", MARKS, "--split", "train"), 1, "is a file, expected a hub set"),
        (("rank", tmp_path / "absent.jsonl"), 1, "no such file"),
        (("compare", "a", "b"), 2, "--prompt"),
        (("compare", "--prompt", "a", "", "b"), 1, "empty response"),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == expected, (arguments, err)
        assert part.lower() in err.lower()
        assert "Traceback" not in err
        if code == 1:
            assert len([line for line in err.splitlines() if line.strip()]) == 1, err


def test_a_function_and_a_model_for_one_place_are_refused(capsys, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    arguments = ("evaluate", "pairs", "--data", path, "--scorer", "json:dumps", "--model", "armorm-tiny-rm")
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert "--scorer replaces --model" in " ".join(err.split())


def test_every_command_has_help_with_an_example(capsys):
    for command in ("evaluate", "rank", "compare"):
        code, out, _ = run(capsys, command, "--help")
        assert code == 0
        assert "Example:" in out
        assert f"armorm {command}" in out


def test_rank_writes_orders_and_preference_rows(capsys, tmp_path, model):
    source, ranked, pairs = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "pairs.jsonl"))
    rows = [
        {"id": "a", "prompt": "Name a fruit.", "responses": ["Plum.", "A plum is a fruit.", ""]},
        {"prompt": "Name a tree.", "responses": ["Oak.", "Oak."]},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(
        capsys, "rank", source, "-m", model, "--dtype", "float32", "--output", ranked, "--pairs", pairs
    )
    assert (code, out) == (0, "")
    first, second = (json.loads(line) for line in ranked.read_text().splitlines())
    assert (first["id"], sorted(first["order"]), list(first["refused"])) == ("a", [0, 1], ["2"])
    assert first["decided_by"][0]["objective"]
    assert (second["order"], "decided_by" in second) == ([0, 1], False)
    best, other = first["order"]
    assert f"esponse {best}" in first["verdict"] and f"esponse {other}" in first["verdict"]
    assert second["verdict"] == "Response 0 and response 1 get the same score."
    (pair,) = (json.loads(line) for line in pairs.read_text().splitlines())
    assert list(pair) == ["prompt", "chosen", "rejected", "margin", "chosen_gives_no_answer"]
    assert pair["chosen"][0]["content"] == rows[0]["responses"][first["best"]]
    assert pair["margin"] == pytest.approx(abs(first["scores"][0] - first["scores"][1]))
    assert "ranked 2 prompts, rejected 1 responses" in err
    assert "wrote 1 pairs" in err


def test_rank_takes_a_function_too(capsys, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "responses": ["x <1>", "y <3>", "z <2>"]}\n')
    code, out, err = run(capsys, "rank", source, "--scorer", MARKS, "--pairs", tmp_path / "pairs.jsonl")
    assert code == 0, err
    given = {
        "prompt": "a",
        "responses": ["x <1>", "y <3>", "z <2>"],
        "verdict": "Response 1 scores higher than response 2.",
    }
    assert json.loads(out) == {"row": 1, "best": 1, "order": [1, 2, 0], "scores": [1.0, 3.0, 2.0], **given}
    (pair,) = (json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"], pair["margin"]) == ("y <3>", "x <1>", 2.0)


def test_compare_says_which_is_better_and_what_decides(capsys, model):
    arguments = ("compare", "--model", model, "--dtype", "float32", "--prompt", "How do I juggle?")
    code, out, _ = run(capsys, *arguments, "Start with one ball.", "No.", "--json")
    found = json.loads(out)
    assert code == 0
    assert sum(found["contributions"].values()) == pytest.approx(found["margin"], abs=1e-5)
    assert found["better"] == ("A" if found["margin"] > 0 else "B")
    assert set(found["decided_by"]) <= set(found["contributions"])
    assert found["probability_of_a"] is None, "the model is not calibrated"
    swapped = json.loads(run(capsys, *arguments, "No.", "Start with one ball.", "--json")[1])
    assert swapped["better"] != found["better"]
    assert swapped["decided_by"] == found["decided_by"]
    code, out, _ = run(capsys, *arguments, "Start with one ball.", "No.")
    assert " ".join(out.split()).startswith(found["verdict"])
    assert max(len(line) for line in out.splitlines()) <= 80
    code, out, _ = run(capsys, *arguments, "No.", "No.")
    assert (code, out.splitlines()[0].rstrip()) == (0, "A and B get the same score.")


def test_evaluate_prints_every_audit_of_an_interpretable_model(capsys, model, tmp_path):
    code, out, _ = run(capsys, "evaluate", "rm-bench", "-m", model, "--dtype", "float32", "-d", FIXTURES / "rm_bench")
    assert code == 0
    for part in ("as served", "before debiasing", "objective alone", "what decides", "gate by source", "calibration"):
        assert part in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "…" not in out


def test_fail_if_worse_is_exit_one_beyond_the_interval_and_zero_otherwise(capsys, tmp_path):
    pairs, old = tmp_path / "pairs.jsonl", tmp_path / "old.json"
    # The longer response is chosen; by marks, which it also has, 90 of 100 pairs are wrong.
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"A long answer <{int(i < 10)}>", "rejected": f"Short <{int(i >= 10)}>"}
        for i in range(100)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    longer = "tests.helpers.marked_scorer:longer"
    common = ("evaluate", "pairs", "-d", pairs, "--json", "--scorer")
    assert run(capsys, *common, longer, "-o", old)[0] == 0
    new = tmp_path / "new.json"
    code, out, err = run(capsys, *common, MARKS, "--against", old, "--fail-if-worse", "-o", new)
    assert code == 1
    assert "worse: overall accuracy 0.1000 against 1.0000" in err
    assert "overall/accuracy" in json.loads(out)["against"]["worse"]
    assert new.exists()  # the results are kept
    code, _, err = run(capsys, *common, longer, "--against", old, "--fail-if-worse")
    assert code == 0
    assert "not worse in any metric" in err
    code, _, _ = run(capsys, *common, longer, "--against", new, "--fail-if-worse")  # better
    assert code == 0
    code, _, err = run(capsys, *common, longer, "--against", old, "--against", MARKS, "--fail-if-worse")
    assert code == 0
    assert run(capsys, *common, MARKS, "--fail-if-worse")[0] == 2


def test_fail_if_worse_does_not_pass_where_nothing_can_be_checked(capsys, tmp_path):
    old = tmp_path / "old.json"
    common = ("evaluate", "pairs", "-d", PAIRS, "--json", "--scorer", MARKS)
    assert run(capsys, *common, "-o", old)[0] == 0
    code, _, err = run(capsys, *common, "--against", old, "--fail-if-worse")
    assert code == 1
    assert "fewer than 50 shared prompts" in err


def test_auto_is_the_dtype_of_the_features_that_are_reused(capsys, tmp_path):
    options = ("evaluate", "pairs", "-d", PAIRS, "-m", "armorm-tiny-rm", "--features", tmp_path / "features", "--json")
    assert run(capsys, *options, "--dtype", "bfloat16")[0] == 0
    code, out, err = run(capsys, *options)
    assert code == 0, err
    assert json.loads(out)["model"]["backbone"]["dtype"] == "bfloat16"
    code, _, err = run(capsys, *options, "--dtype", "float32")
    assert code == 1 and "expected one in bfloat16" in err
