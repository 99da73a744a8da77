"""Rewrites the examples in docs/serving.md: a request to each route of a real server, and its response.

The server runs the default model in float32. Long lists and objects are cut at `...`.

    python tools/serving_page.py
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx

from armorm.files import DEFAULT_REWARD_MODEL, write_text
from armorm.reward_model import ArmoRM
from armorm.serving.engine import ScoringEngine
from armorm.serving.server import running
from armorm.serving.settings import ServingSettings

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- exchanges: tools/serving_page.py -->", "<!-- end of exchanges -->"
_SHOWN = 4  # entries of a long list or object
_WIDTH = 116

_PROMPT = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
_RENDERED = _PROMPT + "4<|im_end|>"
_MESSAGES = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}]
_CHOICE = {"multiply": {"diasafety-is_safe": 2.0}, "drop": ["gsm8k-is_correct"]}

# Heading, method, path, body, remark.
EXCHANGES: list[tuple[str, str, str, dict[str, Any] | None, str]] = [
    (
        "armorm: `POST /v1/reward`",
        "POST",
        "/v1/reward",
        {"prompt": "What is 2+2?", "responses": ["4", "5, I think.", " "]},
        "The lists of a result are in the order of `objectives`; contributions sum to the score. A row that cannot "
        "be scored gets an error instead, and the others get their scores. `include` selects the lists: `rewards`, "
        "`ratings` (on the raw scales), `debiased_rewards`, `gating_weights`, `gating_output`, `coefficients`, "
        "`contributions`, `relative`.",
    ),
    (
        "",
        "POST",
        "/v1/reward",
        {"conversations": [_MESSAGES], "normalize": True, "steer": _CHOICE, "include": []},
        "Send whole conversations as `conversations`. Steering and normalisation are set per request.",
    ),
    (
        "",
        "POST",
        "/v1/reward",
        {
            "prompt": "What is 2+2?",
            "responses": ["It is 4."],
            "include": [],
            "per_token": "token",
            "policy_tokens": [["It", " is", " 4", ".", ""]],
        },
        "`per_token` also gives each score as a sum over the tokens of a policy, or over sentences: "
        "[Dense rewards](dense-rewards.md).",
    ),
    (
        "OpenRLHF: `POST /get_reward`",
        "POST",
        "/get_reward",
        {"query": [_RENDERED], "prompts": [_PROMPT], "labels": [None]},
        "Set `--reward.remote_url http://host:8008/get_reward`. The prompt is the exact prefix of its query: "
        "everything after it is one response, whatever it contains. An empty `query` gets empty lists.",
    ),
    (
        "vLLM: `POST /classify` (`/v1/classify`), `/pooling`, `/score` (`/v1/score`)",
        "POST",
        "/classify",
        {"model": "any", "input": _RENDERED, "use_activation": False},
        "verl sends `/classify` to its own vLLM servers. `input` is a rendered text, a list of texts, a list of "
        "token ids, or a list of such lists; `messages` is one conversation. The response has the raw score, which is "
        "no probability; `use_activation: true` requests its sigmoid. A row of more than `truncate_prompt_tokens` "
        "tokens is an error, because vLLM would cut off the end of the response; with `truncation_side: left` the "
        "prompt is shortened instead. Other fields that would change a score (`chat_template`, `instruction`, "
        "`max_tokens_per_doc`, ...) are rejected.",
    ),
    ("", "POST", "/pooling", {"messages": _MESSAGES}, ""),
    (
        "",
        "POST",
        "/score",
        {"text_1": "What is 2+2?", "text_2": ["4", "5"]},
        "`/score` takes plain texts, not rendered ones: one prompt for all responses, or one for each. `queries` "
        "with `documents` or `items`, and `data_1` with `data_2`, are other names of the two lists.",
    ),
    (
        "vLLM, Cohere, Jina: `POST /rerank` (`/v1/rerank`, `/v2/rerank`)",
        "POST",
        "/rerank",
        {"query": "What is 2+2?", "documents": ["I do not know.", "5", "2+2 is 4."], "top_n": 2},
        "The documents are responses to the query, best first: they are ordered by their rewards, not by relevance. "
        "`relevance_score` is the raw score. A document that cannot be scored is listed in `errors`.",
    ),
    (
        "SGLang: `POST /classify` and `/v1/embeddings`",
        "POST",
        "/classify",
        {"text": [_RENDERED]},
        "A `/classify` body with `text` is read in SGLang's format.",
    ),
    (
        "",
        "POST",
        "/v1/embeddings",
        {"model": "any", "input": _RENDERED},
        "verl sends `/v1/embeddings` to its own SGLang servers.",
    ),
    (
        "LLaMA-Factory: `POST /v1/score/evaluation`",
        "POST",
        "/v1/score/evaluation",
        {"model": "any", "messages": [_RENDERED]},
        "Set `reward_model: http://host:8008/v1/score/evaluation` and `reward_model_type: api`.",
    ),
    (
        "NIM: `POST /v1/chat/completions`",
        "POST",
        "/v1/chat/completions",
        {"model": "any", "messages": _MESSAGES},
        "`reward` is the score; the other entries are predicted ratings on the objectives' raw scales.",
    ),
    ("The model: `GET /v1/models`", "GET", "/v1/models", None, ""),
    ("State: `GET /health`, `/ready`, `/metrics`", "GET", "/health", None, ""),
    ("", "GET", "/ready", None, ""),
    (
        "Errors",
        "POST",
        "/get_reward",
        {"query": ["What is 2+2? 4"]},
        "All errors have the shape below. 400: the request cannot be parsed; 401: no valid key; 403: sent by a page "
        "of another site; 408: the headers or the body stalled; 413: the request is too large; 415: its headers do "
        "not say JSON, or name an unknown encoding; 421: another `Host`; 422: nothing in it can be scored; 429: the "
        "queue is full (503 on `/classify` and `/v1/embeddings`, because verl discards a sample on any 4xx); 500: the "
        "model failed; 503: the server is shutting down; 504: the time limit was exceeded.",
    ),
]


def cut(value: Any) -> str:
    """JSON in one line, long lists and objects cut, numbers to six digits."""
    if isinstance(value, dict):
        entries = [f"{json.dumps(key, ensure_ascii=False)}: {cut(entry)}" for key, entry in value.items()]
        keep = len(entries) if len(entries) <= 12 else _SHOWN
        return "{" + ", ".join(entries[:keep] + ["..."] * (keep < len(entries))) + "}"
    if isinstance(value, list):
        keep = len(value) if len(value) <= _SHOWN + 1 else _SHOWN - 1
        return "[" + ", ".join([cut(entry) for entry in value[:keep]] + ["..."] * (keep < len(value))) + "]"
    if isinstance(value, str) and len(value) > 2 * _WIDTH:
        value = value[:_WIDTH] + "..."
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def wrapped(text: str, width: int = _WIDTH) -> str:
    """JSON broken after commas into lines of a width."""
    lines = [""]
    for part in text.split(", "):
        piece = part if not lines[-1] else f", {part}"
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines[-1] += ","
            lines.append(f"  {part}")
        else:
            lines[-1] += piece
    return "\n".join(lines)


def exchanged(client: httpx.Client) -> str:
    """All exchanges as Markdown."""
    parts = []
    for heading, method, path, body, remark in EXCHANGES:
        answer = client.request(method, path, json=body)
        status = "" if answer.status_code == 200 else f"{answer.status_code} {answer.reason_phrase}\n"
        asked = f"{method} {path}" + ("" if body is None else "\n" + wrapped(json.dumps(body, ensure_ascii=False)))
        block = f"```\n{asked}\n```\n\n```\n{status}{wrapped(cut(answer.json()))}\n```"
        parts += (
            [f"### {heading}"] * bool(heading)
            + [textwrap.fill(remark, _WIDTH, break_on_hyphens=False, break_long_words=False)] * bool(remark)
            + [block]
        )
    return "\n\n".join(parts)


def main() -> None:
    """Rewrite the page."""
    rm = ArmoRM.from_pretrained(DEFAULT_REWARD_MODEL, dtype="float32", device="cpu")
    with (
        running(ScoringEngine(rm, ServingSettings(name=rm.name))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        text = exchanged(client)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{PAGE}: found no marks, expected {BEGIN} and {END}")
    write_text(PAGE, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
