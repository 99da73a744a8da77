"""Layouts of users' rows, recognised by their columns and brought to one form: what every reader of rows goes through.

A row in standard form holds one of

    messages                      a conversation; its last message is the response
    prompt, response              prompt: text or messages; response: text or one message
    prompt, responses             several responses, which `armorm rank` orders
    [prompt,] chosen, rejected    a preference pair

and a column per rating. `standard_values` makes it from these layouts; case and spaces in column names do not count,
and columns that no layout uses stay as they are:

- other names of the columns (`ROLES`): question and answer, instruction and completion, winner and loser, ...;
- several responses in columns of their own: `response_a` and `response_b`, `answer 1` and `answer 2`, ...;
- Alpaca: `instruction`, `input` (added to the prompt), `output`, with `system` and `history`;
- ShareGPT: `conversations` of `from` and `value`, with `system`; `chosen` and `rejected` may answer them;
- OpenAI: `messages` with tool calls, and the definitions in `tools`; `input.messages` with `preferred_output` and
  `non_preferred_output`;
- Argilla: `fields`, `responses`, or their flat columns `NAME.responses`; a question's answers become column NAME;
- ratings in an object: `{"ratings": {"helpfulness": 4}}` is a column `helpfulness`;
- cells of a table with messages, lists or objects as JSON (or as Python prints them, which pandas writes).

`layout_fault` says what a row without a layout lacks: the closest layout, and the column to rename.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any

from armorm.errors import ConversationError, shown

# The names of a column by its role, the standard one first.
ROLES = {
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog"),
    "prompt": ("prompt", "question", "instruction", "query", "request", "input", "user", "context"),
    "response": ("response", "answer", "completion", "reply", "output", "assistant", "generation"),
    "responses": ("responses", "completions", "candidates", "answers"),
    "chosen": ("chosen", "preferred", "winner", "better", "chosen_response", "preferred_output"),
    "rejected": ("rejected", "dispreferred", "loser", "worse", "rejected_response", "non_preferred_output"),
    "split": ("split",),
}
LAYOUTS = (("messages",), ("prompt", "response"), ("prompt", "responses"), ("chosen", "rejected"))
RATING_OBJECTS = ("ratings", "scores", "annotations", "labels")
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "bot": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
_OTHER_ROLES = {"developer": "system", "function": "tool"}
_APART = re.compile(rf"(?:{'|'.join(ROLES['response'])})_?(?:[a-d]|\d)")
_CLOSE = 0.6  # similarity of a column's name above which it is likely meant


@dataclass(frozen=True)
class _Plan:
    """What rows with these columns need.

    Attributes:
        roles: column of each role.
        input, system, history: further columns of the prompt (Alpaca, ShareGPT).
        objects: columns that may hold an object of ratings.
        answers: column of the answers, and of their states, of each question of a flat Argilla export.
        nested: an Argilla export with `fields`.
        apart: columns of one response each, in the order of their names; none in rows that hold responses otherwise.
    """

    roles: Mapping[str, str]
    input: str | None
    system: str | None
    history: str | None
    objects: tuple[str, ...]
    answers: Mapping[str, tuple[str, str]]
    nested: bool
    apart: tuple[str, ...]


def standard_values(
    values: Mapping[str, Any], stated: Mapping[str, str] | None = None, *, textual: bool = False
) -> dict[str, Any]:
    """A row's values in standard form; values of no known layout stay as they are.

    Args:
        stated: the row's column of some roles, instead of the one that is recognised by its name.
        textual: every value is text (CSV), so that messages are written as text too. In other rows only `messages` and
            objects of ratings may be; a prompt or response that looks like messages is text.

    Raises:
        ConversationError: for a conversation that cannot be converted, by the row's own column; or for a stated column
            that the row lacks.
    """
    plan = _plan(tuple(values), tuple((stated or {}).items()))
    if plan.nested:
        flat = _without_fields(values)
        if flat is not None:
            return standard_values(flat, stated, textual=textual)
    found = {name: value for name, value in values.items() if name not in plan.roles.values()}
    for question, (answers, states) in plan.answers.items():
        found[question] = _submitted(values[answers], values.get(states))
    for name in plan.objects:
        _expand(found, name, _decoded(values[name]))
    for role, column in plan.roles.items():
        found[role] = _conversation_value(values[column], role, column, textual)
    if plan.apart:
        sides = [found.pop(name) for name in plan.apart]
        found["responses"] = [_conversation_value(side, "response", "", textual) for side in sides]
    sides_are_whole = _is_whole(found.get("chosen"))
    if sides_are_whole and plan.roles.get("prompt", "prompt") not in ("prompt", (stated or {}).get("prompt")):
        found[plan.roles["prompt"]] = found.pop("prompt")  # a column that happens to be called `input`
    if plan.input or plan.system or plan.history:
        _add_to_prompt(found, plan)
    if "messages" in found and "chosen" in found and found.get("prompt") is None and not sides_are_whole:
        found["prompt"] = found.pop("messages")  # ShareGPT pairs: the sides answer the conversation
    prompt = found.get("prompt")
    if isinstance(prompt, Mapping) and "messages" in prompt:
        found["prompt"] = _turns(prompt["messages"], "prompt.messages")
    return found


def tool_definitions(value: Any) -> list[Any] | None:
    """The list that a column `tools` holds or says, None if it is something else, such as the name of a tool."""
    said = _decoded(value)
    return said if isinstance(said, list) and any(isinstance(entry, Mapping) for entry in said) else None


def kind_of(values: Mapping[str, Any]) -> str:
    """`pairs`, `candidates`, or `conversations`: what a row in standard form is, by its columns."""
    if "chosen" in values and "rejected" in values:
        filled = any(values[side] is not None for side in ("chosen", "rejected"))
        if filled or all(values.get(role) is None for role in ("messages", "response")):
            return "pairs"
    return "candidates" if values.get("responses") is not None else "conversations"


def layout_fault(values: Mapping[str, Any], expected: Iterable[Sequence[str]] = LAYOUTS) -> tuple[str, str]:
    """Field and problem of a row (in standard form) that has none of the expected layouts.

    Args:
        expected: the layouts that are read here, each as its roles.
    """
    layouts = list(expected)
    for roles in layouts:
        blank = [role for role in roles if role in values and values[role] is None]
        if blank and all(role in values for role in roles):
            return blank[0], "found an empty cell, expected text"
    wanted = ", or ".join(" and ".join(f"'{role}'" for role in roles) for roles in layouts)
    columns = [name for name, value in values.items() if value is not None]
    found = f"found columns {shown(columns, 80)}, expected {wanted}"
    best = max(layouts, key=lambda roles: sum(_likeness(role, columns)[0] for role in roles) / len(roles))
    missing = [role for role in best if role not in columns and _likeness(role, columns)[0] < 1]
    place = missing[0] if len(missing) == 1 else ""
    free = [name for name in columns if not is_conversation_column(name) and isinstance(values[name], (str, list))]
    renamed = []
    for role in missing:
        likeness, name = _likeness(role, free)
        if likeness < _CLOSE and not (len(free) == 1 and place):
            return place, found
        renamed.append(f"{shown(name)} to '{role}'")
        free.remove(name)
    closest = f"; the closest layout is {' and '.join(best)}: rename column {' and '.join(renamed)}" if renamed else ""
    return place, found + closest


def recognised_columns(columns: Iterable[str], stated: Mapping[str, str] | None = None) -> dict[str, str]:
    """The column of each role whose name is another one; and `input`, of what is added to the prompt."""
    plan = _plan(tuple(columns), tuple((stated or {}).items()))
    further = {"input": plan.input} if plan.input else {}
    return {role: own for role, own in {**plan.roles, **further}.items() if role != own or role in further}


def is_conversation_column(name: str) -> bool:
    """Whether a column has a name of some part of a conversation."""
    plain = _plain(name)
    return any(plain in words for role, words in ROLES.items() if role != "split") or bool(_APART.fullmatch(plain))


def _likeness(role: str, columns: Sequence[str]) -> tuple[float, str]:
    """How similar the most similar column is to one of the role's names, and that column."""
    best = (0.0, "")
    for column in columns:
        name = _plain(column)
        for word in ROLES[role]:
            # A name that contains a word of the role (`model_answer`) is as close as a misspelt one.
            same = 0.9 if word in name.split("_") else SequenceMatcher(None, name, word).ratio()
            best = max(best, (1.0 if name == word else same, column))
    return best


@lru_cache(maxsize=4096)
def _plan(columns: tuple[str, ...], stated: tuple[tuple[str, str], ...]) -> _Plan:
    given = dict(stated)
    for own in given.values():
        if own not in columns:
            raise ConversationError(f"found columns {shown(list(columns), 80)}, expected it", own)
    plain: dict[str, str] = {}
    for name in columns:
        plain.setdefault(_plain(name), name)
    free = {key: name for key, name in plain.items() if name not in given.values()}

    def column(role: str) -> str | None:
        if role in columns and role not in given:
            return role
        return given.get(role) or next((free[word] for word in ROLES[role] if word in free), None)

    found = {role: its for role in ROLES if (its := column(role)) is not None}
    roles = {**{role: found[role] for role in ("split",) if role in found}, **given}
    if "chosen" in found and "rejected" in found:
        wanted: tuple[str, ...] = ("chosen", "rejected", "prompt", "messages")
    elif "messages" in found:
        wanted = ("messages",)
    elif "responses" in found and "prompt" in found:
        wanted = ("prompt", "responses", "response") if "response" in columns else ("prompt", "responses")
    else:
        wanted = ("prompt", "response") if "prompt" in found and "response" in found else ()
    roles |= {role: found[role] for role in wanted if role in found}
    roles |= {role: role for role in ROLES if role in columns and role not in roles and role not in roles.values()}
    used = set(roles.values())
    held = {"response", "responses", "chosen", "messages"} & set(roles)
    apart = sorted(key for key in plain if _APART.fullmatch(key)) if "prompt" in found else []
    if held or len(apart) < 2:
        apart = []
    elif "prompt" not in roles:
        roles["prompt"] = found["prompt"]
    alpaca = _plain(roles.get("prompt", "")) == "instruction"
    extra = {key: plain[key] for key in ("input", "system", "history") if key in plain and plain[key] not in used}
    share_gpt = "messages" in roles and _plain(roles["messages"]) == "conversations"
    answers = {
        name.removesuffix(".responses"): (name, f"{name}.status")
        for name in columns
        if name.endswith(".responses") and name.removesuffix(".responses") not in columns
    }
    return _Plan(
        roles,
        extra.get("input") if alpaca else None,
        plain.get("system_prompt") or (extra.get("system") if alpaca or share_gpt else None),
        extra.get("history") if alpaca else None,
        tuple(plain[name] for name in RATING_OBJECTS if name in plain and plain[name] not in used),
        answers,
        "fields" in columns,
        tuple(plain[key] for key in apart),
    )


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _decoded(value: Any) -> Any:
    """The list or object that a text says, else the value; arrays (of a DataFrame) as lists."""
    if hasattr(value, "tolist"):  # (numpy is not imported here: commands start without it)
        return value.tolist()
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
        if isinstance(found, (list, dict)):
            return found
    return value


def _is_whole(side: Any) -> bool:
    """Whether a side of a pair is a whole conversation: several messages, or a transcript."""
    if isinstance(side, str):
        return side.lstrip().startswith("Human:")
    return isinstance(side, list) and len(side) > 1


def _conversation_value(value: Any, role: str, column: str, textual: bool) -> Any:
    """A value of a role: turns of any layout as messages; text as the messages that it says, where it may."""
    if role in ("split", "margin"):
        return value
    may_say = not isinstance(value, str) or role in ("messages", "responses") or (textual and role != "response")
    said = _decoded(value) if may_say else value
    if isinstance(said, Mapping):
        if role in ("chosen", "rejected", "response") and _is_turn(said):
            return _turns([said], column)
        return said if role == "prompt" and "messages" in said else value
    if not isinstance(said, Sequence) or isinstance(said, str):
        return value
    if role == "responses":
        return [_turns(entry, column) if _is_turns(entry) else entry for entry in said]
    if role == "messages" or _is_turns(said):
        return _turns(said, column)
    return value if isinstance(value, str) else said


def _is_turn(entry: Any) -> bool:
    return isinstance(entry, Mapping) and ("role" in entry or ("from" in entry and "value" in entry))


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _turns(turns: Sequence[Any], column: str) -> list[Any]:
    """Messages of turns in the layout of ShareGPT, or of OpenAI; what is neither stays as it is."""
    return [_turn(turn, f"{column}[{number}]") for number, turn in enumerate(turns)]


def _turn(turn: Any, place: str) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    role = turn.get("role")
    if isinstance(role, str) and role in _OTHER_ROLES:
        return {**turn, "role": _OTHER_ROLES[role]}
    if "from" not in turn or "role" in turn:
        return turn
    speaker, text = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
        raise ConversationError(f"found {shown(speaker)}, expected one of {', '.join(_SPEAKERS)}", f"{place}.from")
    call = _decoded(text) if speaker.lower() == "function_call" else None
    if call is not None and not isinstance(call, str):
        calls = [{"type": "function", "function": part} for part in (call if isinstance(call, list) else [call])]
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": _SPEAKERS[speaker.lower()], "content": text}


def _without_fields(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The columns of an Argilla record with `fields`; None for other rows."""
    fields, answers = _decoded(values["fields"]), _decoded(values.get("responses"))
    if not isinstance(fields, Mapping):
        return None
    others = {name: value for name, value in values.items() if name not in ("fields", "responses", "suggestions")}
    for name, question in (answers if isinstance(answers, Mapping) else {}).items():
        others[name] = question
    suggestions = _decoded(values.get("suggestions"))
    for name, suggestion in (suggestions if isinstance(suggestions, Mapping) else {}).items():
        others[f"{name}.suggestion"] = suggestion.get("value") if isinstance(suggestion, Mapping) else suggestion
    return {**others, **fields}


def _submitted(answers: Any, states: Any) -> Any:
    """The answers whose state is `submitted`, or all where no states are given."""
    answers, states = _decoded(answers), _decoded(states)
    if not isinstance(answers, list) or not isinstance(states, list) or len(states) != len(answers):
        return answers
    return [answer for answer, state in zip(answers, states, strict=True) if state in (None, "submitted")]


def _expand(found: dict[str, Any], column: str, ratings: Any) -> None:
    """Add a column for each rating of an object; a name that a column has already is written `OBJECT.NAME`."""
    if isinstance(ratings, Mapping):
        del found[column]
        for name, value in ratings.items():
            rating = value
            if isinstance(value, Mapping):
                rating = next((value[key] for key in ("value", "rating", "Rating", "score") if key in value), None)
            found[f"{column}.{name}" if name in found else str(name)] = rating


def _add_to_prompt(found: dict[str, Any], plan: _Plan) -> None:
    """Add the further columns of a prompt: `input` below the instruction, `history` and `system` before it."""
    own = [name for name in (plan.input, plan.system, plan.history) if name]
    further, system, history = (
        found.pop(name, None) if name else None for name in (plan.input, plan.system, plan.history)
    )
    role = "messages" if "messages" in found else "prompt"
    prompt = found.get(role)
    if isinstance(prompt, str) and isinstance(further, str) and further.strip():
        prompt = f"{prompt}\n\n{further}"
    before: list[Any] = []
    if isinstance(system, str) and system.strip():
        before.append({"role": "system", "content": system})
    for entry in _decoded(history) or ():
        if not (isinstance(entry, Sequence) and len(entry) == 2 and not isinstance(entry, str)):
            raise ConversationError(f"found {shown(entry)}, expected [prompt, response] of an earlier turn", own[-1])
        before += [{"role": who, "content": text} for who, text in zip(("user", "assistant"), entry, strict=True)]
    if before and isinstance(prompt, (str, list)):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        has_system = any(isinstance(turn, Mapping) and turn.get("role") == "system" for turn in turns)
        prompt = [*(turn for turn in before if not (has_system and turn["role"] == "system")), *turns]
    found[role] = prompt
