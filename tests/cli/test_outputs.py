"""Outputs of commands: checked before the work, never at the expense of an input; finished rows are kept."""

from __future__ import annotations

import inspect
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import get_type_hints

import pytest

from armorm.cli.app import COMMANDS
from armorm.cli.options import Place
from tests.helpers.commands import exit_code, run

CALLS: list[int] = []


def by_length(conversations: list) -> list[float]:
    """A scorer that cannot score the word 'fault' until the environment says otherwise."""
    CALLS.append(len(conversations))
    if "fault" in str(conversations) and "ARMORM_TEST_SOUND" not in os.environ:
        raise KeyboardInterrupt
    return [float(len(str(conversation))) for conversation in conversations]


SCORER = f"{__name__}:by_length"


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    prompts = ({"prompt": f"Question {row}?", "responses": ["short", f"longer {row}"]} for row in range(150))
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "link", "./rows.jsonl", "hard"])
def test_an_output_that_is_the_input_is_rejected_before_any_work(capsys, data, name):
    before = data.read_text()
    (data.parent / "link").symlink_to(data)
    os.link(data, data.parent / "hard")
    code, _, errors = run(capsys, "rank", data, "--scorer", SCORER, "-o", f"{data.parent}/{name}")
    assert code == 1 and "is the input" in errors and errors.count("\n") == 1
    assert data.read_text() == before and not CALLS


def test_two_outputs_with_one_name_are_rejected(capsys, data, tmp_path):
    code, _, errors = run(capsys, "rank", data, "--scorer", SCORER, "-o", tmp_path / "a", "--pairs", f"{tmp_path}/./a")
    assert code == 1 and "is also an output" in errors and not CALLS
    code, _, errors = run(capsys, "score", data, "-o", tmp_path / "a", "--rejected", tmp_path / "a")
    assert code == 1 and "is also an output" in errors
    # The list of rejected rows, too, which gets its name from the output.
    rows = tmp_path / "x.rejected.jsonl"
    rows.write_text("{}\n")
    code, _, errors = run(capsys, "score", rows, "-o", tmp_path / "x.jsonl")
    assert code == 1 and "is the input" in errors and rows.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("output", "problem"), [("", "is a folder"), ("rows.jsonl/out", "Not a directory"), ("/proc/none/out", "/proc")]
)
def test_an_output_that_cannot_be_written_is_found_before_any_work(capsys, data, output, problem):
    code, _, errors = run(capsys, "rank", data, "--scorer", SCORER, "-o", data.parent / output)
    assert code == 1 and problem in errors and errors.count("\n") == 1 and not CALLS


@pytest.mark.parametrize(
    ("name", "found"), [("s.xlsx", "suffix .xlsx"), ("s.jsonl.gz", "suffix .gz"), ("s.CSV", "suffix .CSV"), ("s", "no")]
)
def test_an_output_of_rows_with_another_suffix_is_rejected_before_any_work(capsys, data, tmp_path, name, found):
    commands = [
        ("rank", data, "--scorer", SCORER, "-o", tmp_path / name),
        ("rank", data, "--scorer", SCORER, "--pairs", tmp_path / name),
        ("score", data, "-o", tmp_path / name),
        ("label", data, "--rubric", data, "--judge", "http://127.0.0.1:1", "-o", tmp_path / name),
        ("suggest", "armorm-tiny-rm", data, "--objective", "x", "-o", tmp_path / name),
    ]
    for command in commands:
        code, _, errors = run(capsys, *command)
        assert code == 1 and not CALLS and not (tmp_path / name).exists()
        assert errors.startswith(f"armorm: {tmp_path / name}: found {found}")
        assert errors.endswith("expected .jsonl, .csv, .tsv or .parquet\n") and errors.count("\n") == 1


def test_rows_may_go_to_standard_output_and_to_a_fifo(capsys, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "rank", data, "--scorer", SCORER, "-o", "-")
    assert code == 0 and len(out.splitlines()) == 150 and not Path("-").exists()
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    data.write_text(data.read_text()[:500].rpartition("\n")[0])  # fits into the buffer of the FIFO
    assert exit_code("rank", data, "--scorer", SCORER, "-o", "fifo") == 0
    assert json.loads(os.read(reader, 100_000).splitlines()[0])["row"] == 1
    os.close(reader)
    assert exit_code("rank", data, "--scorer", SCORER, "-o", "/dev/stdout") == 0


def test_a_folder_for_output_that_is_a_file_is_found_before_any_work(capsys, data):
    code, _, errors = run(capsys, "embed", data, "-o", data.parent / "rows.jsonl")
    assert code == 1 and "rows.jsonl" in errors and errors.count("\n") == 1


def test_finished_prompts_are_kept_and_a_run_that_resumes_writes_the_same(capsys, data, tmp_path, monkeypatch):
    whole, out, pairs = (tmp_path / name for name in ("whole.jsonl", "out.jsonl", "pairs.jsonl"))
    assert exit_code("rank", data, "--scorer", SCORER, "-o", whole) == 0
    everything = list(CALLS)
    data.write_text(data.read_text().replace("longer 140", "a long fault"))
    assert exit_code("rank", data, "--scorer", SCORER, "-o", out, "--pairs", pairs) != 0
    assert not out.exists() and not pairs.exists()
    assert len(list((tmp_path / "out.jsonl.partial").glob("chunk-*"))) == len(everything) - 1
    monkeypatch.setenv("ARMORM_TEST_SOUND", "1")
    CALLS.clear()
    assert exit_code("rank", data, "--scorer", SCORER, "-o", out, "--pairs", pairs) == 0
    assert len(CALLS) == 1, "only the chunk that was not finished"
    assert not (tmp_path / "out.jsonl.partial").exists()
    lines, expected = (path.read_text().splitlines() for path in (out, whole))
    assert len(lines) == 150 and lines[:140] == expected[:140] and len(pairs.read_text().splitlines()) == 150


@pytest.fixture
def killed_at_the_end(data, tmp_path) -> tuple[Path, Path, Path]:
    """Two outputs of `rank`, next to the chunks that a kill before their removal leaves."""
    out, pairs, partial = (tmp_path / name for name in ("out.jsonl", "pairs.jsonl", "out.jsonl.partial"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("armorm.saved_chunks.discard", lambda folder: None)
        assert exit_code("rank", data, "--scorer", SCORER, "-o", out, "--pairs", pairs) == 0
    assert list(partial.glob("chunk-*"))
    CALLS.clear()
    return out, pairs, partial


@pytest.mark.parametrize("named", ["both", "pairs"])
def test_a_run_killed_after_its_output_has_its_name_ends_well(data, killed_at_the_end, named):
    out, pairs, _ = killed_at_the_end
    before = out.read_bytes(), pairs.read_bytes()
    if named == "pairs":  # they get their names one after the other
        out.unlink()
    assert exit_code("rank", data, "--scorer", SCORER, "-o", out, "--pairs", pairs) == 0
    assert (out.read_bytes(), pairs.read_bytes()) == before and not CALLS
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "pairs.jsonl", "rows.jsonl"]


def test_an_output_of_another_run_next_to_finished_rows_is_not_replaced(capsys, data, killed_at_the_end):
    out, pairs, partial = killed_at_the_end
    command = ["rank", data, "--scorer", SCORER, "-o", out, "--pairs", pairs]
    out.write_text("precious\n")  # all rows are kept, but the output is not theirs
    code, _, errors = run(capsys, *command)
    assert code == 1 and "out.jsonl: exists already" in errors and out.read_text() == "precious\n" and not CALLS
    next(partial.glob("chunk-*")).unlink()  # nor is any row computed for it
    code, _, errors = run(capsys, *command)
    assert code == 1 and "out.jsonl: exists already" in errors and out.read_text() == "precious\n" and not CALLS
    assert exit_code(*command, "--force") == 0
    assert "precious" not in out.read_text() and len(CALLS) == 1 and not partial.exists()


def test_every_parameter_that_names_a_path_says_what_it_is_for():
    read = {"policy", "run", "features", "against"}  # a policy, a run, and stores, which are read too
    for function in (function for functions in COMMANDS.values() for function in functions):
        hints = get_type_hints(function, include_extras=True)
        for name in inspect.signature(function).parameters:
            marks = [mark for mark in getattr(hints[name], "__metadata__", ()) if isinstance(mark, Place)]
            assert marks or "Path" not in str(hints[name]) or name in read, f"{function.__name__}: {name}"


def test_a_closed_output_is_one_line(capsys, data, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    code = exit_code("rank", data, "--scorer", SCORER)
    assert code == 1 and capsys.readouterr().err == "armorm: standard output: is closed\n" and not CALLS


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_tables_and_json_that_cannot_be_printed_are_one_line(capsys, data, monkeypatch, form):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code("inspect", data, *form) == 1
        monkeypatch.setattr(sys, "stdout", None)
        assert exit_code("inspect", data, *form) == 1
        with suppress(OSError):
            full.flush()
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["armorm: standard output: No space left on device", "armorm: standard output: is closed"]


def test_a_closed_input_is_one_line(capsys, data, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, _, errors = run(capsys, "rank", "-", "--scorer", SCORER)
    assert code == 1 and errors == "armorm: standard input: is closed\n"
