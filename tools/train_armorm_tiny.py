"""Train armorm-tiny, the embedded backbone: a small Llama with its own tokenizer and chat template.

Reads the corpus of `tools/tiny_corpus.py` and writes a Hugging Face model folder (bfloat16 safetensors, tokenizer,
config, training record).

7.5M parameters (hidden 320, 5 layers, vocabulary 8,192, tied embeddings) keep the weights under 16 MB. Each sequence is
one conversation or one piece of a page, as in feature extraction: no packing across texts, but batches of equal length
(padding under 2%). Matrices are optimised by Muon, embeddings and norms by AdamW; the learning rate is constant, then
falls linearly, while the share of conversations rises to one. Loss and gradient are computed in chunks, so that the
(tokens, vocabulary) logits are never materialised.

    python tools/tiny_corpus.py
    python tools/train_armorm_tiny.py --output runs/tiny/armorm-tiny
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from armorm.backbone.decoder import fast_bfloat16

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('role ' ~ message.role ~ ' is not one of system, user, assistant, tool') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message.role ~ '|>' ~ ((message.content or '') | trim) -}}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{- '\\n' ~ ((call.function or call) | tojson) -}}"
    "{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Words with a leading space, single digits, runs of punctuation, runs of white space (code indentation).
PIECES = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
KINDS = ("chat", "docs", "chat_held_out", "docs_held_out")
CONTEXT = 1024
DOC_PIECE = 512


def read_lines(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def train_tokenizer(corpus: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on all conversations and a fifth of the documentation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        for row in read_lines(corpus / "chat.jsonl"):
            # A prompt has many responses; counting it for every row would fill the vocabulary with it.
            yield row["messages"][-1]["content"]
            if row["held_out"] or hash_share(row["messages"][-1]["content"]) < 0.2:
                yield from (message["content"] for message in row["messages"][:-1])
        for index, row in enumerate(read_lines(corpus / "docs.jsonl")):
            if index % 5 == 0:
                yield row["text"]

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def hash_share(text: str) -> float:
    return (sum(text.encode()) % 1009) / 1009


def read_sequences(path: Path) -> list[np.ndarray]:
    with np.load(path) as arrays:
        return np.split(arrays["ids"], arrays["ends"][:-1])


def encode_corpus(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[np.ndarray]]:
    """Token ids by kind: chat, docs and their held-out parts."""
    sequences: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    rows = list(read_lines(corpus / "chat.jsonl"))
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for row, ids in zip(rows, encoded, strict=True):
        sequences["chat_held_out" if row["held_out"] else "chat"].append(np.array(ids[:CONTEXT], np.uint16))
    bos = tokenizer.bos_token_id
    for row in read_lines(corpus / "docs.jsonl"):
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), DOC_PIECE - 1):
            piece = np.array([bos, *ids[start : start + DOC_PIECE - 1]], np.uint16)
            if len(piece) > 32:
                sequences["docs_held_out" if row["held_out"] else "docs"].append(piece)
    return sequences


class Batches:
    """Batches of similar length up to a token budget, from chat with a given probability."""

    def __init__(self, chat: list[np.ndarray], docs: list[np.ndarray], budget: int, seed: int) -> None:
        self.pools = {"chat": chat, "docs": docs}
        self.budget = budget
        self.rng = np.random.default_rng(seed)
        self.ready: dict[str, list[list[int]]] = {"chat": [], "docs": []}

    def _refill(self, kind: str) -> None:
        pool = self.pools[kind]
        lengths = np.array([len(ids) for ids in pool])
        order = np.argsort(lengths + self.rng.uniform(0, 8, len(pool)), kind="stable")
        batches: list[list[int]] = []
        current: list[int] = []
        for index in order:
            if current and lengths[index] * (len(current) + 1) > self.budget:
                batches.append(current)
                current = []
            current.append(int(index))
        batches.append(current)
        self.rng.shuffle(batches)
        self.ready[kind] = batches

    def next(self, chat_share: float) -> list[np.ndarray]:
        kind = "chat" if self.rng.uniform() < chat_share else "docs"
        if not self.ready[kind]:
            self._refill(kind)
        return [self.pools[kind][index] for index in self.ready[kind].pop()]


def padded(batch: list[np.ndarray], pad_id: int, budget: int = 0, multiple: int = 16) -> torch.Tensor:
    """Ids (rows, width), right-padded; with empty rows up to the budget, so that few shapes occur.

    Matrix kernels are generated for each new shape, which costs as much as a step, so there is one shape per width.
    """
    width = -(-max(len(ids) for ids in batch) // multiple) * multiple
    ids = torch.full((max(len(batch), budget // width), width), pad_id, dtype=torch.long)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return ids


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of next-token losses, computed chunk by chunk so that the logits stay in the cache; padding does not count."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, pad_id, chunk):
        total = torch.zeros((), device=hidden.device)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros(weight.shape, device=weight.device)
        for start in range(0, len(hidden), chunk):
            piece, target = hidden[start : start + chunk], targets[start : start + chunk]
            log_probabilities = (piece @ weight.T).float().log_softmax(dim=1)
            real = (target != pad_id).float()
            total -= (log_probabilities.gather(1, target[:, None])[:, 0] * real).sum()
            gradient = log_probabilities.exp_()
            gradient[torch.arange(len(target), device=target.device), target] -= 1
            gradient *= real[:, None]
            gradient = gradient.to(weight.dtype)
            hidden_gradient[start : start + chunk] = gradient @ weight
            weight_gradient += (gradient.T @ piece).float()
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return upstream * hidden_gradient.float(), upstream * weight_gradient, None, None, None


def loss_sum(
    model: LlamaForCausalLM, backbone, ids: torch.Tensor, pad_id: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """Summed next-token loss of a padded batch (nats), and the number of targets; matrix products in `dtype`."""
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        hidden = backbone(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    weight, targets = model.lm_head.weight.to(dtype), ids[:, 1:].flatten()
    loss = ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1).to(dtype), weight, targets, pad_id, 512 if ids.device.type == "cpu" else 8192
    )
    return loss, int((targets != pad_id).sum())


@torch.no_grad()
def bits_per_byte(model, backbone, tokenizer, sequences: list[np.ndarray], budget: int, dtype: torch.dtype) -> float:
    """Held-out bits per byte of text (template tokens count as predictions, not as bytes)."""
    nats, size = 0.0, 0
    batches = Batches(sequences, [], budget, seed=0)
    batches._refill("chat")
    for indices in batches.ready["chat"]:
        batch = [sequences[index] for index in indices]
        ids = padded(batch, tokenizer.pad_token_id, budget).to(model.device)
        nats += float(loss_sum(model, backbone, ids, tokenizer.pad_token_id, dtype)[0])
        size += sum(
            len(text.encode()) for text in tokenizer.batch_decode([list(s) for s in batch], skip_special_tokens=True)
        )
    return nats / math.log(2) / size


def build_model(vocab_size: int, arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 64,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is replaced by its nearest orthogonal one (Newton-Schulz), as `torch.optim.Muon`.

    The library version iterates in bfloat16, which is five times slower than float32 on processors without bfloat16
    units, and one matrix at a time; here the dtype can be chosen, and matrices of one shape are batched.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]  # no closure is ever given
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for parameter in group["params"]:
                shapes.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    assert parameter.grad is not None
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                stacked = torch.stack(updates)
                stacked = stacked / stacked.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
                stacked = (stacked.mT if rows > columns else stacked).to(self.dtype)
                for _ in range(5):
                    gram = stacked @ stacked.mT
                    stacked = 3.4445 * stacked + (-4.7750 * gram + 2.0315 * gram @ gram) @ stacked
                stacked = (stacked.mT if rows > columns else stacked).float()
                scale = 0.2 * max(rows, columns) ** 0.5  # the root mean square of an AdamW update
                for parameter, update in zip(parameters, stacked, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)


def optimizers(model: LlamaForCausalLM, rate: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=rate, dtype=dtype),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    work: Path = arguments.output.parent / (arguments.output.name + "-state")
    work.mkdir(parents=True, exist_ok=True)
    if (work / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    else:
        tokenizer = train_tokenizer(arguments.corpus, arguments.vocab)
        tokenizer.save_pretrained(work)
    sequences = {kind: read_sequences(work / f"{kind}.npz") for kind in KINDS if (work / f"{kind}.npz").exists()}
    if len(sequences) < len(KINDS):
        sequences = encode_corpus(arguments.corpus, tokenizer)
        for kind, pool in sequences.items():
            np.savez_compressed(
                work / f"{kind}.npz", ids=np.concatenate(pool), ends=np.cumsum([len(ids) for ids in pool])
            )
    counts = {kind: sum(len(ids) for ids in pool) for kind, pool in sequences.items()}
    print("tokens:", {kind: f"{count:,}" for kind, count in counts.items()}, flush=True)

    device = torch.device(arguments.device)
    model = build_model(len(tokenizer), arguments).to(device)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    fast = device.type == "cuda" or fast_bfloat16()
    dtype = torch.bfloat16 if (fast if arguments.bfloat16 is None else arguments.bfloat16) else torch.float32
    steppers = optimizers(model, arguments.rate, dtype)
    batches = Batches(sequences["chat"], sequences["docs"], arguments.batch, arguments.seed)
    done, step, average = 0, 0, None
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)  # noqa: TID251
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
        done, step, batches.ready = state["done"], state["step"], state["ready"]
        batches.rng.bit_generator.state = state["rng"]
        print(f"resumed at {done:,} tokens", flush=True)
    backbone = torch.compile(model.model, dynamic=True) if arguments.compile else model.model
    start, start_done = time.time(), done
    while done < arguments.tokens:
        progress = done / arguments.tokens
        factor = min(1.0, (step + 1) / 100, (1 - progress) / arguments.decay)
        # The share of conversations rises from its starting value to one over the second half.
        share = arguments.chat_share + (1 - arguments.chat_share) * max(0.0, 2 * progress - 1)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = arguments.rate * factor
        ids = padded(batches.next(share), tokenizer.pad_token_id, arguments.batch).to(device)
        loss, targets = loss_sum(model, backbone, ids, tokenizer.pad_token_id, dtype)
        (loss / targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        value = float(loss.detach()) / targets
        average = value if average is None else 0.98 * average + 0.02 * value
        done, step = done + targets, step + 1
        if step % 20 == 0:
            speed = (done - start_done) / (time.time() - start)
            left = (arguments.tokens - done) / speed / 60
            print(
                f"step {step:5} {done / 1e6:7.2f}M tokens loss {average:.3f} {speed:,.0f} tok/s {left:.0f} min left",
                flush=True,
            )
        if step % 200 == 0:
            torch.save(
                {"model": model.state_dict(), "steppers": [s.state_dict() for s in steppers], "done": done,
                 "step": step, "rng": batches.rng.bit_generator.state, "ready": batches.ready},
                work / "checkpoint.tmp",
            )  # fmt: skip
            (work / "checkpoint.tmp").replace(checkpoint)
        if step % arguments.measure_every == 0 or done >= arguments.tokens:
            held = {kind: bits_per_byte(model, backbone, tokenizer, sequences[kind], arguments.batch, dtype)
                    for kind in ("chat_held_out", "docs_held_out")}  # fmt: skip
            print(
                f"  held-out bits per byte: chat {held['chat_held_out']:.4f}, docs {held['docs_held_out']:.4f}",
                flush=True,
            )
    model.cpu().to(torch.bfloat16).model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    facts = {"tokens_seen": done, "steps": step, "corpus_tokens": counts, "bits_per_byte": held,
             "hours": (time.time() - start) / 3600, "arguments": {k: str(v) for k, v in vars(arguments).items()}}  # fmt: skip
    (arguments.output / "training.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=Path("runs/tiny/corpus"))
    parser.add_argument("--output", type=Path, default=Path("runs/tiny/armorm-tiny"))
    parser.add_argument("--tokens", type=int, default=18_000_000)
    parser.add_argument("--batch", type=int, default=8192, help="tokens per step")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the run over which the rate falls")
    parser.add_argument("--chat-share", type=float, default=0.6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--intermediate", type=int, default=704)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-every", type=int, default=500)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="matrix products in bfloat16, weights in float32; by default if the device has fast bfloat16",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (--no-compile starts a minute sooner)")
    train(parser.parse_args())
