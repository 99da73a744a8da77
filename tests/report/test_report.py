"""The report of a small run: figures against those computed here, nothing from outside, hostile texts as text."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from armorm import ArmoRM
from armorm.cli.report import report as command
from armorm.conversation import Conversation
from armorm.errors import DataError
from armorm.evaluation.audits.perturbation import ROWS, perturb
from armorm.report.evidence import gather
from armorm.report.page import contents, report, without_texts
from tests.helpers.commands import run

HOSTILE = "</div><script src='//evil.example/x.js'></script><img src=x onerror=alert(1)>"
SETS = ("workshop", "harbour", "market", "choices")


@pytest.fixture(scope="module")
def data(small_recipe, tmp_path_factory) -> list[Path]:
    """The run's own sets, with 32 of the held-out pairs, half of them with hostile texts."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in SETS:
        rows = [json.loads(line) for line in (Path(small_recipe.data_root) / f"{name}.jsonl").read_text().splitlines()]
        if name == "choices":
            rows = [row for row in rows if row["split"] == "train"] + [row for row in rows if row["split"] == "test"][
                ::3
            ][:32]
            for row in rows[1::2]:
                for side in ("chosen", "rejected"):
                    row[side][-1]["content"] += HOSTILE
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / f"{name}.jsonl" for name in SETS]


@pytest.fixture(scope="module")
def rm(small_run) -> ArmoRM:
    return ArmoRM.from_pretrained(small_run, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def features(small_run, tmp_path_factory) -> Path:
    return shutil.copytree(small_run / "work" / "features", tmp_path_factory.mktemp("report") / "features")


@pytest.fixture(scope="module")
def evidence(rm, data, features):
    return gather(rm, data, features=features)


@pytest.fixture(scope="module")
def page(rm, data, features):
    return report(rm, data, features=features)


@pytest.fixture(scope="module")
def rows(data):
    """Test rows of a set with their scores."""
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in data}


def test_the_figures_are_those_of_the_model_on_the_data(page, rm, rows):
    _, found = page
    tested = [row for row in rows["choices"] if row["split"] == "test"]
    chosen, rejected = (rm.score([row["prompt"] + row[side] for row in tested]) for side in ("chosen", "rejected"))
    accuracy = float((chosen.scores > rejected.scores).mean())
    value = next(
        row for e in found["evaluations"] for g in e["groups"].values() for row in g if row["name"] == "accuracy"
    )
    assert value["raw"][0] == pytest.approx(accuracy)
    assert value["value"] == f"{100 * accuracy:.1f}"
    wrong = (rejected.scores - chosen.scores)[rejected.scores > chosen.scores]
    unit = rm.reference["score_std"]
    assert found["scale"]["std"] == unit and found["scale"]["mean"] == rm.reference["score_mean"]
    assert found["mistakes"]["pairs"][0]["margin"] == pytest.approx(-wrong.max() / unit, abs=1e-4)
    rated = [row for row in rows["workshop"] if row["split"] == "test"]
    batch = rm.score([row["messages"] for row in rated])
    raw = rm.objectives.to_raw(batch.rewards)[:, rm.objectives.position("workshop-help")]
    entry = next(entry for entry in found["objectives"] if entry["name"] == "workshop-help")
    given = [row["help"] for row in rated]
    assert entry["n"] == len(rated)
    assert entry["spearman"] == pytest.approx(spearmanr(raw, given).statistic, abs=1e-6)
    assert entry["error"] == pytest.approx(np.abs(raw - given).mean(), abs=1e-4)


def test_verbosity_and_gate_are_over_every_distinct_conversation(page, rm, rows):
    _, found = page
    texts = {}
    for name in SETS:
        for row in rows[name]:
            if row["split"] == "test":
                sides = (
                    [row["messages"]] if "messages" in row else [row["prompt"] + row[s] for s in ("chosen", "rejected")]
                )
                texts |= {Conversation.from_messages(side).key: side for side in sides}
    batch = rm.score(list(texts.values()))
    sizes = [len(side[-1]["content"]) for side in texts.values()]
    assert found["verbosity"]["n"] == len(texts) == found["data"]["conversations"]
    debiased = batch.rewards.astype(np.float64) @ rm.transform
    for line in found["verbosity"]["lines"]:
        before, after = line["pooled"]["before"], line["pooled"]["after"]
        if line["is_score"]:
            assert after == pytest.approx(spearmanr(batch.scores, sizes).statistic, abs=1e-3)
            continue
        column = rm.objectives.position(line["name"])
        assert before == pytest.approx(spearmanr(batch.rewards[:, column], sizes).statistic, abs=1e-3)
        if line["is_bias"]:
            assert after is None
        else:
            assert after == pytest.approx(spearmanr(debiased[:, column], sizes).statistic, abs=1e-3)
    prompts = {side[0]["content"]: i for i, side in enumerate(texts.values())}
    means = batch.gating_weights[list(prompts.values())].mean(0)
    assert found["gate"]["prompts"] == len(prompts)
    for entry in found["gate"]["means"]:
        assert entry["mean"] == pytest.approx(means[rm.objectives.position(entry["name"])], abs=1e-5)


def test_contributions_of_a_mistake_sum_to_its_margin(evidence):
    for entry in contents(evidence)["mistakes"]["pairs"]:
        count, rest = entry["others"]
        assert len(entry["shares"]) + count == 6, "all objectives of the small model"
        assert sum(value for _, value, _ in entry["shares"]) + rest == pytest.approx(entry["margin"], abs=1e-4)
        for _, value, decides in entry["shares"]:
            assert decides == ((entry["margin"] - value) * entry["margin"] <= 0)
        assert (
            entry["verdict"].startswith("B ")
            or "B is ahead" in entry["verdict"]
            or "B is better with" in entry["verdict"]
        )


def test_the_bars_of_all_mistakes_are_on_one_scale(evidence):
    pairs = contents(evidence)["mistakes"]["pairs"]
    largest = {entry["largest"] for entry in pairs}
    assert largest == {max(abs(value) for entry in pairs for _, value, _ in entry["shares"])}


def test_a_verdict_in_words_opens_the_page(evidence, page):
    verdict = contents(evidence)["verdict"]
    accuracy = evidence.results["pairs"].level("overall")["accuracy"]
    assert f"{accuracy.value:.0%} of {accuracy.examples:,} pairs" in verdict[0]
    assert verdict[1].startswith("It predicts what raters say")
    assert page[0].index(verdict[0]) < page[0].index('class="figures"')


def test_every_section_stands_on_the_page_with_its_figures(page):
    html, found = page
    for place in ("data", "objectives", "together", "verbosity", "gate", "evaluation", "perturbations", "mistakes"):
        assert f'id="{place}"' in html
    assert "No data was given" not in html
    for entry in found["objectives"]:
        assert html.count(f"<b>{entry['name']}</b>") >= 2, "a cloud and an error curve"
        assert f"R2 {entry['report']['r2']:.2f}" in html
    for notice in found["notices"]:
        assert notice["title"] in html
    for name, edit in found["perturbations"]["edits"].items():
        assert not edit["rows"] or f'<td class="name">{name}</td>' in html
    assert html.count("<svg") == 2 * len(found["objectives"]) + 4
    assert "selected: step" in html and "held out" in html


def test_effects_of_edits_are_those_of_the_model_on_the_edited_responses(page, rm, evidence):
    found = page[1]["perturbations"]
    assert (found["unit"], found["std"]) == ("standard deviations of the reference score", rm.reference["score_std"])
    pairs = [
        at for example, at in zip(evidence.examples, evidence.rows, strict=True) if len(example.conversations) == 2
    ]
    worse = {int(row) for at in pairs for row in at[1:]} - {int(at[0]) for at in pairs}
    perturbed = perturb([c for row, c in enumerate(evidence.conversations) if row not in worse])
    assert worse
    for edit in ("padding", "insult before", "first half"):
        before, after = (rm.score([perturbed.conversations[row] for row in side]) for side in perturbed.rows[edit].T)
        shown, scale = found["edits"][edit], rm.reference["score_std"]
        assert shown["rows"] == len(before) > 10
        assert shown["change"] == pytest.approx((after.scores - before.scores).mean() / scale, abs=1e-4)
        assert shown["rose"] == pytest.approx((after.scores > before.scores).mean())
        for name, moved in shown["objectives"].items():
            column = rm.objectives.position(name)
            change = (after.contributions - before.contributions)[:, column].mean() / scale
            assert moved["change"] == pytest.approx(change, abs=1e-4)


def test_edits_can_be_turned_off_and_fewer(rm, data, features):
    assert inspect.signature(command).parameters["perturbations"].default == ROWS
    html, found = report(rm, data[3:], features=features, perturbations=0)
    assert 'id="perturbations"' not in html and "perturbations" not in found
    _, found = report(rm, data[3:], features=features, perturbations=4)
    assert found["perturbations"]["edits"]["padding"]["rows"] == 4


def test_edits_of_the_embedded_model_end_to_end(tmp_path):
    rows = [
        {"prompt": f"What is {i} + 4?", "response": f"I think it is {i + 4}, always.", "truthfulqa-truthful": i % 2}
        for i in range(4)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rm = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu")
    html, found = report(rm, [tmp_path / "sums.jsonl"], run=tmp_path, perturbations=3)
    for name in ("insult after", "number changed", "word turned to its opposite", "padding", "female user name"):
        entry = found["perturbations"]["edits"][name]
        assert (entry["rows"], entry["unscored"], entry["verdict"]) == (3, 0, "too few rows")
        assert sum(moved["change"] for moved in entry["objectives"].values()) == pytest.approx(
            entry["change"], abs=1e-4
        )
        assert f"{name} {entry['change']:+.2f}, too few rows" in html, "the plot says so to screen readers"
    assert "No response fits: British spelling, female names, non-English names." in html


class Tags(HTMLParser):
    """Tags, attributes and texts of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_takes_nothing_from_outside_and_runs_nothing(page):
    seen = Tags(page[0])
    assert not {"script", "img", "link", "iframe", "object", "form", "base", "embed"} & set(seen.tags)
    for name, value in seen.attributes:
        assert not name.startswith("on") and name != "src", (name, value)
        assert name != "href" or value.startswith("#"), value
    style = page[0].split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|http", style)
    assert any(HOSTILE in text for text in seen.texts), "the hostile text is shown as text"
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in seen.attributes


def test_without_data_the_run_speaks_and_without_a_run_the_data(rm, small_run, data, features, tmp_path):
    html, found = report(rm, run=small_run)
    assert "No data was given" in html and "Evaluation by the training run" in html
    assert found["verbosity"] is None and len(found["gate"]["means"]) == 6
    html, found = report(rm, data[:1], run=tmp_path, features=features)
    assert "validation errors of the training run are not available" in html
    assert found["objectives"][0]["n"] > 0 and found["objectives"][0]["report"] is None
    assert found["mistakes"]["pairs"] == []


def test_a_run_whose_few_held_out_rows_tell_nothing_about_debiasing(rm, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("work"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert "What debiasing left" in report(rm, run=run)[0]
    del metrics["debiasing"]["stability"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    html, _ = report(rm, run=run)
    assert "Evaluation by the training run" in html and "What debiasing left" not in html


def test_a_steered_model_says_so_first(rm, data, features):
    html, found = report(rm.steer({"workshop-help": 2.0}), data[3:], features=features)
    assert found["notices"][0] == {"title": "This model is steered", "text": "workshop-help is weighted 2 times."}
    assert html.index("This model is steered") < html.index('id="data"')


def test_figures_hold_no_text_of_a_conversation(evidence, rows):
    kept = json.dumps(without_texts(contents(evidence)))
    assert "evil" not in kept
    assert not any(row["messages"][-1]["content"][:60] in kept for row in rows["workshop"])


def test_data_that_is_neither_is_refused(rm, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(
        DataError, match=r"odd.jsonl, row 1: found columns \['text'\], expected 'messages', .* 'chosen' and 'rejected'"
    ):
        report(rm, [tmp_path / "odd.jsonl"])


def test_the_command_writes_the_page_and_prints_the_warnings(capsys, small_run, data, features, tmp_path):
    target = tmp_path / "page.html"
    code, out, err = run(
        capsys, "report", small_run, "-d", data[3], "-o", target, "--json", "--dtype", "float32",
        "--features", features, "--perturbations", "2",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["perturbations"]["edits"]["padding"]["rows"] == 2
    assert target.read_text().startswith("<!doctype html>")
    for notice in json.loads(out)["notices"]:
        assert f"warning: {notice['title']}" in err
