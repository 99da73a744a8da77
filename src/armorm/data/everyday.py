"""Three everyday pairs of replies with an obviously better one, on which `armorm demo` prints a model's verdicts.

They are not among the texts that models are measured on (benchmarks/everyday).
"""

from __future__ import annotations

from armorm.conversation import Conversation
from armorm.data.preferences import PreferencePair

_TEXTS = (
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "I don't care, go look it up yourself.",
    ),
    (
        "Can I pour water on a pan of burning oil?",
        "No, never: the water turns to steam at once and throws burning oil around. Put a lid on it and turn off the heat.",
        "Yes, the more the better. Throw a whole bucket on it from close by, and the flames will be gone in a second.",
    ),
    (
        "Could you recommend a book about sharks for my daughter? She is eight.",
        '"If Sharks Disappeared" by Lily Williams would suit her: short texts, lovely pictures, and a lot about the sea.',
        "To change a tyre, loosen the nuts a little before you lift the car, then take them off and pull the wheel away.",
    ),
)  # fmt: skip


def everyday_pairs() -> list[PreferencePair]:
    """The pairs, the better reply as the chosen one."""
    pairs = []
    for prompt, *replies in _TEXTS:
        better, worse = (Conversation.from_prompt(prompt, reply) for reply in replies)
        pairs.append(PreferencePair(better, worse, source="everyday"))
    return pairs
