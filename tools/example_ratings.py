"""`docs/examples/ratings.csv`: what a team's own ratings look like, for the tutorial.

In:  the texts of the demo and what they were put together from (`armorm.data.synthetic`).
Out: a CSV with a question, an answer, three ratings as a form would ask for them, and who rated. One rating in
     ten is missing.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from armorm.data.synthetic import generate
from armorm.files import write_text

PLACE = Path(__file__).parents[1] / "docs" / "examples" / "ratings.csv"
EVERY = 6  # prompts of the demo


def table() -> str:
    """The text of the CSV."""
    rng = np.random.default_rng(0)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["question", "answer", "helpful", "clear", "harm", "rater"])
    for row in generate(0):
        if row.prompt % EVERY:
            continue
        quality = row.qualities
        noisy = np.clip([quality["help"] + 0.1 * rng.normal(), quality["clarity"] + 0.1 * rng.normal()], 0, 1)
        ratings = [str(round(1 + 4 * value)) for value in noisy] + [str(int(quality["care"] < 0.5))]
        kept = ["" if rng.uniform() < 0.1 else rating for rating in ratings]
        writer.writerow([row.messages[0]["content"], row.messages[1]["content"], *kept, f"rater {rng.integers(1, 4)}"])
    return out.getvalue()


if __name__ == "__main__":
    write_text(PLACE, table())
    print(f"wrote {PLACE}")
