"""A GRPO run is watched while it trains: alarms, TRL's metrics, TensorBoard, and the table of completions rescored afterwards."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from armorm import ArmoRM
from armorm.data.rows import line_rows
from armorm.integrations.rewards import IntegrationError
from armorm.integrations.trl import reward_funcs
from armorm.monitoring.log import read_log
from tests.helpers.backbones import save_backbone
from tests.helpers.commands import exit_code, run
from tests.helpers.small_models import reward_model

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

PROMPTS = ["Name a river.", "Why is the sky blue?", "Hi!", "Tell me about primes, and about those between 10 and 20."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("reward")
    reward_model().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def watched(folder, tmp_path_factory):
    """A run whose policy gives every sample of a prompt the same reply, stopped by its callback."""
    from armorm.integrations.trl_callback import MonitorCallback

    place = tmp_path_factory.mktemp("run")
    policy = save_backbone(tmp_path_factory.mktemp("policy"), seed=1)
    rm = ArmoRM.from_pretrained(folder, dtype="float32", device="cpu")
    rewards = reward_funcs(rm, log_file=place / "run.jsonl")
    raised = []
    callback = MonitorCallback(rewards, on_alarm=raised.append, stop=True, reference_steps=5)
    trainer = trl.GRPOTrainer(
        model=str(policy),
        reward_funcs=rewards,
        args=trl.GRPOConfig(
            output_dir=str(place / "out"),
            max_steps=30,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            temperature=1e-5,
            generation_kwargs={"min_new_tokens": 8},
            beta=0.05,
            logging_steps=1,
            save_strategy="no",
            report_to="tensorboard",
            log_completions=True,
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(policy),
        callbacks=[callback],
    )
    trainer.train()
    return place, trainer, callback, raised


def test_samples_that_all_score_alike_raise_an_alarm_that_ends_the_run(watched):
    _, trainer, callback, raised = watched
    assert [alarm.kind for alarm in raised if alarm.warning] == ["alike"]
    assert "have samples that all score alike" in raised[-1].sentence
    assert callback.alarms == raised
    assert 5 < trainer.state.global_step < 30


def test_the_log_has_every_sample_and_the_trainers_own_measures_of_each_step(watched):
    place, trainer, _, _ = watched
    log = read_log(line_rows((place / "run.jsonl").read_bytes().splitlines(), "run"), "run")
    steps = trainer.state.global_step
    assert log.steps.tolist() == np.repeat(np.arange(steps), 4).tolist()
    logged = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert [step for step, _ in log.metrics] == [entry["step"] - 1 for entry in logged]
    assert [metrics["entropy"] for _, metrics in log.metrics] == [entry["entropy"] for entry in logged]
    assert [metrics["kl"] for _, metrics in log.metrics] == [entry["kl"] for entry in logged]


def test_trackers_get_how_near_each_alarm_is(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place, trainer, _, _ = watched
    near = [entry["armorm/alarm/alike"] for entry in trainer.state.log_history if "armorm/alarm/alike" in entry]
    assert near == sorted(near)
    assert near[-1] > 0.5
    (events,) = (place / "out").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    assert [event.value for event in board.Scalars("train/armorm/alarm/alike")] == pytest.approx(near, rel=1e-5)
    assert "train/armorm/warnings" in board.Tags()["scalars"]


def test_the_completions_that_trl_writes_are_rescored_to_the_same_run(watched, folder, capsys):
    place, trainer, _, _ = watched
    tables = sorted((place / "out" / "completions").glob("*.parquet"))
    assert len(tables) == trainer.state.global_step
    code = exit_code(
        "monitor", place / "out" / "completions", "--model", folder, "--dtype", "float32", "--follow", "--idle", 1,
        "--reference-steps", 5, "--json",
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [alarm["kind"] for alarm in found if alarm["warning"]] == ["alike"]
    assert f"{4 * len(tables)} samples" in captured.err
    code, _, err = run(capsys, "monitor", place / "out" / "completions")
    assert code == 1
    assert "expected an object, as written by score --details" in err


def test_reward_functions_without_a_log_file_are_refused(folder):
    from armorm.integrations.trl_callback import MonitorCallback

    with pytest.raises(IntegrationError, match="log_file"):
        MonitorCallback(reward_funcs(str(folder)))
