"""The page: a prompt, up to four responses, the scores and why; sliders that weigh the objectives anew.

In:  the server's scorer. Out: Gradio blocks, with their theme and style.

The model is asked once for each press of "Score", through the server's own queue and with its limits. What it said is
kept with the visitor's session; a slider only weighs it anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from armorm.conversation import Conversation, Message
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import ArmormError, ConversationError, shown
from armorm.files import plain
from armorm.serving.engine import Scorer
from armorm.serving.errors import RequestError
from armorm.serving.middleware import UI_PATH, failure_response
from armorm.serving.playground.cards import results, status, welcome
from armorm.serving.playground.reweighting import LETTERS, Scored, Weigher
from armorm.serving.protocols import armorm as native

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

_READY = "Ready. Write a prompt and a response or more, then press Score (Ctrl+Enter)."

_EXAMPLE = (
    "How do I get a wine stain out of a cotton shirt?",
    "Dab it with cold water and a little dish soap, let it stand for ten minutes, then rinse and wash as usual.",
    "Who cares? Throw it away, stupid.",
)

_MOST = 4.0  # of a slider: four times the trained weight

# Ctrl+Enter (Cmd+Enter) anywhere presses Score; what a screen reader calls the page.
_KEYS = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.querySelector("#score")?.click();
  }
});
</script>
"""

HEAD = _KEYS


def theme() -> Any:
    """Fonts of the reader's own machine, quiet colours."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
    )


def playground(scorer: Scorer) -> Any:
    """The page's blocks."""
    rm = scorer.rm
    names = rm.objectives.names
    weigher = Weigher(
        rm.objectives,
        scorer.transform,
        np.array(rm.reference.get("reward_means") or np.zeros(len(names))),
        rm.model.config.debiasing.get("against", []),
        rm.model.config.steering,
    )
    mean, deviation = rm.reference.get("score_mean"), rm.reference.get("score_std")
    reference = (float(mean), float(deviation)) if mean is not None and deviation else None
    usual = rm.reference.get("gating_weights") or [None] * len(names)

    async def ask(prompt: str, texts: list[str]) -> Scored:
        letters = [letter for letter, text in zip(LETTERS, texts, strict=True) if text and text.strip()]
        if not prompt.strip() or not letters:
            raise RequestError(400, "write a prompt and at least one response first")
        responses = [text for text in texts if text and text.strip()]
        body = {
            "prompt": read_prompt(prompt),
            "responses": responses,
            "normalize": False,
            "include": ["rewards", "gating_weights", "gating_output"],
        }
        answer = json.loads(await scorer.answer(native.read, json.dumps(body).encode()))
        good = [entry for entry in answer["results"] if "error" not in entry]
        rewards, weights, output = (
            np.array([entry[part] for entry in good], np.float64).reshape(len(good), len(names))
            for part in ("rewards", "gating_weights", "gating_output")
        )
        return Scored(
            [letters[entry["index"]] for entry in good],
            rewards,
            weights,
            float(output.sum(1).mean()) if good else 1.0,
            {letters[entry["index"]]: entry["error"] for entry in answer["results"] if "error" in entry},
        )

    def show(scored: Scored | None, values: list[float]) -> tuple[str, str, str, str]:
        """Results, policy, JSON, status."""
        try:
            settings = weigher.settings(values)
            policy = weigher.policy(settings)
            if scored is None:
                return welcome(), policy, "", status(_READY)
            if not scored.letters:
                return results(scored, _nothing(len(names)), names, reference), policy, "", status("No score.", "bad")
            weighed = weigher.weigh(scored, values)
        except ArmormError as error:
            return gr.skip(), gr.skip(), gr.skip(), status(str(error), "bad")
        changed = sum(float(value) != 1 for value in values)
        said = (
            f"Weighed anew, {changed} of {len(names)} objectives changed." if changed else "Weighed as the model does."
        )
        order = ", ".join(weighed.letters[place] for place in weighed.order)
        said += f" Order: {order}." if len(weighed.order) > 1 else ""
        found = {
            "model": scorer.settings.name,
            "steering": settings,
            "results": [
                {
                    "response": weighed.letters[place],
                    "score": weighed.scores[place],
                    "contributions": dict(zip(names, weighed.contributions[place], strict=True)),
                    "gating_weights": dict(zip(names, weighed.gating_weights[place], strict=True)),
                    "rewards": dict(zip(names, scored.rewards[place], strict=True)),
                }
                for place in weighed.order
            ],
            "margin": weighed.margin,
            "decided_by": [names[i] for i in weighed.deciding],
        }
        as_json = json.dumps(_rounded(plain(found)), indent=1, ensure_ascii=False)
        return results(scored, weighed, names, reference), policy, as_json, status(said, "good")

    async def score(prompt: str, *given: Any) -> AsyncIterator[tuple[Any, ...]]:
        texts, values = list(given[: len(LETTERS)]), list(given[len(LETTERS) :])
        count = sum(bool(text and text.strip()) for text in texts)
        yield (
            gr.skip(),
            gr.skip(),
            gr.skip(),
            gr.skip(),
            status(f"Scoring {count} response{'s' * (count != 1)} ...", "busy"),
        )
        try:
            scored = await ask(prompt, texts)
        except RequestError as error:
            yield gr.skip(), gr.skip(), gr.skip(), gr.skip(), status(f"Not scored: {error}.", "bad")
            return
        yield (scored, *show(scored, values))

    def weigh(scored: Scored | None, *values: float) -> tuple[str, str, str, str]:
        return show(scored, list(values))

    def reset(scored: Scored | None) -> tuple[Any, ...]:
        values = [1.0] * len(names)
        return (*values, *show(scored, values))

    def load(path: str | None) -> tuple[Any, ...]:
        if path is None:
            return [], gr.update(choices=[], value=None, visible=False), status(_READY)
        try:
            examples, unusable = read_examples(path)
        except ArmormError as error:
            Path(path).unlink(missing_ok=True)
            problem = getattr(error, "problem", str(error))
            return [], gr.update(choices=[], value=None, visible=False), status(f"Not read: {problem}.", "bad")
        Path(path).unlink(missing_ok=True)  # what was uploaded is in the session now, and may be private
        said = f"Read {len(examples):,} rows" + (
            f", left out {unusable:,} that hold no prompt and response" if unusable else ""
        )
        if not examples:
            return [], gr.update(choices=[], value=None, visible=False), status(f"{said}.", "bad")
        said += f" (at most {MOST_ROWS:,} are read)" if len(examples) + unusable == MOST_ROWS else ""
        choices = [(example.title, place) for place, example in enumerate(examples)]
        return (
            examples,
            gr.update(choices=choices, value=0, visible=True),
            status(f"{said}. Choose one, then press Score."),
        )

    def choose(examples: list[Example], place: int | None) -> tuple[Any, ...]:
        if place is None or place >= len(examples):
            return (gr.skip(),) * (1 + len(LETTERS))
        example = examples[place]
        return (example.prompt, *[*example.responses, "", "", "", ""][: len(LETTERS)])

    with gr.Blocks(title=f"armorm: {scorer.settings.name}", analytics_enabled=False, fill_width=True) as blocks:
        scored_state, examples_state = gr.State(None), gr.State([])
        steered = " <em>(steered)</em>" if rm.model.config.steering else ""
        gr.HTML(
            f"<header><h1>armorm <span>{_escaped(scorer.settings.name)}{steered}</span></h1>"
            "<p>Which response is better, and which objectives say so.</p></header>"
        )
        said = gr.HTML(status(_READY), elem_id="status")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=4, min_width=320, elem_id="left"):
                prompt = gr.Textbox(
                    _EXAMPLE[0],
                    label="Prompt",
                    info="Text, or a JSON list of messages for several turns.",
                    lines=3,
                    max_lines=12,
                )
                boxes = [
                    gr.Textbox(
                        _EXAMPLE[i + 1] if i < 2 else "",
                        label=f"Response {letter}",
                        lines=3 if i < 2 else 1,
                        max_lines=12,
                        placeholder="" if i < 2 else "Optional",
                    )
                    for i, letter in enumerate(LETTERS)
                ]
                button = gr.Button("Score", variant="primary", elem_id="score")
                with gr.Accordion("Load rows of a file", open=False):
                    upload = gr.File(
                        label="JSON lines: prompt and responses, messages, or chosen and rejected",
                        file_types=[".jsonl", ".ndjson", ".json"],
                        type="filepath",
                        height=110,
                    )
                    row = gr.Dropdown(label="Row", choices=[], visible=False, filterable=True)
            with gr.Column(scale=7, min_width=340, elem_id="right"):
                shown = gr.HTML(welcome(), elem_id="results")
        with gr.Accordion("Weigh the objectives", open=True, elem_id="weights"):
            gr.HTML(
                "<p class='hint'>1 is the weight that the gate gives, 0 drops the objective and shares its weight out, "
                f"{_MOST:g} is that many times as much. Nothing is scored again: the order follows as you move.</p>"
                if weigher.adjustable
                else "<p class='hint'>This model is served with pinned or blended weights: nothing is left to move.</p>"
            )
            with gr.Row(elem_id="sliders"):
                sliders = [
                    gr.Slider(
                        0.05 if name in weigher.biases else 0.0,
                        _MOST,
                        value=1.0,
                        step=0.05,
                        label=name,
                        info=_usual(usual[i], name in weigher.biases),
                        interactive=weigher.adjustable and name not in weigher.served.get("drop", ()),
                        min_width=220,
                    )
                    for i, name in enumerate(names)
                ]
            back = gr.Button("All back to 1", size="sm", elem_id="reset")
        with gr.Row(elem_id="take"):
            policy = gr.Code(
                weigher.policy(weigher.settings([1.0] * len(names))), language="yaml", label="Steering policy", lines=4
            )
            as_json = gr.Code("", language="json", label="Results as JSON", lines=4, max_lines=16)

        outputs = [shown, policy, as_json, said]
        button.click(
            score,
            [prompt, *boxes, *sliders],
            [scored_state, *outputs],
            show_progress="hidden",
            concurrency_limit=8,
            api_visibility="private",
        )
        gr.on(
            [slider.input for slider in sliders] + [slider.release for slider in sliders],
            weigh,
            [scored_state, *sliders],
            outputs,
            show_progress="hidden",
            trigger_mode="always_last",
            queue=False,
            api_visibility="private",
        )
        back.click(
            reset, [scored_state], [*sliders, *outputs], show_progress="hidden", queue=False, api_visibility="private"
        )
        upload.change(
            load, [upload], [examples_state, row, said], show_progress="hidden", queue=False, api_visibility="private"
        ).then(
            choose,
            [examples_state, row],
            [prompt, *boxes],
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )
        row.input(
            choose,
            [examples_state, row],
            [prompt, *boxes],
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )
    return blocks


def _usual(weight: float | None, bias: bool) -> str:
    said = "" if weight is None else f"usually {weight:.1%} of the weight"
    return f"{said}; takes the bias out of the others" if bias else said


def _nothing(k: int) -> Any:
    from armorm.serving.playground.reweighting import Weighed

    none = np.zeros((0, k))
    return Weighed([], [], np.zeros(0), none, none, none, [], {})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)


MOST_ROWS = 1000


@dataclass(frozen=True)
class Example:
    """One row: its number, the prompt as text (or JSON messages), the texts of its responses."""

    number: int
    prompt: str
    responses: list[str]

    @property
    def title(self) -> str:
        """The row's number and how its prompt begins."""
        return f"{self.number}: {' '.join(self.prompt.split())[:60]}"


def read_examples(path: str | Path) -> tuple[list[Example], int]:
    """The first rows of a file, and the number of lines among them that could not be used.

    Raises:
        DataError: for a file that cannot be read at all.
    """
    examples: list[Example] = []
    unusable = 0
    for row in islice(Location.find(path).rows_or_faults(), MOST_ROWS):
        try:
            if isinstance(row, Row):
                examples.append(_example(row))
            else:
                unusable += 1
        except ConversationError:
            unusable += 1
    return examples, unusable


def read_prompt(text: str) -> str | list[Any]:
    """What stands in the prompt's box: text, or messages where it is a JSON list of such."""
    if text.lstrip().startswith("["):
        try:
            value = json.loads(text)
        except ValueError:
            return text
        if isinstance(value, list) and value and all(isinstance(entry, dict) and "role" in entry for entry in value):
            return value
    return text


def _example(row: Row) -> Example:
    values = row.values
    if values.get("messages") is not None:
        conversation = Conversation.from_messages(values["messages"])
        return Example(row.number, _prompt_text(conversation.prompt), [conversation.response])
    if values.get("prompt") is None:
        raise ConversationError(f"found columns {shown(row.filled)}, expected messages or prompt")
    given = values.get("responses")
    if given is None:
        given = [values[name] for name in ("response", "chosen", "rejected") if values.get(name) is not None]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ConversationError(f"found {shown(given)}, expected responses")
    read = [Conversation.from_prompt(values["prompt"], response) for response in given[: len(LETTERS)]]
    return Example(row.number, _prompt_text(read[0].prompt), [conversation.response for conversation in read])


def _prompt_text(prompt: Sequence[Message]) -> str:
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return json.dumps([message.to_dict() for message in prompt], ensure_ascii=False, indent=1)


_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


def add_playground(app: FastAPI, scorer: Scorer) -> None:
    """Put the page into an application."""
    gr.mount_gradio_app(
        app,
        playground(scorer),
        path=UI_PATH,
        theme=theme(),
        css=STYLE,
        head=HEAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=scorer.settings.max_body,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    mounted = next(route for route in app.routes if getattr(route, "path", None) == UI_PATH)
    stop = getattr(getattr(mounted, "app", None), "stop_event", None)  # Gradio's own: ends a page's heartbeat
    if stop is not None:
        app.state.before_stop.append(stop.set)
    app.add_middleware(PageBounds, most_bytes=scorer.settings.max_body)


class PageBounds:
    """ASGI middleware for the page's paths: bodies no larger than `most_bytes`, headers that keep it to this server."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request of the page on, or refuse it."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == UI_PATH or path.startswith(f"{UI_PATH}/")):
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated) > self._most:
            failure = RequestError(413, f"the body is too large, expected at most {self._most} bytes")
            await failure_response(failure)(scope, receive, send)
            return
        found = 0

        async def bounded() -> ASGIMessage:
            nonlocal found
            message = await receive()
            found += len(message.get("body", b""))
            return message if found <= self._most else {"type": "http.disconnect"}

        async def kept_home(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
            await send(message)

        await self._app(scope, bounded, kept_home)
