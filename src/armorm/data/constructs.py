"""Constructed objectives: labels 0 to 1 made by a stated rule from replies that are there already.

A reply that is fit to be the good one gets 1, and an edit of it (edits.py) gets the label of the rule, 0 for most. Some
edits keep the label 1 (a friendly opening before the reply), so that an inserted line or a short reply is no sign of
the label. A good reply must give an answer where the rule says so, and never complies with a harmful prompt: of sets
whose prompts are harmful only refusals are used, by the rules that are about wording.

Rows inherit the split of the prompt; another prompt's reply comes from the same split. Test rows, and only they, use
the held-out templates of edit_texts.py. Every choice is decided by the seed and the reply, whatever the order of rows.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from armorm.conversation import Conversation, Message
from armorm.data.decontamination import prompt_groups
from armorm.data.edit_texts import Draw
from armorm.data.edits import EDITS, Edit, EditFunction
from armorm.data.ratings import OWN_REPLY, sample_by_prompt
from armorm.data.refusals import gives_no_answer, sounds_like_refusal
from armorm.errors import nearest
from armorm.objectives import Objective, ObjectiveError

RELEVANCE = "relevance"
OTHER_REPLY = "another prompt's reply"
SIMILAR_LENGTH = 1.25  # ratio of characters
_TRIES = 30  # replies of similar length that are looked at


@dataclass(frozen=True)
class Construct:
    """A rule that labels replies.

    Attributes:
        name: as in a recipe, by default also of the objective.
        rule: the labels in one sentence, for reports.
        edits: label and weight of each edit; an edited reply takes one of them, drawn with these weights.
        needs_answer: a good reply must give an answer, so it is no refusal; no row has a harmful prompt.
        by_backbone: labels are not made here (they are NaN) but by the backbone, when a run starts.
    """

    name: str
    rule: str
    edits: Mapping[str, tuple[float, float]]
    needs_answer: bool = False
    by_backbone: bool = False


CONSTRUCTS = {
    construct.name: construct
    for construct in (
        Construct(
            "answers-the-question",
            "its own reply 1; another prompt's reply of similar length, or the prompt echoed, 0",
            {OTHER_REPLY: (0.0, 3), "prompt echoed": (0.0, 1)},
            needs_answer=True,
        ),
        Construct(
            "gives-an-answer",
            "a reply 1, also after a friendly opening; a don't-know, an empty excuse, a refusal of a harmless prompt "
            "or a dismissal 0",
            {
                "don't know instead": (0.0, 3),
                "excuse instead": (0.0, 2),
                "refusal instead": (0.0, 3),
                "dismissal instead": (0.0, 2),
                "opening before": (1.0, 2),
            },
            needs_answer=True,
        ),
        Construct(
            "complete",
            "a reply 1; its first third, half or three quarters the share that is kept",
            {"first third": (1 / 3, 1), "first half": (1 / 2, 1), "first three quarters": (3 / 4, 1)},
        ),
        Construct(
            "fluent",
            "a reply 1; its words shuffled, or one of its phrases looped, 0",
            {"words shuffled": (0.0, 1), "phrase looped": (0.0, 1)},
        ),
        Construct(
            "courteous",
            "a reply 1, also after a friendly opening, and so a polite don't-know or refusal; an insulting or "
            "dismissive line before, after, inside or instead of the reply 0",
            {
                "insult before": (0.0, 2),
                "insult inside": (0.0, 1),
                "insult after": (0.0, 1),
                "insult instead": (0.0, 2),
                "dismissal before": (0.0, 1),
                "dismissal after": (0.0, 1),
                "dismissal instead": (0.0, 2),
                "opening before": (1.0, 2),
                "don't know instead": (1.0, 1),
                "refusal instead": (1.0, 1),
            },
        ),
        Construct(
            "consistent-facts",
            "a right reply 1; with a number, name, sign, operator or opposite changed 0",
            {
                "number changed": (0.0, 3),
                "name changed": (0.0, 2),
                "sign changed": (0.0, 1),
                "operator changed": (0.0, 2),
                "word turned to its opposite": (0.0, 1),
            },
            needs_answer=True,
        ),
        Construct(
            RELEVANCE,
            "how much the prompt raises the reply's log-likelihood by the backbone, from its 1st to 99th percentile",
            {OTHER_REPLY: (math.nan, 3), "prompt echoed": (math.nan, 1)},
            needs_answer=True,
            by_backbone=True,
        ),
    )
}


def find_construct(name: str) -> Construct:
    """The rule of a name; an `ObjectiveError` with the nearest name for an unknown one."""
    if name not in CONSTRUCTS:
        raise ObjectiveError(
            f"unknown construct {name!r}{nearest(name, CONSTRUCTS)}; there are {', '.join(CONSTRUCTS)}"
        )
    return CONSTRUCTS[name]


def constructed_objective(name: str) -> Objective:
    """The objective of a construct: 0 to 1, higher is better."""
    return Objective.rated(name, 0, 1, source="constructed")


@dataclass(frozen=True)
class Reply:
    """A reply of a set that constructs may start from.

    Attributes:
        split: `train` or `test`.
        source: name of the set.
        harmful: the set's prompts ask for something harmful.
        origin: file and row number.
    """

    conversation: Conversation
    split: str
    source: str
    harmful: bool = False
    origin: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class ConstructedRow:
    """A labelled conversation.

    Attributes:
        label: 0 to 1; NaN if the backbone gives it.
        reply: what it was made from, with split and source.
        edit: `OWN_REPLY`, or what was done to the reply.
        span: characters of the response that are new, None if they are not in one place.
        templates: ids of the texts that were inserted.
    """

    conversation: Conversation
    label: float
    reply: Reply
    edit: str
    span: tuple[int, int] | None = None
    templates: tuple[str, ...] = field(default=())


def constructed_rows(
    construct: Construct,
    replies: Iterable[Reply],
    *,
    seed: int = 0,
    variants: int = 1,
    rows: int | None = None,
    source_rows: Mapping[str, int] | None = None,
    per_prompt: int | None = None,
) -> tuple[list[ConstructedRow], dict[str, int]]:
    """Labelled rows: each reply that is fit, and `variants` edits of it.

    Args:
        replies: any order; a conversation that occurs twice is used once.
        variants: edited replies per reply; fewer where fewer edits apply. A reply to which none applies is left out.
        rows: approximate most replies of each source, whole prompts chosen by their content.
        source_rows: the same for single sources, by name.
        per_prompt: most replies of each prompt.

    Returns:
        the rows, in the order of the replies' content keys; number of replies that are left out, by reason.
    """
    left_out: Counter[str] = Counter()
    fit = []
    for reply in sorted({r.conversation.key: r for r in sorted(replies, key=_order)}.values(), key=_order):
        reason = unfit(reply, construct)
        if reason:
            left_out[reason] += 1
        else:
            fit.append(reply)
    chosen = _sampled(fit, rows, source_rows or {}, per_prompt)
    left_out["beyond the limits of rows"] = len(fit) - len(chosen)
    other = _other_reply(chosen) if OTHER_REPLY in construct.edits else None
    found = []
    for reply in chosen:
        edited = _edited(construct, reply, seed, variants, other)
        if edited:
            label = math.nan if construct.by_backbone else 1.0
            found += [ConstructedRow(reply.conversation, label, reply, OWN_REPLY), *edited]
        else:
            left_out["to which no edit applies"] += 1
    return found, {reason: count for reason, count in left_out.items() if count}


def unfit(reply: Reply, construct: Construct) -> str:
    """Why a reply cannot be the good one; empty if it can."""
    last = reply.conversation.messages[-1]
    if last.extra or not last.content.strip():
        return "that call tools"
    if reply.harmful:
        if construct.needs_answer:
            return "to harmful prompts"
        return "" if sounds_like_refusal(last.content) else "that may comply with a harmful prompt"
    if construct.needs_answer and gives_no_answer(last.content):
        return "that give no answer themselves"
    return ""


def _order(reply: Reply) -> tuple[str, str, str, tuple[str, int]]:
    return reply.conversation.key, reply.split, reply.source, reply.origin


def _sampled(
    replies: Sequence[Reply], rows: int | None, source_rows: Mapping[str, int], per_prompt: int | None
) -> list[Reply]:
    """At most `per_prompt` replies of each prompt, and about `rows` of each source."""
    by_source: dict[str, list[Reply]] = {}
    taken: Counter[str] = Counter()
    for reply in replies:  # in the order of content hashes, so the first are a random choice
        taken[reply.conversation.prompt_key] += 1
        if per_prompt is None or taken[reply.conversation.prompt_key] <= per_prompt:
            by_source.setdefault(reply.source, []).append(reply)
    kept = [
        some[i]
        for source, some in by_source.items()
        for i in sample_by_prompt([reply.conversation.prompt_key for reply in some], source_rows.get(source, rows))
    ]
    return sorted(kept, key=_order)


def _edited(
    construct: Construct, reply: Reply, seed: int, variants: int, other: Callable[[Reply, Random], Edit | None] | None
) -> list[ConstructedRow]:
    """At most `variants` different edits of a reply, of different kinds first."""
    conversation = reply.conversation
    digest = blake2b(f"{seed} {construct.name} {conversation.key}".encode(), digest_size=8).digest()
    random = Random(int.from_bytes(digest, "big"))
    draw = Draw(random, _last_user_turn(conversation), held_out=reply.split == "test")
    order = sorted(construct.edits, key=lambda name: -(random.random() ** (1 / construct.edits[name][1])))
    rows: dict[str, ConstructedRow] = {}
    for name in order * variants:
        if len(rows) == variants:
            break
        draw.used = []
        if name == OTHER_REPLY:
            assert other is not None
            edit = other(reply, random)
        else:
            function: EditFunction = EDITS[name]
            edit = function(conversation.response, draw)
        if edit is None or not edit.text.strip() or edit.text == conversation.response or edit.text in rows:
            continue
        label = construct.edits[name][0]
        edited = conversation.with_messages([*conversation.prompt, Message("assistant", edit.text)])
        rows[edit.text] = ConstructedRow(edited, label, reply, name, edit.span, tuple(draw.used))
    return list(rows.values())


def _last_user_turn(conversation: Conversation) -> str:
    return next((turn.content for turn in reversed(conversation.prompt) if turn.role == "user"), "")


def _other_reply(replies: Sequence[Reply]) -> Callable[[Reply, Random], Edit | None]:
    """A function from a reply to the reply of another prompt, of the same split and source and of similar length; none
    of near-duplicate prompts."""
    groups = prompt_groups([reply.conversation for reply in replies])
    pools: dict[tuple[str, str], list[tuple[int, str, Reply]]] = {}
    for reply in replies:
        text = reply.conversation.response
        pools.setdefault((reply.split, reply.source), []).append((len(text), reply.conversation.key, reply))
    for pool in pools.values():
        pool.sort(key=lambda entry: entry[:2])
    lengths = {key: [entry[0] for entry in pool] for key, pool in pools.items()}

    def other(reply: Reply, random: Random) -> Edit | None:
        key, length = (reply.split, reply.source), len(reply.conversation.response)
        first = bisect_left(lengths[key], length / SIMILAR_LENGTH)
        end = bisect_right(lengths[key], length * SIMILAR_LENGTH)
        for _ in range(_TRIES):
            candidate = pools[key][random.randrange(first, end)][2].conversation
            if groups[candidate.prompt_key] != groups[reply.conversation.prompt_key]:
                return Edit(candidate.response, (0, len(candidate.response)))
        return None

    return other
