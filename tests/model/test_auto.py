"""After `import armorm` the Auto classes of transformers know its models, whichever was imported first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.small_models import reward_model

ARMORM_FIRST = """
import armorm
assert armorm.__version__ and "ArmoRM" in dir(armorm)

def waiting():
    return sum(type(finder).__module__ == "armorm.model.auto" for finder in sys.meta_path)

assert waiting() == 2
armorm.register_with_transformers()
assert waiting() == 2
from transformers import AutoConfig
assert waiting() == 1
assert "transformers.models.auto.modeling_auto" not in sys.modules
assert "armorm.model.modeling" not in sys.modules
assert type(AutoConfig.from_pretrained(folder)).__name__ == "ArmoRMConfig"
"""

TRANSFORMERS_FIRST = """
from transformers import AutoConfig, AutoModelForSequenceClassification
import armorm
assert type(AutoConfig.from_pretrained(folder)).__name__ == "ArmoRMConfig"
"""

# What is the same for every order, torch, is imported once; each order then goes on in a process forked from this one.
PROGRAM = """
import os, sys
import torch
folder, *orders = sys.argv[1:]
for order in orders:
    if os.fork() == 0:
        exec(order)
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(model) is armorm.ArmoRMForSequenceClassification, type(model)
        with torch.no_grad():
            print(float(model(torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])).logits[0, 0]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, order
"""


def output_of(program: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_each_auto_module_is_waited_for_and_the_config_is_known_without_the_model(tmp_path):
    reward_model().model.config.save_pretrained(tmp_path)
    output_of(f"import sys\nfolder = sys.argv[1]\n{ARMORM_FIRST}", str(tmp_path))


@pytest.mark.slow
def test_auto_classes_load_the_model_whichever_is_imported_first(tmp_path):
    ids = torch.tensor([[1, 4, 60, 61, 2, 5, 70, 71, 2]])
    rm = reward_model()
    rm.save_pretrained(tmp_path)
    with torch.no_grad():
        score = float(rm.model(ids).score)
    found = output_of(PROGRAM, str(tmp_path), ARMORM_FIRST, TRANSFORMERS_FIRST)
    assert [float(line) for line in found.split()] == pytest.approx([score, score], abs=1e-6)


def test_every_public_name_has_a_home():
    import armorm

    for name in armorm.__all__:
        assert getattr(armorm, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Armorm'"):
        armorm.Armorm  # noqa: B018
