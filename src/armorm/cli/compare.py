"""`armorm compare`: which of two responses is better, and why."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from armorm.cli.options import AllOption, DeviceOption, DtypeOption, ForceOption, HtmlOption, JsonOption, ModelOption
from armorm.cli.output import emit, require_unused, write_page
from armorm.conversation import Conversation
from armorm.errors import ConversationError
from armorm.files import DEFAULT_REWARD_MODEL
from armorm.progress import Terminal


def compare(
    first: Annotated[str, Argument(metavar="A", help="Text of the first response.")],
    second: Annotated[str, Argument(metavar="B", help="Text of the second response.")],
    prompt: Annotated[str, Option(help="Text of the prompt.")],
    model: ModelOption = DEFAULT_REWARD_MODEL,
    tokens: Annotated[bool, Option(help="Show which sentences of each response carry the margin.")] = False,
    every: AllOption = False,
    html: HtmlOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Compare two responses to a prompt and show which objectives decide.

    Example: `armorm compare --prompt "What is 2+2?" "4" "5, I think."`
    """
    from armorm.evaluation.scorers import ArmoRMScorer, load_scorer
    from armorm.explain.response_comparison import compare_scores

    require_unused(html, force)
    conversations = [Conversation.from_prompt(prompt, text, name) for text, name in ((first, "A"), (second, "B"))]
    scorer = load_scorer(model, dtype=dtype, device=device)
    if isinstance(scorer, ArmoRMScorer):
        found = scorer.rm.compare(*conversations, tokens=tokens)
    elif tokens:
        raise typer.BadParameter(f"--tokens needs an armorm reward model, found {model}")
    else:
        same = conversations[0].key == conversations[1].key
        scored = scorer.score(conversations[:1] if same else conversations)
        if scored.unscored:
            row, reason = sorted(scored.unscored.items())[0]
            raise ConversationError(reason, "AB"[row])
        name, scale = str(scorer.describe()["name"]), getattr(scorer, "margin_scale", None)
        found = compare_scores(float(scored.scores[0]), float(scored.scores[-1]), name, margin_scale=scale)
    emit(found.to_dict(), *found.lines(Terminal().width, every=every), as_json=as_json, indent=None)
    if html is not None:
        write_page(html, found.to_html(conversations))
