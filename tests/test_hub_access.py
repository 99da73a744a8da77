"""Models that are not there: one line at once, and nothing is asked of a hub that does not answer."""

from __future__ import annotations

import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from armorm import ArmoRM, hub_access
from armorm.backbone.decoder import Backbone
from armorm.errors import BackboneError, CheckpointError
from armorm.evaluation.scorers import require_known
from armorm.hub_access import _answers, hub_answers, hub_if_it_answers, require_folder, without_hub


@pytest.fixture
def hub_at(monkeypatch):
    """Makes an address that of the hub."""

    def set_endpoint(address: str) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        _answers.cache_clear()

    yield set_endpoint
    _answers.cache_clear()


@pytest.fixture
def no_hub(hub_at):
    """A hub that refuses connections."""
    hub_at("http://127.0.0.1:9")


def test_a_hub_that_does_not_answer_is_switched_off_within_the_block(no_hub, tmp_path):
    with hub_if_it_answers("owner/name"):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with hub_if_it_answers(tmp_path):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_hub_whose_tls_python_does_not_accept_answers(hub_at):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)  # (without TLS)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub_at(f"https://127.0.0.1:{server.server_port}")
    assert hub_answers()
    server.shutdown()
    server.server_close()
    _answers.cache_clear()
    assert not hub_answers()


def test_an_answer_is_asked_for_again_after_a_minute(no_hub, monkeypatch):
    assert not hub_answers()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", Path(__file__).as_uri())  # a URL that opens
    now = time.monotonic()
    monkeypatch.setattr(hub_access.time, "monotonic", lambda: now + 61)
    assert hub_answers()


def test_a_hub_that_answers_is_used(monkeypatch):
    monkeypatch.setattr(hub_access, "hub_answers", lambda: True)
    with hub_if_it_answers("owner/name"):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with without_hub():
        assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_model_that_is_nowhere_is_one_line(no_hub):
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: .* no such folder, .* the hub cannot be reached$"):
        ArmoRM.from_pretrained("nobody/nothing")
    with pytest.raises(BackboneError, match=r"^backbone nobody/nothing: no such folder, .* the hub cannot be reached$"):
        Backbone.load("nobody/nothing")


def test_a_folder_with_a_name_like_a_hub_id_is_a_hint_not_a_refusal(no_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-4B").mkdir(parents=True)
    said = r"^Qwen/Qwen3-8B: .* no such folder \(did you mean Qwen/Qwen3-4B\?\), not in the local cache, and the hub cannot"
    with pytest.raises(CheckpointError, match=said):
        ArmoRM.from_pretrained("Qwen/Qwen3-8B")
    with pytest.raises(CheckpointError, match=said):
        require_known("Qwen/Qwen3-8B")
    monkeypatch.setattr(hub_access, "hub_answers", lambda: True)
    require_folder("Qwen/Qwen3-8B")


def test_names_of_folders_are_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_access, "hub_answers", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("./runs/mne", str(tmp_path / "runs" / "mne"), "runs/mine/../mne"):
        with pytest.raises(CheckpointError, match=r"mne: no such folder \(did you mean .*mine\?\)$"):
            ArmoRM.from_pretrained(name)
    for name in ("./model", "/nowhere/model", "runs/mine/model", "~/model"):
        with pytest.raises(CheckpointError, match=r"no such folder$"):
            ArmoRM.from_pretrained(name)
    with pytest.raises(
        CheckpointError, match="armorm-small: a backbone, expected a reward model such as armorm-small-rm"
    ):
        ArmoRM.from_pretrained("armorm-small")
