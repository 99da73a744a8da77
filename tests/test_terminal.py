"""Nothing that others wrote reaches a terminal as a control sequence."""

from __future__ import annotations

import ast
import json
import math
import re

import pytest
from rich.table import Table

from armorm.cli.output import emit
from armorm.errors import DataError, printable
from armorm.files import json_text
from armorm.progress import Terminal, say
from tests.helpers.small_models import OBJECTIVES, changed, reward_model
from tests.test_architecture import MODULES

CLEAR = "\x1b[2J\x1b]0;title\x07"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\x9b2J\x7f\x00", r"\x9b2J\x7f\x00"),
        ("abc\u202ecba", r"abc\u202ecba"),
        ("name\udcff", r"name\udcff"),
        ("naïve 語\tשלום\n", "naïve 語\tשלום\n"),
    ],
)
def test_control_characters_are_escaped_and_text_is_kept(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_a_line_a_table_and_an_error_print_no_control_character(capsys):
    table = Table(f"head{CLEAR}", "value")
    table.add_row(f"cell{CLEAR}", "1")
    emit({}, f"line{CLEAR}", table, as_json=False)
    say(f"said{CLEAR}")
    out, err = capsys.readouterr()
    assert not CONTROL.search(out + err)
    assert [part in out for part in ("head", "cell", "line")] == [True] * 3
    assert r"said\x1b[2J" in err
    assert not CONTROL.search(str(DataError(f"wrong{CLEAR}", file=f"a{CLEAR}")))


def test_styles_of_a_terminal_are_kept(capsys):
    Terminal(force_terminal=True, color_system="standard", highlight=False).print("[red]red[/red] \x1b[32m")
    out = capsys.readouterr().out
    assert out.startswith("\x1b[31mred\x1b[0m")
    assert "\x1b[32m" not in out


def test_an_explanation_of_an_objective_with_a_control_sequence_is_printable():
    rm = reward_model()
    entries = OBJECTIVES.to_dicts()
    entries[0]["name"] = f"help{CLEAR}"
    explanation = changed(rm, objectives=entries).explain(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    )
    assert not CONTROL.search(str(explanation))
    assert r"help\x1b" in str(explanation)


def test_json_holds_no_control_character_and_no_nan_and_reads_back():
    value = {"id": "\x9b2J\x1b[2J\x7f\udcff", "nan": math.nan, "nested": [{"inf": math.inf}], "text": "語"}
    text = json_text(value)
    assert not CONTROL.search(text)
    text.encode()
    read = json.loads(text, parse_constant=pytest.fail)
    assert read == {**value, "nan": None, "nested": [{"inf": None}]}
    assert "語" in text


def test_what_json_has_no_type_for_is_written_as_text():
    from datetime import date

    assert json.loads(json_text({"day": date(2024, 1, 2), "raw": b"ab"})) == {"day": "2024-01-02", "raw": "b'ab'"}


def test_every_module_prints_through_the_terminal():
    found = [
        f"{name}:{node.lineno}"
        for name, module in MODULES.items()
        for node in ast.walk(module)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console"
    ]
    assert found == []
