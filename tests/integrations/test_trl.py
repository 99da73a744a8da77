"""TRL trainers take a reward model by its folder, as an object or as our functions, and log its scores (`make test-integrations`)."""

from __future__ import annotations

import asyncio
import math
import pickle
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from armorm import ArmoRM
from armorm.integrations.trl import reward_funcs
from tests.helpers.backbones import save_backbone
from tests.helpers.servers import served
from tests.helpers.small_models import reward_model

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


def dataset() -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS])


def arguments(method: str, folder: Path, **settings):
    return getattr(trl, f"{method}Config")(
        output_dir=str(folder / "run"),
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
        **settings,
    )


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_the_rewards_that_a_trainer_logs_are_the_scores(rm, policy, tmp_path, method):
    copied = shutil.copytree(rm.name, tmp_path / "object")
    by_object = ArmoRM.from_pretrained(copied, dtype="float32", device="cpu").model
    scored_rows = []

    def scored(prompts, completions, **_):
        conversations = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scored_rows.extend(conversations)
        return rm.score(conversations).scores.tolist()

    trainer = getattr(trl, f"{method}Trainer")(
        model=str(policy),
        reward_funcs=[rm.name, by_object, scored],
        args=arguments(method, tmp_path),
        train_dataset=dataset(),
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


@pytest.mark.parametrize("objectives", [None, ["code-style", "ultra-helpful"]])
@pytest.mark.parametrize("where", ["here", "server", "awaited"])
def test_grpo_trains_on_our_reward_functions_and_logs_the_models_own_scores(rm, policy, tmp_path, where, objectives):
    generated = []

    def kept(prompts, completions, **_):
        generated.append([prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
        return [0.0] * len(prompts)

    with ExitStack() as stack:
        source = rm
        if where != "here":
            source = stack.enter_context(served(rm)).url
        functions = reward_funcs(source, objectives, asynchronous=where == "awaited")
        functions = functions if objectives else [functions]
        trainer = trl.GRPOTrainer(
            model=str(policy),
            reward_funcs=[*functions, kept],
            args=arguments("GRPO", tmp_path, multi_objective_aggregation="normalize_then_sum" if objectives else "sum_then_normalize"),
            train_dataset=dataset(),
            processing_class=AutoTokenizer.from_pretrained(policy),
        )  # fmt: skip
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        trainer.train()

    names = objectives or ["armorm"]
    assert trainer.reward_func_names == [*names, "kept"]
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == len(generated) == 2
    for log, conversations in zip(logs, generated, strict=True):
        expected = rm.score(conversations)
        values = {"armorm": expected.scores} | dict(zip(expected.names, expected.rewards.T, strict=True))
        for name in names:
            assert values[name].std() > 1e-3, "rewards should differ for the comparison to mean something"
            assert log[f"rewards/{name}/mean"] == pytest.approx(float(values[name].mean()), abs=1e-4)
            assert log[f"rewards/{name}/std"] == pytest.approx(float(values[name].std(ddof=1)), abs=1e-4)
        assert log["armorm/score"] == pytest.approx(float(expected.scores.mean()), abs=1e-4)
        for name in expected.names:
            assert log[f"armorm/{name}"] == pytest.approx(float(values[name].mean()), abs=1e-4)
        contributions = [log[f"armorm/contribution/{name}"] for name in expected.names]
        assert contributions == pytest.approx(expected.contributions.mean(0).tolist(), abs=1e-4)
        assert log["armorm/unscored"] == 0.0
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(value.cpu(), after[name].cpu()) for name, value in before.items())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_child_of_async_grpo_scores_groups_with_functions_that_were_pickled_to_it(rm, monkeypatch, asynchronous):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    worker = pytest.importorskip("trl.experimental.async_grpo.async_rollout_worker")
    names = ["code-style", "ultra-helpful"]
    asked = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]
    replies = [[{"role": "assistant", "content": text}] for text in ("The Rhine.", "Because.")]
    replies.append([asked, {"role": "tool", "name": "f", "content": "17"}])
    sequence = worker.TrainingSequence.__new__(worker.TrainingSequence)
    sequence.input_ids, sequence.completion_mask, sequence.old_log_probs = [1, 2], [0, 1], [0.0, -1.0]

    def group(number):
        rows = 3 * [[sequence]]
        return worker.RolloutGroup(
            prompts, {"label": ["x"] * 3}, replies, [[2]] * 3, rows, [0] * 3, [0] * 3, 0, number, [None] * 3, [None] * 3
        )

    async def scored(loop):
        return await asyncio.gather(*(loop._score_group(group(number)) for number in range(3)))

    with served(rm) as server:
        functions = pickle.loads(pickle.dumps(reward_funcs(server.url, names, asynchronous=asynchronous)))  # noqa: S301
        loop = worker._AsyncRolloutLoop.__new__(worker._AsyncRolloutLoop)
        loop.reward_funcs, loop._env_reward_types = functions, []
        loop.reward_func_names = [worker.get_callable_name(function) for function in functions]
        groups = asyncio.run(scored(loop))
    assert loop.reward_func_names == names
    expected = rm.score([prompt + reply for prompt, reply in zip(prompts[:2], replies[:2], strict=True)])
    for samples in groups:
        assert len(samples) == 3
        for sample, row in zip(samples, expected.rewards, strict=False):
            assert sample.metrics["rewards/code-style"] == pytest.approx(float(row[2]), abs=1e-4)
            assert sample.metrics["rewards/ultra-helpful"] == pytest.approx(float(row[0]), abs=1e-4)
        assert math.isnan(samples[2].metrics["reward"])
        assert samples[2].advantage == 0.0
