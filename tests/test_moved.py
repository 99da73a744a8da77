"""Modules of version 0.1: their import names the module of today, and the table is complete and right."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import armorm

ROOT = Path(__file__).parents[1]
MOVED = json.loads((Path(armorm.__file__).parent / "moved_modules.json").read_text())


@pytest.mark.parametrize("name", ["armorm.explanation", "armorm.registration", "armorm.heads.debias"])
def test_importing_a_module_that_moved_names_its_new_place(name):
    with pytest.raises(
        ModuleNotFoundError, match=rf"^{name} is {re.escape(MOVED[name])} since armorm 0\.2\.0$"
    ) as caught:
        importlib.import_module(name)
    assert caught.value.name == name


def test_a_module_that_never_was_fails_as_any_other():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'armorm\.explanations'"):
        importlib.import_module("armorm.explanations")
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"):
        importlib.import_module("nowhere")


def test_old_places_are_gone_and_new_ones_exist():
    modules = {
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "src" / "armorm").rglob("*.py")
    }
    assert modules & set(MOVED) == set()
    assert {new for entry in MOVED.values() for new in entry.split(" and ")} - modules == set()


def test_the_migration_page_lists_the_same_modules():
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- begin modules") : page.index("<!-- end modules")]
    rows = re.findall(r"^\| `(armorm\.[\w.]+)` \| (.+?) \|$", table, flags=re.MULTILINE)
    assert {old: " and ".join(re.findall(r"`([\w.]+)`", new)) for old, new in rows} == MOVED


def test_importing_the_package_reads_no_table():
    """Without site, whose path files import json themselves; so the package is found by its folder."""
    folder = str(Path(armorm.__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {folder!r}); import armorm"
    program += "; print('json' in sys.modules, armorm.moved.MovedModules in sys.meta_path)"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
