"""Compare two models: is one better, by how much, and on what?

    python docs/tutorials/compare_two_models.py

Two reward models judge the same preference pairs. A difference of accuracies needs a confidence interval. Because both
models see the same prompts, the interval of the paired difference is tighter than comparing two separate intervals.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from armorm import ArmoRM, evaluate
from armorm.data.synthetic import generate
from armorm.evaluation.model_comparison import compare_models

# --- 1. Pairs with known labels ------------------------------------------------------------------------
#
# The generated corpus of `armorm demo`: of two replies to one prompt, the one with the more concrete steps is better.
# Some of the worse ones are padded with filler.

by_prompt = defaultdict(list)
for row in generate(0):
    if row.prompt % 2 == 0:
        by_prompt[row.prompt].append(row)
folder = Path(tempfile.mkdtemp(prefix="armorm-tutorial-"))
pairs = []
for rows in by_prompt.values():
    worse, better = sorted(rows, key=lambda row: row.qualities["help"])[:: len(rows) - 1]
    if better.qualities["help"] > worse.qualities["help"]:
        longer = len(better.messages[-1]["content"]) > len(worse.messages[-1]["content"])
        pairs.append(
            {
                "prompt": better.messages[:-1],
                "chosen": better.messages[-1:],
                "rejected": worse.messages[-1:],
                "subset": "better is longer" if longer else "better is shorter",
            }
        )
(folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
print(f"1. {len(pairs)} pairs, one for each prompt")

# --- 2. Two models ----------------------------------------------------------------------------------------
#
# The embedded model, and the same model steered to weight depth ten times as much. A folder, a hub id, or a function
# from conversations to numbers works as well.

plain = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu")
deep = plain.steer({"justeval-depth": 10.0})
deep.name = "armorm-tiny-rm, depth x 10"
results = [evaluate("pairs", model, folder / "pairs.jsonl") for model in (deep, plain)]

print("\n2. Accuracy of each model, with a 95% interval (bootstrap over prompts)")
for result in results:
    accuracy = result.level("overall")["accuracy"]
    low, high = accuracy.interval
    print(f"   {result.model['name']:28s} {accuracy.value:.3f}  [{low:.3f}, {high:.3f}]")

# --- 3. The difference ------------------------------------------------------------------------------------
#
# Both models judged the same pairs, so each prompt is compared with itself: the interval of the difference is narrower
# than the two intervals above suggest. p is from a permutation test that exchanges the models on whole prompts; a star
# marks what remains significant after Holm's correction over the metrics of its level.

comparison = compare_models(*results)
print(f"\n3. {comparison.first} minus {comparison.second}, on {comparison.shared} shared pairs")
for difference in comparison.differences:
    if difference.interval is not None:
        low, high = difference.interval
        star = " *" if difference.significant else ""
        change = f"{difference.difference:+.3f}  [{low:+.3f}, {high:+.3f}]"
        print(f"   {difference.name:20s} {change}  p {difference.p:.3f}{star}")
assert comparison.shared == len(pairs)

# --- 4. Where do they differ? -----------------------------------------------------------------------------
#
# A difference is a reason to look closer. The pairs that only one model judges correctly show what changed, and
# `explain` shows why.

margins = [
    np.subtract(
        model.score([pair["prompt"] + pair["chosen"] for pair in pairs]).scores,
        model.score([pair["prompt"] + pair["rejected"] for pair in pairs]).scores,
    )
    for model in (deep, plain)
]
won, lost = (int(((a > 0) & (b <= 0)).sum()) for a, b in (margins, margins[::-1]))
print(f"\n4. Pairs that only the steered model judges correctly: {won}; only the plain one: {lost}")
turned = int(np.argmax(np.abs(np.sign(margins[0]) - np.sign(margins[1])) * np.abs(margins[0] - margins[1])))
pair = pairs[turned]
print(f"   largest change ({pair['subset']}): margin {margins[1][turned]:+.3f}, steered {margins[0][turned]:+.3f}")
