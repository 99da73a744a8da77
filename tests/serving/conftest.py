"""A small model and a server around it, for all tests of serving."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from armorm.reward_model import ArmoRM
from tests.helpers.small_models import reward_model

pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from tests.helpers.servers import Served, served


@pytest.fixture(scope="session")
def rm() -> ArmoRM:
    """A small random reward model in float32."""
    return reward_model()


@pytest.fixture(scope="session")
def server(rm: ArmoRM) -> Iterator[Served]:
    """One server for all tests that change nothing about it."""
    with served(rm) as running_server:
        yield running_server
