"""An OpenAI-compatible chat server around a small real language model, generating greedily."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from armorm.backbone.chat_template import ChatTemplate
from tests.helpers.local_http import QuietHandler, local_server
from tests.helpers.small_models import tokenizer


@dataclass
class ChatServed:
    """A running chat server: its base URL, and every request body that it received."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def chat_served(
    closing: Callable[[dict[str, Any]], str], key: str = "", most_characters: int | None = None
) -> Iterator[ChatServed]:
    """A server whose answers are what the model generates, then the closing line that the test wants.

    A random model of 20 thousand weights never writes a verdict of its own accord.

    Args:
        closing: from the request to the last line of its answer; it may be empty.
        key: required in the header, if any.
        most_characters: longer requests are rejected.
    """
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.pad_token_id = 0
    tokens = tokenizer()
    assert ChatTemplate(tokens)
    one_at_a_time = threading.Lock()
    served = ChatServed("")

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send({"object": "list", "data": [{"id": "small-chat", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                self.send({"error": {"message": "no valid API key"}}, 401)
                return
            assert self.path == "/v1/chat/completions"
            if most_characters is not None and len(body["messages"][-1]["content"]) > most_characters:
                self.send({"error": {"message": "too long"}}, 400)
                return
            with one_at_a_time:
                served.requests.append(body)
                ids = tokens.apply_chat_template(
                    body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
                assert body["temperature"] == 0
                found = model.generate(**ids, max_new_tokens=min(body["max_tokens"], 4), do_sample=False)
            text = tokens.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            message = {"role": "assistant", "content": f"{text}\n{closing(body)}"}
            self.send({"object": "chat.completion", "choices": [{"index": 0, "message": message}]})

        def send(self, value: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    with local_server(Handler) as url:
        served.url = f"{url}/v1"
        yield served
