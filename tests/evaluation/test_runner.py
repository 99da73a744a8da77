"""The runner with functions as scorers: once each, resumed, reported, written down, compared."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from armorm import evaluate
from armorm.errors import DataError
from armorm.evaluation import runner
from armorm.evaluation.benchmarks import BENCHMARKS
from armorm.evaluation.benchmarks.base import BenchmarkError
from armorm.evaluation.model_comparison import compare_models
from armorm.evaluation.results import Results, published, reference
from armorm.evaluation.scorer import CallableScorer, ScorerError
from armorm.evaluation.tables import as_json, comparison_table, results_tables
from tests.helpers.marked_scorer import FIXTURES, evaluated, marked, values

ALL = {
    "pairs": ["pairs.jsonl"],
    "ratings": ["ratings.jsonl"],
    "rewardbench": ["rewardbench.jsonl", "prior"],
    "rewardbench2": ["rewardbench2.jsonl"],
    "rm-bench": ["rm_bench"],
    "rmb": ["rmb"],
    "rewardmath": ["rewardmath.json"],
    "judgebench": ["judgebench"],
    "ppe": ["ppe"],
}


@pytest.fixture
def many(tmp_path):
    """Sixty pairs of sixty prompts; the mark of the better one is higher in every third only by a little."""
    rng = np.random.default_rng(0)
    path = tmp_path / "many.jsonl"
    rows = [
        {
            "prompt": f"question {i}",
            "chosen": f"yes {'very ' * (i % 4)}<{rng.normal() + 1:.3f}>",
            "rejected": f"no <{rng.normal():.3f}>",
            "subset": ("even", "odd")[i % 2],
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_benchmark_has_a_fixture():
    assert set(ALL) == {name for name, benchmark in BENCHMARKS.items() if not benchmark.judged}


def test_each_distinct_conversation_is_scored_once(tmp_path):
    lines = (FIXTURES / "pairs.jsonl").read_text()
    (tmp_path / "twice.jsonl").write_text(lines + lines)
    seen: list[str] = []

    def noting(conversations):
        seen.extend(json.dumps(messages) for messages in conversations)
        return marked(conversations)

    results = evaluate("pairs", noting, tmp_path / "twice.jsonl", quiet=True)
    assert len(seen) == len(set(seen)) == results.counts["conversations"] == 9
    assert results.counts["examples"] == 10
    assert len({entry["key"] for entry in results.examples}) == 10


def test_a_stopped_run_goes_on_where_it_was(many, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CHUNK", 16)
    output = tmp_path / "results.json"
    calls: list[int] = []

    def scorer(conversations):
        calls.append(len(conversations))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return marked(conversations)

    with pytest.raises(KeyboardInterrupt):
        evaluate("pairs", CallableScorer(scorer, "s"), many, output=output, quiet=True)
    assert not output.exists()
    results = evaluate("pairs", CallableScorer(scorer, "s"), many, output=output, quiet=True)
    assert sum(calls) == 120 + 16  # the chunk that broke off is the only one that is asked for twice
    assert not (tmp_path / "results.json.partial").exists()
    assert results.to_dict()["overall"] == evaluate("pairs", marked, many, quiet=True).to_dict()["overall"]
    assert Results.load(output).to_dict() == results.to_dict()


def test_scores_of_another_function_are_not_taken_for_these(many, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CHUNK", 16)

    def failing(conversations):
        if "question 40" in json.dumps(conversations):
            raise KeyboardInterrupt
        return [0.0] * len(conversations)

    output = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate("pairs", CallableScorer(failing, "constant"), many, output=output, quiet=True)
    results = evaluate("pairs", CallableScorer(marked, "marks"), many, output=output, quiet=True)
    assert values(results, "overall") == values(evaluate("pairs", marked, many, quiet=True), "overall")


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        (lambda n: [1.0] * (n - 1), "returned 8 values, expected 9"),
        (lambda n: 1.0, "returned 1.0, expected 9 numbers"),
        (lambda n: ["high"] * n, "returned 'high', expected a number"),
        (lambda n: [True] * n, "returned True, expected a number"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused_and_never_broadcast(returned, fault):
    with pytest.raises(ScorerError, match=fault):
        evaluate("pairs", lambda conversations: returned(len(conversations)), FIXTURES / "pairs.jsonl", quiet=True)


def test_a_score_that_is_no_number_is_a_refusal_with_a_reason():
    def shy(conversations):
        return [None if "bread" in str(c) else math.nan if "Salt" in str(c) else 1.0 for c in conversations]

    results = evaluate("pairs", shy, FIXTURES / "pairs.jsonl", quiet=True)
    assert [entry["reason"] for entry in results.refused[:2]] == ["the scorer returned None", "the scorer returned nan"]
    assert results.counts["refused_examples"] == 3
    assert values(results, "overall") == {"accuracy": 0.0}


def test_arrays_are_numbers_too():
    results = evaluate("pairs", lambda c: np.array(marked(c), np.float32), FIXTURES / "pairs.jsonl", quiet=True)
    assert values(results, "overall") == values(evaluated("pairs", "pairs.jsonl"), "overall")


def test_results_hold_the_model_the_data_the_version_and_no_text(many, tmp_path):
    output = tmp_path / "r.json"
    evaluate("pairs", CallableScorer(marked, "marks"), many, output=output, quiet=True)
    found = json.loads(output.read_text())
    assert found["model"] == {"name": "marks", "kind": "function"}
    assert found["data"]["sources"] == [str(many)]
    assert len(found["data"]["fingerprint"]) == 16
    import armorm

    assert found["armorm_version"] == armorm.__version__
    assert "question" not in json.dumps(found["examples"])
    figure = found["overall"]["accuracy"]
    assert (figure["prompts"], figure["examples"]) == (60, 60)
    assert figure["interval"][0] < figure["value"] < figure["interval"][1]
    assert set(figure["baselines"]) == {"length", "shortest", "prompt_only", "chance"}
    assert found["subsets"]["odd"]["interval"] is None  # thirty prompts are too few
    assert {"length", "markdown", "lists", "calibration"} <= set(found["audits"])
    margins = [entry["margin"] for entry in found["examples"]]
    assert figure["value"] == pytest.approx(np.mean(np.array(margins) > 0))


def test_a_limit_keeps_whole_prompts_and_the_same_ones(many):
    kept = [evaluate("pairs", marked, many, limit=20, quiet=True) for _ in range(2)]
    assert kept[0].counts["examples"] == 20
    assert [e["key"] for e in kept[0].examples] == [e["key"] for e in kept[1].examples]


def test_two_results_are_compared_on_the_examples_they_share(many):
    def worse(conversations):
        return [
            score if "yes" in c[-1]["content"] else score + 1.5
            for c, score in zip(conversations, marked(conversations), strict=True)
        ]

    first = evaluate("pairs", marked, many, quiet=True)
    second = evaluate("pairs", worse, many, limit=50, quiet=True)
    comparison = compare_models(first, second)
    assert (comparison.shared, comparison.only_first, comparison.only_second) == (50, 10, 0)
    keys = {entry["key"] for entry in second.examples}
    right = [np.array([e["margin"] > 0 for e in results.examples if e["key"] in keys]) for results in (first, second)]
    overall = next(d for d in comparison.differences if d.level == "overall")
    assert overall.difference == pytest.approx(right[0].mean() - right[1].mean())
    assert overall.significant
    assert overall.interval[0] > 0
    again = next(d for d in compare_models(first, first).differences if d.level == "overall")
    assert (again.difference, again.p) == (0, 1)


def test_a_result_read_back_compares_as_the_one_in_memory(tmp_path):
    for benchmark, places in ALL.items():
        results = evaluated(benchmark, *places)
        results.save(tmp_path / "r.json")
        comparison = compare_models(results, Results.load(tmp_path / "r.json"))
        found = {(d.level, d.name): d for d in comparison.differences}
        assert found
        for (level, name), difference in found.items():
            assert difference.first == pytest.approx(results.level(level)[name].value)
            assert difference.difference == pytest.approx(0)


def test_results_that_have_nothing_in_common_are_not_compared(many):
    pairs = evaluated("pairs", "pairs.jsonl")
    with pytest.raises(DataError, match="expected the same benchmark"):
        compare_models(pairs, evaluated("judgebench", "judgebench"))
    with pytest.raises(DataError, match="found no example in both"):
        compare_models(pairs, evaluate("pairs", marked, many, quiet=True))


def test_a_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "r.json"
    for text in ("{", "[]", '{"format": "armorm-evaluation", "version": 0}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"r\.json"):
            Results.load(path)


def test_an_unknown_benchmark_and_one_without_data_are_bad_usage():
    with pytest.raises(BenchmarkError, match="did you mean rewardbench"):
        evaluate("rewardbnch", marked)
    with pytest.raises(BenchmarkError, match="--data"):
        evaluate("pairs", marked)


def printed(renderable) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize("benchmark", ALL)
def test_tables_fit_in_eighty_columns_and_nothing_is_cut(benchmark):
    results = evaluated(benchmark, *ALL[benchmark])
    text = printed(results_tables(results)) + printed(comparison_table(compare_models(results, results)))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for level in ("overall", "sections"):
        for name in values(results, level):
            assert name.split()[0] in text


def test_the_table_names_what_a_partial_benchmark_lacks():
    text = printed(results_tables(evaluated("rm-bench", "rm_bench/chat_filtered.json")))
    assert (
        "mean of four domains (missing), hard (missing), normal (missing), easy (missing): the data lacks math, code"
        in " ".join(text.split())
    )
    assert "no published numbers to compare Mean 4" in text


def complete(results: Results) -> Results:
    """A result as if the data had been whole."""
    from dataclasses import replace

    return replace(results, metrics=[replace(metric, lacking=()) for metric in results.metrics])


def test_published_figures_stand_only_beside_figures_of_the_whole_benchmark():
    results = evaluated("rewardbench", "rewardbench.jsonl")
    table = published(results)
    assert (table.columns, table.rows) == ({}, [])
    assert "alpacaeval-length" in table.withheld["Chat"]
    whole = published(complete(results))
    # Without prior sets there is no score with prior sets, and none of the published ones is shown.
    assert list(whole.columns.values()) == ["Chat", "Hard", "Safety", "Reason.", "Mean 4"]
    assert set(whole.withheld) == {"Prior", "+ prior"}
    text = printed(results_tables(complete(results)))
    assert "ArmoRM-Llama3-8B-v0.1 (published)" in text
    assert "90.8" in text
    assert "89.0" not in text
    with_prior = printed(results_tables(complete(evaluated("rewardbench", "rewardbench.jsonl", "prior"))))
    assert "89.0" in with_prior
    assert max(len(line) for line in with_prior.splitlines()) <= 80
    assert as_json(complete(results), None)["published"]["rows"]


def test_the_published_rows_are_consistent_and_each_has_a_source():
    for entry in reference().values():
        for row in entry["rows"]:
            assert row["source"]
            assert set(row["figures"]) <= set(entry["columns"])
            figures = row["figures"]
            sections = [figures.get(f"sections/{name}") for name in ("Chat", "Chat Hard", "Safety", "Reasoning")]
            if None not in sections:
                four = "overall/mean of four sections"
                assert figures[four] == pytest.approx(sum(sections) / 4, abs=6e-4)
                whole = (2 * sum(sections) + figures["sections/Prior Sets"]) / 9
                assert figures["overall/with prior sets at half weight"] == pytest.approx(whole, abs=1e-3)
