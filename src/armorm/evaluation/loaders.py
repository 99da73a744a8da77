"""Loaders: the rows of each benchmark as examples.

In:  sources of rows, in the layout that the benchmark is published in.
Out: `Loaded`: the examples in order, and how many rows were left out, by reason.

What belongs to the layout (columns, labels, subsets) is refused by file, row and field when it is wrong.
A response that is no conversation (an empty reply) is another matter: its example stays, and loses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from armorm.conversation import Conversation
from armorm.data.preferences import preference_pair
from armorm.data.rows import Row
from armorm.data.sources import Source
from armorm.errors import ConversationError, DataError, nearest, shown
from armorm.evaluation.benchmarks import judgebench, ppe, rewardbench, rewardbench2, rm_bench
from armorm.evaluation.examples import Example, make_example


@dataclass
class Loaded:
    """Examples of a benchmark.

    Attributes:
        examples: in order.
        left_out: count of rows that were not read as examples, by reason.
        names: (k,) objectives of rated rows.
        raw: whether scores of rated rows are raw ratings.
    """

    examples: list[Example]
    left_out: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    raw: bool = False


def load_pairs(sources: Sequence[Source]) -> Loaded:
    """Preference rows in any layout; of rows with a `split` only those of the test split."""
    loaded = Loaded([])
    for source, row in _rows(sources):
        if row.split_role() not in ("", "test"):
            _leave_out(loaded, "rows of other splits than test")
            continue
        subset = row.values.get("subset")
        loaded.examples.append(_pair(row, str(subset or (source.name if len(sources) > 1 else ""))))
    return _some(loaded, sources)


def load_rewardbench(sources: Sequence[Source]) -> Loaded:
    """Rows `prompt`, `chosen`, `rejected`, `subset`, `id`; prior sets by the name of their split or file."""
    loaded = Loaded([])
    for source, row in _rows(sources):
        prior = source.name in (*rewardbench.PRIOR_SETS, *rewardbench.UNWEIGHTED)
        subset = source.name if prior else row.values.get("subset") or source.name
        if subset not in rewardbench.KNOWN:
            raise row.error(
                f"found {shown(subset)}, expected a subset of RewardBench{nearest(str(subset), rewardbench.KNOWN)}",
                "subset",
            )
        loaded.examples.append(_pair(row, str(subset)))
    return _some(loaded, sources)


def load_rewardbench2(sources: Sequence[Source]) -> Loaded:
    """Rows `id`, `prompt`, `chosen`, `rejected` (lists), `num_correct`, `subset`."""
    loaded = Loaded([])
    canonical = {name.lower(): name for name in rewardbench2.ROWS}
    for _, row in _rows(sources):
        subset = canonical.get(str(row.values.get("subset")).lower())
        if subset is None:
            raise row.error(
                f"found {shown(row.values.get('subset'))}, expected one of {', '.join(rewardbench2.ROWS)}", "subset"
            )
        chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
        correct = row.values.get("num_correct", len(chosen))
        if correct != len(chosen) or not chosen or not rejected:
            raise row.error(
                f"found num_correct {shown(correct)}, {len(chosen)} chosen and {len(rejected)} rejected, "
                "expected num_correct chosen completions and at least one rejected",
                "num_correct",
            )
        name = str(row.values.get("id"))
        cluster = f"ties:{name.rpartition(':')[2]}" if subset == rewardbench2.TIES else None
        loaded.examples.append(_several(row, chosen, rejected, subset, cluster=cluster))
    return _some(loaded, sources)


def load_rm_bench(sources: Sequence[Source]) -> Loaded:
    """Rows `prompt`, `chosen` (3), `rejected` (3), `domain`; without it, the file's name says the domain."""
    named = [source for source in sources if _part_of(source.name)]
    loaded = Loaded([])
    for source in sources:
        # total_dataset.json repeats the rows of the files by domain beside it.
        if named and source not in named:
            loaded.left_out[f"files beside those of a domain: {source.name}"] = 1
            continue
        for row in source.rows():
            given = row.values.get("domain")
            part = _part_of(str(given)) if given is not None else _part_of(source.name)
            if part is None:
                raise row.error(f"found {shown(given)}, expected one of {', '.join(rm_bench.PARTS)}", "domain")
            chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
            if (len(chosen), len(rejected)) != (3, 3):
                raise row.error(
                    f"found {len(chosen)} chosen and {len(rejected)} rejected, expected 3 of each: one a style"
                )
            loaded.examples.append(_several(row, chosen, rejected, part))
    return _some(loaded, sources)


def load_judgebench(sources: Sequence[Source]) -> Loaded:
    """Rows `pair_id`, `source`, `question`, `response_model`, `response_A`, `response_B`, `label`."""
    loaded = Loaded([])
    for _, row in _rows(sources):
        file = judgebench.file_of(_text(row, "response_model"))
        source = judgebench.source_of(_text(row, "source"))
        label = row.values.get("label")
        if file is None:
            raise row.error(
                f"found {shown(row.values['response_model'])}, expected a GPT-4o or a Claude model", "response_model"
            )
        if source is None:
            raise row.error(
                f"found {shown(row.values['source'])}, expected one of {', '.join(judgebench.SOURCES)}", "source"
            )
        if label not in judgebench.LABELS:
            raise row.error(f"found {shown(label)}, expected 'A>B' or 'B>A'", "label")
        loaded.examples.append(
            make_example(
                _replies(row, "question", [_text(row, "response_A"), _text(row, "response_B")]),
                (1, 0) if label == "A>B" else (0, 1),
                id=row.values.get("pair_id"),
                subset=f"{file} {source}",
                facts={"file": file},
                origin=(row.file, row.number),
            )
        )
    return _some(loaded, sources)


def load_ppe(sources: Sequence[Source]) -> Loaded:
    """Human votes (`winner`, `response_1`, `response_2`) and best of k (`scores`, `response_1` to `response_k`)."""
    loaded = Loaded([])
    for source, row in _rows(sources):
        if row.values.get("winner") is not None:
            loaded.examples.append(_vote(row))
        elif row.values.get("scores") is not None:
            loaded.examples.append(_best_of_k(row, source.name))
        else:
            raise row.error(f"found columns {shown(row.filled, 80)}, expected 'winner' or 'scores'")
    return _some(loaded, sources)


def _vote(row: Row) -> Example:
    labels = {"model_a": (1, 0), "model_b": (0, 1), "tie": (0, 0), "tie (bothbad)": (0, 0)}
    winner = row.values["winner"]
    if winner not in labels:
        raise row.error(f"found {shown(winner)}, expected one of {', '.join(labels)}", "winner")
    kinds = {"hard_prompt": "hard", "easy_prompt": "easy", "if_prompt": "instructions", "math_prompt": "mathematics"}
    kinds |= {"is_code": "code"}
    found = [name for column, name in kinds.items() if row.values.get(column)]
    language = row.values.get("language")
    if isinstance(language, str):
        found.append("English" if language == "English" else "other languages")
    return make_example(
        _replies(row, "prompt", [_text(row, "response_1"), _text(row, "response_2")]),
        labels[winner],
        id=row.values.get("question_id"),
        subset=ppe.HUMAN,
        facts={"models": [_text(row, "model_a"), _text(row, "model_b")], "kinds": found},
        origin=(row.file, row.number),
    )


def _best_of_k(row: Row, source: str) -> Example:
    places = [str(row.values.get("subset") or ""), source, *reversed(Path(row.file).parts[-3:])]
    name = next((name for place in places for word, name in ppe.SETS.items() if word in place.lower()), None)
    if name is None:
        raise row.error(f"found no set in the names {shown(places)}, expected one of {', '.join(ppe.SETS.values())}")
    scores = row.values["scores"]
    if not isinstance(scores, Sequence) or isinstance(scores, str) or not all(value in (0, 1) for value in scores):
        raise row.error(f"found {shown(scores)}, expected a list of true and false", "scores")
    responses = [_text(row, f"response_{number}") for number in range(1, len(scores) + 1)]
    return make_example(
        _replies(row, "prompt", responses),
        [float(value) for value in scores],
        id=row.values.get("question_id"),
        subset=name,
        origin=(row.file, row.number),
    )


def _pair(row: Row, subset: str) -> Example:
    """The pair of a row; where a side is refused, the other one is still read."""
    name, origin = row.values.get("id"), (row.file, row.number)
    try:
        pair = preference_pair(row)
        builds: list[Callable[[], Conversation]] = [lambda: pair.chosen, lambda: pair.rejected]
    except DataError:
        if row.values.get("chosen") is None or row.values.get("rejected") is None:
            raise
        builds = [partial(_side, row, "chosen"), partial(_side, row, "rejected")]
        if all(_stands(build) for build in builds):
            raise  # each side is a conversation, so the fault is in the row: two prompts, say
    return make_example(builds, (1, 0), id=name, subset=subset, origin=origin)


def _side(row: Row, name: str) -> Conversation:
    """One side of a pair by itself."""
    both = {"chosen": row.values[name], "rejected": row.values[name]}
    try:
        return preference_pair(Row(row.file, row.number, {**row.values, **both})).chosen
    except DataError as error:
        raise ConversationError(error.problem, name) from None


def _stands(build: Callable[[], Conversation]) -> bool:
    try:
        build()
    except ConversationError:
        return False
    return True


def _several(row: Row, chosen: list[str], rejected: list[str], subset: str, cluster: str | None = None) -> Example:
    return make_example(
        _replies(row, "prompt", [*chosen, *rejected]),
        [1.0] * len(chosen) + [0.0] * len(rejected),
        id=row.values.get("id"),
        subset=subset,
        cluster=cluster,
        origin=(row.file, row.number),
    )


def _replies(row: Row, column: str, responses: Sequence[str]) -> list[Callable[[], Conversation]]:
    prompt = row.values.get(column)
    if prompt is None:
        raise row.error("found nothing, expected text or messages", column)
    return [partial(Conversation.from_prompt, prompt, response) for response in responses]


def _texts(row: Row, column: str) -> list[str]:
    value = row.values.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise row.error(f"found {shown(value)}, expected a list of texts", column)
    return list(value)


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str):
        raise row.error(f"found {shown(value)}, expected text", column)
    return value


def _part_of(name: str) -> str | None:
    """The part that a domain or a file's name begins with, the longest one that fits."""
    return next((part for part in sorted(rm_bench.PARTS, key=len, reverse=True) if name.lower().startswith(part)), None)


def _rows(sources: Sequence[Source]) -> Iterator[tuple[Source, Row]]:
    for source in sources:
        for row in source.rows():
            yield source, row


def _leave_out(loaded: Loaded, reason: str) -> None:
    loaded.left_out[reason] = loaded.left_out.get(reason, 0) + 1


def _some(loaded: Loaded, sources: Sequence[Source]) -> Loaded:
    """Refuse a set without rows, or one of which every row is refused."""
    name = sources[0].location.name if sources else ""
    if not loaded.examples:
        reasons = Counter[str](loaded.left_out)
        raise DataError(f"found no rows to evaluate on{' (' + str(dict(reasons)) + ')' if reasons else ''}", file=name)
    if all(len(example.faults) == len(example.conversations) for example in loaded.examples):
        first = loaded.examples[0]
        raise DataError(f"every row is refused, the first one: {first.faults[0][1]}", file=name, row=first.origin[1])
    return loaded


READERS: Mapping[str, Callable[[Sequence[Source]], Loaded]] = {
    "pairs": load_pairs,
    "rewardbench": load_rewardbench,
    "rewardbench2": load_rewardbench2,
    "rm-bench": load_rm_bench,
    "judgebench": load_judgebench,
    "ppe": load_ppe,
}
