"""The Ray engine: two workers, one of them killed in the middle, and the shards of one process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.errors import BackboneError, StoreError
from armorm.evaluation.scorers import ArmoRMScorer
from armorm.features import engine as engines
from armorm.features.extract import extract, fill_store
from armorm.features.store import FeatureStore
from armorm.features.token_table import TokenTable
from armorm.features.workers import ExtractionSettings
from armorm.reward_model import ArmoRM
from tests.helpers.conversations import chat
from tests.helpers.forward_passes import before_each_pass

pytestmark = pytest.mark.slow
psutil = pytest.importorskip("psutil")

SHARD_TOKENS = 1500
WORDS = ["sun", "rain", "wind", "snow", "fog", "hail", "frost", "heat"]
DIALOGUES = [
    chat(f"Tell me about {WORDS[prompt % 8]} {prompt}.", f"{WORDS[reply]} and more " * (10 + (7 * prompt + reply) % 30))
    for reply in range(4)
    for prompt in range(50)
]


@pytest.fixture(scope="module")
def two_cores():
    """Ray on this machine, with two cores for workers of one thread each, as in this process."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.load("armorm-tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def encoded(backbone) -> list[EncodedConversation]:
    return backbone.template.encode([Conversation.from_messages(dialogue) for dialogue in DIALOGUES])


@pytest.fixture(scope="module")
def source():
    from armorm.features.ray_workers import BackboneSource

    return BackboneSource("armorm-tiny", dtype="float32", device="cpu")


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class Killer(threading.Thread):
    """Kills one of the workers, without a word, as soon as two shards are there."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.seen, self.killed, self.shards_then = folder, set(), 0, 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            workers = [p for p in psutil.Process().children(recursive=True) if _is_worker(p)]
            self.seen |= {p.pid for p in workers}
            done = len(list(self.folder.glob("shard-*")))
            if not self.killed and done >= 2 and len(workers) == 2:
                self.killed, self.shards_then = workers[0].pid, done
                workers[0].kill()
            time.sleep(0.05)


def _is_worker(process) -> bool:
    try:
        return "MapWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_a_worker_killed_in_the_middle_is_replaced_and_the_bytes_are_those_of_one_process(
    two_cores, backbone, encoded, source, tmp_path, monkeypatch
):
    from armorm.features.ray_workers import RayWorkers

    monkeypatch.setattr(engines, "SHARD_TOKENS", SHARD_TOKENS)
    here, there = tmp_path / "here", tmp_path / "there"
    fill_store(backbone, encoded, FeatureStore.of(here, backbone), ExtractionSettings(1024))
    table = TokenTable.write(tmp_path / "tokens", [encoded])
    runner = RayWorkers(source, workers=2)
    store = FeatureStore.of(there, runner)
    killer = Killer(there)
    killer.start()
    figures = fill_store(runner, table, store, ExtractionSettings(1024))
    killer.over.set()
    killer.join()
    expected = shards_of(here)
    assert len(expected) > 8
    assert killer.killed
    assert killer.shards_then < len(expected) - 2  # it had work in hand
    assert len(killer.seen) >= 3  # two, and the one that came instead
    assert shards_of(there) == expected
    assert figures.unique == len(store) == len(encoded)


def test_features_read_through_workers_are_those_of_the_backbone(two_cores, backbone, encoded, source, tmp_path):
    from armorm.features.ray_workers import RayWorkers

    few = encoded[:6]
    store = FeatureStore.of(tmp_path, backbone)
    found = extract(backbone, few, store, workers=RayWorkers(source, workers=1, cpus=1))
    alone = np.concatenate([backbone.features([one])[1] for one in few])
    np.testing.assert_allclose(found.response, alone, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("tokens-*"))  # what was written for the workers is taken away


def test_more_workers_than_there_is_room_for_are_refused_before_anything_is_loaded(two_cores, source):
    from armorm.features.ray_workers import RayWorkers

    with pytest.raises(BackboneError, match="3 workers with 1 CPU each: the cluster has 2"):
        RayWorkers(source, workers=3, cpus=1)
    with pytest.raises(BackboneError, match="1 workers with 1 GPU each: the cluster has 0"):
        RayWorkers(source, workers=1, gpus=1)


def test_a_backbone_that_does_not_load_is_one_clear_line(two_cores, tmp_path):
    from armorm.features.ray_workers import BackboneSource, RayWorkers

    runner = RayWorkers(BackboneSource(str(tmp_path / "nothing")), workers=1, cpus=1)
    with pytest.raises(BackboneError, match="nothing") as caught:
        FeatureStore.of(tmp_path / "store", runner)
    assert "\n" not in str(caught.value)


def test_a_store_of_another_backbone_is_refused(two_cores, backbone, encoded, source, tmp_path):
    from armorm.features.ray_workers import BackboneSource, RayWorkers

    store = FeatureStore.of(tmp_path, backbone)
    runner = RayWorkers(BackboneSource("armorm-tiny", dtype="bfloat16", device="cpu"), workers=1, cpus=1)
    with pytest.raises(StoreError, match="dtype, weights differ"):
        fill_store(runner, encoded[:4], store)


def test_a_shard_that_kills_every_worker_ends_the_run(two_cores, backbone, encoded, source, tmp_path):
    from armorm.features.ray_workers import ATTEMPTS, _Counter, _Worker

    table = TokenTable.write(tmp_path / "tokens", [encoded[:2]])
    counter = two_cores.remote(_Counter).options(num_cpus=0).remote()
    settings = {"mechanism": "plain", "compiled": False, "budget": 512}
    worker = _Worker(source, str(table.folder), str(tmp_path), "float32", settings, counter)
    row = {"number": 3, "name": "shard-a-00003.safetensors", "places": np.arange(2).tobytes(), "owned": b""}
    for _ in range(ATTEMPTS):  # workers that began it and were never heard of again
        two_cores.get(counter.begin.remote(3))
    with pytest.raises(BackboneError, match=f"shard-a-00003.safetensors: {ATTEMPTS} workers died on it"):
        worker(row)
    assert worker(row | {"number": 4, "name": "shard-a-00004.safetensors"})["name"] == "shard-a-00004.safetensors"
    assert (tmp_path / "shard-a-00004.safetensors").exists()


def test_a_recipe_is_trained_on_features_of_workers(two_cores, small_recipe, tmp_path, monkeypatch):
    from armorm import Recipe, train

    monkeypatch.chdir(tmp_path)  # a relative folder of features is found by the workers too
    # (One penalty: with few rows two small ones are so near that rounding of features chooses.)
    text, penalty = small_recipe.to_yaml(), "regression.alphas=[10]"
    settings = ["backbone.engine=ray", "backbone.workers=1", penalty]
    found = train(Recipe.from_text(text, settings), Path("run"), quiet=True)
    asked = [Conversation.from_messages(dialogue) for dialogue in DIALOGUES[:5]]
    expected = train(Recipe.from_text(text, [penalty]), Path("here"), quiet=True).score(asked)
    np.testing.assert_allclose(found.score(asked).rewards, expected.rewards, atol=1e-3)


def test_a_reward_model_scores_and_is_evaluated_on_ray(two_cores, tmp_path):
    """By the workers alone: the decoder of this process is not called."""
    alone, spread = (ArmoRM.from_pretrained("armorm-tiny-rm", device=device) for device in ("cpu", "ray:2"))
    passes = []
    with before_each_pass(spread.backbone.model, passes.append):
        found = spread.score(DIALOGUES)
        stored = ArmoRMScorer(spread, tmp_path / "features").score([Conversation.from_messages(d) for d in DIALOGUES])
    np.testing.assert_allclose(found.scores, alone.score(DIALOGUES).scores, atol=1e-4)
    np.testing.assert_allclose(stored.scores, found.scores, atol=1e-4)
    assert not passes and list((tmp_path / "features").glob("shard-*"))


@pytest.mark.parametrize(("device", "reason"), [("ray:0", "expected ray, or ray:N"), ("ray:9", "9 workers with")])
def test_impossible_workers_are_refused(two_cores, device, reason):
    with pytest.raises(BackboneError, match=reason):
        ArmoRM.from_pretrained("armorm-tiny-rm", device=device)
