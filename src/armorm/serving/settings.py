"""Settings of a server: names, limits, how rendered text is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from armorm.backbone.rendered_text import RenderedTurns
from armorm.errors import ArmormError
from armorm.features.extract import BATCH_TOKENS

MEBIBYTE = 1 << 20


class SettingsError(ArmormError, ValueError):
    """An invalid server setting."""


@dataclass(frozen=True)
class ServingSettings:
    """Settings of one server.

    Attributes:
        name: name of the model in responses.
        normalize: scores of the other protocols in standard deviations from the reference mean (armorm's own requests
            state it themselves).
        empty_score: score of an empty response in the other protocols; None rejects it.
        rendered_turns: how to read rendered text (no `prompts`, no messages) with several assistant turns, which a
            response may have forged: `refuse` it; read it as a `single` turn (the response begins at the first reply,
            and the markers in it are text); or trust it as `multi` turns.
        api_key: key that clients must present; None for no key.
        batch_tokens: most tokens of a forward pass, padding included.
        batch_wait: most seconds that a row waits for others while the model is idle.
        share_prompts: compute a prompt once for all rows of a batch that share it.
        prompt_cache: most bytes of cached keys and values of recent prompts, 0 for no cache between batches.
        max_length: most tokens of a conversation, in addition to the model's own limit.
        max_rows: most conversations of a request.
        max_body: most bytes of a request.
        max_waiting_rows, max_waiting_tokens: size of the queue; further requests are rejected.
        max_waiting_seconds: most seconds of work in the queue, estimated from the speed of the model; further requests
            are rejected. Under overload this is also how long an accepted request waits.
        max_requests: most requests in flight, in any state.
        max_bytes: most bytes of all bodies in flight.
        request_seconds: time limit of a request, from its first byte to its response.
        shutdown_seconds: how long a stopping server works on what it has accepted.
        log_texts: write every scored conversation to the log.
        score_log: file to which a line of numbers is appended for each plain (not steered) scored row, for
            `armorm monitor`; None for no log.
        ui: serve the playground at /ui; needs the extra `ui`.
    """

    name: str = "armorm"
    normalize: bool = False
    empty_score: float | None = None
    rendered_turns: RenderedTurns = "refuse"
    api_key: str | None = None
    batch_tokens: int = BATCH_TOKENS
    batch_wait: float = 0.004
    share_prompts: bool = True
    prompt_cache: int = 256 * MEBIBYTE
    max_length: int | None = None
    max_rows: int = 1024
    max_body: int = 16 * MEBIBYTE
    max_waiting_rows: int = 8192
    max_waiting_tokens: int = 4_000_000
    max_waiting_seconds: float = 60.0
    max_requests: int = 4096
    max_bytes: int = 256 * MEBIBYTE
    request_seconds: float = 150.0
    shutdown_seconds: float = 30.0
    log_texts: bool = False
    score_log: Path | None = None
    ui: bool = False

    def __post_init__(self) -> None:
        for name in (
            *("batch_tokens", "max_length", "max_rows", "max_body", "max_waiting_rows", "max_waiting_tokens"),
            *("max_waiting_seconds", "max_requests", "max_bytes", "request_seconds", "shutdown_seconds"),
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
        if self.api_key is not None and not self.api_key.strip():
            raise SettingsError("the API key is empty, expected one")
