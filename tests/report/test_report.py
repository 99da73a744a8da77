"""The report of a small run: figures against those computed here, nothing from outside, hostile texts as text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from armorm import ArmoRM
from armorm.conversation import Conversation
from armorm.errors import DataError
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
    assert found["mistakes"]["pairs"][0]["margin"] == pytest.approx(-wrong.max(), abs=1e-4)
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
        assert len(entry["shares"]) == 6, "all objectives of the small model are shown"
        assert sum(value for _, value, _ in entry["shares"]) == pytest.approx(entry["margin"], abs=1e-4)


def test_every_section_stands_on_the_page_with_its_figures(page):
    html, found = page
    for place in ("data", "objectives", "together", "verbosity", "gate", "evaluation", "mistakes"):
        assert f'id="{place}"' in html
    assert "No data was given" not in html
    for entry in found["objectives"]:
        assert html.count(f"<b>{entry['name']}</b>") >= 2, "a cloud and an error curve"
        assert f"R2 {entry['report']['r2']:.2f}" in html
    for notice in found["notices"]:
        assert notice["title"] in html
    assert html.count("<svg") == 2 * len(found["objectives"]) + 2
    assert "selected: step" in html and "held out" in html


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
    with pytest.raises(DataError, match=r"odd.jsonl.*expected 'chosen' and 'rejected', or a conversation"):
        report(rm, [tmp_path / "odd.jsonl"])


def test_the_command_writes_the_page_and_prints_the_warnings(capsys, small_run, data, features, tmp_path):
    target = tmp_path / "page.html"
    code, out, err = run(
        capsys, "report", small_run, "-d", data[3], "-o", target, "--json", "--dtype", "float32",
        "--features", features,
    )  # fmt: skip
    assert code == 0
    assert target.read_text().startswith("<!doctype html>")
    for notice in json.loads(out)["notices"]:
        assert f"warning: {notice['title']}" in err
