"""The playground in a real browser: what a visitor sees, moves, copies; nothing from other hosts; the key is asked for."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from urllib.parse import urlparse

import pytest
import yaml

from armorm import ArmoRM
from tests.helpers.servers import served

CHROMIUM = os.environ.get("ARMORM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]
# Off is everything that a browser does by itself, so that what is asked for is what the page asked for.
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
              "--disable-component-update", "--disable-sync"]  # fmt: skip
KEY = "s3cret"
VERDICT = re.compile("is better than|Too close to call")


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("gradio")
    with served(
        ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu"), ui=True, api_key=KEY
    ) as running:
        running.passes = 0
        forward = running.engine.rm.model.model.register_forward_pre_hook(lambda *_: _count(running))
        yield running
        forward.remove()


def _count(running):
    running.passes += 1


@pytest.fixture(scope="module")
def browser(server):  # closed before the server, which would wait for its pages
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


def opened(browser, server, **options):
    """A page of the playground, with the addresses it asked for and the faults of its scripts."""
    context = browser.new_context(http_credentials={"username": "any", "password": KEY}, **options)
    page = context.new_page()
    page.addresses, page.faults, page.console = [], [], []
    page.on("console", lambda message: message.type == "error" and page.console.append(message.text))
    page.on("request", lambda request: page.addresses.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(f"{server.url}/ui/")
    page.get_by_role("button", name="Score", exact=True).wait_for(timeout=60_000)
    return page


def status(page, text):
    page.locator("[role=status]", has_text=text).wait_for(timeout=60_000)


def slider(page, name):
    return page.get_by_role("slider", name=re.compile(re.escape(name))).first


def test_a_visitor_scores_reweighs_without_the_model_and_copies_the_policy(browser, server):
    page = opened(browser, server, viewport={"width": 1360, "height": 1000})
    before = server.passes
    page.get_by_role("button", name="Score", exact=True).click()
    page.get_by_role("heading", name=VERDICT).wait_for(timeout=60_000)
    page.wait_for_timeout(500)
    asked = server.passes
    assert asked > before
    assert page.locator("article.card").count() == 2
    assert page.locator(".verdict").get_by_text("Contributions to").count() == 1
    first = [text.strip() for text in page.locator("article .score").all_inner_texts()]

    page.get_by_text("Weight the objectives").click()
    moved = slider(page, "diasafety-is_safe")
    moved.focus()
    for _ in range(20):
        moved.press("ArrowRight")
    status(page, "1 of")
    page.wait_for_timeout(500)
    assert [text.strip() for text in page.locator("article .score").all_inner_texts()] != first
    assert server.passes == asked, "the model was asked again"
    policy = yaml.safe_load("\n".join(page.locator("#take .cm-content").first.locator(".cm-line").all_inner_texts()))
    assert policy["multiply"]["diasafety-is_safe"] == pytest.approx(2.0)
    rm = server.engine.rm.steer(policy["multiply"])
    prompt, *replies = [box.input_value() for box in page.locator("textarea").all()[:3]]
    batch = rm.score(
        [[{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}] for reply in replies]
    )
    shown = sorted(
        (float(text.replace("\N{MINUS SIGN}", "-")) for text in page.locator("article .score").all_inner_texts()),
        reverse=True,
    )
    assert shown == pytest.approx(sorted(batch.scores.tolist(), reverse=True), abs=2e-3)

    page.get_by_role("button", name="Reset all to 1").click()
    status(page, "Weights as served")
    assert [text.strip() for text in page.locator("article .score").all_inner_texts()] == first
    hosts = {urlparse(url).hostname for url in page.addresses if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}
    assert page.faults == []


def test_the_keyboard_alone_is_enough(browser, server):
    page = opened(browser, server)
    prompt = page.get_by_label("Prompt")
    prompt.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("What is 2+2?")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("4")
    page.keyboard.press("Control+Enter")
    page.get_by_role("heading", name=VERDICT).wait_for(timeout=60_000)
    assert prompt.input_value() == "What is 2+2?"


def test_rows_of_a_file_are_loaded_and_faults_are_said(browser, server, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"prompt": "Name a river.", "responses": ["The Rhine.", "Elbe", "Oder", "Main"]}) + "\n{broken\n"
    )
    page = opened(browser, server)
    page.get_by_text("More responses, or rows of a file").click()
    page.locator("input[type=file]").first.set_input_files(str(rows))
    status(page, "Read 1 rows, skipped 1")
    page.wait_for_function("document.querySelector('textarea').value == 'Name a river.'")
    page.get_by_role("button", name="Score", exact=True).click()
    page.locator("article.card").nth(3).wait_for(timeout=60_000)
    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Score", exact=True).click()
    status(page, "Not scored: enter a prompt")
    assert page.locator(".verdict").count() == page.locator("article.card").count() == 0, "the earlier results are gone"


def test_a_phone_and_a_dark_page_show_everything_without_scrolling_sideways(browser, server):
    page = opened(browser, server, viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.get_by_role("button", name="Score", exact=True).click()
    page.locator(".verdict").wait_for(timeout=60_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for seen in (page.get_by_label("Prompt"), page.get_by_label("Response A"), page.locator(".verdict h2")):
        box = seen.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 844, "on the first screen"
    assert page.get_by_role("slider").first.is_hidden() or page.get_by_role("slider").count() == 0
    assert page.console == [], "no file is missing"
    colours = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", colours)[:3])) < 200, colours


def test_without_the_key_there_is_no_page_and_a_browser_is_told_to_ask_for_it(server):
    for path in ("/ui", "/ui/", "/ui/config", "/ui/gradio_api/info", "/ui/gradio_api/upload"):
        answer = server.client.get(path)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Basic realm="armorm"'
    assert server.client.get("/v1/models").headers["www-authenticate"] == "Bearer"
    page = server.client.get("/ui/", auth=("any", KEY))
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]


def test_a_body_beyond_the_limit_is_refused_on_the_page_too():
    from tests.helpers.small_models import reward_model

    with served(reward_model(), ui=True, max_body=1000) as small:
        answer = small.client.post("/ui/gradio_api/queue/join", content=b"x" * 1001)
        assert answer.status_code == 413
        chunks = small.client.post("/ui/gradio_api/queue/join", content=iter([b"x" * 600, b"x" * 600]))
        assert chunks.status_code >= 400


def test_an_open_page_does_not_keep_the_server_from_stopping(browser):
    with served(ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu"), ui=True) as running:
        page = opened(browser, running)
        page.wait_for_timeout(500)
        begin = time.monotonic()
    assert time.monotonic() - begin < running.engine.settings.shutdown_seconds / 3
