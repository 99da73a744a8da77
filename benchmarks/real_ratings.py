"""Prediction of held-out ratings of real data: armorm against text baselines.

For each objective, on the test split: Spearman correlation, and accuracy within prompts (pairs of one prompt whose
ratings differ), for

- armorm: the model's rewards;
- TF-IDF + ridge: words and word pairs of prompt and response as separate features (joint ones predict worse), same
  training rows, penalty selected by prompt folds;
- the same from the prompt alone (what can be known without reading the response);
- length alone: response tokens, in the direction that fits the training ratings.

Trains the model first if its folder does not exist.

    python benchmarks/real_ratings.py --model runs/real
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from armorm import ArmoRM, Conversation, Recipe, train
from armorm.backbone.encoding import encode_rows
from armorm.correlation import spearman
from armorm.features.extract import extract
from armorm.features.store import FeatureStore
from armorm.files import write_json
from armorm.heads.regression import fold_of
from armorm.progress import progress
from armorm.training.dataset import read_training_data
from armorm.training.evaluate import within_prompt_accuracy

ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 3
MIN_TEST_RATINGS = 100
METHODS = ("armorm", "tfidf", "tfidf_prompt", "length")


def word_counts(texts: list[str], is_train: np.ndarray) -> csr_matrix:
    """TF-IDF of words and word pairs (n, words), fitted on the training rows."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, dtype=np.float32)
    vectorizer.fit([text for text, train_row in zip(texts, is_train, strict=True) if train_row])
    return vectorizer.transform(texts).tocsr()


def prompt_text(conversation: Conversation) -> str:
    return "\n".join(message.content for message in conversation.prompt)


def ridge_predictions(
    train_texts: csr_matrix, ratings: np.ndarray, folds: np.ndarray, test_texts: csr_matrix
) -> tuple[np.ndarray, float]:
    """Predictions for test rows, and the penalty selected on prompt folds."""
    errors = []
    for alpha in ALPHAS:
        error = 0.0
        for fold in range(FOLDS):
            seen = folds != fold
            model = Ridge(alpha=alpha, solver="sparse_cg", tol=1e-3).fit(train_texts[seen], ratings[seen])
            error += float(((model.predict(train_texts[~seen]) - ratings[~seen]) ** 2).sum())
        errors.append(error)
    alpha = ALPHAS[int(np.argmin(errors))]
    return Ridge(alpha=alpha, solver="sparse_cg", tol=1e-3).fit(train_texts, ratings).predict(test_texts), alpha


def figures(prediction: np.ndarray, ratings: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    accuracy, pairs = within_prompt_accuracy(prediction, ratings, prompts)
    return {"spearman": spearman(prediction, ratings), "within_prompt": accuracy, "pairs": pairs}


def measure(recipe: Recipe, model: ArmoRM, store: Path) -> dict[str, Any]:
    data = read_training_data(recipe)
    table = data.table
    rows = np.concatenate([data.train_rows, data.test_rows])
    conversations = [table.conversations[i] for i in rows]
    is_train = np.arange(len(rows)) < len(data.train_rows)
    backbone = model.backbone
    with progress("tokens", len(rows), "conversations") as advance:
        encoded = encode_rows(
            backbone.template, conversations, recipe.backbone.max_length, recipe.backbone.overflow, advance
        )
    if encoded.rejected:
        raise SystemExit("the recipe rejects rows, so the methods would be compared on different rows")
    kept = encoded.encoded
    lengths = np.array([row.response_tokens for row in kept], np.float64)
    test_index = np.flatnonzero(~is_train)
    features = extract(
        backbone,
        [kept[i] for i in test_index],
        FeatureStore.of(store, backbone),
    )
    rewards = model.score_features(features).rewards
    names = model.objectives.names
    prompt_names = {key: i for i, key in enumerate(dict.fromkeys(c.prompt_key for c in conversations))}
    prompts = np.array([prompt_names[c.prompt_key] for c in conversations])
    folds = np.array([fold_of(c.prompt_key, FOLDS) for c in conversations])
    prompt_words = word_counts([prompt_text(conversation) for conversation in conversations], is_train)
    response_words = word_counts([conversation.messages[-1].content for conversation in conversations], is_train)
    matrices = {"tfidf": hstack([prompt_words, response_words]).tocsr(), "tfidf_prompt": prompt_words}
    results: dict[str, Any] = {}
    with progress("objectives", len(table.objectives), "objectives") as advance:
        for column, objective in enumerate(table.objectives):
            ratings = table.ratings[rows, column]
            rated = ~np.isnan(ratings)
            train_rows, test_rows = np.flatnonzero(rated & is_train), np.flatnonzero(rated & ~is_train)
            mapped = objective.to_reward(ratings)
            sign = np.sign(spearman(lengths[train_rows], mapped[train_rows])) or 1.0
            place = test_rows - len(data.train_rows)
            predictions = {"armorm": rewards[place, names.index(objective.name)], "length": sign * lengths[test_rows]}
            alphas = {}
            for method, matrix in matrices.items():
                predictions[method], alphas[method] = ridge_predictions(
                    matrix[train_rows], mapped[train_rows], folds[train_rows], matrix[test_rows]
                )
            entry: dict[str, Any] = {"train": len(train_rows), "test": len(test_rows), "tfidf_alphas": alphas}
            for method in METHODS:
                entry[method] = figures(predictions[method], mapped[test_rows], prompts[test_rows])
            results[objective.name] = entry
            advance(1)
    large = [entry for entry in results.values() if entry["test"] >= MIN_TEST_RATINGS]
    means = {}
    for method in METHODS:
        within = [entry[method]["within_prompt"] for entry in large if entry[method]["pairs"] >= MIN_TEST_RATINGS]
        means[method] = {
            "spearman": float(np.mean([entry[method]["spearman"] for entry in large])),
            "within_prompt": float(np.mean(within)),
        }
    return {"objectives": results, "means": means, "objectives_in_mean": len(large)}


def print_table(results: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = ("armorm", "TF-IDF", "prompt", "length")
    for name in ("objective", "train", "test", *shown, "pairs", *shown):
        table.add_column(name, justify="left" if name == "objective" else "right", no_wrap=True)
    for name, entry in results["objectives"].items():
        table.add_row(
            name,
            f"{entry['train']:,}",
            f"{entry['test']:,}",
            *(f"{entry[method]['spearman']:.3f}" for method in METHODS),
            f"{entry['armorm']['pairs']:,}",
            *("" if not entry[m]["pairs"] else f"{entry[m]['within_prompt']:.3f}" for m in METHODS),
        )
    means = results["means"]
    table.add_row(
        f"mean of {results['objectives_in_mean']} (test >= {MIN_TEST_RATINGS})",
        "",
        "",
        *(f"{means[method]['spearman']:.3f}" for method in METHODS),
        f">= {MIN_TEST_RATINGS}",
        *(f"{means[method]['within_prompt']:.3f}" for method in METHODS),
        style="bold",
    )
    console = Console(width=150, highlight=False)
    console.print("Spearman on the test split (left), accuracy within prompts (right)")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Held-out ratings of real data: armorm, TF-IDF, the prompt alone, length."
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/real-small.yaml"))
    parser.add_argument("--model", type=Path, default=Path("runs/real"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="override a recipe key: KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/real_ratings.json"))
    arguments = parser.parse_args()
    recipe = Recipe.from_yaml(arguments.recipe, arguments.overrides)
    if not (arguments.model / "config.json").exists():
        train(recipe, arguments.model)
    model = ArmoRM.from_pretrained(arguments.model)
    results = measure(recipe, model, arguments.model / "work" / "features")
    results["model"] = {
        key: model.model.config.provenance.get(key) for key in ("backbone", "recipe_hash", "armorm_version")
    }
    print_table(results)
    write_json(arguments.output, results)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
