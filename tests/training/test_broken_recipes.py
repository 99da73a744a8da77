"""Whatever a recipe holds: a recipe, or one line that says what is wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armorm.data.synthetic import RECIPE
from armorm.errors import RecipeError
from armorm.training.recipe import Recipe
from tests.helpers.examples import examples

KEYS = sorted({*Recipe.model_fields, "data", "objectives", "construct", "from", "compute", "range", "nonsense"})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["${X}", "${X:-1}", "${HF_TOKEN}", "../x", "a/b", "\x1b[2J", "9" * 5000, "auto"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | SCALARS, inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="[]{}&*a:,- \n\"'!|>?%@`#.0", max_size=60),
    st.sampled_from(
        ["&a [*a]", "? [a]", "2020-99-99", "0x", "1:99:99", "!!binary x", "!!set {a}", "<<: 3", "=: 1", "%YAML 9.9"]
    ),
)
options = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def read_or_one_line(read: Any) -> None:
    start = time.monotonic()
    try:
        recipe = read()
    except RecipeError as error:
        assert str(error)
        assert "\n" not in str(error)
        assert "\x1b" not in str(error)
    else:
        assert Recipe.from_text(recipe.to_yaml()).stored() == recipe.stored()
    assert time.monotonic() - start < 2


def changed_recipe(draw: st.DataObject) -> str:
    """A valid recipe with something else at one place."""
    values = yaml.safe_load(RECIPE)
    found: Any = values
    key: Any = draw.draw(st.sampled_from(KEYS), "key")
    while isinstance(found.get(key) if isinstance(found, dict) else found[key], (dict, list)) and draw.draw(
        st.booleans()
    ):
        inner = found[key]
        if not inner:
            break
        found = inner
        key = draw.draw(
            st.sampled_from(sorted(found, key=str)) if isinstance(found, dict) else st.sampled_from(range(len(found)))
        )
    found[key] = draw.draw(VALUES, "value")
    return yaml.safe_dump(values, allow_unicode=True)


@settings(max_examples=examples(60), **options)
@given(draw=st.data())
def test_any_change_of_a_recipe_is_read_or_refused_in_one_line(draw):
    text = changed_recipe(draw)
    read_or_one_line(lambda: Recipe.from_text(text))


@settings(max_examples=examples(60), **options)
@given(text=TEXTS)
def test_any_text_is_refused_in_one_line(text):
    read_or_one_line(lambda: Recipe.from_text(text))


@settings(max_examples=examples(40), **options)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, content):
    path: Path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    read_or_one_line(lambda: Recipe.from_yaml(path))


@settings(max_examples=examples(40), **options)
@given(override=st.builds("{}={}".format, st.sampled_from(KEYS) | st.text(max_size=8), TEXTS))
def test_any_override_is_read_or_refused_in_one_line(override):
    read_or_one_line(lambda: Recipe.from_text(RECIPE, [override]))


@pytest.mark.slow
@settings(max_examples=examples(2000), **options)
@given(draw=st.data(), text=TEXTS)
def test_many_changes_of_a_recipe_are_read_or_refused_in_one_line(draw, text):
    changed = changed_recipe(draw)
    read_or_one_line(lambda: Recipe.from_text(changed))
    read_or_one_line(lambda: Recipe.from_text(text))
    read_or_one_line(lambda: Recipe.from_text(RECIPE, [f"gating={text}"]))
