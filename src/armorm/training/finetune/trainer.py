"""Fine-tuning of a decoder with linear heads: model, losses, datasets, and training with the transformers Trainer.

Checkpoints hold only trained weights: adapters and heads, or the layers that are not frozen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from armorm.backbone.adapters import add_adapters
from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.lower_layers import layer_list, skip_lower_layers
from armorm.files import output_errors
from armorm.progress import ignore, progress
from armorm.training.finetune.collator import WIDTH_STEP, PromptTree, model_inputs, tree_batches, tree_tensors
from armorm.training.finetune.processes import Processes
from armorm.training.finetune.state_cache import StateCache
from armorm.training.finetune.validation import BestState
from armorm.training.schema import FinetuneSection

KEPT_CHECKPOINTS = 2
Validate = Callable[["Learner"], dict[str, float]]
SCORE_RATE = 10  # learning rate of the score head over that of rewards: logits span about ten times the range 0 to 1


class Learner(torch.nn.Module):
    """A decoder with a linear reward per objective, and a linear score for pairs, on the response feature.

    Args:
        backbone: cut at the layer that is read; LoRA adapters are added to its model here.
        objective_weights: (k,) weights of the squared errors.
        frozen: number of first layers that are not trained.
        states_given: whether the states of the frozen layers are inputs (`states`), instead of computed.
    """

    objective_weights: torch.Tensor
    accepts_loss_kwargs = False  # the Trainer then averages over the batches of a step

    def __init__(
        self,
        backbone: Backbone,
        section: FinetuneSection,
        objective_weights: np.ndarray,
        frozen: int = 0,
        states_given: bool = False,
    ) -> None:
        super().__init__()
        self.section, self.readout = section, backbone.readout
        self.head_rate = section.head_learning_rate  # set by `start_from`
        self.seen_tokens = 0  # that were trained on, padding excluded
        model = backbone.model
        trained = layer_list(model)[frozen:]
        if frozen or section.method == "lora":
            model.requires_grad_(section.method == "full")
            model.get_input_embeddings().requires_grad_(False)
            layer_list(model)[:frozen].requires_grad_(False)
        self.entry = skip_lower_layers(model, frozen) if states_given else None
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if section.method == "lora":
            add_adapters(trained, section.lora_rank, section.lora_alpha, section.lora_dropout)
        self.decoder = model
        with torch.device(backbone.device):
            self.rewards = torch.nn.Linear(backbone.response_size, len(objective_weights), bias=False)
            self.score = torch.nn.Linear(backbone.response_size, 1, bias=False)
        self.rewards.weight.data.zero_()
        self.score.weight.data.zero_()
        self.register_buffer("objective_weights", torch.from_numpy(objective_weights).float(), persistent=False)

    @torch.no_grad()
    def start_from(self, weight: np.ndarray, score: np.ndarray, feature_norm: float) -> None:
        """Initialise the reward weights (k, d) and those of the score (d,); `feature_norm` is the mean L1 norm of
        features."""
        self.rewards.weight.copy_(torch.from_numpy(weight))
        self.score.weight[0].copy_(torch.from_numpy(score))
        self.head_rate = self.section.head_learning_rate / feature_norm

    def features(
        self,
        inputs: dict[str, torch.Tensor],
        leaf_rows: torch.Tensor,
        leaf_columns: torch.Tensor,
        span_places: torch.Tensor,
        span_leaves: torch.Tensor,
        states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Response features (l, d) float32 of a batch (`TreeTensors`), as the readout says."""
        if self.entry is not None:
            self.entry.states = states
        hidden = self.decoder(**model_inputs(inputs, self.decoder), use_cache=False).last_hidden_state
        last = hidden[leaf_rows, leaf_columns].float()
        mean = None
        if self.readout.pooling != "last":
            sums = torch.zeros_like(last).index_add(0, span_leaves, hidden.flatten(0, 1)[span_places].float())
            mean = sums / torch.bincount(span_leaves, minlength=len(last))[:, None]
        return self.readout.response(last, mean)

    def forward(
        self,
        batch: dict[str, Any],
        pairs: torch.Tensor,
        divisors: torch.Tensor,
        token_count: torch.Tensor,
        ratings: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch: masked squared error of ratings, and Bradley-Terry loss of pairs (m, 2).

        Args:
            batch: arguments of `features`.
            divisors: (2,) mean number of ratings per batch, and of pairs divided by their weight; constants, so that
                the weight of an item does not depend on its batch.
            token_count: tokens in the batch.
            ratings: (l, k) of the leaves, NaN where missing.
        """
        self.seen_tokens += int(token_count)
        features = functional.dropout(self.features(**batch), self.section.dropout, self.training)
        with torch.autocast(features.device.type, enabled=False):
            scores = self.score(features)[:, 0]
            loss = functional.softplus(scores[pairs[:, 1]] - scores[pairs[:, 0]]).sum() / divisors[1]
            if ratings is not None:
                error = masked_squared_error(self.rewards(features), ratings, self.objective_weights)
                loss = loss + error / divisors[0]
        return {"loss": loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters only."""
        trained = self._trained()
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name in trained}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load trained parameters; frozen ones do not count as missing.

        Raises:
            RuntimeError: for a state of other parameters.
        """
        missing = self._trained() ^ set(state_dict)
        if missing:
            raise RuntimeError(f"the state of a fine-tuning run does not fit: {', '.join(sorted(missing)[:5])}")
        found = super().load_state_dict(state_dict, strict=False)
        found.missing_keys.clear()
        return found

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def rating_weight(self) -> np.ndarray:
        """Reward weights (k, d) float32."""
        return self.rewards.weight.detach().float().cpu().numpy()


def masked_squared_error(rewards: torch.Tensor, ratings: torch.Tensor, objective_weights: torch.Tensor) -> torch.Tensor:
    """Sum over rated entries of v_j (reward - rating)^2, for rewards and ratings (l, k) and weights (k,)."""
    rated = ~ratings.isnan()
    error = torch.where(rated, rewards - torch.where(rated, ratings, 0.0), 0.0)
    return (error.square() * objective_weights).sum()


@dataclass(frozen=True)
class BatchLayout:
    """How batches are laid out."""

    batch_tokens: int
    share: bool  # whether the decoder supports trees
    few_shapes: bool = False  # pad batches to one of few shapes (`tree_tensors`)
    header: int = 1  # `Backbone.header_tokens`
    cache: StateCache | None = None  # states of the frozen layers


class TreeBatches(Dataset):
    """Batches of rated rows, preference pairs, or both. Batches are fixed; the Trainer shuffles whole ones.

    Args:
        trees: trees of all items.
        ratings: (conversations, k) mapped, NaN where missing; None for pairs only.
        pair_weight: weight of the mean loss of pairs next to that of ratings.
        multiple: batches are halved until their number is a multiple of this, so that every step has as many.
    """

    def __init__(
        self,
        encoded: Sequence[EncodedConversation],
        trees: Sequence[PromptTree],
        layout: BatchLayout,
        seed: int = 0,
        ratings: np.ndarray | None = None,
        pair_weight: float = 1.0,
        multiple: int = 1,
    ) -> None:
        self.encoded, self.layout, self.ratings = encoded, layout, ratings
        step = WIDTH_STEP if layout.few_shapes else 1
        self.batches = in_multiples(tree_batches(trees, layout.batch_tokens, seed, step=step), multiple)
        pairs = sum(len(item) == 2 for tree in trees for item in tree.items)
        rated = 0
        if ratings is not None:
            rated = int((~np.isnan(ratings[[row for tree in trees for row in tree.rows]])).sum())
        self.divisors = np.maximum([rated, pairs / pair_weight if pair_weight else 0], 1) / len(self.batches)
        self.tokens = [sum(tree.tokens for tree in batch) for batch in self.batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        layout = self.layout
        tensors = tree_tensors(
            self.encoded,
            self.batches[index],
            share=layout.share,
            budget=layout.batch_tokens if layout.few_shapes else 0,
            header=layout.header,
            index=layout.cache.index if layout.cache else None,
        )
        batch = {
            "inputs": tensors.inputs,
            "leaf_rows": tensors.leaf_rows,
            "leaf_columns": tensors.leaf_columns,
            "span_places": tensors.span_places,
            "span_leaves": tensors.span_leaves,
        }
        if layout.cache is not None:
            batch["states"] = layout.cache.take(tensors.tokens)
        ratings = {} if self.ratings is None else {"ratings": torch.from_numpy(self.ratings[tensors.rows])}
        divisors, count = torch.from_numpy(self.divisors).float(), torch.tensor(self.tokens[index])
        return {"batch": batch, "pairs": tensors.pairs, "divisors": divisors, "token_count": count, **ratings}

    def leaves(self, index: int) -> np.ndarray:
        """Conversations (l,) of a batch, in the order of its features."""
        return np.array([row for tree in self.batches[index] for row in tree.rows], np.int64)


def in_multiples(batches: list[list[PromptTree]], multiple: int) -> list[list[PromptTree]]:
    """The batches with the largest ones halved until their number is a multiple, or none has two trees."""
    batches = list(batches)
    while len(batches) % multiple:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        batch = batches[largest]
        if len(batch) < 2:
            break
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches


@torch.no_grad()
def features_of(
    learner: Learner, batches: TreeBatches, rows: np.ndarray, *, autocast: bool, description: str = ""
) -> tuple[np.ndarray, float]:
    """Response features (n, d) float32 of conversations that occur in the batches, and tokens computed per second.

    Args:
        description: of the progress; shows none if empty.
    """
    place = {int(row): i for i, row in enumerate(rows)}
    features = np.full((len(rows), learner.rewards.in_features), np.nan, np.float32)
    device, training = learner.rewards.weight.device, learner.training
    learner.eval()
    times = []
    with progress(description, sum(batches.tokens), "tokens") if description else nullcontext(ignore) as advance:
        for index in range(len(batches)):
            began = time.perf_counter()
            batch = _moved(batches[index]["batch"], device)
            with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                found = learner.features(**batch).cpu().numpy()
            times.append((time.perf_counter() - began) / batches.tokens[index])
            for row, feature in zip(batches.leaves(index).tolist(), found, strict=True):
                if row in place:
                    features[place[row]] = feature
            advance(batches.tokens[index])
    learner.train(training)
    return features, 1 / float(np.median(times))  # (the first batches also compile kernels)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(entry, device) for name, entry in value.items()}
    return value.to(device)


def total_steps(batches: TreeBatches, section: FinetuneSection, epochs: float) -> int:
    """Number of optimiser steps of a training."""
    return max(1, round(epochs * -(-len(batches) // section.accumulation)))


def run_trainer(
    learner: Learner,
    batches: TreeBatches,
    epochs: float,
    folder: Path,
    *,
    seed: int,
    autocast: bool,
    forward_rate: float | None = None,
    processes: Processes | None = None,
    validate: Validate | None = None,
) -> list[dict[str, float]]:
    """Train, resuming from the last complete checkpoint in the folder; with validations, end with the best state.

    Args:
        autocast: multiply in bfloat16 with float32 weights.
        forward_rate: tokens per second of the forward pass alone, for the progress line.
        processes: that share each step; every one of them calls this.
        validate: metrics of the learner, their `mean` among them.

    Returns:
        `step`, `epoch`, `loss`, `learning_rate` and `grad_norm`, every few steps.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    section, device = learner.section, learner.rewards.weight.device
    group = processes or Processes()
    steps = total_steps(batches, section, epochs)
    stable = section.schedule == "stable"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=group.steps_of(section.accumulation),
        ddp_find_unused_parameters=True if group.count > 1 else None,  # (a stage of pairs has no ratings)
        learning_rate=section.learning_rate,
        max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay" if stable else section.schedule,
        lr_scheduler_kwargs={"num_decay_steps": round(section.decay * steps), "decay_type": "linear"} if stable else {},
        warmup_steps=min(steps - 1, round(section.warmup * steps)),
        logging_steps=max(1, steps // 50),
        save_steps=section.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        seed=seed,
        bf16=autocast,
        use_cpu=device.type == "cpu",
        report_to=list(section.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        label_names=[],
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would split the batches
    best = BestState(folder, section.patience, writes=group.is_first)
    checkpoint = last_whole_checkpoint(folder)
    done = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    left = round((steps - done) * section.accumulation * float(np.mean(batches.tokens)))
    with progress("fine-tuning", left, "tokens", forward_rate) as advance:

        class Progress(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                best.resume(state.global_step)
                group.wait()  # (The first writes what the others have just read.)
                self.validate(state, control)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                advance(learner.seen_tokens * group.count)
                learner.seen_tokens = 0
                self.validate(state, control)

            def validate(self, state: Any, control: Any) -> None:
                if validate is None or (state.global_step % section.eval_steps and state.global_step != steps):
                    return
                if not best.has(state.global_step):
                    best.add(state.global_step, validate(learner), learner.state_dict())
                control.should_training_stop = control.should_training_stop or best.is_over

        trainer = Trainer(
            model=learner,
            args=arguments,
            train_dataset=batches,
            data_collator=itemgetter(0),
            optimizers=(_optimizer(learner), None),
            callbacks=[Progress()],
        )
        trainer.remove_callback(PrinterCallback)
        with output_errors(Path(str(arguments.output_dir))):  # of checkpoints
            trainer.train(resume_from_checkpoint=checkpoint)
    group.wait()
    if validate is not None:
        learner.load_state_dict(best.state())
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return [{n: entry[n] for n in names if n in entry} for entry in trainer.state.log_history if "loss" in entry]


def _optimizer(learner: Learner) -> torch.optim.Optimizer:
    """AdamW with separate learning rates for the heads; only matrices have weight decay."""
    section = learner.section
    embeddings = set(learner.decoder.get_input_embeddings().parameters())
    trained = [parameter for parameter in learner.decoder.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2 and p not in embeddings]
    others = [p for p in trained if p.ndim < 2 or p in embeddings]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": [*learner.rewards.parameters()], "weight_decay": 0.0, "lr": learner.head_rate},
        {"params": [*learner.score.parameters()], "weight_decay": 0.0, "lr": SCORE_RATE * learner.head_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=section.learning_rate, betas=(0.9, 0.98))


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, or None; the Trainer writes `trainer_state.json` last."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None
