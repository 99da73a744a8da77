"""Scores of the rewardbench package for per-example results; run in an environment that has the package.

In:  a JSON file: `pairs` (subset, chosen, rejected), `best_of` (scores, the chosen one first), `ties` (id, scores,
     num_correct).
Out: a JSON file: `counts` and `mapping` of the package, and its `sections`, `credit` and `ties`.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset

task = json.loads(Path(sys.argv[1]).read_text())
results: dict[str, list[int]] = {}
for pair in task["pairs"]:
    results.setdefault(pair["subset"], []).append(int(pair["chosen"] > pair["rejected"]))
accuracies = {subset: sum(right) / len(right) for subset, right in results.items()}
flat = [(number, score) for number, scores in enumerate(task["best_of"]) for score in scores]
rerolled = reroll_and_score_dataset(
    Dataset.from_dict({"number": [number for number, _ in flat], "scores": [score for _, score in flat]}),
    [len(scores) for scores in task["best_of"]],
    cols_to_combine=["scores"],
)
found = {
    "counts": EXAMPLE_COUNTS,
    "mapping": SUBSET_MAPPING,
    "sections": calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracies),
    "credit": [float(credit) for credit in rerolled["results"]],
    "ties": float(process_single_model(task["ties"])[1]),
}
Path(sys.argv[2]).write_text(json.dumps(found))
