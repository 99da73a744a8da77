"""Add your own objective: train a reward model on the ratings of your own form.

    python docs/tutorials/add_your_own_objective.py

A team rates the replies of its support desk by two questions of its own. These ratings alone become a reward model
with two objectives, trained offline on the embedded backbone.
"""

import csv
import json
import random
import tempfile
from pathlib import Path

from armorm import ArmoRM, Recipe, train

# --- 1. The ratings ---------------------------------------------------------------------------------------
#
# A spreadsheet with one row per rated reply. "Is it polite?" is rated from 1 to 5; "does it name a next step?" is yes
# or no for only some of the replies, so cells may be empty.

generator = random.Random(0)
things = ("router", "printer", "laptop", "phone", "screen", "mouse", "keyboard", "speaker", "camera", "tablet")
troubles = (
    "does not start",
    "is very slow",
    "makes a noise",
    "lost its settings",
    "gets hot",
    "stopped after an update",
)
problems = [f"My {thing} {trouble}." for thing in things for trouble in troubles]
openings = [("Thank you for writing, I am sorry for the trouble.", 5), ("Hello.", 3), ("Not this again.", 1)]
middles = ["This happens now and then.", "We have seen this before.", "It is a known thing with this model."]
steps = [("Please unplug it for ten seconds and start it again.", 1), ("Please send us the number on its back.", 1),
         ("Such is life.", 0), ("It may or may not get better.", 0)]  # fmt: skip

folder = Path(tempfile.mkdtemp(prefix="armorm-tutorial-"))
with open(folder / "support.csv", "w", newline="", encoding="utf-8") as file:
    sheet = csv.writer(file)
    sheet.writerow(["question", "reply", "polite", "next_step"])
    for problem in problems:
        for _ in range(6):
            opening, polite = generator.choice(openings)
            step, names_one = generator.choice(steps)
            asked = generator.random() < 0.7
            sheet.writerow(
                [problem, f"{opening} {generator.choice(middles)} {step}", polite, names_one if asked else ""]
            )

# --- 2. Into rows -----------------------------------------------------------------------------------------
#
# armorm reads JSON lines (or Parquet): the conversation as `prompt` and `response`, and a column for each question. An
# empty cell is null; a row with a missing rating is skipped only in the fit of that objective.

with open(folder / "support.csv", encoding="utf-8") as file:
    rows = [
        {
            "prompt": row["question"],
            "response": row["reply"],
            "polite": float(row["polite"]),
            "next_step": float(row["next_step"]) if row["next_step"] else None,
        }
        for row in csv.DictReader(file)
    ]
(folder / "support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(
    f"1. {len(rows)} rated replies to {len(problems)} questions, "
    f"{sum(row['next_step'] is None for row in rows)} cells empty"
)

# --- 3. The recipe ----------------------------------------------------------------------------------------
#
# The scale of each question; preference pairs for the gate, derived from the ratings (two replies to one question with
# different ratings); and response length, so that length bias can be removed.

recipe = Recipe.from_text(f"""
name: support-desk
backbone: {{model: armorm-tiny, dtype: float32, max_length: 256}}
data_root: {folder}
test_share: 0.25
ratings:
  - {{data: support.jsonl, objectives: {{polite: [1, 5], next_step: [0, 1]}}}}
  - {{compute: response_length, name: verbosity}}
preferences:
  - {{from_ratings: support-polite, margin: 1, max_pairs_per_prompt: 6}}
  - {{from_ratings: support-next_step, margin: 1, max_pairs_per_prompt: 6}}
debias: {{against: [verbosity]}}
gating: {{hidden_size: 16, hidden_layers: 1, temperature: 1, steps: 200, batch_size: 256}}
evaluation:
  - {{benchmark: ratings}}
""")
rm = train(recipe, folder / "model")

# --- 4. Was anything learned? -----------------------------------------------------------------------------
#
# A quarter of the questions was held out. Spearman's correlation measures whether held-out replies are ranked as they
# were rated; 0 is chance.

metrics = json.loads((folder / "model" / "metrics.json").read_text(encoding="utf-8"))
print("\n2. On questions that were held out")
for name, figures in metrics["evaluation"]["ratings"].items():
    print(f"   {name:20s} Spearman {figures['spearman']:.2f} on {figures['n']} ratings")
    assert name == "verbosity" or figures["spearman"] > 0.5

# --- 5. Use it --------------------------------------------------------------------------------------------
#
# The folder is a model like any other: `armorm score --model DIR`, `armorm serve --model DIR`, or

question = {"role": "user", "content": "My bicycle lamp does not start."}
replies = {
    "polite, with a step": "Thank you for writing, I am sorry for the trouble. Please unplug it and start it again.",
    "polite, without": "Thank you for writing, I am sorry for the trouble. Such is life.",
    "rude, with a step": "Not this again. Please unplug it and start it again.",
}
rm = ArmoRM.from_pretrained(folder / "model", dtype="float32", device="cpu")
conversations = [[question, {"role": "assistant", "content": text}] for text in replies.values()]
batch = rm.score(conversations)
with_length = rm.steer(debias_strength=0).score(conversations).scores
ratings = rm.objectives.to_raw(batch.rewards)
polite, step = (ratings[:, batch.names.index(name)] for name in ("support-polite", "support-next_step"))
print("\n3. Replies that it never saw, on the scales of the form")
for row, name in enumerate(replies):
    print(
        f"   {name:20s} polite {polite[row]:.1f} of 5, next step {step[row]:.2f} of 1, "
        f"score {batch.scores[row]:+.2f} (without debiasing: {with_length[row]:+.2f})"
    )
assert min(polite[:2]) > polite[2] + 2 and min(step[0], step[2]) > step[1] + 0.3
assert batch.scores[2] == min(batch.scores) and with_length[0] == max(with_length)

# Naming a next step makes a reply longer, and debiasing removes everything that correlates with length, wanted or not.
# If that is too much, lower `debias_strength` with `rm.steer`, or omit `debias` from the recipe.
