"""The plan of a run: every set read and checked, every split made, before any model is loaded.

In:  a recipe.
Out: `TrainingData`: rated rows, preference pairs, reference conversations and evaluation pairs, split by
     prompt; with the count of everything that was left out, and why.

Splits. Rows of a set with a `split` column go where it says; of other sets, a share of the prompts
(`test_share`, decided by the prompt's content) is held out. No prompt that is evaluated on, anywhere in the
run, or kept apart by the recipe, is trained on, however it is written (data/decontamination.py): such training rows
are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from armorm.conversation import Conversation
from armorm.data.decontamination import KnownPrompts
from armorm.data.layouts import renamed
from armorm.data.measures import find_measure
from armorm.data.preferences import (
    PreferencePair,
    cap_pairs,
    pairs_from_ratings,
    preference_pair,
    read_preferences,
)
from armorm.data.presets import PREFERENCE_PRESETS, Preset, preference_preset, rating_preset
from armorm.data.ratings import RatedSet, RatingTable, merge_objectives, objective_name, read_ratings, row_conversation
from armorm.data.rows import Row
from armorm.data.sources import Location, find_sources
from armorm.errors import DataError, RecipeError, nearest
from armorm.evaluation.loaders import READERS
from armorm.evaluation.registry import BENCHMARKS
from armorm.objectives import Objective, ObjectiveError
from armorm.training.recipe import Recipe
from armorm.training.schema import EvaluationSection, PreferencesSection, ReferenceSection, SetSection


@dataclass
class EvaluationSet:
    """Pairs of one evaluation.

    Attributes:
        name: in the report.
        pairs: in file order.
    """

    name: str
    pairs: list[PreferencePair]


@dataclass
class TrainingData:
    """Everything a run reads.

    Attributes:
        table: rated rows of all sets, without computed objectives.
        train_rows, test_rows: rows of the table.
        computed: (objective name, measure) of each computed objective.
        pairs: training pairs, capped.
        test_pairs: held-out pairs of the preference sets.
        reference: reference conversations, or None for the training rating rows.
        evaluations: sets of pairs to evaluate on.
        evaluate_ratings: whether held-out ratings are evaluated.
        benchmarks: (name, benchmark, where its data is) of each published benchmark to evaluate on.
        left_out: count of rows left out, by reason.
    """

    table: RatingTable
    train_rows: np.ndarray
    test_rows: np.ndarray
    computed: list[tuple[str, str]]
    pairs: list[PreferencePair]
    test_pairs: list[PreferencePair]
    reference: list[Conversation] | None
    evaluations: list[EvaluationSet]
    evaluate_ratings: bool
    left_out: dict[str, int] = field(default_factory=dict)
    benchmarks: list[tuple[str, str, list[str]]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Rows of each kind, for the plan and the metrics."""
        return {
            "rated_train": len(self.train_rows),
            "rated_test": len(self.test_rows),
            "rated_train_prompts": len({self.table.conversations[i].prompt_key for i in self.train_rows}),
            "pairs_train": len(self.pairs),
            "pairs_train_prompts": len({pair.prompt_key for pair in self.pairs}),
            "pairs_test": len(self.test_pairs),
            **{f"pairs_{evaluation.name}": len(evaluation.pairs) for evaluation in self.evaluations},
        }


def plan(recipe: Recipe) -> TrainingData:
    """Read and split everything a recipe names.

    Raises:
        RecipeError: for a missing file or an unknown objective, by its place in the recipe.
        DataError: for a fault in a file, by file, row and field.
    """
    root = Path(recipe.data_root).expanduser()
    sets = _rated_sets(recipe, root)
    computed = _computed(recipe)
    _check_objectives(recipe, sets, computed)
    preference_locations = [_location(entry, root, f"preferences.{i}") for i, entry in enumerate(recipe.preferences)]
    evaluation_locations = [
        _location(entry, root, f"evaluation.{i}") if entry.benchmark == "pairs" else None
        for i, entry in enumerate(recipe.evaluation)
    ]
    reference = None
    if recipe.reference != "ratings":
        location = _location(recipe.reference, root, "reference")
        assert location is not None
        reference = [c for row in islice(location.rows(), recipe.limit) for c in _conversations(row)]

    table = read_ratings(sets, recipe.limit)
    keys = [conversation.prompt_key for conversation in table.conversations]
    rated_test = np.array(
        [is_test(split, key, recipe.test_share) for split, key in zip(table.splits, keys, strict=True)]
    )
    unused = np.array([split == "other" for split in table.splits])

    evaluations = []
    for evaluation, location in zip(recipe.evaluation, evaluation_locations, strict=True):
        if location is not None:
            pairs = [pair for pair in read_preferences(location, limit=recipe.limit) if pair.split in ("", "test")]
            if not pairs:
                raise DataError("no row has split 'test'", file=location.name, field="split")
            evaluations.append(EvaluationSet(evaluation.name or _stem(location), pairs))

    benchmarks: list[tuple[str, str, list[str]]] = [
        (entry.name or entry.benchmark, entry.benchmark, _benchmark_data(entry, root))
        for entry in recipe.evaluation
        if entry.benchmark not in ("pairs", "ratings")
    ]
    apart = KnownPrompts(c for c, test in zip(table.conversations, rated_test, strict=True) if test)
    apart.add(pair.chosen for benchmark in evaluations for pair in benchmark.pairs)
    for _, benchmark, places in benchmarks:
        apart.add(_benchmark_conversations(benchmark, places))
    for place, name in enumerate(recipe.keep_apart):
        apart.add(_kept_apart(name, root, f"keep_apart.{place}"))

    train_pairs: list[PreferencePair] = []
    test_pairs: list[PreferencePair] = []
    capped = 0
    for entry, location in zip(recipe.preferences, preference_locations, strict=True):
        pairs = _pairs(entry, location, table, recipe.limit)
        held_out = [is_test(pair.split, pair.prompt_key, recipe.test_share) for pair in pairs]
        test_pairs += cap_pairs(
            [p for p, test in zip(pairs, held_out, strict=True) if test], entry.max_pairs_per_prompt, recipe.seed
        )
        training = [p for p, test in zip(pairs, held_out, strict=True) if not test and p.split != "other"]
        kept = cap_pairs(training, entry.max_pairs_per_prompt, recipe.seed)
        capped += len(training) - len(kept)
        train_pairs += kept
    apart.add(pair.chosen for pair in test_pairs)

    overlapping = np.array([apart.holds(conversation) for conversation in table.conversations], bool)
    ties = sum(pair.is_tie for pair in train_pairs)
    train_pairs = [pair for pair in train_pairs if not pair.is_tie]
    overlapping_pairs = [pair for pair in train_pairs if apart.holds(pair.chosen)]
    pairs = [pair for pair in train_pairs if not apart.holds(pair.chosen)]
    training = overlapping & ~rated_test & ~unused
    written_alike = sum(keys[i] in apart.keys for i in np.flatnonzero(training))
    pairs_alike = sum(pair.prompt_key in apart.keys for pair in overlapping_pairs)
    left_out = {
        "rated rows of other splits": int(unused.sum()),
        "rated training rows whose prompt is evaluated on": written_alike,
        "rated training rows whose prompt is evaluated on, written otherwise": int(training.sum()) - written_alike,
        "training pairs whose prompt is evaluated on": pairs_alike,
        "training pairs whose prompt is evaluated on, written otherwise": len(overlapping_pairs) - pairs_alike,
        "training pairs over the cap of their prompt": capped,
        "training pairs of twice the same response": ties,
    }
    return TrainingData(
        table=table,
        train_rows=np.flatnonzero(~overlapping & ~rated_test & ~unused),
        test_rows=np.flatnonzero(rated_test & ~unused),
        computed=computed,
        pairs=pairs,
        test_pairs=test_pairs,
        reference=reference,
        evaluations=evaluations,
        evaluate_ratings=any(entry.benchmark == "ratings" for entry in recipe.evaluation),
        left_out={reason: count for reason, count in left_out.items() if count},
        benchmarks=benchmarks,
    )


def _rated_sets(recipe: Recipe, root: Path) -> list[RatedSet]:
    sets = []
    for index, entry in enumerate(recipe.ratings):
        place = f"ratings.{index}"
        if entry.preset is not None:
            preset = rating_preset(entry.preset)
            source = entry.source or entry.preset
            sets.append(
                RatedSet(
                    preset_location(preset, entry, root),
                    preset.objectives(source, entry.map),
                    source,
                    entry.split or preset.split,
                )
            )
        elif entry.data is not None:
            found = _location(entry, root, place)
            assert found is not None
            source = entry.source or _stem(found)
            columns = {}
            for column, objective in entry.objectives.items():
                name = objective.name or objective_name(column, source)
                low, high = objective.range
                columns[column] = Objective.rated(
                    name,
                    low,
                    high,
                    source=entry.source or name.split("-")[0],
                    direction=objective.direction,
                    scale_map=objective.map,
                )
            sets.append(RatedSet(found, columns, source, entry.split or "train"))
    if not sets:
        raise RecipeError("ratings: found computed objectives only, expected at least one set of ratings")
    return sets


def _computed(recipe: Recipe) -> list[tuple[str, str]]:
    computed = []
    for index, entry in enumerate(recipe.ratings):
        if entry.compute is not None:
            try:
                find_measure(entry.compute)
            except ObjectiveError as error:
                raise RecipeError(f"ratings.{index}.compute: {error}") from None
            computed.append((entry.name or entry.compute, entry.compute))
    return computed


def _check_objectives(recipe: Recipe, sets: Sequence[RatedSet], computed: Sequence[tuple[str, str]]) -> None:
    rated = merge_objectives(sets).names
    names = [*rated, *(name for name, _ in computed)]
    sources = [
        entry.source or entry.from_ratings or Path(entry.data or "").name.split(".")[0] for entry in recipe.preferences
    ]
    for source in recipe.gating.source_weights:
        if source not in sources:
            raise RecipeError(
                f"gating.source_weights: no preference set is named {source!r}{nearest(source, sources)}; "
                f"there are {', '.join(sources)}"
            )
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise RecipeError(f"ratings: objective {doubled!r} stands twice")
    wanted = [
        (f"preferences.{i}.from_ratings", entry.from_ratings, rated) for i, entry in enumerate(recipe.preferences)
    ]
    wanted += [(f"regression.weights.{name}", name, names) for name in recipe.regression.weights]
    if recipe.debias is not None:
        wanted += [(f"debias.against.{i}", name, names) for i, name in enumerate(recipe.debias.against)]
    for place, name, known in wanted:
        if name is not None and name not in known:
            raise RecipeError(
                f"{place}: unknown objective {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            )


def locations(recipe: Recipe) -> Iterator[tuple[str, str, Location, str]]:
    """Place in the recipe, kind (ratings, pairs, reference), location and preset of every set that a run reads.

    Raises:
        RecipeError: for a missing file or an unknown preset, by its place in the recipe.
    """
    root = Path(recipe.data_root).expanduser()
    for index, rated in enumerate(recipe.ratings):
        place = f"ratings.{index}"
        if rated.preset is not None:
            yield place, "ratings", preset_location(rating_preset(rated.preset), rated, root), rated.preset
        elif (location := _location(rated, root, place)) is not None:
            yield place, "ratings", location, ""
    for index, paired in enumerate(recipe.preferences):
        place = f"preferences.{index}"
        if (location := _location(paired, root, place)) is not None:
            yield place, "pairs", location, paired.preset or ""
    if recipe.reference != "ratings":
        location = _location(recipe.reference, root, "reference")
        assert location is not None
        yield "reference", "reference", location, recipe.reference.preset or ""


def preset_location(preset: Preset, entry: SetSection, root: Path) -> Location:
    """Where the rows of a preset are: a folder of its name below the data root, or the hub; the entry overrides."""
    return Location.find(
        preset.hub_id,
        root,
        subset=entry.subset,
        split=entry.split or preset.split,
        revision=entry.revision or preset.revision,
        data_dir=preset.data_dir,
        layout=preset.layout,
    )


def _location(entry: SetSection, root: Path, place: str) -> Location | None:
    if isinstance(entry, PreferencesSection) and entry.preset is not None:
        return preset_location(preference_preset(entry.preset), entry, root)
    if isinstance(entry, ReferenceSection) and entry.preset is not None:
        return preset_location(PREFERENCE_PRESETS.get(entry.preset) or rating_preset(entry.preset), entry, root)
    if entry.data is None:
        return None
    layout = renamed(entry.columns) if entry.columns else None
    try:
        return Location.find(
            entry.data, root, subset=entry.subset, split=entry.split, revision=entry.revision, layout=layout
        )
    except DataError as error:
        raise RecipeError(f"{place}.data: {error}") from None


def _pairs(
    entry: PreferencesSection, location: Location | None, table: RatingTable, limit: int | None
) -> list[PreferencePair]:
    if location is not None:
        split = entry.split or (preference_preset(entry.preset).split if entry.preset else "train")
        return read_preferences(location, entry.source or entry.preset or _stem(location), limit, split)
    assert entry.from_ratings is not None
    return pairs_from_ratings(table, entry.from_ratings, entry.margin)


def _conversations(row: Row) -> list[Conversation]:
    """The conversation of a row, or of a row of pairs both."""
    if row.values.get("chosen") is None:
        return [row_conversation(row)]
    pair = preference_pair(row)
    return [pair.chosen, pair.rejected]


def _benchmark_data(entry: EvaluationSection, root: Path) -> list[str]:
    """What the benchmark's rows are read from: what the entry names, else a folder of its hub name below the data
    root for each of its published sets, else the hub."""
    if entry.data is not None:
        return [str(root / entry.data) if (root / entry.data).exists() else entry.data]
    published = [hub.id for hub in BENCHMARKS[entry.benchmark].published]
    return [str(root / name) if (root / name).exists() else name for name in published]


def _benchmark_conversations(benchmark: str, places: Sequence[str]) -> Iterator[Conversation]:
    found = BENCHMARKS[benchmark]
    for example in READERS[benchmark](find_sources(places, found.published, found.also)).examples:
        yield from (conversation for conversation in example.conversations[:1] if conversation is not None)


def _kept_apart(name: str, root: Path, place: str) -> Iterator[Conversation]:
    if name in BENCHMARKS and BENCHMARKS[name].published:
        entry = EvaluationSection.model_validate({"benchmark": name})
        yield from _benchmark_conversations(name, _benchmark_data(entry, root))
        return
    location = _location(SetSection(data=name), root, place)
    assert location is not None
    yield from (pair.chosen for pair in read_preferences(location))


def is_test(split: str, prompt_key: str, share: float) -> bool:
    """Whether a row is held out: by its own split, else by its prompt."""
    return split == "test" or (split == "" and int(prompt_key[16:24], 16) / 2**32 < share)


def _stem(location: Location) -> str:
    return Path(location.name).name.split(".")[0]


HELD_OUT_PAIRS = 0.1


def relative_margins(pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Margin (p,) of each pair over the mean margin of its source, 0 where it has none: sources have scales of their
    own. A negative margin (the data says that rejected is better) counts as 0."""
    margins = np.array([max(pair.margin or 0.0, 0.0) for pair in pairs])
    for source in {pair.source for pair in pairs}:
        rows = np.array([pair.source == source for pair in pairs]) & (margins > 0)
        if rows.any():
            margins[rows] /= margins[rows].mean()
    return margins


def held_out_prompts(prompt_keys: Sequence[str], share: float) -> np.ndarray:
    """Mask of the pairs of some prompts, at least `share` of all pairs; the prompts' content decides which."""
    counts: dict[str, int] = {}
    for key in prompt_keys:
        counts[key] = counts.get(key, 0) + 1
    held: set[str] = set()
    taken = 0
    for key in sorted(counts, key=lambda key: key[8:]):
        if taken >= share * len(prompt_keys):
            break
        held.add(key)
        taken += counts[key]
    return np.array([key in held for key in prompt_keys], bool)


def group_index(keys: Sequence[str]) -> np.ndarray:
    """Number of each key, in order of appearance."""
    rows: dict[str, int] = {}
    return np.array([rows.setdefault(key, len(rows)) for key in keys], np.int64)
