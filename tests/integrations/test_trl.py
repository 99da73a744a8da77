"""TRL trainers take a reward model by its folder or as an object, and log its scores (`make test-integrations`)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from armorm import ArmoRM
from tests.backbones_for_tests import save_backbone
from tests.small_models import reward_model

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

PROMPTS = ["Name a river.", "Why is the sky blue?", "Hi!", "Tell me about primes, and about those between 10 and 20."]


@pytest.fixture(scope="module")
def rm(tmp_path_factory) -> ArmoRM:
    """A reward model from a folder, which is where TRL finds the tokenizer of a model object."""
    folder = tmp_path_factory.mktemp("reward")
    reward_model().save_pretrained(folder)
    return ArmoRM.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("policy"), seed=1)


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_the_rewards_that_a_trainer_logs_are_the_scores(rm, policy, tmp_path, method):
    copied = shutil.copytree(rm.name, tmp_path / "object")
    by_object = ArmoRM.from_pretrained(copied, dtype="float32", device="cpu").model
    scored_rows = []

    def scored(prompts, completions, **_):
        conversations = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scored_rows.extend(conversations)
        return rm.score(conversations).scores.tolist()

    arguments = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        generation_kwargs={"min_new_tokens": 8},  # a reply that is empty has no score
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = getattr(trl, f"{method}Trainer")(
        model=str(policy),
        reward_funcs=[rm.name, by_object, scored],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.train()

    assert len(scored_rows) == 8
    logs = [log for log in trainer.state.log_history if "rewards/scored/mean" in log]
    assert len(logs) == 2
    assert trainer.reward_func_names == [Path(rm.name).name, "object", "scored"]
    for log in logs:
        assert log["rewards/scored/std"] > 0.01, "rewards should differ for the comparison to mean something"
        for figure in ("mean", "std"):
            expected = pytest.approx(log[f"rewards/scored/{figure}"], abs=1e-5)
            for name in trainer.reward_func_names[:2]:
                assert log[f"rewards/{name}/{figure}"] == expected
