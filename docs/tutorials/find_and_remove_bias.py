"""Find a verbosity bias in a reward model and remove it by steering.

A corpus with known qualities is generated: each response has an amount of help, clarity and care, and some filler. Then
a bias is planted: the preferences that train the gate favour the longer response, and debiasing is off. Unbiased pairs,
on prompts that training never saw, are labelled by quality alone.

    python docs/tutorials/find_and_remove_bias.py [FOLDER]

The report names the objectives that mostly measure length. Some of them carry other information too, so the number of
objectives to drop, strongest first, is selected on some of the unbiased pairs, and the steered model is evaluated on
the others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from armorm import ArmoRM, Recipe, evaluate, train
from armorm.data.synthetic import RECIPE, DemoRow, generate, utility, write_corpus
from armorm.evaluation.steering_preview import preview
from armorm.evaluation.tables import preview_tables
from armorm.features.store import dtype_for
from armorm.files import write_json, write_text
from armorm.report.page import MOSTLY_LENGTH, report

LENGTH_PREFERENCE = 5.0  # compared with 4 for the quality that the prompt asks for, and 1 for the other
PAIRS = 10  # per prompt
SETTINGS = ["name=biased", "debias=null", "gating.steps=300", "evaluation=[]"]


def main(folder: Path) -> dict[str, Any]:
    """Plant the bias, train, report, steer, evaluate."""
    rows = [row for row in generate(0) if row.test or row.prompt % 2 == 0]
    write_corpus(folder / "data", rows, seed=0)
    training, trial, honest = (folder / "data" / f"{name}.jsonl" for name in ("choices", "trial", "honest"))
    held_out = list(dict.fromkeys(row.prompt for row in rows if row.test))
    tried_on = set(held_out[::3])
    taken = write_pairs(training, [row for row in rows if not row.test], LENGTH_PREFERENCE)
    write_pairs(trial, [row for row in rows if row.prompt in tried_on], None)
    fair = write_pairs(honest, [row for row in rows if row.test and row.prompt not in tried_on], None)
    print(f"planted: the longer response is chosen in {taken:.1%} of the training pairs, in {fair:.1%} of the unbiased")

    recipe = Recipe.from_text(RECIPE.replace("runs/demo/data", str(folder / "data")), SETTINGS)
    rm = train(recipe, folder / "biased", quiet=True)
    store = folder / "biased" / "work" / "features"

    data = [folder / "data" / f"{name}.jsonl" for name in ("workshop", "harbour", "market", "trial")]
    page, found = report(rm, data, run=folder / "biased", features=store)
    write_text(folder / "report.html", page)
    print(f"\nthe report ({folder / 'report.html'}) warns:")
    for notice in found["notices"]:
        print(f"- {notice['title']}. {notice['text']}")

    lines = [line for line in found["verbosity"]["lines"] if not line["is_score"]]
    suspects = [line["name"] for line in lines if abs(line["pooled"]["before"]) >= MOSTLY_LENGTH]
    print("\ntried on the trial pairs:")
    tried = {}
    for count in range(1, len(suspects) + 1):
        seen = preview(rm, rm.steer(drop=suspects[:count]), trial, features=store)
        tried[count] = seen.accuracy["all"]["after"]
        print(f"- without {', '.join(suspects[:count])}: {seen.accuracy['all']['before']:.1%} to {tried[count]:.1%}")
    policy = {"drop": suspects[: max(tried, key=lambda count: tried[count])]}
    steered = rm.steer(**policy)
    print(f"\nbest: drop {', '.join(policy['drop'])}; effect on the unbiased pairs:\n")
    Console(width=80, highlight=False).print(preview_tables(preview(rm, steered, honest, features=store)))

    steered.save_pretrained(folder / "steered")
    reloaded = ArmoRM.from_pretrained(folder / "steered", dtype=dtype_for(store))  # as its features
    figures: dict[str, Any] = {}
    for name, model in (("as trained", rm), ("steered", reloaded)):
        results = evaluate("pairs", model, honest, features=store, quiet=True)
        accuracy = results.level("overall")["accuracy"]
        audit = results.audits["length"]["views"]["as served"]
        figures[name] = {"accuracy": accuracy.value, "prompts": accuracy.prompts, **audit}
    print(f"\non the unbiased pairs, of {figures['steered']['prompts']} prompts, which are too few for an interval:")
    for name, entry in figures.items():
        print(
            f"{name:>12}: {entry['accuracy']:.1%} correct, {entry['more_is_worse']:.1%} where the longer one is worse; "
            f"score and length correlate {entry['correlation']:+.2f}"
        )
    figures["dropped"] = policy["drop"]
    write_json(folder / "figures.json", {"planted": taken, "honest": fair, "tried": tried, "figures": figures})
    return figures


def write_pairs(path: Path, rows: list[DemoRow], length_preference: float | None) -> float:
    """Write pairs labelled by utility plus a noisy preference for length, or by utility alone if it is None.

    Returns:
        share of pairs whose chosen response is the longer one.
    """
    rng = np.random.default_rng(1)
    by_prompt: dict[int, list[DemoRow]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    lines, longer = [], []
    for group in by_prompt.values():
        couples = [(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
        for index in rng.permutation(len(couples))[:PAIRS]:
            one, other = couples[index]
            gain = utility(one) - utility(other)
            if length_preference is not None:
                gain += length_preference * (one.qualities["length"] - other.qualities["length"])
                gain += rng.logistic()
            if gain == 0 or one.messages == other.messages:
                continue
            chosen, rejected = (one, other) if gain > 0 else (other, one)
            sides = {"chosen": chosen.messages[-1:], "rejected": rejected.messages[-1:]}
            subset = "risky" if chosen.risky else "harmless"
            lines.append(json.dumps({"prompt": chosen.messages[:-1], **sides, "subset": subset}))
            sizes = [len(side.messages[-1]["content"]) for side in (chosen, rejected)]
            if sizes[0] != sizes[1]:
                longer.append(sizes[0] > sizes[1])
    write_text(path, "\n".join(lines) + "\n")
    return float(np.mean(longer))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bias"))
