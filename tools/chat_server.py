"""An OpenAI-compatible chat server around a small local model, for trying a judge without any other server.

    python tools/chat_server.py [armorm-small] [--port 8765]

Serves `GET /v1/models` and `POST /v1/chat/completions` on 127.0.0.1, one generation at a time: greedy at temperature 0,
else sampled from the request's seed; a JSON schema (`response_format`) is followed. It is for tests, tutorials and benchmarks; serve real judges with vLLM or SGLang.
"""

from __future__ import annotations

import argparse
import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from armorm.backbone.locate import backbone_path

Generate = Callable[[dict[str, Any]], str]  # from the body of a request to the text of its answer


def generator(name: str) -> Generate:
    """Answers of a model by name, such as `armorm-small`, in float32 on the CPU.

    Of a `response_format` with a JSON schema, `enum` values are chosen by their likelihood, and texts generated.
    """
    folder = backbone_path(name)
    tokens, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).float().eval()
    end = {"pad_token_id": tokens.pad_token_id or tokens.eos_token_id}

    def encoded(text: str) -> torch.Tensor:
        return tokens(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def continued(ids: torch.Tensor, most: int, **settings: Any) -> str:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, **end, **settings)
        return str(tokens.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    def most_likely(ids: torch.Tensor, texts: list[str]) -> int:
        options = [encoded(text)[0] for text in texts]
        starts = {tuple(option[:-1].tolist()) for option in options}
        if len(starts) == 1:  # they differ in the last token alone: one forward pass
            logits = model(torch.cat([ids, options[0][None, :-1]], 1), logits_to_keep=1).logits[0, -1]
            return int(logits[torch.stack([option[-1] for option in options])].argmax())
        before = model(ids[:, :-1], use_cache=True).past_key_values
        scores = []
        for text in texts:
            option = encoded(text)
            logits = model(torch.cat([ids[:, -1:], option], 1), past_key_values=copy.deepcopy(before)).logits[:, :-1]
            scores.append(float(logits.log_softmax(-1).gather(2, option[:, :, None]).sum()))
        return scores.index(max(scores))

    def structured(prompt: str, properties: dict[str, Any]) -> str:
        answer = "{"
        for key, schema in properties.items():
            answer += f"{json.dumps(key)}:"
            if "enum" in schema:
                texts = [f" {json.dumps(value)}" for value in schema["enum"]]
                answer += texts[most_likely(encoded(prompt + answer), texts)]
            else:
                text = continued(encoded(prompt + answer + ' "'), 48, do_sample=False)
                answer += f" {json.dumps(text.partition(chr(34))[0].strip())}"
            answer += ", "
        return answer.removesuffix(", ") + "}"

    def generate(body: dict[str, Any]) -> str:
        prompt = tokens.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        form = body.get("response_format") or {}
        with torch.inference_mode():
            if form.get("type") == "json_schema":
                return structured(prompt, form["json_schema"]["schema"]["properties"])
            torch.manual_seed(body.get("seed") or 0)
            heat = body.get("temperature") or 0
            sampling = {"do_sample": True, "temperature": heat} if heat else {"do_sample": False}
            return continued(encoded(prompt), body.get("max_tokens") or 64, **sampling)

    return generate


@contextmanager
def chat_server(generate: Generate, name: str, port: int = 0) -> Iterator[str]:
    """The base URL of a server on a thread, for as long as the block runs; port 0 takes a free one."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send({"object": "list", "data": [{"id": name, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with one_at_a_time:
                text = generate(body)
            message = {"role": "assistant", "content": text}
            self.send({"object": "chat.completion", "choices": [{"index": 0, "message": message}]})

        def send(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="armorm-small")
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    with chat_server(generator(arguments.model), arguments.model, arguments.port) as url:
        print(f"{arguments.model} at {url}; end with Ctrl-C", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
