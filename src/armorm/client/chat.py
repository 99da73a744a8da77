"""Client of OpenAI-compatible servers: `POST /chat/completions`, answers kept.

Answers are kept by a digest of server and request (model, messages, temperature, seed, format of the answer), one line
each as they come, so a text is asked once; the file holds answers, never the texts that were sent, nor a key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from armorm.client.http import JsonClient, RewardServerError, json_request
from armorm.files import append_text
from armorm.progress import Advance, ignore

_BATCH = 64  # requests that wait at once
REJECTED = frozenset({400, 413, 422})  # statuses that concern one request, such as a text that is too long


class ChatClient(JsonClient):
    """Client of one model.

    Args:
        url: base address such as `http://host:8000/v1`; without a path, `/v1` is added.
        model: its name at the server; None takes the first one that the server lists.
        answers: file of answers to read and add to; None keeps them in memory only.
        max_tokens: most tokens of an answer.
        temperature, seed: of the sampling; at temperature 0 the most probable answer.
        settings: api_key, timeout, retries, connections, verify, as for `Connections`.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        answers: Path | None = None,
        max_tokens: int = 512,
        temperature: float = 0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1", **settings)
        self._named, self.answers, self.max_tokens = model, answers, max_tokens
        self.temperature, self.seed = temperature, seed
        self.asked = 0  # requests that were sent, not answered from the file
        self._known: dict[str, str] = {}
        self._writing = Lock()

    @cached_property
    def model(self) -> str:
        """Name of the model."""
        return self._named or str(self._first_model())

    def complete(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        advance: Advance = ignore,
        *,
        formats: Sequence[Mapping[str, Any] | None] = (),
        rejected: dict[int, str] | None = None,
    ) -> list[str]:
        """The model's answer to each conversation; equal ones are asked once.

        Args:
            conversations: lists of messages, each ending with a user turn.
            advance: called with the number of conversations just done.
            formats: `response_format` of each request, None for free text; by default of none.
            rejected: collects why the server rejected a conversation (400, 413, 422), whose answer is then empty and is
                not kept; None raises it.

        Raises:
            RewardServerError: if the server rejects a request, stays unreachable, or sends an invalid response.
        """
        bodies = self._bodies(conversations, formats)
        keys = [self._key(body) for body in bodies]
        left = self._unanswered(keys, bodies)
        advance(sum(key not in left for key in keys))
        waiting, counts, reasons = list(left.items()), Counter(keys), dict[str, str]()
        kept = REJECTED if rejected is not None else frozenset()
        for start in range(0, len(waiting), _BATCH):
            part = waiting[start : start + _BATCH]
            sizes = [counts[key] for key, _ in part]

            def keep(place: int, answer: Any, part: Sequence[tuple[str, Any]] = part) -> None:
                if not isinstance(answer, RewardServerError):
                    self._keep(part[place][0], self._text(answer))

            requests = [json_request("/chat/completions", body) for _, body in part]
            answers = self.send_all(requests, sizes, advance, kept, keep)
            reasons |= {
                key: str(answer)
                for (key, _), answer in zip(part, answers, strict=True)
                if isinstance(answer, RewardServerError)
            }
        if rejected is not None:
            rejected.update({place: reasons[key] for place, key in enumerate(keys) if key in reasons})
        return [self._known.get(key, "") for key in keys]

    def unanswered(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], formats: Sequence[Mapping[str, Any] | None] = ()
    ) -> list[int]:
        """Places of the conversations that `complete` would send, of equal ones the first."""
        bodies = self._bodies(conversations, formats)
        keys = [self._key(body) for body in bodies]
        left = self._unanswered(keys, bodies)
        return [place for place, key in enumerate(keys) if left.pop(key, None) is not None]

    def _unanswered(self, keys: Sequence[str], bodies: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if self.answers is not None and not self._known:
            self._known = _read_answers(self.answers)
        return {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._known}

    def _keep(self, key: str, text: str) -> None:
        with self._writing:
            self._known[key] = text
            self.asked += 1
            if self.answers is not None:
                append_text(self.answers, json.dumps([key, text]) + "\n")

    def _first_model(self) -> Any:
        shown = self.send(("GET", "/models", None)).get("data")
        if not isinstance(shown, list) or not shown:
            raise RewardServerError(f"{self.address}: /models names no model, expected model=NAME")
        return shown[0].get("id")

    def _bodies(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], formats: Sequence[Mapping[str, Any] | None]
    ) -> list[dict[str, Any]]:
        settings = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": self.seed}
        return [
            {"model": self.model, "messages": list(messages), **settings, **({"response_format": form} if form else {})}
            for messages, form in zip(conversations, formats or [None] * len(conversations), strict=True)
        ]

    def _key(self, body: Mapping[str, Any]) -> str:
        text = json.dumps([self.address, body], sort_keys=True)
        return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def _text(self, answer: Any) -> str:
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise RewardServerError(f"{self.address}: the response has no choices[0].message.content") from None
        return text if isinstance(text, str) else ""


def _read_answers(path: Path) -> dict[str, str]:
    """Answers by key; lines that a killed writer left unfinished are ignored."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
                found[entry[0]] = entry[1]
    return found
