"""`armorm demo`: train on a synthetic corpus with planted effects, and test whether training recovers them.

It ends with the verdicts of the embedded reward model on three everyday pairs of replies.

Everything is measured on held-out prompts. An effect counts as found only beyond three standard errors, so nothing must
be found in the control, a corpus without planted effects.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from armorm.backbone.encoding import encode_rows
from armorm.conversation import Conversation
from armorm.correlation import spearman
from armorm.data.everyday import everyday_pairs
from armorm.data.preferences import read_preferences
from armorm.data.ratings import RatingTable
from armorm.data.sources import Location
from armorm.data.synthetic import RECIPE, DemoRow, generate, write_corpus
from armorm.features.extract import Features, extract
from armorm.features.store import FeatureStore
from armorm.files import write_json, write_text
from armorm.heads.bradley_terry import fit_bradley_terry
from armorm.reward_model import ArmoRM
from armorm.training.dataset import held_out_prompts, read_training_data
from armorm.training.pipeline import train
from armorm.training.recipe import Recipe
from armorm.training.summary import numbers_table

# Planted quality that each objective rates.
TRUTH = {
    "workshop-help": "help",
    "workshop-clarity": "clarity",
    "workshop-verbosity": "length",
    "harbour-is_safe": "care",
    "harbour-muddle": "clarity",  # less muddle is better, so its reward rises with clarity
    "market-overall": "overall",
}
STANDARD_ERRORS = 3.0


def run_demo(output: Path, seed: int = 0) -> dict[str, Any]:
    """Generate the corpus, train and measure; likewise for the control.

    Returns:
        `planted` and `control`, each with the metrics of `objectives`, `gate` and `pairs`, and the effects `found`; and
        `everyday`, the verdicts of the embedded reward model (`everyday_verdicts`).
    """
    rows = generate(seed)
    findings: dict[str, Any] = {}
    for name, folder, planted in (("planted", output, True), ("control", output / "control", False)):
        write_corpus(folder / "data", rows, seed, planted)
        text = RECIPE.replace("runs/demo/data", str(folder / "data")).replace("seed: 0", f"seed: {seed}")
        recipe = Recipe.from_text(text, [] if planted else ["name=demo-control"], name="demo")
        write_text(folder / "demo.yaml", text)
        model = train(recipe, folder, features=output / "work" / "features")
        findings[name] = _findings(model, recipe, rows, output / "work" / "features")
    findings["everyday"] = everyday_verdicts(ArmoRM.from_pretrained())
    write_json(output / "findings.json", findings)
    return findings


def everyday_verdicts(rm: ArmoRM) -> dict[str, Any]:
    """The `model` and its `verdicts`: `prompt`, replies `A` (the better one) and `B`, `right`, `reason`."""
    verdicts = []
    for pair in everyday_pairs():
        found = rm.compare(pair.chosen, pair.rejected)
        texts = {"prompt": pair.chosen.prompt[-1].content, "A": pair.chosen.response, "B": pair.rejected.response}
        verdicts.append(texts | {"right": found.better == "A", "reason": found.in_words()})
    return {"model": rm.name, "verdicts": verdicts}


def _findings(model: ArmoRM, recipe: Recipe, rows: list[DemoRow], store: Path) -> dict[str, Any]:
    test = [row for row in rows if row.test]
    conversations = [Conversation.from_messages(row.messages) for row in test]
    batch = model.score_features(_features(model, conversations, store))
    table = read_training_data(recipe).table
    place = {conversation.key: i for i, conversation in enumerate(table.conversations)}
    ratings = table.take([place[conversation.key] for conversation in conversations])
    transform = model.model.reward_transform_matrix.double().numpy()
    rewards = batch.rewards.astype(np.float64)
    objectives = _objective_findings(model, test, rewards, rewards @ transform, ratings)
    gate = _gate_findings(model, test, batch.gating_weights)
    pairs = _pair_findings(model, recipe, store)
    found = {
        "objectives": [name for name, entry in objectives.items() if entry["found"]],
        "bias": [name for name, entry in objectives.items() if entry["biased"]],
        "gate": gate["found"],
        "preferences": pairs["found"],
    }
    return {"objectives": objectives, "gate": gate, "pairs": pairs, "found": found}


def _objective_findings(
    model: ArmoRM, test: list[DemoRow], rewards: np.ndarray, debiased: np.ndarray, table: RatingTable
) -> dict[str, Any]:
    """Rank correlations on held-out prompts.

    Per objective: `rating` (reward with the given ratings), `rating_length` (given ratings with planted length),
    `truth` and `length` (reward with planted quality and with planted length), the last two also after debiasing. An
    objective is found by `rating`, a length bias by `rating_length`: in the control both correlate independent draws,
    so their standard error is 1 / sqrt(n).
    """
    qualities = {
        name: np.array([row.qualities[name] for row in test]) for name in ("help", "clarity", "care", "length")
    }
    qualities["overall"] = 0.35 * qualities["help"] + 0.15 * qualities["clarity"] + 0.1 * qualities["care"]
    mapped = table.objectives.to_reward(table.ratings)
    bias = model.objectives.position("workshop-verbosity")
    findings: dict[str, Any] = {}
    for column, name in enumerate(model.objectives.names):
        truth, length = qualities[TRUTH[name]], qualities["length"]
        rated = ~np.isnan(mapped[:, column])
        limit = STANDARD_ERRORS / math.sqrt(rated.sum())
        entry: dict[str, Any] = {
            "rating": spearman(rewards[rated, column], mapped[rated, column]),
            "rating_length": spearman(mapped[rated, column], length[rated]),
            "rated": int(rated.sum()),
            "truth": spearman(rewards[:, column], truth),
            "length": spearman(rewards[:, column], length),
            "truth_debiased": None if column == bias else spearman(debiased[:, column], truth),
            "length_debiased": None if column == bias else spearman(debiased[:, column], length),
        }
        entry["found"] = entry["rating"] > limit
        entry["biased"] = column != bias and entry["found"] and entry["rating_length"] > limit
        findings[name] = entry
    return findings


def _gate_findings(model: ArmoRM, test: list[DemoRow], weights: np.ndarray) -> dict[str, Any]:
    """Gating weight of safety on risky and on harmless prompts, one value per prompt."""
    column = model.objectives.position("harbour-is_safe")
    prompts = {row.prompt: (row.risky, float(weights[i, column])) for i, row in enumerate(test)}
    risky, harmless = (np.array([w for kind, w in prompts.values() if kind is wanted]) for wanted in (True, False))
    error = math.sqrt(risky.var(ddof=1) / len(risky) + harmless.var(ddof=1) / len(harmless))
    difference = float(risky.mean() - harmless.mean())
    # A gate that hardly moves has a tiny standard error too, so the difference must also be of a relevant size.
    return {
        "safety_weight_risky": float(risky.mean()),
        "safety_weight_harmless": float(harmless.mean()),
        "standard_error": error,
        "prompts": len(prompts),
        "found": difference > STANDARD_ERRORS * error and difference > 0.05,
    }


def _pair_findings(model: ArmoRM, recipe: Recipe, store: Path) -> dict[str, Any]:
    """Accuracy on held-out pairs, of the model and of three baselines."""
    pairs = read_preferences(Location.find("choices.jsonl", Path(recipe.data_root)))
    training, test = ([pair for pair in pairs if pair.split == split] for split in ("train", "test"))
    sides = {
        name: tuple(_features(model, [getattr(p, side) for p in part], store) for side in ("chosen", "rejected"))
        for name, part in (("train", training), ("test", test))
    }
    transform = model.model.reward_transform_matrix.double().numpy()
    margins: dict[str, np.ndarray] = {}
    rewards = {}
    for name, (chosen, rejected) in sides.items():
        batches = model.score_features(chosen), model.score_features(rejected)
        rewards[name] = (batches[0].rewards.astype(np.float64) - batches[1].rewards) @ transform
        margins[name] = batches[0].scores.astype(np.float64) - batches[1].scores
    best = int((rewards["train"] > 0).mean(0).argmax())
    held_out = held_out_prompts([pair.prompt_key for pair in training], 0.2)
    weights = fit_bradley_terry(sides["train"][0].response, sides["train"][1].response, held_out)
    linear = (sides["test"][0].response.astype(np.float64) - sides["test"][1].response) @ weights
    all_margins = {
        "armorm": margins["test"],
        "uniform weights": rewards["test"].mean(1),
        f"best single objective ({model.objectives.names[best]})": rewards["test"][:, best],
        "linear Bradley-Terry head": linear,
    }
    accuracy = {name: float((values > 0).mean()) for name, values in all_margins.items()}
    # Pairs of one prompt are dependent: the standard error is that of the means of prompts.
    right = (margins["test"] > 0).astype(float)
    _, index = np.unique([pair.prompt_key for pair in test], return_inverse=True)
    means = np.bincount(index, right) / np.bincount(index)
    error = float(means.std(ddof=1) / math.sqrt(len(means)))
    return {
        "accuracy": accuracy,
        "pairs": len(test),
        "prompts": len(means),
        "standard_error": error,
        "found": accuracy["armorm"] - 0.5 > STANDARD_ERRORS * error,
    }


def _features(model: ArmoRM, conversations: list[Conversation], store: Path) -> Features:
    backbone = model.backbone
    encoded = encode_rows(backbone.template, conversations, None).encoded
    return extract(backbone, encoded, FeatureStore.of(store, backbone))


def findings_table(findings: dict[str, Any]) -> RenderableType:
    """Terminal tables of the findings."""
    planted, control = findings["planted"], findings["control"]
    table = partial(numbers_table, title_justify="left")
    title = "Rank correlation of rewards on held-out prompts, before > after debiasing"
    objectives = table("objective", "ratings", "planted", "length", "control", title=title)
    for name, entry in planted["objectives"].items():
        objectives.add_row(
            name,
            f"{entry['rating']:+.2f}",
            _before_after(entry["truth"], entry["truth_debiased"]),
            _before_after(entry["length"], entry["length_debiased"]),
            f"{control['objectives'][name]['rating']:+.2f}",
        )
    gate = table("", "risky prompts", "harmless prompts", title="\nGating weight of safety")
    for label, part in (("planted", planted), ("control", control)):
        weights = (part["gate"][f"safety_weight_{kind}"] for kind in ("risky", "harmless"))
        gate.add_row(label, *(f"{weight:.1%}" for weight in weights))
    pairs = table("", "planted", "control", title="\nAccuracy on held-out pairs")
    accuracies = (part["pairs"]["accuracy"].items() for part in (planted, control))
    for (name, value), (_, other) in zip(*accuracies, strict=True):
        pairs.add_row(name.partition(" (")[0] if "single" in name else name, f"{value:.3f}", f"{other:.3f}")
    verdicts = [_verdict(label, findings[label]) for label in ("planted", "control")]
    return Group(objectives, gate, pairs, Text(""), *verdicts, Text(""), *_everyday(findings["everyday"]))


def _before_after(before: float, after: float | None) -> str:
    return f"{before:+.2f}        " if after is None else f"{before:+.2f} > {after:+.2f}"


def _verdict(label: str, part: dict[str, Any]) -> Text:
    found = part["found"]
    parts = [
        f"{len(found['objectives'])} of {len(part['objectives'])} objectives",
        f"length bias in {len(found['bias'])}",
        "safety weighted by the prompt" if found["gate"] else "no dependence of the gate on the prompt",
        "preferences" if found["preferences"] else "no preferences",
    ]
    return Text.assemble((f"{label}: ", "bold"), "found ", "; ".join(parts))


def _everyday(found: dict[str, Any]) -> list[Text]:
    """The verdicts in words."""
    lines = [Text.assemble(("Everyday replies", "bold"), f", A the better one, judged by {found['model']}")]
    for entry in found["verdicts"]:
        verdict = ("right", "green") if entry["right"] else ("wrong", "red")
        replies = f"{entry['prompt']}\nA: {entry['A']}\nB: {entry['B']}\n"
        lines.append(Text.assemble("\n", replies, verdict, f": {entry['reason']}"))
    return lines
