"""Constructed objectives of a recipe: source replies are found, split and decontaminated, and rows added to the table.

A source is a rated set of the recipe, a preference set of which the chosen replies are used, or other data. Training
rows start only from replies whose prompt is evaluated on nowhere, so that no edit and no borrowed reply brings one in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from armorm.data.cells import rating_cell
from armorm.data.constructs import (
    Construct,
    ConstructedRow,
    Reply,
    constructed_objective,
    constructed_rows,
    find_construct,
)
from armorm.data.decontamination import KnownPrompts
from armorm.data.preferences import PreferencePair, row_conversations
from armorm.data.ratings import RatingTable, sample_by_prompt, split_role
from armorm.data.sources import Location
from armorm.errors import DataError, RecipeError, nearest
from armorm.objectives import ObjectiveError
from armorm.training.recipe import Recipe
from armorm.training.schema import ConstructSource, PreferencesSection, RatingsSection


@dataclass(frozen=True)
class ConstructReport:
    """What a construct was made of.

    Attributes:
        objective, construct, rule: names, and the labels in a sentence.
        sources: names of the sets.
        train, test: number of rows: replies and edits of them.
        left_out: number of replies that were not used, by reason.
    """

    objective: str
    construct: str
    rule: str
    sources: list[str]
    train: int
    test: int
    left_out: dict[str, int]


def construct_entries(recipe: Recipe) -> Iterator[tuple[str, RatingsSection, str, Construct]]:
    """Path in the recipe, section, objective name and rule of each construct.

    Raises:
        RecipeError: for an unknown construct.
    """
    for index, entry in enumerate(recipe.ratings):
        if entry.constructed is not None:
            try:
                construct = find_construct(entry.constructed)
            except ObjectiveError as error:
                raise RecipeError(f"ratings.{index}.construct: {error}") from None
            yield f"ratings.{index}", entry, entry.name or construct.name, construct


def named_sets(recipe: Recipe) -> list[tuple[str, int, RatingsSection | PreferencesSection]]:
    """Kind, number and section of the sets of a recipe that a construct can name."""
    sections: list[tuple[str, Sequence[RatingsSection | PreferencesSection]]] = [
        ("ratings", recipe.ratings),
        ("preferences", recipe.preferences),
    ]
    return [
        (kind, index, entry)
        for kind, entries in sections
        for index, entry in enumerate(entries)
        if entry.data is not None or entry.preset is not None
    ]


def set_of(recipe: Recipe, name: str, place: str) -> tuple[str, int] | None:
    """The set of the recipe that a source names: `ratings` or `preferences` and its number; None for other data.

    Raises:
        RecipeError: if several sets have the name.
    """
    entries = named_sets(recipe)
    found = [(kind, index) for kind, index, entry in entries if name == entry.data]
    found = found or [(kind, index) for kind, index, entry in entries if name in (entry.label, entry.preset)]
    if len(found) > 1:
        places = " and ".join(f"{kind}.{index}" for kind, index in found)
        raise RecipeError(f"{place}: {name!r} is {places}, expected the data of one of them, or another source name")
    return found[0] if found else None


def add_constructs(
    recipe: Recipe,
    located: Mapping[str, Location],
    table: RatingTable,
    preferences: Mapping[int, Sequence[PreferencePair]],
    evaluated: KnownPrompts,
) -> tuple[RatingTable, list[ConstructReport]]:
    """The table with the rows and objectives of the recipe's constructs.

    Args:
        located: location of other data, by its path in the recipe.
        preferences: pairs of each preference set that was read, by its number.
        evaluated: prompts that are evaluated on; those of test rows and test pairs are added.

    Raises:
        RecipeError: for an unknown construct, set or objective, or a source without a fit reply.
        DataError: for invalid other data.
    """
    entries = list(construct_entries(recipe))
    share = recipe.test_share
    replies: dict[tuple[str, int], list[Reply]] = {
        (place, number): list(_replies(recipe, source, f"{place}.from.{number}", located, table, preferences))
        for place, entry, _, _ in entries
        for number, source in enumerate(entry.from_)
    }
    pairs = list(chain(*preferences.values()))
    rated = zip(table.conversations, table.splits, strict=True)
    evaluated.add(c for c, split in rated if split_role(split, c.prompt_key, share) == "test")
    evaluated.add(pair.chosen for pair in pairs if split_role(pair.split, pair.prompt_key, share) == "test")
    evaluated.add(reply.conversation for some in replies.values() for reply in some if reply.split == "test")
    prompts = {r.conversation.prompt_key: r.conversation for some in replies.values() for r in some}
    known = evaluated.find(list(prompts.values()))
    unclean = {key for key, is_known in zip(prompts, known, strict=True) if is_known}
    reports = []
    for place, entry, name, construct in entries:
        sources = [reply for number in range(len(entry.from_)) for reply in replies[place, number]]
        clean = [r for r in sources if r.split == "test" or r.conversation.prompt_key not in unclean]
        own = {r.source: s.rows for n, s in enumerate(entry.from_) if s.rows for r in replies[place, n]}
        limits = {"rows": entry.construct_rows, "per_prompt": entry.per_prompt, "variants": entry.variants}
        rows, left_out = constructed_rows(construct, clean, seed=recipe.seed, source_rows=own, **limits)
        if len(clean) < len(sources):
            left_out["whose prompt is evaluated on"] = len(sources) - len(clean)
        train = sum(row.reply.split == "train" for row in rows)
        if not train:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())
            raise RecipeError(f"{place}: no training reply is fit for {construct.name} ({reasons or 'there is none'})")
        table = _with_rows(table, name, rows)
        names = list(dict.fromkeys(reply.source for reply in sources))
        reports.append(ConstructReport(name, construct.name, construct.rule, names, train, len(rows) - train, left_out))
    return table, reports


def _with_rows(table: RatingTable, name: str, rows: Sequence[ConstructedRow]) -> RatingTable:
    table = table.with_column(constructed_objective(name), np.full(len(table), np.nan))
    ratings = np.full((len(rows), len(table.objectives)), np.nan)
    ratings[:, -1] = [row.label for row in rows]
    return RatingTable(
        [*table.conversations, *(row.conversation for row in rows)],
        np.concatenate([table.ratings, ratings]),
        table.objectives,
        [*table.sources, *[name] * len(rows)],
        [*table.splits, *(row.reply.split for row in rows)],
        [*table.origins, *(row.reply.origin for row in rows)],
        [*(table.edits or [""] * len(table)), *(row.edit for row in rows)],
    )


def _replies(
    recipe: Recipe,
    source: ConstructSource,
    place: str,
    located: Mapping[str, Location],
    table: RatingTable,
    preferences: Mapping[int, Sequence[PreferencePair]],
) -> Iterator[Reply]:
    """The replies of a source for training and for testing."""
    found = set_of(recipe, source.set, place)
    harmful = source.prompts == "harmful"
    if found is None:
        some = _other_data(located[place], source, harmful, recipe.limit)
    elif found[0] == "ratings":
        some = _rated(table, recipe.ratings[found[1]].label, source, place, harmful)
    else:
        if source.where:
            raise RecipeError(f"{place}.where: {source.set!r} is a preference set, expected a rated one")
        label = recipe.preferences[found[1]].label
        some = [Reply(pair.chosen, pair.split, label, harmful, pair.origin) for pair in preferences[found[1]]]
    if not some and source.where:
        where = ", ".join(f"{name} from {low:g} to {high:g}" for name, (low, high) in source.where.items())
        raise RecipeError(f"{place}.where: no reply of {source.set!r} has {where}")
    for reply in some:
        split = split_role(reply.split, reply.conversation.prompt_key, recipe.test_share)
        if split != "other":
            yield Reply(reply.conversation, split, reply.source, reply.harmful, reply.origin)


def _rated(table: RatingTable, label: str, source: ConstructSource, place: str, harmful: bool) -> list[Reply]:
    """Rows of a rated set, of which all raw ratings under `where` are in their ranges."""
    mask = np.array([name == label and not edit for name, edit in zip(table.sources, _edits(table), strict=True)], bool)
    for name, (low, high) in source.where.items():
        if name not in table.objectives.names:
            hint = f"{nearest(name, table.objectives.names)}, expected one of {', '.join(table.objectives.names)}"
            raise RecipeError(f"{place}.where: unknown objective {name!r}{hint}")
        values = table.ratings[:, table.objectives.position(name)]
        with np.errstate(invalid="ignore"):
            mask &= (values >= low) & (values <= high)
    return [
        Reply(table.conversations[i], table.splits[i], label, harmful, table.origins[i] if table.origins else ("", 0))
        for i in np.flatnonzero(mask).tolist()
    ]


def _edits(table: RatingTable) -> Sequence[str]:
    return table.edits or [""] * len(table)


def _other_data(location: Location, source: ConstructSource, harmful: bool, limit: int | None) -> list[Reply]:
    """Conversations, or chosen replies of pairs, of data that the recipe reads for constructs only."""
    label = location.name.rsplit("/", 1)[-1].split(".")[0]
    replies: list[Reply] = []
    found: set[str] = set()
    for row in location.rows():
        found.update(row.values)
        if all(low <= rating_cell(row.values.get(name)).value <= high for name, (low, high) in source.where.items()):
            conversation = row_conversations(row)[0]
            replies.append(Reply(conversation, row.split_role(), label, harmful, (row.file, row.number)))
    absent = next((name for name in source.where if name not in found), None)
    if absent is not None:
        raise DataError(f"no row has it{nearest(absent, found)}", file=location.name, field=absent)
    return [replies[i] for i in sample_by_prompt([r.conversation.prompt_key for r in replies], limit)]
