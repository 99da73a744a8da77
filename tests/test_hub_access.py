"""Models that are not there: one line at once, and nothing is asked of a hub that does not answer."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from unittest.mock import Mock

import huggingface_hub.constants
import pytest

from armorm import ArmoRM, hub_access
from armorm.backbone.decoder import Backbone
from armorm.errors import BackboneError, CheckpointError
from armorm.hub_access import hub_answers, hub_if_it_answers, without_hub


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses connections."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


def test_a_hub_that_does_not_answer_is_switched_off_within_the_block(no_hub, tmp_path):
    with hub_if_it_answers("owner/name"):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    with hub_if_it_answers(tmp_path):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_hub_whose_certificate_python_does_not_know_answers(no_hub, monkeypatch):
    refused = urllib.error.URLError(ssl.SSLCertVerificationError("unable to get local issuer certificate"))
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=refused))
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


def test_names_of_folders_are_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_access, "hub_answers", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("runs/mne", "./runs/mne", str(tmp_path / "runs" / "mne")):
        with pytest.raises(CheckpointError, match=r"runs/mne: no such folder \(did you mean .*runs/mine\?\)$"):
            ArmoRM.from_pretrained(name)
    for name in ("./model", "/nowhere/model", "runs/mine/model", "~/model"):
        with pytest.raises(CheckpointError, match=r"no such folder$"):
            ArmoRM.from_pretrained(name)
    with pytest.raises(
        CheckpointError, match="armorm-small: a backbone, expected a reward model such as armorm-small-rm"
    ):
        ArmoRM.from_pretrained("armorm-small")
