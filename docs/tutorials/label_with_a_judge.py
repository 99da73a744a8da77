"""Label with a judge: ratings by a language model, checked against your own before you train on them.

    python docs/tutorials/label_with_a_judge.py

A support desk has 96 replies, of which people rated a third. Two judges rate all of them by one rubric, and the ratings
of people say which judge is worth using. Both are behind a local OpenAI-compatible server, so this runs offline: a real
language model of 135 million parameters, and a stand-in for a good one that follows a rule. In your own work, the
server is vLLM, SGLang or a provider.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from armorm.errors import BackboneError
from chat_server import chat_server, generator

# --- 1. Replies, some of them rated -----------------------------------------------------------------------
#
# 48 questions with two replies each. People rated politeness from 1 to 5 on the first 64 rows; the rest is unrated.

generate_number = random.Random(0)
things = ("router", "printer", "laptop", "phone", "screen", "mouse", "keyboard", "speaker")
troubles = ("does not start", "is slow", "makes a noise", "lost its settings", "gets hot", "blinks")
openings = {1: "Not this again.", 2: "Well.", 3: "Hello.", 4: "Thank you for writing.", 5: "Thank you, and sorry!"}
endings = ("Unplug it for ten seconds.", "Send us its number.", "It may get better.", "Such is life, and it is late.")

rows = []
for thing in things:
    for trouble in troubles:
        for polite in generate_number.sample(sorted(openings), 2):
            reply = f"{openings[polite]} {generate_number.choice(endings)}"
            human = min(max(polite + generate_number.choice((-1, 0, 0, 0, 1)), 1), 5)  # people differ by a point
            own = {"polite": human} if len(rows) < 64 else {}
            rows.append({"prompt": f"My {thing} {trouble}.", "response": reply, **own})

folder = Path(tempfile.mkdtemp(prefix="armorm-tutorial-"))
(folder / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
print(f"1. {len(rows)} replies, {sum('polite' in row for row in rows)} rated by people")

# --- 2. The rubric ----------------------------------------------------------------------------------------
#
# One question, its scale, and what its ends mean. The column `polite` of the data holds people's ratings.

(folder / "rubric.yaml").write_text(
    """
about: The replies are of a support desk.
objectives:
  - name: polite
    question: How polite is the reply?
    range: [1, 5]
    anchors: {1: rude, 3: neutral, 5: thanks or apologises}
"""
)

# --- 3. Two judges ----------------------------------------------------------------------------------------
#
# Each is a function from a request to the text of its answer. `--structured` sends the schema of the answer, which the
# small model is held to: by itself, a model of this size seldom writes a rating at all.

try:
    small = generator("armorm-small")
except BackboneError:  # not installed here: the model inside the package, which is smaller still
    small = generator("armorm-tiny")


def rule(body):
    """A good judge, for comparison: it knows the openings."""
    reply = body["messages"][-1]["content"].split("[Reply to rate]\n")[1]
    rating = next(rating for rating, opening in openings.items() if reply.startswith(opening))
    return json.dumps({"rating": rating})


def label(url, name, *more):
    """`armorm label` as on the command line; the output of --json."""
    command = [sys.executable, "-m", "armorm", "label", folder / "replies.jsonl", "--rubric", folder / "rubric.yaml"]
    command += ["--judge", url, "--judge-model", name, "--structured", "--json", *more]
    environment = os.environ | {"ARMORM_CACHE": os.environ.get("ARMORM_CACHE", str(folder / "cache"))}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


with chat_server(small, "small") as url:
    cost = label(url, "small", "--dry-run")
print(f"\n2. Before anything is sent: {cost['requests']} requests, about {cost['prompt_tokens']:,} prompt tokens")

# --- 4. Do they agree with people? ------------------------------------------------------------------------
#
# First a sample (`--rows`): a bad judge is found for a fraction of the cost. The answers are kept, so the full run
# below asks only for the rest.

print("\n3. Agreement with people")
for name, judge in (("small", small), ("rule", rule)):
    with chat_server(judge, name) as url:
        report = label(url, name, "--rows", "12", "--output", folder / f"sample-{name}.jsonl")
        if name == "rule":
            report = label(url, name, "--output", folder / "labels.jsonl")
            assert report["cost"]["answered"] >= 12
    figures = report["agreement"]["polite"]
    print(
        f"   {name:6s} {report['answers']:3d} answers, {report['bad']['polite']} bad; over "
        f"{figures['Spearman']['n']} rated replies Spearman {figures['Spearman']['value']:+.2f}, "
        f"kappa {figures['kappa']['value']:+.2f}, bias {figures['bias']['value']:+.2f}"
    )
rule_kappa = figures["kappa"]["value"]
assert rule_kappa > 0.7

# The small model gives a rating to everything, and its ratings are worth nothing: look at kappa and Spearman, never at
# the share of valid answers.

# --- 5. Train on the labels that are worth it -------------------------------------------------------------
#
# The file of ratings is like any other: `armorm init`, `armorm train`, or `armorm extend` for a model that exists.

extended = [sys.executable, "-m", "armorm", "extend", "armorm-tiny-rm", "--ratings", folder / "labels.jsonl"]
extended += ["--objective", "polite=1:5", "--output", folder / "model", "--json"]
done = subprocess.run(extended, check=True, stdout=subprocess.PIPE, text=True)
metrics = json.loads(done.stdout)
fitted = metrics["regression"][-1]
print("\n4. A model with the new objective")
print(f"   {fitted['objective']}: {fitted['ratings']} ratings, R2 on held-out folds {fitted['r2']:.2f}")
assert fitted["objective"] == "labels-polite"
print(f"   {folder / 'model'}: armorm score, explain and serve take it as they take any model")
