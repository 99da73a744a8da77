"""Several models on one benchmark: values on shared examples, intervals and paired tests, and every form of output."""

from __future__ import annotations

import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from armorm import evaluate
from armorm.errors import DataError
from armorm.evaluation.leaderboard import leaderboards
from armorm.evaluation.model_comparison import compare_models
from armorm.evaluation.results import Results
from armorm.evaluation.scorer import CallableScorer
from armorm.evaluation.tables import leaderboard_tables
from tests.evaluation.test_runner import ALL
from tests.helpers.commands import run
from tests.helpers.marked_scorer import FIXTURES, evaluated, longer, marked


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three models on 80 pairs: one right on 9 of 10, one that flips some of its verdicts, one by length."""
    folder = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": f"question {i}",
            "chosen": f"yes{' very' * (i % 3)} <{1 if i % 10 else -1}>",
            "rejected": "no, no <0>",
        }
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flipped = set(rng.choice(80, 25, replace=False).tolist())

    def worse(conversations):
        numbers = [int(c[0]["content"].split()[-1]) for c in conversations]
        return [-s if n in flipped else s for s, n in zip(marked(conversations), numbers, strict=True)]

    found = {}
    for name, function in (("good", marked), ("flipped", worse), ("length", longer)):
        found[name] = folder / f"{name}.json"
        limit = 70 if name == "length" else None
        evaluate("pairs", CallableScorer(function, name), path, output=found[name], limit=limit, quiet=True)
    return found


def load(results, *names):
    return [Results.load(results[name]) for name in names]


def test_the_best_comes_first_and_the_others_are_tested_against_it(results):
    (board,) = leaderboards(load(results, "flipped", "good"))
    assert board.models == ["good", "flipped"]
    assert board.shared == 80
    best, other = board.metrics[0].entries
    comparison = compare_models(*load(results, "flipped", "good")).differences[0]
    assert best.value == pytest.approx(0.9)
    assert (best.difference, best.p) == (None, None)
    assert other.difference == pytest.approx(comparison.difference)
    assert other.p == pytest.approx(comparison.p, abs=0.01)
    assert other.significant
    assert best.interval == load(results, "good")[0].level("overall")["accuracy"].interval


def test_all_models_are_measured_on_the_examples_that_they_share(results):
    (board,) = leaderboards(load(results, "good", "flipped", "length"))
    assert board.shared == 70
    assert dict(zip(board.models, board.only, strict=True)) == {"good": 10, "flipped": 10, "length": 0}
    keys = {entry["key"] for entry in load(results, "length")[0].examples}
    margins = [entry["margin"] for entry in load(results, "good")[0].examples if entry["key"] in keys]
    assert board.metrics[0].entries[0].value == pytest.approx(np.mean(np.array(margins) > 0))


def test_holms_correction_is_over_the_models():
    first = evaluated("pairs", "pairs.jsonl")
    (board,) = leaderboards([first, first, first])
    assert board.models == [first.model["name"]] + [f"{first.model['name']} ({n})" for n in (2, 3)]
    assert not any(entry.significant for entry in board.metrics[0].entries)
    assert [entry.difference for entry in board.metrics[0].entries[1:]] == [0, 0]


def test_each_benchmark_has_its_board_and_results_without_shared_examples_are_refused(results):
    boards = leaderboards([evaluated("rmb", "rmb"), *load(results, "good"), evaluated("rmb", "rmb")])
    assert [(board.benchmark, len(board.models)) for board in boards] == [("rmb", 2), ("pairs", 1)]
    with pytest.raises(DataError, match="found no example in both results"):
        leaderboards([evaluated("pairs", "pairs.jsonl"), *load(results, "good")])


def test_the_command_prints_and_writes_every_form(capsys, results, tmp_path):
    files = [results[name] for name in ("flipped", "good", "length")]
    code, out, _ = run(capsys, "leaderboard", *files)
    assert code == 0
    assert "preference pairs: 3 models, 70 shared examples" in out
    assert out.index("good") < out.index("flipped")
    assert max(len(line) for line in out.splitlines()) <= 80
    for suffix in (".html", ".md", ".svg", ".json"):
        assert run(capsys, "leaderboard", *files, "-o", tmp_path / f"board{suffix}")[0] == 0
    page = (tmp_path / "board.html").read_text()
    assert "<svg" in page
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", page)
    markdown = (tmp_path / "board.md").read_text().splitlines()
    rows = [line for line in markdown if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["model", "good", "length", "flipped"]
    plot = ElementTree.parse(tmp_path / "board.svg").getroot()
    assert plot.tag.endswith("svg")
    assert {"good", "flipped", "length"} <= {text.text for text in plot.iter("{http://www.w3.org/2000/svg}text")}
    assert json.loads((tmp_path / "board.json").read_text())[0]["models"][0] == "good"
    assert json.loads(run(capsys, "leaderboard", *files, "--json")[1])[0]["shared"] == 70


@pytest.mark.parametrize("benchmark", ALL)
def test_every_benchmark_has_tables_that_fit_in_eighty_columns(benchmark):
    found = evaluated(benchmark, *ALL[benchmark])
    boards = leaderboards([found, found], resamples=50, permutations=50)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(leaderboard_tables(boards))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for board in boards[0].metrics:
        assert board.name.split()[0] in text
        np.testing.assert_equal(board.entries[0].value, found.level("overall")[board.name].value)


def test_a_hostile_name_stays_text(tmp_path, capsys):
    name = "<script>x</script>|\x1b[31mred"
    path = tmp_path / "r.json"
    evaluate("pairs", CallableScorer(marked, name), FIXTURES / "pairs.jsonl", output=path, quiet=True)
    code, out, _ = run(capsys, "leaderboard", path, "-o", tmp_path / "b.html")
    assert code == 0
    assert "\x1b[31m" not in out
    assert "<script>" not in (tmp_path / "b.html").read_text()
    run(capsys, "leaderboard", path, "-o", tmp_path / "b.md")
    assert "<script>" not in (tmp_path / "b.md").read_text()
    run(capsys, "leaderboard", path, "-o", tmp_path / "b.svg")
    assert "<script>" not in (tmp_path / "b.svg").read_text()


def test_bad_usage_is_one_line(capsys, results, tmp_path):
    for arguments, code, part in (
        ((tmp_path / "absent.json",), 1, "absent.json: no such file or folder; looked for"),
        ((results["good"], "-o", tmp_path / "b.pdf"), 2, "expected a name ending in .html"),
        ((results["good"], "--level", "section"), 2, "did you mean sections"),
    ):
        found, _, err = run(capsys, "leaderboard", *arguments)
        assert (found, part in " ".join(err.replace("│", " ").split())) == (code, True), err
