"""Rubrics: what they hold, and faults that name file and field."""

from __future__ import annotations

import pytest

from armorm.data.rubric import Rubric
from armorm.errors import DataError

TEXT = """
about: replies of a shop
explain: true
objectives:
  - name: polite
    question: How polite is it?
    range: [1, 5]
    anchors: {5: friendly, 1: insulting}
  - {name: rude, question: "How rude?", range: [0, 0.5], direction: lower, column: shop-rude}
pairs: {question: "Which is better?", objective: polite}
"""


def test_a_rubric_is_read_from_yaml(tmp_path):
    path = tmp_path / "rubric.yaml"
    path.write_text(TEXT)
    rubric = Rubric.from_yaml(path)
    polite, rude = rubric.objectives
    assert (polite.levels, polite.anchors, polite.column) == (
        [1, 2, 3, 4, 5],
        ((1, "insulting"), (5, "friendly")),
        "polite",
    )
    assert (rude.levels, rude.scale, rude.column) == ([], "rude=0:0.5:lower", "shop-rude")
    assert rubric.explain and rubric.pairs.objective == "polite"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "range: [1, 5]",
            "range: [5, 1]",
            "field 'objectives.0.range': found [5, 1], expected [LOW, HIGH] with LOW < HIGH",
        ),
        ("name: rude", "name: polite", "field 'objectives.1.name': found 'polite' twice"),
        ('question: "How rude?", ', "", "field 'objectives.1.question': missing"),
        ("direction: lower", "direction: down", "expected higher, lower or neutral"),
        ("5: friendly", "6: friendly", "found 6: 'friendly', expected a rating from 1 to 5 with a text"),
        ("explain: true", "explain: often", "field 'explain': found 'often', expected true or false"),
        ("explain: true", "explian: true", "unknown key (did you mean explain?)"),
        ("objective: polite", "objective: polight", "did you mean polite"),
        ("about: replies", "about: [replies", "not valid YAML"),
    ],
)
def test_a_fault_names_file_and_field(tmp_path, old, new, said):
    assert old in TEXT
    path = tmp_path / "rubric.yaml"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(DataError) as caught:
        Rubric.from_yaml(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"absent\.yaml: no such file or folder; looked for /"):
        Rubric.from_yaml(tmp_path / "absent.yaml")
