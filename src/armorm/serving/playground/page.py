"""The playground page: a prompt, up to four responses, their scores and why; sliders that reweight the objectives.

The model runs once per press of "Score", through the server's own queue and limits. The results are kept in the
visitor's session; sliders only reweight them. Gradio is imported when the page is built, so that the module can be
imported without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Response

from armorm.conversation import Conversation, Message
from armorm.data.rows import Row
from armorm.data.sources import Location
from armorm.errors import ArmormError, ConversationError, shown
from armorm.explain.token_attribution import TokenAttribution
from armorm.files import plain
from armorm.score_batch import ScoreBatch
from armorm.serving.engine import ScoringEngine
from armorm.serving.errors import RequestError
from armorm.serving.middleware import UI_PATH
from armorm.serving.playground.cards import not_scored, results, status, welcome
from armorm.serving.playground.reweighting import LETTERS, Reweighted, Reweighter, policy_yaml
from armorm.serving.protocols.base import read_row

MOST_ROWS = 1000  # of an uploaded file
FILE_TYPES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")
_LARGEST_FACTOR = 4.0
_READY = "Ready. Enter a prompt and one or more responses, then press Score (Ctrl+Enter)."
_EXAMPLE = (
    "How do I get a wine stain out of a cotton shirt?",
    "Dab it with cold water and a little dish soap, let it stand for ten minutes, then rinse and wash as usual.",
    "Who cares? Throw it away, stupid.",
)
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
    '<rect width="8" height="8" rx="2" fill="#2563eb"/><path d="M2 6 4 2l2 4" fill="none" stroke="#fff"/></svg>'
)
# Ctrl+Enter (Cmd+Enter) anywhere presses Score.
_HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.querySelector("#score")?.click();
  }
});
</script>
"""


def add_playground(app: FastAPI, engine: ScoringEngine) -> None:
    """Mount the page on an application; needs Gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    def icon() -> Response:
        return Response(_ICON, media_type="image/svg+xml")

    def manifest() -> Response:
        return Response('{"name": "armorm"}', media_type="application/manifest+json")

    # Browsers ask for both at the root, and print an error if they are missing.
    app.add_api_route("/favicon.ico", icon, include_in_schema=False)
    app.add_api_route("/manifest.json", manifest, include_in_schema=False)
    gr.mount_gradio_app(
        app,
        Playground(engine).blocks(),
        path=UI_PATH,
        theme=gr.themes.Base(
            primary_hue="blue",
            neutral_hue="slate",
            radius_size="md",
            # Fonts of the visitor's machine: nothing is loaded from other hosts.
            font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
            font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
        ),
        css=(Path(__file__).parent / "page.css").read_text(encoding="utf-8"),
        head=_HEAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size=engine.settings.max_body,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    mounted = next(route for route in app.routes if getattr(route, "path", None) == UI_PATH)
    stop = getattr(getattr(mounted, "app", None), "stop_event", None)  # Gradio's own: ends a page's heartbeat
    if stop is not None:
        app.state.before_stop.append(stop.set)


class Playground:
    """The page of one engine: its event handlers and its layout."""

    def __init__(self, engine: ScoringEngine) -> None:
        import gradio

        self.gr, self.engine = gradio, engine
        rm = engine.rm
        self.names = rm.objectives.names
        self.reweighter = Reweighter(
            rm.objectives,
            rm.transform,
            np.array(rm.reference.get("reward_means") or np.zeros(len(self.names))),
            rm.model.config.debiasing.get("against", []),
            rm.model.config.steering,
            rm.margin_scale,
        )

    # --- event handlers: values of the components in, their updates out ------------------------------

    async def on_score(self, prompt: str, *given: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Score the responses, then attribute them to words; updates of batch, words and of `on_reweight`."""
        texts, factors = list(given[: len(LETTERS)]), list(given[len(LETTERS) :])
        count = sum(bool(text and text.strip()) for text in texts)
        yield (*(self.gr.skip(),) * 5, status(f"Scoring {count} response{'s' * (count != 1)} ...", "busy"))
        try:
            batch, conversations = await self._score(prompt, texts)
        except RequestError as error:  # the earlier results are not of this text
            yield (None, [], not_scored(str(error)), self.gr.skip(), "", status(f"Not scored: {error}.", "bad"))
            return
        yield (batch, [], *self.on_reweight(batch, [], *factors))
        words = await self.engine.attribute(batch, conversations)
        if words:
            yield (self.gr.skip(), words, *self.on_reweight(batch, words, *factors))

    def on_reset(self, batch: ScoreBatch | None, words: list[TokenAttribution]) -> tuple[Any, ...]:
        """Set all sliders to 1."""
        factors = [1.0] * len(self.names)
        return (*factors, *self.on_reweight(batch, words, *factors))

    def on_upload(self, path: str | None) -> tuple[Any, ...]:
        """Read an uploaded file: its examples, the choices of the row menu, the status."""
        no_choice = self.gr.update(choices=[], value=None, visible=False)
        if path is None:
            return [], no_choice, status(_READY)
        try:
            examples, unusable = read_examples(path)
        except ArmormError as error:
            return [], no_choice, status(f"Not read: {getattr(error, 'problem', str(error))}.", "bad")
        finally:
            Path(path).unlink(missing_ok=True)  # its content is kept in the session only; it may be private
        text = f"Read {len(examples):,} rows"
        text += f", skipped {unusable:,} without prompt and response" if unusable else ""
        if not examples:
            return [], no_choice, status(f"{text}.", "bad")
        text += f" (at most {MOST_ROWS:,} are read)" if len(examples) + unusable == MOST_ROWS else ""
        choices = [(f"{row.number}: {' '.join(row.prompt.split())[:60]}", at) for at, row in enumerate(examples)]
        menu = self.gr.update(choices=choices, value=0, visible=True)
        return examples, menu, status(f"{text}. Select one, press Score.")

    def on_select(self, examples: list[Example], index: int | None) -> tuple[Any, ...]:
        """Prompt and responses of a row."""
        if index is None or index >= len(examples):
            return (self.gr.skip(),) * (1 + len(LETTERS))
        example = examples[index]
        return (example.prompt, *[*example.responses, "", "", "", ""][: len(LETTERS)])

    async def _score(self, prompt: str, texts: Sequence[str]) -> tuple[ScoreBatch, list[Conversation]]:
        """Scores of the responses that are not blank, and their conversations; `rows` are positions in `LETTERS`."""
        given = [place for place, text in enumerate(texts) if text and text.strip()]
        if not prompt.strip() or not given:
            raise RequestError(400, "enter a prompt and at least one response first")
        messages = read_prompt(prompt)
        rows = [read_row(Conversation.from_prompt, messages, texts[place]) for place in given]
        scores = await self.engine.score(rows)
        scored = [row for index in scores.batch.rows if isinstance(row := rows[index], Conversation)]
        batch = replace(
            scores.batch,
            rows=np.array(given)[scores.batch.rows],
            rejected=[(given[index], row.reason) for index, row in scores.rejected.items()],
        )
        return batch, scored

    def on_reweight(self, batch: ScoreBatch | None, words: list[TokenAttribution], *factors: float) -> tuple[Any, ...]:
        """Updates of results, policy, JSON and status under the sliders' factors."""
        try:
            policy = policy_yaml(self.reweighter.settings(factors))
            if batch is None:
                return welcome(), policy, "", status(_READY)
            reweighted = self.reweighter.reweight(batch, factors)
        except ArmormError as error:
            return (not_scored(str(error)), self.gr.skip(), "", status(str(error), "bad"))
        weighted = [replace(of, coefficients=reweighted.batch.coefficients[row]) for row, of in enumerate(words)]
        html = results(reweighted, self.engine.reference_score, weighted, self.reweighter.biases)
        if not len(batch):
            return html, policy, "", status("No score.", "bad")
        changed = sum(float(factor) != 1 for factor in factors)
        text = f"{changed} of {len(factors)} objectives reweighted." if changed else "Weights as served."
        order = ", ".join(map(reweighted.letter, reweighted.order))
        text += f" Order: {order}." if len(batch) > 1 else ""
        as_json = json.dumps(self._to_dict(reweighted), indent=1, ensure_ascii=False)
        return html, policy, as_json, status(text, "good")

    def _to_dict(self, reweighted: Reweighted) -> dict[str, Any]:
        """Plain values, with six significant digits."""
        batch, entries = reweighted.batch, []
        for row in reweighted.order:
            entry: dict[str, Any] = {"response": reweighted.letter(row), "score": batch.scores[row]}
            for part in ("contributions", "gating_weights", "rewards"):
                entry[part] = dict(zip(self.names, getattr(batch, part)[row], strict=True))
            entries.append(entry)
        found: dict[str, Any] = {
            "model": self.engine.settings.name,
            "steering": reweighted.settings,
            "results": entries,
        }
        found |= {"margin": reweighted.margin, "decided_by": [self.names[i] for i in reweighted.deciding]}
        return json.loads(json.dumps(plain(found)), parse_float=lambda text: float(f"{float(text):.6g}"))

    # --- layout --------------------------------------------------------------------------------------

    def blocks(self) -> Any:
        """The page as Gradio blocks."""
        gr, name = self.gr, self.engine.settings.name
        with gr.Blocks(title=f"armorm: {name}", analytics_enabled=False, fill_width=True) as blocks:
            batch, words, examples = gr.State(None), gr.State([]), gr.State([])
            steered = " <em>(steered)</em>" if self.reweighter.served else ""
            gr.HTML(
                f"<header><h1>armorm <span>{escape(name)}{steered}</span></h1>"
                "<p>Which response is better, and because of which objectives.</p></header>"
            )
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=4, min_width=320, elem_id="left"):
                    box: dict[str, Any] = {"lines": 2, "max_lines": 12}
                    hint = "Text, or a JSON list of messages for several turns."
                    prompt = gr.Textbox(_EXAMPLE[0], label="Prompt", placeholder=hint, **{**box, "lines": 1})
                    responses = [gr.Textbox(_EXAMPLE[i + 1], label=f"Response {LETTERS[i]}", **box) for i in range(2)]
                    score = gr.Button("Score", variant="primary", elem_id="score")
                    with gr.Accordion("More responses, or rows of a file", open=False):
                        optional: dict[str, Any] = {**box, "lines": 1, "placeholder": "Optional"}
                        responses += [gr.Textbox(label=f"Response {letter}", **optional) for letter in LETTERS[2:]]
                        upload = gr.File(
                            label="Rows (JSON lines, CSV, Parquet): prompt and responses, messages, or pairs",
                            file_types=list(FILE_TYPES),
                            type="filepath",
                            height=110,
                        )
                        row = gr.Dropdown(label="Row", choices=[], visible=False, filterable=True)
                with gr.Column(scale=7, min_width=340, elem_id="right"):
                    status_line = gr.HTML(status(_READY), elem_id="status")
                    cards = gr.HTML(welcome(), elem_id="results")
            with gr.Accordion("Weight the objectives", open=False, elem_id="weights"):
                sliders, reset = self._sliders()
                with gr.Row(elem_id="take"):
                    served = policy_yaml(self.reweighter.settings([1.0] * len(self.names)))
                    policy = gr.Code(served, language="yaml", label="Steering policy", lines=4)
                    as_json = gr.Code("", language="json", label="Results as JSON", lines=4, max_lines=16)

            outputs = [cards, policy, as_json, status_line]
            at_once: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
            queued = {**at_once, "queue": True, "concurrency_limit": 8}
            score.click(self.on_score, [prompt, *responses, *sliders], [batch, words, *outputs], **queued)
            moved = [slider.input for slider in sliders] + [slider.release for slider in sliders]
            gr.on(moved, self.on_reweight, [batch, words, *sliders], outputs, trigger_mode="always_last", **at_once)
            reset.click(self.on_reset, [batch, words], [*sliders, *outputs], **at_once)
            selection: Any = (self.on_select, [examples, row], [prompt, *responses])
            upload.change(self.on_upload, [upload], [examples, row, status_line], **at_once).then(*selection, **at_once)
            row.input(*selection, **at_once)
        return blocks

    def _sliders(self) -> tuple[list[Any], Any]:
        """A slider for each objective, and the button that resets them."""
        gr, reweighter, usual = self.gr, self.reweighter, self.engine.rm.reference.get("gating_weights")
        hint = (
            "1 is the weight given by the gate; 0 drops the objective and redistributes its weight; "
            f"{_LARGEST_FACTOR:g} multiplies it by {_LARGEST_FACTOR:g}. Nothing is scored again."
            if reweighter.adjustable
            else "This model is served with pinned or blended weights, which sliders cannot change."
        )
        gr.HTML(f"<p class='hint'>{hint}</p>")
        sliders, dropped = [], reweighter.served.get("drop", ())
        with gr.Row(elem_id="sliders"):
            for i, name in enumerate(self.names):
                info = "" if usual is None else f"mean weight {usual[i]:.1%}"
                if name in reweighter.biases:
                    info += "; others are debiased against it"
                usable, least = reweighter.adjustable and name not in dropped, 0.05 * (name in reweighter.biases)
                options = {"label": name, "info": info, "interactive": usable, "min_width": 220}
                sliders.append(gr.Slider(least, _LARGEST_FACTOR, 1.0, step=0.05, **options))
        return sliders, gr.Button("Reset all to 1", size="sm", elem_id="reset")


# --- rows of uploaded files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A row of a file."""

    number: int
    prompt: str  # text, or messages as JSON
    responses: list[str]


def read_examples(path: str | Path) -> tuple[list[Example], int]:
    """Examples of the first `MOST_ROWS` rows of a file, and the number of unusable ones; a `DataError` for no file."""
    examples: list[Example] = []
    rows = list(islice(Location.find(path).rows_or_faults(), MOST_ROWS))
    for row in rows:
        if isinstance(row, Row):
            with suppress(ConversationError):
                examples.append(_example(row))
    return examples, len(rows) - len(examples)


def read_prompt(text: str) -> str | list[Any]:
    """Content of the prompt box: text, or messages if it is a JSON list of them."""
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
