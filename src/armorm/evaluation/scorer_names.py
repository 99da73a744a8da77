"""Names of scorers that are not a folder or hub id: a server, a DPO policy, a language model as judge.

    https://host:8008[,api=classify][,tokenizer=NAME]
    dpo:POLICY,reference=NAME[,beta=0.1][,max_length=N]
    judge:https://host:8000/v1[,model=NAME][,mode=pairs][,max_tokens=512]

Every server takes `connections`, `retries`, `timeout` (seconds) and `api_key_env`, the environment variable with its
key. A key is never part of a name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from armorm.client.http import address_fault
from armorm.errors import nearest, shown
from armorm.evaluation.scorer import Scorer, ScorerError

if TYPE_CHECKING:
    from armorm.client import PoolingClient, RewardClient

_URLS = ("http://", "https://")
_SERVER: Mapping[str, Callable[[str], Any]] = {
    "connections": int,
    "retries": int,
    "timeout": float,
    "api_key_env": str,
}
_OPTIONS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "server": {"api": str, "tokenizer": str, "rows_per_request": int, **_SERVER},
    "dpo": {"reference": str, "beta": float, "max_length": int},
    "judge": {"model": str, "mode": str, "max_tokens": int, "answers": str, **_SERVER},
}


@dataclass(frozen=True)
class ScorerName:
    """A parsed name.

    Attributes:
        kind: `server`, `dpo` or `judge`.
        target: URL, or name of the policy.
        options: by name, converted.
    """

    kind: str
    target: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, name: str) -> ScorerName | None:
        """The parts of a name; None for a folder, hub id or function.

        Raises:
            ScorerError: for an unknown option or an impossible value, a URL that holds a key, or no reference.
        """
        kind, colon, rest = ("server", ":", name) if name.startswith(_URLS) else name.partition(":")
        if not colon or kind not in _OPTIONS:
            return None
        target, *given = rest.split(",")
        options = dict(_option(kind, name, text) for text in given)
        if kind != "dpo":
            fault = address_fault(target)
            if fault:
                raise ScorerError(fault)
        elif not options.get("reference"):
            raise ScorerError(f"{name}: expected dpo:POLICY,reference=NAME")
        if not target:
            raise ScorerError(f"{name}: expected a name after {kind}:")
        return cls(kind, target, options)

    @property
    def judges_pairs(self) -> bool:
        """Whether it compares two responses instead of scoring each."""
        return self.kind == "judge" and self.options.get("mode") == "pairs"

    def load(self, *, device: str = "auto", api_key_env: str | None = None) -> Scorer:
        """The scorer. For a server, this sends the first request: it asks for the model.

        Raises:
            ScorerError: for an empty environment variable, an unknown api or mode.
            RewardServerError: if no known server answers at the URL.
            BackboneError: for a policy or reference that cannot be loaded.
        """
        if self.kind == "server":
            from armorm.evaluation.server_scorer import server_scorer

            return server_scorer(self.client(api_key_env))
        if self.kind == "dpo":
            from armorm.evaluation.dpo_scorer import DpoScorer

            return DpoScorer(self.target, device=device, **self.options)
        from armorm.evaluation.judge import load_judge

        return load_judge(self.target, **self._connection(api_key_env))

    def client(self, api_key_env: str | None = None) -> RewardClient | PoolingClient:
        """The client of a server.

        Raises:
            ScorerError: for an empty environment variable or an unknown api.
            RewardServerError: if no known server answers at the URL.
        """
        from armorm.evaluation.server_scorer import server_client

        return server_client(self.target, **self._connection(api_key_env))

    def _connection(self, api_key_env: str | None) -> dict[str, Any]:
        """Options with the key in place of the name of its variable."""
        options = dict(self.options)
        variable = options.pop("api_key_env", None) or api_key_env
        if variable is None:
            return options
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ScorerError(f"environment variable {variable} is empty or absent, expected the API key")
        return {**options, "api_key": key}


def _option(kind: str, name: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    known = _OPTIONS[kind]
    if key not in known or not equals:
        raise ScorerError(
            f"{name}: found {text!r}{nearest(key, known)}, expected one of {', '.join(known)}, as KEY=VALUE"
        )
    try:
        return key, known[key](value)
    except ValueError:
        raise ScorerError(f"{name}: {key}: found {shown(value)}, expected a number") from None
