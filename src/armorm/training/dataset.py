"""Training data of a recipe: every set read, checked, split by prompt and decontaminated before a model is loaded.

Rows of a set with a `split` column are split by it; of other sets, a share of the prompts (`test_share`, chosen by a
hash of the prompt) is held out. No prompt that is evaluated on anywhere in the run, or listed under `keep_apart`, is
trained on, nor a near-duplicate of it (data/decontamination.py). Excluded training rows, and rows and rating cells that
cannot be read, are counted by reason.

A recipe without rated sets trains its measured objectives on both sides of its preference pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from armorm.conversation import Conversation
from armorm.data.decontamination import KnownPrompts
from armorm.data.measures import find_measure
from armorm.data.preferences import PreferencePair, cap_pairs, pairs_from_ratings, read_preferences, row_conversations
from armorm.data.presets import PREFERENCE_PRESETS, Preset, preference_preset, rating_preset
from armorm.data.ratings import (
    RatedSet,
    RatingTable,
    merge_objectives,
    objective_name,
    read_ratings,
    smaller,
    split_role,
)
from armorm.data.rejections import Rejections, read_rows
from armorm.data.sources import Location, find_sources
from armorm.errors import DataError, RecipeError, nearest
from armorm.evaluation.benchmarks import BENCHMARKS
from armorm.heads.gate_training import MIN_PAIRS
from armorm.objectives import Objective, ObjectiveError, ObjectiveSet
from armorm.training.construct_sets import ConstructReport, add_constructs, construct_entries, named_sets, set_of
from armorm.training.recipe import Recipe
from armorm.training.schema import (
    EvaluationSection,
    PreferencesSection,
    RatingsSection,
    ReferenceSection,
    SetSection,
)

Kind = Literal["ratings", "pairs", "reference", "evaluation", "construct"]

HELD_OUT_PAIRS = 0.1  # share of the training pairs that early stopping and calibration of the gate use, by prompt
PAIRS_FOR_GATE = math.ceil(MIN_PAIRS / HELD_OUT_PAIRS)  # training pairs of which that share is enough


@dataclass
class TrainingData:
    """All data of a run, split."""

    table: RatingTable  # rated rows of all sets and constructed rows, without computed objectives
    train_rows: np.ndarray  # row indices into the table
    test_rows: np.ndarray
    pairs: list[PreferencePair]  # of the preference sets, capped per prompt
    test_pairs: list[PreferencePair]
    left_out: dict[str, int]  # number of excluded rows by reason
    evaluated: KnownPrompts  # prompts that are evaluated on or kept apart
    # (objective name, measure) of each computed objective
    computed: list[tuple[str, str]] = field(default_factory=list)
    reference: list[Conversation] | None = None  # reference conversations, or None for the rated training rows
    evaluations: dict[str, list[PreferencePair]] = field(default_factory=dict)  # pairs by name, in file order
    evaluate_ratings: bool = True
    # (name, benchmark, data sources) of each published benchmark to evaluate on
    benchmarks: list[tuple[str, str, list[str]]] = field(default_factory=list)
    constructs: list[ConstructReport] = field(default_factory=list)
    rejections: Rejections = field(default_factory=Rejections)  # rows and rating cells that could not be read

    def counts(self) -> dict[str, int]:
        """Number of rows and prompts of each kind; rated rows include constructed ones."""
        edits = np.array(self.table.edits or [""] * len(self.table), object)
        roles = (("train", self.train_rows), ("test", self.test_rows))
        constructed = {f"constructed_{role}": int((edits[rows] != "").sum()) for role, rows in roles}
        return {
            "rated_train": len(self.train_rows),
            "rated_test": len(self.test_rows),
            **(constructed if self.constructs else {}),
            "rated_train_prompts": len({self.table.conversations[i].prompt_key for i in self.train_rows}),
            "pairs_train": len(self.pairs),
            "pairs_train_prompts": len({pair.prompt_key for pair in self.pairs}),
            "pairs_test": len(self.test_pairs),
            **{f"pairs_{name}": len(pairs) for name, pairs in self.evaluations.items()},
        }

    def all_pairs(self) -> Iterator[PreferencePair]:
        """Training, test and evaluation pairs."""
        return chain(self.pairs, self.test_pairs, *self.evaluations.values())

    def conversations(self) -> list[Conversation]:
        """Every conversation of the run, each once: rated rows, both sides of all pairs, reference data."""
        rated = [self.table.conversations[i] for i in (*self.train_rows, *self.test_rows)]
        return distinct_conversations([*rated, *sides(self.all_pairs()), *(self.reference or ())])


def sides(pairs: Iterable[PreferencePair]) -> Iterator[Conversation]:
    """Chosen and rejected side of each pair."""
    for pair in pairs:
        yield from (pair.chosen, pair.rejected)


def distinct_conversations(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Each conversation once, in order of first appearance."""
    return list({conversation.key: conversation for conversation in conversations}.values())


def read_training_data(recipe: Recipe, *, strict: bool = False) -> TrainingData:
    """Read, check, split and decontaminate every set of a recipe.

    Args:
        strict: a row or rating cell that cannot be read is an error, instead of being left out and counted.

    Raises:
        RecipeError: for a missing file or an unknown objective, by its path in the recipe.
        DataError: for a set of which nothing can be read, or with `strict`, by file, row and field.
    """
    rejections = Rejections(strict)
    located = {place: location for place, _, location, _ in set_locations(recipe)}
    sets, computed = _rated_sets(recipe, located), _computed(recipe)
    _check_objectives(recipe, sets, computed)
    table = read_ratings(sets, recipe.limit, rejections)
    read_pairs = {
        index: _read_pairs(entry, located[f"preferences.{index}"], recipe.limit, rejections)
        for index, entry in enumerate(recipe.preferences)
        if entry.from_ratings is None
    }
    if not sets:
        table = _table_of_sides(chain(*read_pairs.values()))
    evaluations = {
        entry.label: _evaluation_pairs(located[f"evaluation.{i}"], recipe.limit, rejections)
        for i, entry in enumerate(recipe.evaluation)
        if entry.benchmark == "pairs"
    }
    benchmarks = [
        (entry.label, entry.benchmark, _benchmark_data(entry, _root(recipe)))
        for entry in recipe.evaluation
        if entry.benchmark not in ("pairs", "ratings")
    ]
    evaluated = _benchmark_prompts(recipe, benchmarks)
    evaluated.add(pair.chosen for pair in chain(*evaluations.values()))
    constructs: list[ConstructReport] = []
    if any(construct_entries(recipe)):
        table, constructs = add_constructs(recipe, located, table, read_pairs, evaluated)
    reference = None
    if "reference" in located:
        rows = read_rows(located["reference"], row_conversations, rejections, recipe.limit)
        reference = list(chain.from_iterable(rows))
    not_made: Counter[str] = Counter()
    preference_sets = _preference_sets(recipe, read_pairs, table, not_made)
    split = split_by_prompt(recipe, table, preference_sets, evaluated, not_made)
    return replace(
        split,
        left_out=rejections.counts | split.left_out,
        rejections=rejections,
        computed=computed,
        constructs=constructs,
        reference=reference,
        evaluations=evaluations,
        evaluate_ratings=any(entry.benchmark == "ratings" for entry in recipe.evaluation),
        benchmarks=benchmarks,
    )


def split_by_prompt(
    recipe: Recipe,
    table: RatingTable,
    preference_sets: Iterable[tuple[Sequence[PreferencePair], int | None]],
    evaluated: KnownPrompts,
    not_made: Counter[str] | None = None,
) -> TrainingData:
    """Rated rows and pairs for training and for testing, without training rows whose prompt is evaluated on.

    Args:
        recipe: `test_share` and `seed`.
        preference_sets: pairs of each set, and most pairs per prompt.
        evaluated: prompts that are evaluated on in other ways; those of the test rows and test pairs are added.
        not_made: number of pairs by role that capped sets have not made; read after the sets.
    """
    roles = np.array(
        [
            split_role(split, conversation.prompt_key, recipe.test_share)
            for split, conversation in zip(table.splits, table.conversations, strict=True)
        ],
        object,
    )
    training, test_pairs, ties, capped, unused_pairs = [], [], 0, 0, 0
    for pairs, most in preference_sets:
        by_role: dict[str, list[PreferencePair]] = {"train": [], "test": [], "other": []}
        for pair in pairs:
            by_role[split_role(pair.split, pair.prompt_key, recipe.test_share)].append(pair)
        kept = cap_pairs(by_role["train"], most, recipe.seed)
        training += [pair for pair in kept if not pair.is_tie]
        test_pairs += cap_pairs(by_role["test"], most, recipe.seed)
        ties += sum(pair.is_tie for pair in kept)
        capped += len(by_role["train"]) - len(kept)
        unused_pairs += len(by_role["other"])
    if not_made:
        capped, unused_pairs = capped + not_made["train"], unused_pairs + not_made["other"]
    candidates, test_rows = np.flatnonzero(roles == "train"), np.flatnonzero(roles == "test")
    evaluated.add(table.conversations[i] for i in test_rows)
    evaluated.add(pair.chosen for pair in test_pairs)
    clean_rows, same_rows, similar_rows = _decontaminate([table.conversations[i] for i in candidates], evaluated)
    clean_pairs, same_pairs, similar_pairs = _decontaminate([pair.chosen for pair in training], evaluated)
    left_out = {
        "rated rows of other splits": int((roles == "other").sum()),
        "rated training rows whose prompt is evaluated on": same_rows,
        "rated training rows whose prompt is evaluated on, written otherwise": similar_rows,
        "pairs of other splits": unused_pairs,
        "training pairs whose prompt is evaluated on": same_pairs,
        "training pairs whose prompt is evaluated on, written otherwise": similar_pairs,
        "training pairs over the cap of their prompt": capped,
        "training pairs of twice the same response": ties,
    }
    return TrainingData(
        table=table,
        train_rows=candidates[clean_rows],
        test_rows=test_rows,
        pairs=[training[i] for i in clean_pairs],
        test_pairs=test_pairs,
        left_out={reason: count for reason, count in left_out.items() if count},
        evaluated=evaluated,
    )


def _decontaminate(conversations: Sequence[Conversation], evaluated: KnownPrompts) -> tuple[np.ndarray, int, int]:
    """Indices of conversations whose prompt is not evaluated on; the number of exact matches, and of matches up to
    formatting."""
    overlaps = evaluated.find(conversations)
    same = sum(conversations[i].prompt_key in evaluated.prompts for i in np.flatnonzero(overlaps).tolist())
    return np.flatnonzero(~overlaps), same, int(overlaps.sum()) - same


def _rated_sets(recipe: Recipe, located: Mapping[str, Location]) -> list[RatedSet]:
    sets = []
    for index, entry in enumerate(recipe.ratings):
        location = located.get(f"ratings.{index}")
        if location is None:
            continue
        source = entry.label
        if entry.preset is not None:
            preset = rating_preset(entry.preset)
            columns, split = preset.objectives(source, entry.map), entry.split or preset.split
        else:
            columns, split = {}, entry.split or "train"
            for column, objective in entry.objectives.items():
                name = objective.name or objective_name(column, source)
                columns[column] = Objective.rated(
                    name,
                    *objective.range,
                    source=entry.source or name.split("-")[0],
                    direction=objective.direction,
                    scale_map=objective.map,
                )
        sets.append(RatedSet(location, columns, source, split, entry.rows))
    other = any(construct_entries(recipe)) or (
        any(entry.compute for entry in recipe.ratings) and recipe.preference_objectives
    )
    if not sets and not other:
        raise RecipeError(
            "ratings: found no set of ratings; without one, expected a construct, or a computed objective and one "
            "fitted to pairs (bradley_terry)"
        )
    return sets


def _table_of_sides(pairs: Iterable[PreferencePair]) -> RatingTable:
    """Both sides of pairs, each once, as rows without ratings."""
    rows = {side.key: (side, pair) for pair in pairs for side in sides([pair])}
    conversations = [side for side, _ in rows.values()]
    of = [pair for _, pair in rows.values()]
    return RatingTable(
        conversations,
        np.empty((len(rows), 0)),
        ObjectiveSet(()),
        [pair.source for pair in of],
        [pair.split for pair in of],
        [pair.origin for pair in of],
    )


def _computed(recipe: Recipe) -> list[tuple[str, str]]:
    computed = [(index, entry.name, entry.compute) for index, entry in enumerate(recipe.ratings) if entry.compute]
    for index, _, measure in computed:
        try:
            find_measure(measure)
        except ObjectiveError as error:
            raise RecipeError(f"ratings.{index}.compute: {error}") from None
    return [(name or measure, measure) for _, name, measure in computed]


def _check_objectives(recipe: Recipe, sets: Sequence[RatedSet], computed: Sequence[tuple[str, str]]) -> None:
    rated = [*merge_objectives(sets).names, *(name for _, _, name, _ in construct_entries(recipe))]
    names = [*rated, *(name for name, _ in computed), *recipe.preference_objectives]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise RecipeError(f"ratings: objective {repeated!r} is defined twice")
    made = [(f"preferences.{i}.from_ratings", entry.from_ratings) for i, entry in enumerate(recipe.preferences)]
    late = {name for _, _, name, construct in construct_entries(recipe) if construct.by_backbone}
    for place, name in made:
        if name in late:
            raise RecipeError(
                f"{place}: {name!r} is measured by the backbone, after pairs are made; expected another one"
            )
    named = [(f"regression.weights.{name}", name) for name in recipe.regression.weights]
    named += [(f"debias.against.{i}", name) for i, name in enumerate(recipe.debias.against if recipe.debias else ())]
    named += [(f"debias.keep.{name}", name) for name in (recipe.debias.keep if recipe.debias else ())]
    fitted = [
        (f"ratings.{i}.bradley_terry", source)
        for i, entry in enumerate(recipe.ratings)
        for source in entry.bradley_terry or ()
    ]
    sources = list(dict.fromkeys(entry.label for entry in recipe.preferences))
    for kind, given, known in (
        ("objective", made, rated),
        ("objective", named, names),
        ("preference set", fitted, sources),
    ):
        for place, name in given:
            if name is not None and name not in known:
                hint = f"{nearest(name, known)}, expected one of {', '.join(known) or 'none'}"
                raise RecipeError(f"{place}: unknown {kind} {name!r}{hint}")


def set_locations(recipe: Recipe) -> Iterator[tuple[str, Kind, Location, Preset | None]]:
    """Path in the recipe, kind, location and preset of every set that a run reads.

    Raises:
        RecipeError: for a missing file or an unknown preset, by its path in the recipe.
    """
    root = _root(recipe)
    entries: list[tuple[str, Kind, RatingsSection | PreferencesSection | ReferenceSection]] = []
    entries += [(f"ratings.{i}", "ratings", entry) for i, entry in enumerate(recipe.ratings) if entry.reads_rows]
    entries += [(f"preferences.{i}", "pairs", e) for i, e in enumerate(recipe.preferences) if not e.from_ratings]
    if recipe.reference != "ratings":
        entries.append(("reference", "reference", recipe.reference))
    for place, kind, entry in entries:
        if entry.preset is None:
            yield place, kind, data_location(entry, root, place), None
            continue
        is_pairs = kind == "pairs" or (kind == "reference" and entry.preset in PREFERENCE_PRESETS)
        preset: Preset = preference_preset(entry.preset) if is_pairs else rating_preset(entry.preset)
        yield place, kind, preset_location(preset, entry, root), preset
    for start, section, _, _ in construct_entries(recipe):
        for number, source in enumerate(section.from_):
            place = f"{start}.from.{number}"
            if set_of(recipe, source.set, place) is None:
                yield place, "construct", _other_data(recipe, source.set, root, place), None
    for i, evaluation in enumerate(recipe.evaluation):
        if evaluation.data is not None and evaluation.benchmark == "pairs":
            yield f"evaluation.{i}", "evaluation", data_location(evaluation, root, f"evaluation.{i}"), None
        elif evaluation.data is None:
            for hub in BENCHMARKS[evaluation.benchmark].published:
                yield f"evaluation.{i}", "evaluation", Location.find(hub.id, root), None


def _root(recipe: Recipe) -> Path:
    return Path(recipe.data_root).expanduser()


def preset_location(preset: Preset, entry: SetSection, root: Path) -> Location:
    """The location of a preset: a folder of its name below the data root, else the hub, with the entry's overrides."""
    return Location.find(
        preset.hub_id,
        root,
        subset=entry.subset,
        split=entry.split or preset.split,
        revision=entry.revision or preset.revision,
        data_dir=preset.data_dir,
        layout=preset.layout,
    )


def data_location(entry: SetSection, root: Path, place: str) -> Location:
    """The location of an entry with `data`: a file or folder below the data root, or a hub id.

    Raises:
        RecipeError: for a missing file, by `place`, the entry's path in the recipe.
    """
    assert entry.data is not None
    try:
        return Location.find(
            entry.data, root, subset=entry.subset, split=entry.split, revision=entry.revision, columns=entry.columns
        )
    except DataError as error:
        raise RecipeError(f"{place}.data: {error}") from None


def _other_data(recipe: Recipe, name: str, root: Path, place: str) -> Location:
    """The location of what a construct names and no set of the recipe is."""
    try:
        return Location.find(name, root)
    except DataError as error:
        sets = [entry.label for _, _, entry in named_sets(recipe)]
        raise RecipeError(f"{place}: no set of the recipe{nearest(name, sets)}, and {error}") from None


def _read_pairs(
    entry: PreferencesSection, location: Location, limit: int | None, rejections: Rejections
) -> list[PreferencePair]:
    split = entry.split or (preference_preset(entry.preset).split if entry.preset else "train")
    return read_preferences(location, entry.label, smaller(limit, entry.rows), split, rejections)


def _preference_sets(
    recipe: Recipe, read_pairs: Mapping[int, list[PreferencePair]], table: RatingTable, not_made: Counter[str]
) -> Iterator[tuple[list[PreferencePair], int | None]]:
    """Pairs of each set, and most pairs per prompt; those made from ratings are capped before they are made."""
    for index, entry in enumerate(recipe.preferences):
        pairs = read_pairs.get(index)
        if pairs is None:
            assert entry.from_ratings is not None
            cap: dict[str, Any] = {"most": entry.max_pairs_per_prompt, "seed": recipe.seed, "not_made": not_made}
            pairs = pairs_from_ratings(table, entry.from_ratings, entry.margin, **cap, test_share=recipe.test_share)
        own: dict[str, Any] = {"source": entry.label, "weight": entry.weight, "weak": entry.weak}
        yield [replace(pair, **own) for pair in pairs], entry.max_pairs_per_prompt


def _evaluation_pairs(location: Location, limit: int | None, rejections: Rejections) -> list[PreferencePair]:
    pairs = read_preferences(location, limit=limit, rejections=rejections)
    pairs = [pair for pair in pairs if pair.split in ("", "test")]
    if not pairs:
        raise DataError("no row has split 'test'", file=location.name, field="split")
    return pairs


def _benchmark_data(entry: EvaluationSection, root: Path) -> list[str]:
    """Data sources of a benchmark: those of the entry, else its published sets, from below the data root or the hub."""
    names = [hub.id for hub in BENCHMARKS[entry.benchmark].published] if entry.data is None else [entry.data]
    return [str(root / name) if (root / name).exists() else name for name in names]


def _benchmark_prompts(recipe: Recipe, benchmarks: Sequence[tuple[str, str, list[str]]]) -> KnownPrompts:
    """Prompts of the published benchmarks that are evaluated on, and of everything under `keep_apart`."""
    prompts, root = KnownPrompts(), _root(recipe)
    for _, benchmark, sources in benchmarks:
        prompts.add(_benchmark_conversations(benchmark, sources))
    for index, name in enumerate(recipe.keep_apart):
        if name in BENCHMARKS and BENCHMARKS[name].published:
            entry = EvaluationSection.model_validate({"benchmark": name})
            prompts.add(_benchmark_conversations(name, _benchmark_data(entry, root)))
        else:
            location = data_location(SetSection(data=name), root, f"keep_apart.{index}")
            prompts.add(pair.chosen for pair in read_preferences(location))
    return prompts


def _benchmark_conversations(benchmark: str, sources: Sequence[str]) -> Iterator[Conversation]:
    found = BENCHMARKS[benchmark]
    for example in found.read(find_sources(sources, found.published, found.also)).examples:
        yield from (conversation for conversation in example.conversations if conversation is not None)


def relative_margins(pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Margin (p,) of each pair divided by the mean margin of its source, since sources differ in scale; 0 without a
    margin, and for a negative one."""
    margins = np.array([max(pair.margin or 0.0, 0.0) for pair in pairs])
    for source in {pair.source for pair in pairs}:
        rows = np.array([pair.source == source for pair in pairs]) & (margins > 0)
        if rows.any():
            margins[rows] /= margins[rows].mean()
    return margins


def enough_for_gate(pairs: int) -> bool:
    """Whether so many training pairs leave enough of them held out to train a gate."""
    return pairs >= PAIRS_FOR_GATE


def held_out_prompts(keys: Sequence[str], share: float, counted: np.ndarray | None = None) -> np.ndarray:
    """Mask of held-out pairs: whole prompts, or groups of near-duplicates, chosen by their keys, until at least `share`
    of the pairs is held out.

    Args:
        counted: (p,) bool, the pairs that are counted and whose prompts are chosen; by default all.
    """
    counts = Counter(keys if counted is None else [key for key, use in zip(keys, counted, strict=True) if use])
    held: set[str] = set()
    taken = 0
    for key in sorted(counts, key=lambda key: key[8:]):
        if taken >= share * counts.total():
            break
        held.add(key)
        taken += counts[key]
    return np.array([key in held for key in keys], bool)


def group_index(keys: Sequence[str]) -> np.ndarray:
    """Integer code (n,) of each key, in order of first appearance."""
    rows: dict[str, int] = {}
    return np.array([rows.setdefault(key, len(rows)) for key in keys], np.int64)
