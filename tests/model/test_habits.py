"""What people do with any Hugging Face model works on this one: loading options, pipelines, trainers, casts, padding."""

from __future__ import annotations

import contextlib
import copy
import io
import logging

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import mse_loss
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, pipeline

from armorm import ArmoRM
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.objectives import RELEASED_OBJECTIVES
from tests.helpers.backbones import backbone_of
from tests.helpers.conversations import chat
from tests.helpers.small_models import changed, reward_model, tokenizer

CONVERSATIONS = [
    chat("What is the capital of France?", "Paris, on the river Seine."),
    chat("Hi!", "Hello."),
    chat("Name a prime.", "Seven.", "And one that is larger, with a reason?", "Eleven: nothing but one divides it."),
    chat("Tell me about rivers.", "They flow. " * 12),
    [{"role": "system", "content": "Be brief."}, *chat("How do planes fly?", "Their wings push air down.")],
]
PAD, BOS, END, MARK = 0, 1, 2, 5  # the embedded tokenizer's pad, BOS, eos (which ends turns), and `<|assistant|>`


@pytest.fixture(scope="module")
def rm() -> ArmoRM:
    return reward_model()


@pytest.fixture(scope="module")
def scores(rm) -> torch.Tensor:
    """What every way of calling the model must give."""
    scores = torch.from_numpy(rm.score(CONVERSATIONS).scores)
    assert scores.std() > 0.1, "scores should differ for the comparisons below to mean something"
    return scores


@pytest.fixture(scope="module")
def folder(rm, tmp_path_factory):
    path = tmp_path_factory.mktemp("rm")
    rm.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts(rm) -> list[str]:
    return rm.tokenizer.apply_chat_template(CONVERSATIONS, tokenize=False)


def batch_of(texts, *, side: str = "right", tokens=None, **options):
    tokens = tokens or tokenizer()
    options = {"padding": True, "add_special_tokens": False, **options}
    return tokens(texts, padding_side=side, return_tensors="pt", **options)


def assert_scores(found, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(torch.as_tensor(found).detach(), expected, atol=tolerance, rtol=0)


def head_tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.")}


def assert_heads_kept(model, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in head_tensors(model).items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor.cpu(), expected[name]), name


# --- from_pretrained -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, "bfloat16", "auto"])
def test_the_dtype_is_that_of_the_backbone(folder, rm, option, dtype):
    model = AutoModelForSequenceClassification.from_pretrained(folder, **{option: dtype})
    expected = {"auto": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, dtype)
    assert {parameter.dtype for parameter in model.model.parameters()} == {expected}
    assert_heads_kept(model, head_tensors(rm.model))


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_is_taken(folder, texts, scores, place):
    pytest.importorskip("accelerate")
    model = AutoModelForSequenceClassification.from_pretrained(folder, device_map=place, dtype=torch.float32)
    assert model.device.type == ("cuda" if place == "auto" and torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        assert_scores(model(**batch_of(texts).to(model.device)).score.cpu(), scores)
    read = ArmoRM.from_pretrained(folder, device_map=place, dtype="float32")
    assert_scores(read.score(CONVERSATIONS).scores, scores)


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # it knows modules only
def test_layers_and_heads_may_lie_on_disk(folder, texts, scores, tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    places |= {
        "model.rotary_emb": "cpu",
        "regression_layer": "disk",
        "gating": "disk",
        "reward_transform_matrix": "cpu",
    }
    model = AutoModelForSequenceClassification.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert model.regression_layer.weight.is_meta
    with torch.no_grad():
        assert_scores(model(**batch_of(texts)).score, scores)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_that_of_the_backbone(folder, texts, scores, attention):
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=attention)
    assert model.model.config._attn_implementation == model.config._attn_implementation == attention
    with torch.no_grad():
        assert_scores(model(**batch_of(texts)).score, scores)
    assert (
        ArmoRM.from_pretrained(folder, attn_implementation=attention).model.model.config._attn_implementation
        == attention
    )
    other = {"eager": "sdpa", "sdpa": "eager"}[attention]
    model.set_attn_implementation(other)
    assert model.model.config._attn_implementation == other


def test_assembling_leaves_the_attention_of_the_backbone_as_it_is():
    backbone = backbone_of("llama")
    backbone.set_attn_implementation("eager")
    rm = reward_model(backbone=backbone)
    assert backbone.config._attn_implementation == rm.model.model.config._attn_implementation == "eager"


def test_a_quantisation_reaches_transformers_own_checks(folder):
    with pytest.raises(ValueError, match="nonsense"):
        AutoModelForSequenceClassification.from_pretrained(folder, quantization_config={"quant_method": "nonsense"})


def test_loading_and_saving_again_changes_nothing(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert isinstance(model, ArmoRMForSequenceClassification)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)  # as trainers ask for one score
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


# --- the published usage example -----------------------------------------------------------------

# As published but for the path and the device. (Where `apply_chat_template` returns a mapping, as transformers 5 has
# it, the model takes that.)
EXAMPLE = """
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
device = "cpu"
path = PATH
model = AutoModelForSequenceClassification.from_pretrained(path, device_map=device,
                               trust_remote_code=True, torch_dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True)
# We load a random sample from the validation set of the HelpSteer dataset
prompt = 'What are some synonyms for the word "beautiful"?'
response = "Nicely, Beautifully, Handsome, Stunning, Wonderful, Gorgeous, Pretty, Stunning, Elegant"
messages = [{"role": "user", "content": prompt},
           {"role": "assistant", "content": response}]
input_ids = tokenizer.apply_chat_template(messages, return_tensors="pt").to(device)
with torch.no_grad():
   output = model(input_ids)
   # Multi-objective rewards for the response
   multi_obj_rewards = output.rewards.cpu().float()
   # The gating layer's output is conditioned on the prompt
   gating_output = output.gating_output.cpu().float()
   # The preference score for the response, aggregated from the
   # multi-objective rewards with the gating layer
   preference_score = output.score.cpu().float()
# We apply a transformation matrix to the multi-objective rewards
# before multiplying with the gating layer's output. This mainly aims
# at reducing the verbosity bias of the original reward objectives
obj_transform = model.reward_transform_matrix.data.cpu().float()
# The final coefficients assigned to each reward objective
multi_obj_coeffs = gating_output @ obj_transform.T
# The preference score is the linear combination of the multi-objective rewards with
# the multi-objective coefficients, which can be verified by the following assertion
assert torch.isclose(torch.sum(multi_obj_rewards * multi_obj_coeffs, dim=1), preference_score, atol=1e-3)
# Find the top-K reward objectives with coefficients of the highest magnitude
K = 3
top_obj_dims = torch.argsort(torch.abs(multi_obj_coeffs), dim=1, descending=True,)[:, :K]
top_obj_coeffs = torch.gather(multi_obj_coeffs, dim=1, index=top_obj_dims)

# The attributes of the 19 reward objectives
attributes = ['helpsteer-helpfulness','helpsteer-correctness','helpsteer-coherence',
   'helpsteer-complexity','helpsteer-verbosity','ultrafeedback-overall_score',
   'ultrafeedback-instruction_following', 'ultrafeedback-truthfulness',
   'ultrafeedback-honesty','ultrafeedback-helpfulness','beavertails-is_safe',
   'prometheus-score','argilla-overall_quality','argilla-judge_lm','code-complexity',
   'code-style','code-explanation','code-instruction-following','code-readability']

example_index = 0
for i in range(K):
   attribute = attributes[top_obj_dims[example_index, i].item()]
   coeff = top_obj_coeffs[example_index, i].item()
   print(f"{attribute}: {round(coeff,5)}")

# The actual rewards of this example from the HelpSteer dataset
# are [3,3,4,2,2] for the five helpsteer objectives:
# helpfulness, correctness, coherence, complexity, verbosity
# We can linearly transform our predicted rewards to the
# original reward space to compare with the ground truth
helpsteer_rewards_pred = multi_obj_rewards[0, :5] * 5 - 0.5
print(helpsteer_rewards_pred)
"""


def test_the_published_example_runs_as_it_stands(tmp_path):
    reward_model(objectives=RELEASED_OBJECTIVES, dtype=torch.bfloat16).save_pretrained(tmp_path)
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(EXAMPLE.replace("PATH", repr(str(tmp_path))), names)
    batch = ArmoRM.from_pretrained(tmp_path, dtype="bfloat16", device="cpu").score([names["messages"]])
    assert names["attributes"] == batch.names
    assert_scores(names["preference_score"], torch.from_numpy(batch.scores), 1e-2)
    largest = np.argsort(-np.abs(batch.coefficients[0]))[:3]
    lines = printed.getvalue().splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [batch.names[i] for i in largest]
    coefficients = [float(line.split(": ")[1]) for line in lines[:3]]
    np.testing.assert_allclose(coefficients, batch.coefficients[0][largest], atol=1e-3)
    np.testing.assert_allclose(
        names["helpsteer_rewards_pred"], RELEASED_OBJECTIVES.to_raw(batch.rewards)[0, :5], atol=5e-2
    )


# --- what `model(...)` takes ---------------------------------------------------------------------


@torch.no_grad()
def test_what_a_tokenizer_returns_may_be_passed_whole(rm, texts, scores):
    batch = batch_of(texts)
    assert_scores(rm.model(batch).score, scores)
    assert_scores(rm.model(dict(batch)).score, scores)
    assert_scores(rm.model({"input_ids": batch.input_ids}, attention_mask=batch.attention_mask).score, scores)
    rendered = rm.tokenizer.apply_chat_template(CONVERSATIONS, return_tensors="pt", padding=True, return_dict=True)
    assert_scores(rm.model(rendered).score, scores)
    alone = rm.tokenizer.apply_chat_template(CONVERSATIONS[:1], return_tensors="pt", return_dict=False)
    assert isinstance(alone, torch.Tensor)
    assert_scores(rm.model(alone).score, scores[:1])


def test_what_is_given_twice_is_refused(rm, texts):
    batch = batch_of(texts)
    with pytest.raises(ValueError, match=r"^attention_mask: given in the mapping and as an argument, expected once$"):
        rm.model(batch, attention_mask=batch.attention_mask)


@torch.no_grad()
def test_a_plain_tuple_is_given_on_request(rm, texts, scores):
    output = rm.model(**batch_of(texts), return_dict=False)
    assert isinstance(output, tuple)
    assert_scores(output[0][:, 0], scores)


@torch.no_grad()
def test_a_mask_of_another_shape_is_refused(rm, texts):
    batch = batch_of(texts)
    with pytest.raises(ValueError, match=r"attention_mask \(5, 3\), expected the shape of ids"):
        rm.model(batch.input_ids, attention_mask=batch.attention_mask[:, :3])


@torch.no_grad()
def test_labels_give_a_loss(rm, texts, scores):
    batch, labels = batch_of(texts), torch.arange(5)
    for shaped in (labels, labels[:, None].double()):
        output = rm.model(**batch, labels=shaped)
        torch.testing.assert_close(output.loss, mse_loss(scores, labels.float()), atol=1e-4, rtol=0)
        assert output[0] is output.loss
    assert rm.model(**batch).loss is None


@torch.no_grad()
def test_token_types_mean_nothing(texts):
    rm = reward_model(backbone=backbone_of("gpt2"))  # which would add an embedding for each
    batch = batch_of(texts)
    assert_scores(
        rm.model(**batch, token_type_ids=torch.ones_like(batch.input_ids)).score,
        torch.from_numpy(rm.score(CONVERSATIONS).scores),
    )


# --- pipelines -----------------------------------------------------------------------------------


def test_the_pipeline_gives_the_score(folder, texts, scores, caplog):
    with caplog.at_level(logging.WARNING):
        pipe = pipeline("text-classification", model=str(folder), device="cpu", dtype=torch.float32)
    assert "not supported" not in caplog.text
    assert scores.max() > 1 or scores.min() < 0, "a sigmoid should be seen"
    for options in ({}, {"batch_size": 2, "padding": True}, {"batch_size": 5, "truncation": True, "max_length": 512}):
        results = pipe(texts, **options)
        assert_scores([result["score"] for result in results], scores)
    assert pipe(texts[0])[0]["score"] == pytest.approx(float(scores[0]), abs=1e-5)


def test_the_pipeline_takes_objects(rm, texts, scores):
    tokens = copy.deepcopy(rm.tokenizer)
    for tokens.padding_side in ("left", "right"):
        pipe = pipeline("text-classification", model=rm.model, tokenizer=tokens, device="cpu")
        assert_scores([result["score"] for result in pipe(texts, batch_size=3)], scores)


def test_a_second_bos_that_tokenizing_rendered_text_adds_is_not_counted(rm, texts, scores):
    """Rendered text begins with BOS; a tokenizer that adds one, as Llama-3's does, then writes two of them unless
    `add_special_tokens=False` is passed. Either way the score is that of the conversation."""
    tokens = copy.deepcopy(rm.tokenizer)
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    assert tokens(texts[0]).input_ids[:2] == [BOS, BOS]
    pipe = pipeline("text-classification", model=rm.model, tokenizer=tokens, device="cpu")
    for options in ({}, {"add_special_tokens": False}):
        assert_scores([result["score"] for result in pipe(texts, batch_size=2, **options)], scores)
    for side in ("left", "right"):
        batch = batch_of(texts, tokens=tokens, side=side, add_special_tokens=True)
        with torch.no_grad():
            assert_scores(rm.model(**batch).score, scores)
            gates = (batch.input_ids == END) & (batch.input_ids.roll(-1, 1) == MARK)
            last = torch.where(gates, torch.arange(gates.shape[1]), -1).amax(1)
            assert_scores(rm.model(**batch, gate_positions=last).score, scores)
            assert_scores(rm.model(batch.input_ids).score, scores)
    assert_scores(ArmoRM(rm.model, tokens).score(CONVERSATIONS).scores, scores)


def test_the_call_of_rewardbench_gives_the_score(folder, texts, scores):
    """As its runner builds and calls a pipeline, the attributes it sets included."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    tokens = AutoTokenizer.from_pretrained(folder)
    pipe = pipeline("text-classification", model=model, tokenizer=tokens)
    tokens.pad_token = tokens.pad_token or tokens.eos_token
    pipe.tokenizer.pad_token_id, pipe.model.config.pad_token_id = tokens.pad_token_id, tokens.pad_token_id
    pipe.model, pipe.tokenizer = model.eval(), tokens
    options = {"batch_size": 2, "truncation": True, "padding": True, "max_length": 512, "return_token_type_ids": False}
    results = pipe(texts, function_to_apply="none", **options)
    assert_scores([result["score"] for result in results], scores)


# --- trainers ------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_reward_trainer_reads_the_score(rm, texts, scores):
    """As TRL does: right padding, no special tokens added, the first column of the logits."""
    logits = rm.model(**batch_of(texts)).logits
    assert logits.shape == (5, 1)
    assert_scores(logits[:, 0], scores)


@pytest.mark.parametrize("labelled", [False, True])
def test_a_trainer_predicts_scores_in_order(rm, texts, scores, tmp_path, labelled):
    pytest.importorskip("accelerate")
    rows = [dict(rm.tokenizer(text, add_special_tokens=False)) for text in texts]
    if labelled:
        rows = [{**row, "labels": float(i)} for i, row in enumerate(rows)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model=rm.model, args=arguments, processing_class=rm.tokenizer)
    prediction = trainer.predict(rows)
    assert prediction.predictions.shape == (5, 1)
    assert_scores(prediction.predictions[:, 0], scores)
    everything = trainer.predict(rows, ignore_keys=[]).predictions
    assert [part.shape for part in everything] == [(5, 1), (5, 4), (5, 4), (5,), (5, 32), (5, 32)]
    if labelled:
        expected = float(mse_loss(scores, torch.arange(5.0)))
        assert prediction.metrics["test_loss"] == pytest.approx(expected, abs=1e-4)
        assert prediction.label_ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_scores(rm, texts, scores):
    model = torch.compile(rm.model)
    with torch.no_grad():
        for size in (5, 2):
            assert_scores(model(**batch_of(texts[:size])).score, scores[:size])


# --- dtypes and devices --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cast", "dtype", "tolerance"),
    [
        (lambda model: model.half(), torch.float16, 0.02),
        (lambda model: model.bfloat16(), torch.bfloat16, 0.2),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16, 0.2),
        (lambda model: model.to("cpu", torch.float16), torch.float16, 0.02),
        (lambda model: model.bfloat16().float(), torch.float32, 0.2),
        (lambda model: model.double(), torch.float64, 1e-5),
    ],
)
def test_casts_leave_the_heads_as_they_are(texts, scores, cast, dtype, tolerance):
    model = reward_model().model
    heads = copy.deepcopy(head_tensors(model))
    assert cast(model) is model
    assert {parameter.dtype for parameter in model.model.parameters()} == {dtype}
    assert_heads_kept(model, heads)
    with torch.no_grad():
        output = model(**batch_of(texts))
    assert output.score.dtype == torch.float32
    assert_scores(output.score, scores, tolerance)


def test_a_model_built_in_half_precision_has_float32_heads(rm, texts):
    model = AutoModelForSequenceClassification.from_config(rm.model.config, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in head_tensors(model).values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model.eval()(**batch_of(texts)).score.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_moves_to_the_gpu_and_back(folder, rm, texts, scores):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to("cuda")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        assert_scores(model(**batch_of(texts).to("cuda")).score.cpu(), scores, 1e-3)
        assert_scores(model.half()(**batch_of(texts).to("cuda")).score.cpu(), scores, 0.05)
    assert_heads_kept(model, head_tensors(rm.model))
    read = ArmoRM.from_pretrained(folder, device="cuda", dtype="float32")
    assert_scores(read.score(CONVERSATIONS).scores, scores, 1e-3)
    assert {tensor.device.type for tensor in model.to("cpu").state_dict().values()} == {"cpu"}


# --- gradients -----------------------------------------------------------------------------------


def gradients(model, texts) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch_of(texts)).score.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_loss_on_the_score_reaches_every_parameter_with_and_without_checkpointing(texts):
    model = reward_model(intercept=True).model.train()
    plain = gradients(model, texts)
    parts = (
        "model.embed_tokens.",
        "model.layers.0.",
        "regression_layer.bias",
        "gating.layers.0.",
        "gating.logit_scale",
    )
    assert all(any(name.startswith(part) for name in plain) for part in parts)
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.model.modules())
    for name, gradient in gradients(model, texts).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4, msg=name)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_parameters_that_are_frozen_get_no_gradient(texts):
    model = reward_model().model.train()
    model.model.requires_grad_(False)
    model(**batch_of(texts)).score.sum().backward()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert model.regression_layer.weight.grad.abs().sum() > 0


# --- padding -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("positions", ["given", "counted", "absent"])
@pytest.mark.parametrize("pad", [PAD, END, BOS, 100, 8191])
@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_side_nor_id_nor_positions_of_padding_matter_under_a_mask(rm, texts, scores, side, pad, positions):
    batch = batch_of(texts, side=side)
    mask = batch.attention_mask
    ids = torch.where(mask.bool(), batch.input_ids, pad)
    places = {
        "given": torch.arange(ids.shape[1])[None],  # counted from the first column, padding or not
        "counted": (mask.cumsum(1) - 1).clamp_min(0),
        "absent": None,
    }[positions]
    rm = changed(rm, pad_token_id=pad)
    assert_scores(rm.model(ids, attention_mask=mask, position_ids=places).score, scores)


@torch.no_grad()
def test_a_pad_id_that_the_model_does_not_know_is_never_looked_up(rm, texts, scores):
    batch = batch_of(texts)
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, 8192)
    assert_scores(rm.model(ids, attention_mask=batch.attention_mask).score, scores)
    assert_scores(changed(rm, pad_token_id=8192).model(ids).score, scores)


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_pad_id_inside_a_text_is_text(rm, side, masked):
    texts = rm.tokenizer.apply_chat_template(CONVERSATIONS[:2], tokenize=False)
    rows = [rm.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    for row in rows:
        row[-2] = PAD
    alone = torch.cat([rm.model(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).score for row in rows])
    padded = rm.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
    assert_scores(rm.model(padded.input_ids, attention_mask=padded.attention_mask if masked else None).score, alone)
    plain = torch.cat([rm.model(**batch_of([text])).score for text in texts])
    assert (alone - plain).abs().min() > 1e-3


@torch.no_grad()
def test_tokens_that_are_masked_inside_a_row_are_not_there(rm, texts):
    ids = torch.tensor([rm.tokenizer(texts[0], add_special_tokens=False).input_ids])
    expected = rm.model(ids).score
    holed = torch.cat([ids[:, :3], torch.full((1, 4), 77), ids[:, 3:]], 1)
    mask = torch.ones_like(holed)
    mask[:, 3:7] = 0
    assert_scores(rm.model(holed, attention_mask=mask).score, expected)


@torch.no_grad()
def test_a_gate_in_the_padding_is_refused(rm, texts):
    batch = batch_of(texts[:2], side="left")
    with pytest.raises(ValueError, match=r"rows \[1\] have their gate at \[0\], expected a real token"):
        rm.model(**batch, gate_positions=torch.tensor([9, 0]))
    with pytest.raises(ValueError, match=r"rows \[0, 1\] have their gate at \[-1, 500\]"):
        rm.model(**batch, gate_positions=torch.tensor([-1, 500]))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("pad", "eos"), [(END, END), (END, [7, END]), (END, None), (BOS, END), (9, [9, END])], ids=str)
def test_ends_that_may_be_padding_or_text_are_refused_without_a_mask(rm, texts, scores, side, pad, eos):
    """(END, None): what ends turns is known from the gate pattern."""
    batch = batch_of(texts, side=side)
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, pad)
    rm = changed(rm, pad_token_id=pad)
    rm.model.config.backbone_config.eos_token_id = eos
    with pytest.raises(ValueError, match=rf"begin or end with id {pad}, .* cannot be inferred; pass attention_mask"):
        rm.model(ids)
    assert_scores(rm.model(ids, attention_mask=batch.attention_mask).score, scores)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_pad_id_an_end_that_stands_twice_is_refused(rm, texts, scores, side):
    batch = batch_of(texts, side=side)
    rm = changed(rm, pad_token_id=None)
    with pytest.raises(
        ValueError, match=r"rows \[0, 1, .*\] begin or end with an id that ends turns, twice.*pass attention"
    ):
        rm.model(torch.where(batch.attention_mask.bool(), batch.input_ids, END))
    one = batch_of(texts[:1])
    assert_scores(rm.model(one.input_ids).score, scores[:1])


@torch.no_grad()
def test_a_pad_id_that_ends_no_text_needs_no_mask(rm, texts, scores):
    batch = batch_of(texts)
    assert_scores(rm.model(batch.input_ids).score, scores)
    rm = changed(rm, pad_token_id=100)
    assert_scores(rm.model(torch.where(batch.attention_mask.bool(), batch.input_ids, 100)).score, scores)
