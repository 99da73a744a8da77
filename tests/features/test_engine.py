"""The engine: order and shards, how the mechanism is chosen, half the budget when memory runs out, the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.prefix_tree import lexicographic_order, shared_with_previous
from armorm.conversation import Conversation
from armorm.errors import BackboneError
from armorm.features import engine as engines
from armorm.features.engine import Engine, choose_engine, plan_extraction, resumed_engine
from armorm.features.extract import ExtractionSummary, extract, fill_store
from armorm.features.store import FeatureStore
from armorm.features.workers import ExtractionSettings
from armorm.files import EMBEDDED_BACKBONE, embedded_path
from armorm.progress import ignore
from tests.helpers.backbones import backbone_of
from tests.helpers.conversations import chat
from tests.helpers.forward_passes import before_each_pass

DIALOGUES = [
    chat(f"Tell me about number {prompt}.", f"It is {reply}. " * (1 + 3 * reply))
    for prompt in range(4)
    for reply in range(6)
]


def wrapped(family: str = "llama") -> Backbone:
    return Backbone(family, backbone_of(family), AutoTokenizer.from_pretrained(embedded_path(EMBEDDED_BACKBONE)))


def in_order(backbone: Backbone):
    encoded = backbone.template.encode([Conversation.from_messages(messages) for messages in DIALOGUES])
    return [encoded[i] for i in lexicographic_order([e.ids for e in encoded])]


def shared_by(encoded) -> np.ndarray:
    return shared_with_previous([e.ids for e in encoded])


def alone(backbone: Backbone, encoded) -> np.ndarray:
    return np.concatenate([backbone.features([one])[1] for one in encoded])


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool((np.linalg.norm(found - expected, axis=1) <= 1e-5 * np.linalg.norm(expected, axis=1)).all())


def test_work_is_shared_where_that_is_faster_whether_or_not_the_model_is_known(monkeypatch):
    backbone = wrapped()
    encoded = in_order(backbone)
    shared = shared_by(encoded)
    assert choose_engine(backbone, encoded, shared, 512, sharing=False).mechanism == "plain"
    assert choose_engine(backbone, encoded[:1], shared[:1], 512).mechanism == "plain"
    assert choose_engine(backbone, encoded[:2], shared[:2], 512).mechanism == "plain"  # saves a few tokens
    distinct, none = encoded[::6], np.zeros(4, np.int64)
    assert choose_engine(backbone, distinct, none, 512).mechanism == "plain"
    assert backbone.sharing_fault is None  # not tested until now
    assert choose_engine(backbone, encoded, shared, 512).mechanism == "tree"
    assert backbone.sharing_fault == ""
    assert choose_engine(backbone, distinct, none, 512).mechanism == "plain"
    monkeypatch.setitem(engines.LARGE_TOKENS, "cpu", sum(map(len, distinct)))
    assert choose_engine(backbone, distinct, none, 512).mechanism == "tree"  # no padding


def count_tests(monkeypatch) -> list[int]:
    """A list that gets the number of conversations of each test of a backbone."""
    tested: list[int] = []
    test = engines.why_not_shared
    monkeypatch.setattr(engines, "why_not_shared", lambda *given: tested.append(len(given[1])) or test(*given))
    return tested


def test_on_a_processor_passes_are_small_unless_that_cuts_prompts_that_many_rows_share():
    lone, none = np.full(100, 100), np.zeros(100, np.int64)
    assert engines._stream_tokens(lone, none, 8192) == 2048
    assert engines._stream_tokens(lone, none, 1000) == 1000
    # Prompts of 1,000 tokens, and of 3,000, before ten replies of 200 each.
    for prompt, expected in ((1000, 4096), (3000, 8192)):
        lengths = np.full(100, prompt + 200)
        shared = np.where(np.arange(100) % 10, prompt, 0)
        assert engines._stream_tokens(lengths, shared, 8192) == expected
    backbone = Backbone.load("armorm-tiny", dtype="float32", device="cpu")
    rows = in_order(backbone)
    assert choose_engine(backbone, rows, shared_by(rows), 8192, sharing=False).budget == 1024


def test_a_model_is_tested_once_on_a_machine_and_again_if_anything_differs(monkeypatch, tmp_path):
    monkeypatch.setenv("ARMORM_CACHE", str(tmp_path))
    tested = count_tests(monkeypatch)

    def chosen(backbone: Backbone, **options) -> str:
        encoded = in_order(backbone)
        return choose_engine(backbone, encoded, shared_by(encoded), 512, **options).mechanism

    assert [chosen(wrapped()), chosen(wrapped())] == ["tree", "tree"]
    assert len(tested) == 1
    changed = wrapped()
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(1.001)
    other_config = wrapped()
    other_config.model.config.rope_parameters["rope_theta"] = 5000.0
    assert [chosen(changed), chosen(other_config), chosen(wrapped("mistral"))] == ["tree"] * 3
    assert len(tested) == 4
    # A fault is remembered too, until sharing is requested.
    assert [chosen(wrapped("bloom")), chosen(wrapped("bloom")), chosen(wrapped("bloom"), sharing=True)] == ["plain"] * 3
    assert len(tested) == 6
    for path in tmp_path.rglob("*.json"):  # what cannot be read is as good as absent
        path.write_text("{")
    assert chosen(wrapped()) == "tree"
    assert len(tested) == 7


def test_a_test_on_less_than_the_work_offers_is_repeated(monkeypatch, tmp_path):
    monkeypatch.setenv("ARMORM_CACHE", str(tmp_path))
    tested = count_tests(monkeypatch)
    backbone = wrapped()
    encoded = in_order(backbone)
    choose_engine(backbone, encoded[:2], shared_by(encoded[:2]), 512, sharing=True)
    choose_engine(backbone, encoded[:2], shared_by(encoded[:2]), 512, sharing=True)
    assert tested == [2]
    choose_engine(backbone, encoded, shared_by(encoded), 512)
    choose_engine(wrapped(), encoded, shared_by(encoded), 512)
    assert tested[0] == 2 and len(tested) == 2 and tested[1] > 8


def test_a_model_that_cannot_share_runs_on_plain_batches_and_it_is_said(capsys):
    backbone = wrapped("bloom")
    encoded = in_order(backbone)
    engine = choose_engine(backbone, encoded, shared_by(encoded), 512, sharing=True)
    assert engine.mechanism == "plain"
    assert "bloom: prefixes are not shared, batches are plain:" in capsys.readouterr().err
    assert close(engine.features(encoded, ignore)[1], alone(backbone, encoded))
    # A plan that was begun with sharing is not trusted either.
    settings = {"mechanism": "tree", "compiled": False, "budget": 512}
    assert resumed_engine(wrapped("bloom"), settings, encoded).mechanism == "plain"


def small_memory(most: int) -> Callable[[torch.Tensor], None]:
    """A device without memory for a pass of more than `most` tokens, padding included."""

    def act(ids: torch.Tensor) -> None:
        if ids.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    return act


@pytest.mark.parametrize("mechanism", ["tree", "plain"])
def test_out_of_memory_halves_the_budget_and_the_run_goes_on(mechanism, capsys):
    backbone = wrapped()
    encoded = in_order(backbone)
    expected = alone(backbone, encoded)
    engine = Engine(backbone, 512, mechanism)
    done: list[int] = []
    with before_each_pass(backbone.model, small_memory(200)):
        _, response = engine.features(encoded, done.append)
    assert (engine.budget, engine.halvings) == (128, 2)
    assert capsys.readouterr().err.count("with half the budget") == 2
    assert close(response, expected)
    if mechanism == "plain":
        assert sum(done) == sum(map(len, encoded))


def test_a_halved_budget_is_kept_with_the_shard(tmp_path):
    backbone = wrapped()
    store = FeatureStore.of(tmp_path, backbone)
    with before_each_pass(backbone.model, small_memory(256)):
        extract(backbone, in_order(backbone), store, batch_tokens=512)
    assert [shard.metadata for shard in store.shards] == [{"budget": "256", "halvings": "1"}]


def test_a_conversation_that_does_not_fit_alone_is_an_error_that_names_its_length():
    backbone = wrapped()
    encoded = in_order(backbone)
    longest = max(map(len, encoded))
    with (
        before_each_pass(backbone.model, small_memory(0)),
        pytest.raises(BackboneError, match=f"1 conversation of {longest} tokens"),
    ):
        Engine(backbone, 64).features(encoded, ignore)


def test_other_errors_are_not_taken_for_want_of_memory():
    backbone = wrapped()

    def broken(ids: torch.Tensor) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with before_each_pass(backbone.model, broken), pytest.raises(RuntimeError, match="shapes"):
        Engine(backbone, 512).features(in_order(backbone), ignore)


@pytest.mark.parametrize("stored", [False, True])
def test_extraction_by_trees_gives_the_features_of_each_conversation_alone(stored, tmp_path):
    backbone = wrapped()
    encoded = in_order(backbone)
    order = np.random.default_rng(0).permutation(len(encoded))
    given = [encoded[i] for i in order] * 2
    store = FeatureStore.of(tmp_path, backbone) if stored else None
    features = extract(backbone, given, store, batch_tokens=256, sharing=True)
    assert backbone.sharing_fault == ""
    assert close(features.response, alone(backbone, given))
    prompts = np.concatenate([backbone.features([one])[0] for one in given])
    assert close(features.prompt[features.prompt_index], prompts)
    assert len(features.prompt) == 4


@pytest.mark.parametrize("sharing", [False, True])
def test_the_summary_claims_only_what_was_saved(sharing, tmp_path):
    backbone = wrapped()
    encoded = in_order(backbone)
    passed: list[int] = []
    with before_each_pass(backbone.model, lambda ids: passed.append(ids.numel())):
        settings = ExtractionSettings(batch_tokens=512, sharing=sharing)
        summary = fill_store(backbone, encoded, FeatureStore.of(tmp_path, backbone), settings)
    asked = sum(map(len, encoded))
    if sharing:
        assert summary.computed_tokens < 0.8 * asked
        assert f"{summary.saving:.2f} times fewer" in str(summary)
    else:
        assert summary.computed_tokens == asked <= sum(passed)
        assert "fewer" not in str(summary)


# --- order and shards ------------------------------------------------------------------------------


def conversation(*ids: int, gate: int = 1) -> EncodedConversation:
    return EncodedConversation(np.array(ids, np.int32), gate, 1)


def test_summary_are_those_counted_by_hand():
    encoded = [
        conversation(1, 2, 3, 4),
        conversation(1, 2, 3, 5),  # shares three tokens
        conversation(1, 2, 3, 4),  # the same again
        conversation(7, 8, 9),
    ]
    plan = plan_extraction(encoded, [0, 1, 3])
    assert plan.rows.tolist() == [0, 1, 3]
    assert plan.shared.tolist() == [0, 3, 0]
    assert plan.computed("tree", 100).tolist() == [4, 1, 3]
    assert plan.computed("tree", 4).tolist() == [4, 4, 3]  # each in a pass of its own
    assert plan.computed("plain", 100).tolist() == [4, 4, 3]
    summary = ExtractionSummary.of(encoded, plan, 8)
    assert (summary.conversations, summary.unique, summary.stored, summary.prompts) == (4, 3, 0, 2)
    assert (summary.asked_tokens, summary.computed_tokens) == (15, 8)
    assert summary.saving == 15 / 8
    assert str(summary) == (
        "4 conversations (1 identical to another); 2 prompts (shared by 1 more responses); "
        "15 tokens requested; 8 to compute, 1.88 times fewer"
    )
    stored = ExtractionSummary.of(encoded, plan_extraction(encoded, []), 0)
    assert str(stored).endswith("; 15 tokens requested; 0 to compute")


def test_shards_end_between_prompts_unless_one_prompt_alone_would_fill_two(monkeypatch):
    monkeypatch.setattr(engines, "SHARD_TOKENS", 10)
    few = [conversation(prompt, 1, 2, reply) for prompt in range(8) for reply in range(3)]
    plan = plan_extraction(few, range(24))
    first_of = {0, *plan.bounds[:-1]}
    assert len(plan.bounds) > 2
    assert all(start % 3 == 0 for start in first_of)  # every prompt has three replies
    many = [conversation(0, 1, 2, 100 + reply) for reply in range(50)]
    assert len(plan_extraction(many, range(50)).bounds) > 1


def test_the_plan_does_not_depend_on_the_order_in_which_conversations_come():
    rng = np.random.default_rng(0)
    encoded = [conversation(int(rng.integers(3)), 1, *rng.integers(0, 9, 4).tolist(), i) for i in range(50)]
    order = rng.permutation(50)
    first = plan_extraction(encoded, range(50))
    second = plan_extraction([encoded[i] for i in order], range(50))
    assert [encoded[i].key for i in first.rows] == [encoded[order[i]].key for i in second.rows]
    assert first.bounds == second.bounds
