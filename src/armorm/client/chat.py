"""Client of OpenAI-compatible servers: `POST /chat/completions` at temperature 0, answers kept.

Answers are kept by a digest of server, model and request, one line each, so a text is asked once; the file holds
answers, never the texts that were sent, nor a key.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from armorm.client.http import JsonClient, RewardServerError, json_request
from armorm.files import append_text
from armorm.progress import Advance, ignore

_BATCH = 64  # requests between two writes of the answers


class ChatClient(JsonClient):
    """Client of one model.

    Args:
        url: base address such as `http://host:8000/v1`; without a path, `/v1` is added.
        model: its name at the server; None takes the first one that the server lists.
        answers: file of answers to read and add to; None keeps them in memory only.
        max_tokens: most tokens of an answer.
        settings: api_key, timeout, retries, connections, verify, as for `Connections`.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        answers: Path | None = None,
        max_tokens: int = 512,
        **settings: Any,
    ) -> None:
        super().__init__(url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1", **settings)
        self._named, self.answers, self.max_tokens = model, answers, max_tokens
        self.asked = 0  # requests that were sent, not answered from the file
        self._known: dict[str, str] = {}

    @cached_property
    def model(self) -> str:
        """Name of the model."""
        return self._named or str(self._first_model())

    def complete(self, conversations: Sequence[Sequence[Mapping[str, Any]]], advance: Advance = ignore) -> list[str]:
        """The model's answer to each conversation; equal ones are asked once.

        Args:
            conversations: lists of messages, each ending with a user turn.
            advance: called with the number of conversations just done.

        Raises:
            RewardServerError: if the server rejects a request, stays unreachable, or sends an invalid response.
        """
        bodies = [self._body(messages) for messages in conversations]
        keys = [self._key(body) for body in bodies]
        if self.answers is not None and not self._known:
            self._known = _read_answers(self.answers)
        left = {key: body for key, body in zip(keys, bodies, strict=True) if key not in self._known}
        advance(sum(key in self._known for key in keys))
        waiting, counts = list(left.items()), Counter(keys)
        for start in range(0, len(waiting), _BATCH):
            part = waiting[start : start + _BATCH]
            sizes = [counts[key] for key, _ in part]
            answers = self.send_all([json_request("/chat/completions", body) for _, body in part], sizes, advance)
            found = {key: self._text(answer) for (key, _), answer in zip(part, answers, strict=True)}
            self._known |= found
            self.asked += len(found)
            if self.answers is not None:
                append_text(self.answers, "".join(json.dumps(pair) + "\n" for pair in found.items()))
        return [self._known[key] for key in keys]

    def _first_model(self) -> Any:
        shown = self.send(("GET", "/models", None)).get("data")
        if not isinstance(shown, list) or not shown:
            raise RewardServerError(f"{self.address}: /models names no model, expected model=NAME")
        return shown[0].get("id")

    def _body(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        settings = {"temperature": 0, "max_tokens": self.max_tokens, "seed": 0}
        return {"model": self.model, "messages": list(messages), **settings}

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
