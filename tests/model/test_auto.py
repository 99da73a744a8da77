"""After `import armorm` the Auto classes of transformers know its models, whichever was imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.small_models import reward_model

LIGHT = """
import sys
import armorm
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "scipy", "pandas"})
assert not heavy, heavy
assert armorm.__version__ and "ArmoRM" in dir(armorm)

def waiting():
    return sum(type(finder).__module__ == "armorm.model.auto" for finder in sys.meta_path)

assert waiting() == 2
armorm.register_with_transformers()
assert waiting() == 2
"""

ARMORM_FIRST = (
    LIGHT
    + """
from transformers import AutoConfig
assert waiting() == 1
assert "transformers.models.auto.modeling_auto" not in sys.modules
assert "armorm.model.modeling" not in sys.modules
assert type(AutoConfig.from_pretrained(folder)).__name__ == "ArmoRMConfig"
"""
)

TRANSFORMERS_FIRST = """
from transformers import AutoConfig, AutoModelForSequenceClassification
import armorm
assert type(AutoConfig.from_pretrained(folder)).__name__ == "ArmoRMConfig"
"""

THE_MODEL = """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(folder)
assert type(model) is armorm.ArmoRMForSequenceClassification, type(model)
with torch.no_grad():
    print(float(model(torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])).logits[0, 0]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, float]:
    """A folder with a model, and its score of some ids."""
    import torch

    rm = reward_model()
    folder = tmp_path_factory.mktemp("saved")
    rm.save_pretrained(folder)
    with torch.no_grad():
        return folder, float(rm.model(torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])).score)


@pytest.mark.parametrize("order", [ARMORM_FIRST, TRANSFORMERS_FIRST], ids=["armorm first", "transformers first"])
def test_auto_classes_load_the_model(saved, order):
    folder, score = saved
    program = f"folder = {str(folder)!r}\n{order}\n{THE_MODEL}"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(score, abs=1e-6)


def test_every_public_name_has_a_home():
    import armorm

    for name in armorm.__all__:
        assert getattr(armorm, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Armorm'"):
        armorm.Armorm  # noqa: B018
