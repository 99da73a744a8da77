"""Settings of a server: names, limits, how rendered text is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from armorm.backbone.rendered_text import RenderedTurns
from armorm.errors import ArmormError
from armorm.features.extract import BATCH_TOKENS

MEBIBYTE = 1 << 20
_HOST_RULE = re.compile(r"\[[0-9a-fA-F:.]+\]|(\*\.)?[a-zA-Z0-9._-]+")
_ORIGIN = re.compile(r"https?://[^/\s*?#]+")


class SettingsError(ArmormError, ValueError):
    """An invalid server setting."""


@dataclass(frozen=True)
class ServingSettings:
    """Settings of one server."""

    name: str = "armorm"  # of the model in responses
    # Scores of the other protocols in standard deviations from the reference mean (armorm's own requests state it).
    normalize: bool = False
    empty_score: float | None = None  # of an empty response in the other protocols; None rejects it
    # How to read rendered text (no `prompts`, no messages) with several assistant turns, which a response may have
    # forged: `refuse` it; read it as a `single` turn (the response begins at the first reply, and the markers in it are
    # text); or trust it as `multi` turns.
    rendered_turns: RenderedTurns = "refuse"
    api_key: str | None = None  # that clients must present; None for no key
    # Names in `Host` that are answered besides those of this machine. None: no others if the server listens on a
    # loopback address, else any.
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()  # sites whose pages may send requests (CORS), as https://example.org
    batch_tokens: int = BATCH_TOKENS  # most tokens of a forward pass, padding included
    batch_wait: float = 0.004  # most seconds that a row waits for others while the model is idle
    share_prompts: bool = True  # compute a prompt once for all rows of a batch that share it
    prompt_cache: int = 256 * MEBIBYTE  # most bytes of cached keys and values of recent prompts, 0 for no cache
    max_length: int | None = None  # most tokens of a conversation, in addition to the model's own limit
    max_rows: int = 1024  # of a request
    max_body: int = 16 * MEBIBYTE  # bytes of a request
    # Size of the queue, beyond which requests are rejected: in rows, in tokens, and in seconds of work, estimated from
    # the speed of the model. Under overload the last is also how long an accepted request waits, and a stopping server
    # finishes its queue only if this is below `shutdown_seconds`.
    max_waiting_rows: int = 8192
    max_waiting_tokens: int = 4_000_000
    max_waiting_seconds: float = 25.0
    max_requests: int = 4096  # in flight, in any state
    max_bytes: int = 256 * MEBIBYTE  # of all bodies in flight
    request_seconds: float = 150.0  # time limit of a request, from its first byte to its response
    header_seconds: float = 10.0  # time limit of a request's headers, from its first byte or the connection
    body_idle_seconds: float = 30.0  # longest time without a byte of a body
    keep_alive_seconds: float = 60.0  # how long a connection stays open without a request
    max_connections: int = 1000  # a new one then replaces that which has waited longest without a request
    shutdown_seconds: float = 30.0  # how long a stopping server works on what it has accepted
    log_texts: bool = False  # write every scored conversation to the log
    # A line of numbers for each plain (not steered) scored row is appended to this file, for `armorm monitor`.
    score_log: Path | None = None
    ui: bool = False  # serve the playground at /ui; needs the extra `ui`
    ratings: Path | None = None  # file that ratings given in the playground are appended to; None for no button

    def __post_init__(self) -> None:
        for name in (
            *("batch_tokens", "max_length", "max_rows", "max_body", "max_waiting_rows", "max_waiting_tokens"),
            *("max_waiting_seconds", "max_requests", "max_bytes", "request_seconds", "shutdown_seconds"),
            *("header_seconds", "body_idle_seconds", "keep_alive_seconds", "max_connections"),
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingsError(f"{name} {value}, expected a number above 0")
        for name, unit in (("batch_wait", "seconds"), ("prompt_cache", "bytes")):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} {getattr(self, name)}, expected {unit} >= 0")
        if self.empty_score is not None and not math.isfinite(self.empty_score):
            raise SettingsError(f"empty_score {self.empty_score}, expected a finite number")
        if self.rendered_turns not in get_args(RenderedTurns):
            raise SettingsError(f"rendered_turns {self.rendered_turns!r}, expected refuse, single or multi")
        for host in self.allowed_hosts or ():
            if not _HOST_RULE.fullmatch(host):
                raise SettingsError(f"allowed host {host!r}, expected a name without port, such as rewards.example.org")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise SettingsError(f"allowed origin {origin!r}, expected scheme and host, such as https://example.org")
        if self.api_key is not None and not self.api_key.strip():
            raise SettingsError("the API key is empty, expected one")
