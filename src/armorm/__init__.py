"""armorm: interpretable reward models that can be read, steered and debugged.

    from armorm import ArmoRM, Recipe, train

    rm = ArmoRM.from_pretrained("armorm-small-rm")
    print(rm.explain([{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]))

Names are imported when first used, so that `import armorm` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from armorm.model.auto import register_with_transformers
from armorm.moved import explain_moved_modules
from armorm.version import __version__

if TYPE_CHECKING:
    from armorm.conversation import Conversation, Message
    from armorm.errors import ArmormError
    from armorm.evaluation.runner import evaluate
    from armorm.explain.explanation import Explanation
    from armorm.model.configuration import ArmoRMConfig
    from armorm.model.modeling import ArmoRMForSequenceClassification
    from armorm.objectives import Objective, ObjectiveSet
    from armorm.reward_model import ArmoRM
    from armorm.score_batch import ScoreBatch
    from armorm.training.pipeline import train
    from armorm.training.recipe import Recipe


_HOMES = {
    "ArmoRM": "armorm.reward_model",
    "ArmoRMConfig": "armorm.model.configuration",
    "ArmoRMForSequenceClassification": "armorm.model.modeling",
    "ArmormError": "armorm.errors",
    "Conversation": "armorm.conversation",
    "Explanation": "armorm.explain.explanation",
    "Message": "armorm.conversation",
    "Objective": "armorm.objectives",
    "ObjectiveSet": "armorm.objectives",
    "Recipe": "armorm.training.recipe",
    "ScoreBatch": "armorm.score_batch",
    "evaluate": "armorm.evaluation.runner",
    "train": "armorm.training.pipeline",
}

__all__ = [
    "ArmoRM",
    "ArmoRMConfig",
    "ArmoRMForSequenceClassification",
    "ArmormError",
    "Conversation",
    "Explanation",
    "Message",
    "Objective",
    "ObjectiveSet",
    "Recipe",
    "ScoreBatch",
    "__version__",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'armorm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register_with_transformers()
explain_moved_modules()
