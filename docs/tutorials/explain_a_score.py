"""Explain a score: from one number to the objectives behind it.

    python docs/tutorials/explain_a_score.py

A reward model usually returns one number. This tutorial decomposes it, with the embedded model and offline.
"""

import numpy as np

from armorm import ArmoRM

# --- 1. A score in context --------------------------------------------------------------------------------
#
# A conversation is a list of messages that ends with the reply. The score has no unit; it becomes meaningful relative
# to the reference data, whose statistics are stored in the model's config.

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
# Each objective has a reward (a predicted rating, scaled to 0 for the worst and 1 for the best); the prompt determines
# its weight, and the product is its contribution. The contributions sum to the score.

print("\n2. Contributions sum to the score")
print(f"   sum {batch.contributions[0].sum():+.6f}, score {batch.scores[0]:+.6f}")
assert np.allclose(batch.contributions.sum(1), batch.scores, atol=1e-5)

# --- 3. Arguments for and against -------------------------------------------------------------------------
#
# Most of a contribution is the same for every response: an objective of weight .3 adds about .3 x its usual reward.
# More informative is the difference from a response with average rewards, `relative`: a bar to the right is in favour
# of this response. `explain` prints these, largest first.

print("\n3. The explanation of the rude reply")
print(rm.explain(rude))

# --- 4. Why one is better than the other ------------------------------------------------------------------
#
# Both replies answer the same prompt, so the gate weights them alike, and the margin is again a sum over objectives.

margin = batch.contributions[0] - batch.contributions[1]
print(f"4. kind - rude = {margin.sum():+.3f}, of which")
for i in np.argsort(-np.abs(margin))[:4]:
    print(f"   {batch.names[i]:28s} {margin[i]:+.3f}   weight on this prompt {batch.gating_weights[0, i]:.1%}")

# --- 5. Another prompt, other weights ---------------------------------------------------------------------
#
# The gate reads only the prompt, so an arithmetic question gets other weights than one about stains.

sums = [{"role": "user", "content": "What is 17 * 23?"}, {"role": "assistant", "content": "17 * 23 = 391."}]
other = rm.score([sums])
print("\n5. The three objectives with the largest weights")
for name, scored in (("wine stain", batch), ("arithmetic", other)):
    heaviest = np.argsort(-scored.gating_weights[0])[:3]
    print(f"   {name}: " + ", ".join(f"{scored.names[i]} {scored.gating_weights[0, i]:.0%}" for i in heaviest))
assert not np.allclose(batch.gating_weights[0], other.gating_weights[0], atol=1e-3)
