"""`GET /` says what is here, and `GET /docs` shows every route and field, without a network."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser

import httpx
import pytest

from armorm.serving.protocols import ROUTES, ROUTES_BY_PATH
from tests.helpers.servers import served

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
GETS = ["/health", "/ready", "/metrics", "/v1/models", "/docs", "/openapi.json"]


class Page(HTMLParser):
    """Texts, links, ids and what a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found["href"]] if tag == "a" else []
        self.ids |= {found["id"]} if "id" in found else set()
        self.loaded += [tag] if tag in ("script", "link", "img", "iframe") or "src" in found else []

    def handle_data(self, data):
        self.text += data


def test_a_program_gets_text_with_every_route_and_an_example_that_works(server):
    answer = server.client.get("/")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "small (4 objectives)" in answer.text
    routes = re.findall(r"^(GET|POST) +(/\S*)", answer.text, re.MULTILINE)
    assert sorted(routes) == sorted([*(("POST", path) for path in ROUTES_BY_PATH), *(("GET", path) for path in GETS)])
    _, url, flag, body = shlex.split(re.search(r"^  (curl .*)$", answer.text, re.MULTILINE)[1])
    assert flag == "--json"
    scored = httpx.post(url, content=body, headers={"Content-Type": "application/json"}).json()
    assert "score" in scored["results"][0]


def test_a_browser_gets_a_page_whose_links_lead_somewhere_and_which_loads_nothing(server):
    home = server.client.get("/", headers=BROWSER)
    docs = server.client.get("/docs")
    pages = {"/": Page(home.text), "/docs": Page(docs.text)}
    for answer in (home, docs):
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    for here, page in pages.items():
        assert page.loaded == []
        assert not re.search(r"https?://(?!127\.0\.0\.1)", home.text + docs.text)
        for link in page.links:
            path, _, place = link.partition("#")
            assert place in pages[path or here].ids if place else server.client.get(path).status_code == 200, link
    assert {f"/docs#{path}" for path in ROUTES_BY_PATH} <= set(pages["/"].links)


def test_the_routes_page_names_every_field_of_every_request_and_its_examples_work(server):
    answer = server.client.get("/docs")
    page = Page(answer.text)
    assert set(ROUTES_BY_PATH) <= page.ids
    for route in ROUTES:
        for name, field in route.request.model_fields.items():
            assert name in page.text, (route.path, name)
            assert (field.description or "") in page.text
    commands = [shlex.split(line) for line in page.text.splitlines() if line.startswith("curl ")]
    assert len(commands) == len(ROUTES) + 4
    for _, url, *rest in commands:
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(url, content=rest[1], headers=headers) if rest else httpx.get(url)
        assert answer.status_code == 200, url


def test_with_a_key_the_pages_are_for_those_who_have_it_and_a_browser_is_asked_for_it(rm):
    with served(rm, api_key="k", name="<b>tiny</b>") as closed:
        for path in ("/", "/docs"):
            refused = closed.client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
            page = closed.client.get(path, headers={**BROWSER}, auth=("any", "k"))
            assert page.status_code == 200
            assert "<b>tiny" not in page.text
        assert closed.client.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer KEY" in closed.client.get("/", auth=("any", "k")).text


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_are_read_only(server, path):
    assert server.client.post(path, json={}).status_code == 405
