"""What may be set on a server: limits, and how rendered text is read.

In:  options of `armorm serve`. Out: `ServingSettings`, checked.
"""

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
    """A server setting that makes no sense."""


@dataclass(frozen=True)
class ServingSettings:
    """Settings of one server.

    Attributes:
        name: how the model is called in answers.
        normalize: scores of the stacks' formats in standard deviations from the reference mean.
        empty_score: score of an empty response in the stacks' formats; None refuses it.
        rendered_turns: what is done about rendered text (no `prompts`, no messages) that holds more than one
            assistant turn, since a response may have written them: `refuse` it, read it as a `single` turn (the
            response begins at the first reply; markers in it are text), or believe it as `multi` turns.
        api_key: what clients must show; None lets everyone in.
        batch_tokens: most tokens of a forward pass, padding included.
        batch_wait: seconds that a row waits at most for others while the model is idle.
        share_prompts: compute a prompt once for all rows of a batch that have it.
        prompt_cache: most bytes of recent prompts' keys and values, 0 to keep none between batches.
        max_length: most tokens of a conversation, on top of the model's own limit.
        max_rows: most conversations of a request.
        max_body: most bytes of a request.
        max_waiting_rows, max_waiting_tokens: what may wait for the model before requests are turned away.
        max_waiting_seconds: how long what waits may take the model, by its speed so far, before requests are turned
            away: under a storm it is also how soon after it a request is answered.
        max_requests: most requests under way, in whatever state.
        max_bytes: most bytes of the bodies under way.
        request_seconds: time limit of a request, from its first byte to its answer.
        shutdown_seconds: how long a stopping server works on what it has accepted.
        log_texts: write every scored conversation to the log.
        score_log: file to which a line of numbers is appended for each plain (not steered) scored row, for
            `armorm monitor`; None writes none.
        ui: the playground at /ui; needs the extra `ui`.
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
