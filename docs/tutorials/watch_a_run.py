"""Watch an RL run while it trains, and see a policy that games one objective found by its alarms.

    python docs/tutorials/watch_a_run.py [FOLDER]

The policy is a stand-in that needs no GPU: at every step it answers eight prompts with four responses each, drawn from
a set that the embedded `armorm-tiny-rm` has scored. From step 50 on a single objective's contribution is raised, more
and more, as by a policy that has found out what the head of this objective likes; everything else stays as it was
scored.

The run is written to a log as TRL's reward functions write it (`reward_funcs(rm, log_file=...)`). While it is written,
another thread follows the file, as `armorm monitor run.jsonl --follow` does. In a real run, `MonitorCallback` does the
same inside the trainer:

    rewards = reward_funcs(rm, log_file="run.jsonl")
    GRPOTrainer(..., reward_funcs=rewards, callbacks=[MonitorCallback(rewards)])
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np

from armorm import ArmoRM
from armorm.data.rows import line_rows
from armorm.data.synthetic import generate
from armorm.files import write_text
from armorm.monitoring.live import LogWatch, alarm_line, followed_rows, watch_rows
from armorm.monitoring.log import append_samples, read_log, sample_line
from armorm.monitoring.render import monitor_page
from armorm.monitoring.summary import summarize_run

STEPS, BEGINS, PROMPTS, SAMPLES = 100, 50, 8, 4


def main(folder: Path) -> None:
    """Score, train, watch, and report."""
    rows = sorted((row for row in generate(0) if row.prompt < 40), key=lambda row: row.prompt)
    rm = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu")
    batch = rm.score([row.messages for row in rows])
    prompts = np.array([row.prompt for row in rows])
    gamed = int(batch.contributions.std(0).argmax())
    print(f"scored {len(rows)} responses to {len(set(prompts))} prompts")
    print(f"from step {BEGINS} on the policy is rewarded for {batch.names[gamed]} alone")

    log = folder / "run.jsonl"
    log.unlink(missing_ok=True)
    watch = LogWatch(str(log))
    raised = []

    def follow() -> None:
        for alarm in watch_rows(followed_rows(log, idle_seconds=3.0), watch):
            raised.append(alarm)
            print(f"  {'warning' if alarm.warning else 'notice'}, step {alarm.step:.0f}: {alarm.sentence}")

    follower = threading.Thread(target=follow)
    follower.start()
    generator = np.random.default_rng(0)
    for step in range(STEPS):
        lines = []
        for group, prompt in enumerate(generator.permutation(np.unique(prompts))[:PROMPTS]):
            own = np.flatnonzero(prompts == prompt)
            for _ in range(SAMPLES):
                row = int(generator.choice(own))
                contributions = batch.contributions[row].astype(float)
                if step >= BEGINS:  # the policy learns what the objective's head likes
                    contributions[gamed] += 2.5 * batch.scores.std() * (step - BEGINS) / (STEPS - BEGINS)
                lines.append(
                    sample_line(
                        batch.names,
                        contributions=contributions.tolist(),
                        score=float(contributions.sum()),
                        step=step,
                        group=group,
                        length=int(batch.response_tokens[row]) if batch.response_tokens is not None else None,
                        rewards=batch.rewards[row].tolist(),
                    )
                )
        append_samples(log, lines)
    follower.join()
    print(f"the log is complete: {watch.state}")
    write_text(folder / "alarms.jsonl", "".join(map(alarm_line, raised)))

    outcome = summarize_run(read_log(line_rows(log.read_bytes().splitlines(), str(log)), str(log)))
    print("\nthe finished run, as `armorm monitor run.jsonl` reads it:")
    for flag in outcome.flags:
        print(f"- {outcome.sentence(flag)}")
    write_text(folder / "run.html", monitor_page(outcome))
    print(f"charts: {folder / 'run.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/watch"))
