"""The heat map of words: the text as it is, one drawing per objective, hostile text escaped, no script."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pytest

from armorm.backbone.token_spans import TokenSpans
from armorm.explain.token_attribution import TokenAttribution
from armorm.explain.word_map import MOST_WORDS, shown_objectives, word_map

TEXTS = {
    "code": "Use this:\n\n```python\nif a < b:\n    print('&amp;', \"x\")\n```",
    "hostile": '</form><script>alert(1)</script> "><img src=x onerror=alert(1)> {{ 7*7 }}',
    "right-to-left": "שלום עולם, זה לא בטוח.\nمرحبا بالعالم.",
    "combining": "nai\u0308ve cafe\u0301 क्षत्रिय 👩‍👩‍👧 ok",
    "unspaced": "你好，世界。สวัสดี",
}


def attribution(text, names=("kind", "brief"), seed=0, scale=(1.0, 1.0)):
    """An attribution of one token per run of characters without white space."""
    spans = np.array([found.span() for found in re.finditer(r"\S+", text)])
    count, rng = len(spans), np.random.default_rng(seed)
    places = TokenSpans(text, spans, np.zeros(count, bool), [text[a:b] for a, b in spans], [])
    rewards = rng.normal(size=(count, len(names))) * np.array(scale)
    return TokenAttribution(places, list(names), np.ones(len(names)), rewards, np.zeros(len(names)))


def drawings(page):
    """The shown text of each drawing."""
    replies = re.findall(r'<p class="reply" dir="auto">(.*?)</p>', page, re.DOTALL)
    return [unescape(re.sub(r"<[^>]*>", "", reply)) for reply in replies]


@pytest.mark.parametrize("name", TEXTS)
def test_every_drawing_shows_the_text_as_it_is(name):
    page = word_map(attribution(TEXTS[name]))
    assert drawings(page) == [TEXTS[name]] * 3, "the score and two objectives"


def test_hostile_text_and_names_stay_text():
    page = word_map(attribution(TEXTS["hostile"], names=('"; } * { display: none', "<script>")))
    body = page[page.index("</style>") + 8 :]
    assert "<script" not in page and "<img" not in page and body.count("</form>") == 1
    assert re.findall(r'style="([^"]*)"', body) == [
        '--of:&#34;score&#34;',
        '--of:&#34;\\22 \\3b  \\7d  \\2a  \\7b  display\\3a  none&#34;',
        '--of:&#34;\\3c script\\3e &#34;',
    ]  # fmt: skip
    assert "http" not in page and "url(" not in page


def test_a_switch_has_a_button_and_a_rule_for_each_drawing():
    page = word_map(attribution(TEXTS["code"]))
    buttons = re.findall(r'<input type="radio" name="of"( checked)?>(\w+)', page)
    assert [checked for checked, _ in buttons] == [" checked", "", ""]
    assert sorted(name for _, name in buttons) == ["brief", "kind", "score"] and buttons[0][1] == "score"
    for number in (1, 2, 3):
        assert f"label:nth-of-type({number}) :checked) > .map:nth-of-type({number})" in page


def test_hovering_names_the_word_and_its_number_and_shades_follow_the_sign():
    found = attribution("Plain words that differ in what they add.")
    page = word_map(found)
    first = page[page.index('class="map"') :].split('class="map"')[1]
    for word in found.words():
        value = word.deviations.sum()
        (kind,) = re.findall(rf'<i( class="[rl]\d")? data-t="{re.escape(word.text)}  \{value:+.4f}">', first)
        assert not kind or kind[8] == ("r" if value > 0 else "l")
    strongest = max(found.words(), key=lambda word: abs(word.deviations.sum()))
    assert re.search(rf'class="[rl]3" data-t="{re.escape(strongest.text)}', first)


def test_the_strongest_parts_are_named_as_text():
    found = attribution("One is here. Two is there. Three is nowhere. Four is last.")
    parts = sorted(found.sentences(), key=lambda part: part.deviations.sum())
    page = word_map(found)
    raises, lowers = page.split("Raises it most:")[1].split("Lowers it most:")[:2]
    assert parts[-1].text in raises and f"{parts[-1].deviations.sum():+.4f}" in raises
    assert parts[0].text in lowers and f"{parts[0].deviations.sum():+.4f}" in lowers


def test_a_single_word_of_several_tokens_is_its_own_mean_and_has_no_shade():
    text = "Photosynthesis"
    spans = np.array([[0, 5], [5, 8], [8, 11], [11, 14]])
    places = TokenSpans(text, spans, np.zeros(4, bool), [text[a:b] for a, b in spans], [])
    for seed in range(20):
        rewards = np.random.default_rng(seed).normal(size=(4, 3))
        page = word_map(TokenAttribution(places, ["a", "b", "c"], np.ones(3), rewards, np.zeros(3)))
        assert not re.search(r'class="[rl]\d"', page.split('class="map"', 1)[1])
        assert "Lowers it most" not in page and "Raises it most" not in page


def test_objectives_that_hardly_move_the_score_are_not_drawn():
    found = attribution(TEXTS["code"], names=("kind", "brief", "tiny", "small"), scale=(1, 2, 1e-4, 1e-4))
    assert shown_objectives(found) == ["brief", "kind"]
    assert len(drawings(word_map(found))) == 3 and "2 objectives that hardly move it" in word_map(found)


def test_a_long_reply_is_drawn_for_fewer_objectives():
    names = [f"o{i}" for i in range(10)]
    text = " ".join(["word"] * (MOST_WORDS // 3))
    page = word_map(attribution(text, names=names, scale=np.ones(10)))
    assert len(drawings(page)) == 3
    assert len(page.encode()) < 1_200_000
