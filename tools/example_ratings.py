"""Writes `docs/examples/ratings.csv`, an example of a team's own ratings for the tutorial.

Texts and qualities come from the generated corpus (`armorm.data.synthetic`). Each row has a question, an answer, three
ratings on the scales of a form, and the rater; one rating in ten is missing.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from armorm.data.synthetic import generate
from armorm.files import write_text

PLACE = Path(__file__).parents[1] / "docs" / "examples" / "ratings.csv"
EVERY = 6  # every sixth prompt of the corpus is used


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
