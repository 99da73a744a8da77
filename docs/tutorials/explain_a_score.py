"""Explain a score: from one number to the objectives behind it.

    python docs/tutorials/explain_a_score.py

A reward model usually gives one number. This page takes one apart, on the model inside the package, offline.
"""

import numpy as np

from armorm import ArmoRM

# --- 1. A score, and where it stands ----------------------------------------------------------------------
#
# A conversation is a list of messages that ends with the reply. The score itself has no unit; what it says becomes
# clear beside the reference data, conversations that the model's config keeps the figures of.

rm = ArmoRM.from_pretrained("armorm-tiny-rm", dtype="float32", device="cpu")
prompt = {"role": "user", "content": "How do I get a wine stain out of a cotton shirt?"}
kind = [prompt, {"role": "assistant", "content": "Dab it with cold water and a little dish soap, then wash as usual."}]
rude = [prompt, {"role": "assistant", "content": "Who cares? Throw it away, stupid."}]

batch = rm.score([kind, rude])
normalised = rm.score([kind, rude], normalize=True)
print("1. Scores")
for name, score, deviations in zip(("kind", "rude"), batch.scores, normalised.scores, strict=True):
    print(f"   {name}: {score:+.3f}, {deviations:+.2f} standard deviations from the reference mean")

# --- 2. The score is a sum --------------------------------------------------------------------------------
#
# Each objective has a reward (what its raters would say, 0 the worst and 1 the best), the prompt decides its weight,
# and the product is its contribution. Contributions sum to the score: nothing else is in it.

print("\n2. Contributions sum to the score")
print(f"   sum {batch.contributions[0].sum():+.6f}, score {batch.scores[0]:+.6f}")
assert np.allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)

# --- 3. What speaks for it, what against ------------------------------------------------------------------
#
# Most of a contribution is the same for every response: an objective of weight .3 adds about .3 x its usual reward.
# What a person wants to see is the difference to a response of average rewards, `relative`: a bar to the right
# speaks for this response. `explain` prints it, largest first.

print("\n3. The explanation of the rude reply")
print(rm.explain(rude))

# --- 4. Why one is better than the other ------------------------------------------------------------------
#
# Both replies answer the same prompt, so the gate weighs them alike, and the margin is again a sum over objectives.

margin = batch.contributions[0] - batch.contributions[1]
print(f"4. kind - rude = {margin.sum():+.3f}, of which")
for i in np.argsort(-np.abs(margin))[:4]:
    print(f"   {batch.names[i]:28s} {margin[i]:+.3f}   weight on this prompt {batch.gating_weights[0, i]:.1%}")

# --- 5. Another prompt, other weights ---------------------------------------------------------------------
#
# The gate reads the prompt alone. A question of arithmetic is weighed otherwise than one about stains.

sums = [{"role": "user", "content": "What is 17 * 23?"}, {"role": "assistant", "content": "17 * 23 = 391."}]
other = rm.score([sums])
print("\n5. The three heaviest objectives")
for name, scored in (("wine stain", batch), ("arithmetic", other)):
    heaviest = np.argsort(-scored.gating_weights[0])[:3]
    print(f"   {name}: " + ", ".join(f"{scored.names[i]} {scored.gating_weights[0, i]:.0%}" for i in heaviest))
assert not np.allclose(batch.gating_weights[0], other.gating_weights[0], atol=1e-3)
