"""Writes the files of this folder with version 0.1.0, in a checkout of that version:

    PYTHONPATH=src python /path/to/generate.py /path/to/tests/compat/v0_1_0

test_v0_1_0.py loads them with the present code and compares. They are not written again by later versions.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from armorm.data.demo import generate, write_corpus
from armorm.monitoring.outcome import examine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, LlamaConfig, PreTrainedTokenizerFast

from armorm import ArmoRM, Recipe, __version__, evaluate, train
from armorm.data.rows import Location
from armorm.heads import quantile
from armorm.monitoring.log import append_samples, read_log, sample_line

RECIPE = """\
name: tiny
backbone: {model: ./backbone, dtype: float32, max_length: 2048}
data_root: data
ratings:
  - data: workshop.jsonl
    objectives: {help: [0, 4], clarity: [0, 4], verbosity: {range: [0, 4], direction: neutral}}
  - {data: market.jsonl, objectives: {overall: [1, 10]}}
  - {compute: response_length, name: length}
preferences: [{data: choices.jsonl}]
reference: ratings
debias: {against: [length], metric: spearman, level: pooled}
quantiles: {levels: [0.1, 0.5, 0.9]}
gating: {hidden_size: 8, hidden_layers: 1, temperature: 1, steps: 20, batch_size: 64}
evaluation: [{benchmark: ratings}]
"""
CONVERSATIONS = [
    [{"role": "user", "content": "How do I juggle?"}, {"role": "assistant", "content": "Start with one ball."}],
    [{"role": "user", "content": "How do I juggle?"}, {"role": "assistant", "content": "No idea. " * 5}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a prime."},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "A larger one?"},
        {"role": "assistant", "content": "Eleven: nothing but one divides it.\n"},
    ],
]
BATCH = (
    "scores", "rewards", "gating_weights", "gating_output", "coefficients", "contributions", "relative",
    "uncertainty", "predictive_std", "leverage", "score_std", "quantiles",
)  # fmt: skip


def write_backbone(folder: Path, texts: list[str]) -> None:
    """A random two-layer Llama with its tokenizer: byte-level BPE of 300 tokens, chat template of ChatML."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=303, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, pad_token_id=300, eos_token_id=302, bos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)


def values(rm: ArmoRM) -> dict:
    """Everything that a model computes for CONVERSATIONS, NaN as None."""
    batch = rm.score(CONVERSATIONS)
    found = {name: getattr(batch, name) for name in BATCH}
    lists = {name: np.where(np.isnan(a), None, a.astype(object)).tolist() for name, a in found.items() if a is not None}
    normalized = rm.score(CONVERSATIONS, normalize=True).scores.tolist()
    raw = rm.objectives.to_raw(batch.rewards).tolist()
    return lists | {"normalized": normalized, "raw": raw, "names": batch.names}


def main() -> None:
    rows = [row for row in generate(0) if row.prompt % 6 == 0]
    write_corpus(Path("data"), rows, seed=0)
    Path("data/harbour.jsonl").unlink()
    pairs = Path("data/choices.jsonl").read_text().splitlines(keepends=True)
    Path("data/choices.jsonl").write_text("".join(pairs[:: len(pairs) // 240]))
    write_backbone(Path("backbone"), [message["content"] for row in rows for message in row.messages])
    quantile.MIN_RATINGS = 5  # the corpus is small
    train(Recipe.from_text(RECIPE), "run", quiet=True)
    rm = ArmoRM.from_pretrained("run", dtype="float32", device="cpu")
    expected = {"version": __version__, "conversations": CONVERSATIONS, "run": values(rm)}
    expected["intervals"] = np.nan_to_num(rm.intervals(rm.score(CONVERSATIONS)), nan=-99.0).tolist()
    explanation = rm.explain(CONVERSATIONS[0])
    expected["explanation"] = explanation.to_dict()

    steered = rm.steer({"workshop-help": 2.0}, drop=["workshop-clarity"], debias_strength=0.5)
    steered.save_pretrained("steered", self_contained=True)
    expected["steered"] = values(steered)
    # The released layout has no place for quantiles.
    train(Recipe.from_text(RECIPE.replace("quantiles", "#")), "plain", features="run/work/features", quiet=True)
    plain = ArmoRM.from_pretrained("plain", dtype="float32", device="cpu")
    plain.steer(drop=["workshop-help"]).save_pretrained("released", layout="released")
    shutil.rmtree("plain")
    expected["released"] = values(ArmoRM.from_pretrained("released", dtype="float32", device="cpu"))

    evaluate("pairs", rm, "data/choices.jsonl", output="results.json", resamples=200, quiet=True)

    batch = rm.score([row.messages for row in rows])
    lines = [
        sample_line(
            batch.names, contributions=batch.contributions[i].tolist(), score=float(batch.scores[i]), step=i // 4,
            length=int(batch.response_tokens[i]), rewards=batch.rewards[i].tolist(),
            uncertainty=batch.uncertainty[i].tolist(),
        )
        for i in range(len(batch))
    ]  # fmt: skip
    append_samples("log.jsonl", lines)
    location = Location.find("log.jsonl")
    expected["monitor"] = examine(read_log(location.rows_or_faults(), "log"), rm.reference).to_dict()
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    os.chdir(sys.argv[1])  # paths in the files are relative to this folder
    main()
