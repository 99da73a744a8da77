"""Which layer and which pooling of a backbone give the best heads: all of them measured in one forward pass per row.

For ratings: the ridge heads of stage 1, mean Spearman and mean accuracy within prompts. For pairs: a linear
Bradley-Terry head. Rows are a sample by prompt of the recipe's training data, of which a fifth of the prompts is held
out to measure the heads on; test rows are not read, so a figure of them stays a test of the layer that is chosen here.
The figure of the best of many is a little too good, so it is no figure to report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from armorm.backbone.decoder import Backbone, length_sorted_batches
from armorm.backbone.encoding import encode_rows
from armorm.backbone.readout import Pooling, cut_layers, mean_states, resolve_layer
from armorm.conversation import Conversation
from armorm.data.decontamination import prompt_groups
from armorm.data.ratings import sample_by_prompt
from armorm.errors import BackboneError
from armorm.evaluation.benchmarks.ratings import MIN_ROWS
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.bradley_terry import fit_bradley_terry
from armorm.heads.regression import MIN_RATINGS, fit_from_statistics, fold_of
from armorm.objectives import ObjectiveSet
from armorm.progress import Terminal, progress
from armorm.training.cost import Shape
from armorm.training.dataset import HELD_OUT_PAIRS, distinct_conversations, held_out_prompts, read_training_data, sides
from armorm.training.evaluate import rating_metrics
from armorm.training.recipe import Recipe

POOLINGS: tuple[Pooling, ...] = ("last", "mean", "last+mean")
DEFAULT_LAYERS = 8
SAMPLE = 2000
FEW = 20  # pairs to fit or to measure on, below which no head is fitted to pairs
VALIDATION = 0.2  # of the conversations, by prompt
_T = TypeVar("_T")
Figure = Literal["spearman", "within_prompt", "pairs"]
FIGURES: dict[Figure, str] = {
    "spearman": "Spearman of ratings",
    "within_prompt": "ratings within prompts",
    "pairs": "accuracy on pairs",
}


@dataclass(frozen=True)
class ProbedReadout:
    """Figures of one layer and pooling on validation prompts; NaN where the data has too little.

    Attributes:
        layer: as in `hidden_states`.
        spearman, within_prompt: means over objectives with ratings of validation prompts.
        pairs: accuracy, a tie counts as wrong.
        cost: FLOPs of a forward pass that stops at the layer, relative to the whole backbone.
    """

    layer: int
    pooling: Pooling
    spearman: float
    within_prompt: float
    pairs: float
    cost: float


@dataclass(frozen=True)
class Probe:
    """All readouts that were measured.

    Attributes:
        backbone: its name.
        layers: number of its layers.
        counts: rows and pairs that heads are fitted on and measured on, objectives, rejected conversations.
        readouts: layer after layer.
    """

    backbone: str
    layers: int
    counts: dict[str, int]
    readouts: list[ProbedReadout]

    def best(self, figure: Figure) -> ProbedReadout | None:
        """The readout with the highest figure; None if none has it."""
        known = [entry for entry in self.readouts if np.isfinite(getattr(entry, figure))]
        return max(known, key=lambda entry: getattr(entry, figure)) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        best = {figure: self.best(figure) for figure in FIGURES}
        chosen = {figure: {"layer": e.layer, "pooling": e.pooling} if e else None for figure, e in best.items()}
        return {**asdict(self), "best": chosen}


def probe(
    recipe: Recipe,
    *,
    layers: Sequence[int | float] = (),
    poolings: Sequence[Pooling] = POOLINGS,
    limit: int = SAMPLE,
    quiet: bool = False,
) -> Probe:
    """Measure layers and poolings of a recipe's backbone on its data.

    Args:
        layers: indices as in `hidden_states`, or fractions; by default `DEFAULT_LAYERS` spread evenly, and the last.
        limit: approximate number of training rows of each data set, whole prompts.
        quiet: print only progress.

    Raises:
        BackboneError: for a layer that the backbone does not have.
        RecipeError, DataError: for invalid recipes or data.
    """
    console = Terminal(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    section = recipe.backbone
    data = read_training_data(recipe)
    backbone = Backbone.load(
        section.model,
        dtype=section.dtype,
        device=section.device,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    backbone.template.reasoning = section.reasoning
    total = int(backbone.model.config.get_text_config().num_hidden_layers)
    chosen = _layers(layers, total, backbone.name)
    shape = Shape.of_config(backbone.model.config)
    if 0 < chosen[-1] < total:
        cut_layers(backbone.model, chosen[-1])
    table = data.table
    sampled = _sample(
        [table.conversations[r] for r in data.train_rows], [table.sources[r] for r in data.train_rows], limit
    )
    rows = [int(data.train_rows[i]) for i in sampled]
    pairs = [data.pairs[i] for i in _sample([p.chosen for p in data.pairs], [p.source for p in data.pairs], limit)]
    conversations = distinct_conversations([*(table.conversations[row] for row in rows), *sides(pairs)])
    policy = "skip" if section.overflow == "error" else section.overflow
    encoded = encode_rows(backbone.template, conversations, section.max_length, policy)
    if encoded.rejected:
        console.print(f"rejected: {len(encoded.rejected):,} conversations, the first: {encoded.rejected[0][1]}")
    place = {conversations[row].key: i for i, row in enumerate(encoded.kept)}
    states = layer_states(backbone, encoded.encoded, chosen, "mean" in "".join(poolings))
    groups = prompt_groups(conversations)

    prompts = [groups[conversation.prompt_key] for conversation in conversations]
    held = {prompt for prompt, out in zip(prompts, held_out_prompts(prompts, VALIDATION), strict=True) if out}
    train, test = _parted(
        [row for row in rows if table.conversations[row].key in place],
        lambda row: groups[table.conversations[row].prompt_key] in held,
    )
    pairs, test_pairs = _parted(
        [pair for pair in pairs if pair.chosen.key in place and pair.rejected.key in place],
        lambda pair: groups[pair.prompt_key] in held,
    )
    columns = [j for j in range(len(table.objectives)) if _learnable(table.ratings[train, j])]
    objectives = ObjectiveSet([table.objectives[j] for j in columns])
    for name in set(table.objectives.names) - set(objectives.names):
        console.print(f"skipped: {name}, which has fewer than {MIN_RATINGS} different training ratings in the sample")
    ratings = objectives.to_reward(table.ratings[np.ix_(train, columns)])
    given = table.ratings[np.ix_(test, columns)]
    folds = np.array([fold_of(groups[table.conversations[i].prompt_key], recipe.regression.folds) for i in train])
    test_prompts = [table.conversations[i].prompt_key for i in test]
    held_out = held_out_prompts([groups[pair.prompt_key] for pair in pairs], HELD_OUT_PAIRS)
    lengths = [len(row) for row in encoded.encoded]
    flops = {
        n: shape.read(n, "last").extraction_flops(sum(lengths), sum(t * t for t in lengths), 2 * len(lengths))
        for n in (*chosen, total)
    }

    found = []
    with progress("heads", len(chosen) * len(poolings), "readouts") as advance:
        for number, layer in enumerate(chosen):
            for pooling in poolings:
                features = np.concatenate([states[part][number] for part in pooling.split("+")], 1)

                def of(some: Iterable[Conversation], features: np.ndarray = features) -> np.ndarray:
                    return features[[place[conversation.key] for conversation in some]]

                spearman = within = accuracy = float("nan")
                if columns and len(test) >= MIN_ROWS:
                    blocks = blocks_of(of(table.conversations[i] for i in train), ratings, folds)
                    statistics = accumulate(blocks, objectives.names, recipe.regression.folds, features.shape[1])
                    head = fit_from_statistics(
                        statistics, alphas=recipe.regression.alphas, intercept=recipe.regression.intercept
                    )
                    rewards = head.predict(of(table.conversations[i] for i in test))
                    metrics = rating_metrics(rewards, given, objectives, test_prompts).values()
                    spearman, within = (_mean(entry[key] for entry in metrics) for key in ("spearman", "within_prompt"))
                if min(int(held_out.sum()), int((~held_out).sum()), len(test_pairs)) >= FEW:
                    weight = fit_bradley_terry(
                        of(pair.chosen for pair in pairs), of(pair.rejected for pair in pairs), held_out
                    )
                    margins = (of(p.chosen for p in test_pairs) - of(p.rejected for p in test_pairs)) @ weight
                    accuracy = float((margins > 0).mean())
                found.append(ProbedReadout(layer, pooling, spearman, within, accuracy, flops[layer] / flops[total]))
                advance(1)
    counts = {"train_rows": len(train), "test_rows": len(test), "train_pairs": len(pairs)}
    counts |= {"test_pairs": len(test_pairs), "objectives": len(objectives), "rejected": len(encoded.rejected)}
    return Probe(backbone.name, total, counts, found)


@torch.inference_mode()
def layer_states(
    backbone: Backbone, encoded: Sequence[Any], layers: Sequence[int], means: bool
) -> dict[str, np.ndarray]:
    """States of the last token, and means over the response, of several layers in one forward pass per row.

    Returns:
        `last` and, if wanted, `mean`: (len(layers), n, d) float32.
    """
    found = {
        name: np.empty((len(layers), len(encoded), backbone.hidden_size), np.float32)
        for name in ("last", *(["mean"] if means else []))
    }
    lengths = [len(row) for row in encoded]
    with progress("states of all layers", sum(lengths), "tokens") as advance:
        for batch in length_sorted_batches(lengths, 8192):
            rows = [encoded[i] for i in batch]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            for row, conversation in enumerate(rows):
                ids[row, : len(conversation)] = torch.from_numpy(conversation.ids.astype(np.int64))
            output = backbone.model(input_ids=ids.to(backbone.device), use_cache=False, output_hidden_states=True)
            device = output.last_hidden_state.device
            lasts = torch.tensor([len(row) - 1 for row in rows], device=device)
            first = torch.tensor([row.gate_position + backbone.header_tokens for row in rows], device=device)
            for number, layer in enumerate(layers):
                hidden = output.hidden_states[layer]
                found["last"][number, batch] = hidden[torch.arange(len(rows), device=device), lasts].float().cpu()
                if means:
                    found["mean"][number, batch] = mean_states(hidden, first.minimum(lasts), lasts).cpu()
            advance(sum(map(len, rows)))
    return found


def _sample(conversations: Sequence[Conversation], sources: Sequence[str], limit: int) -> list[int]:
    """Indices of about `limit` conversations of each source, whole prompts."""
    by_source: dict[str, list[int]] = {}
    for row, source in enumerate(sources):
        by_source.setdefault(source, []).append(row)
    return [
        rows[i]
        for rows in by_source.values()
        for i in sample_by_prompt([conversations[row].prompt_key for row in rows], limit)
    ]


def _layers(asked: Sequence[int | float], total: int, name: str) -> list[int]:
    if not asked:
        asked = np.linspace(0, total, min(DEFAULT_LAYERS, total) + 1).round().astype(int)[1:].tolist()
    resolved = [resolve_layer(layer, total, name) for layer in asked]
    found = sorted({total if layer is None else layer for layer in resolved})
    if not found:
        raise BackboneError(f"backbone {name}: no layer to probe")
    return found


def _parted(items: Iterable[_T], is_held_out: Callable[[_T], bool]) -> tuple[list[_T], list[_T]]:
    """Those to fit on, and those that are held out."""
    parts: tuple[list[_T], list[_T]] = ([], [])
    for item in items:
        parts[is_held_out(item)].append(item)
    return parts


def _learnable(ratings: np.ndarray) -> bool:
    rated = ratings[~np.isnan(ratings)]
    return len(rated) >= MIN_RATINGS and bool(np.ptp(rated) > 0)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
