"""Fine-tuning of a decoder with linear heads: model, losses, datasets, and training with the transformers Trainer.

Checkpoints hold only trained weights: adapters and heads, or the layers that are not frozen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from armorm.backbone.chat_template import EncodedConversation
from armorm.errors import BackboneError
from armorm.progress import progress
from armorm.training.finetune.collator import WIDTH_STEP, PromptTree, tree_batches, tree_tensors
from armorm.training.schema import FinetuneSection

KEPT_CHECKPOINTS = 2
SCORE_RATE = 10  # learning rate of the score head over that of rewards: logits span about ten times the range 0 to 1


class Learner(torch.nn.Module):
    """A decoder with a linear reward per objective, and a linear score for pairs.

    Args:
        model: the decoder without a head; LoRA adapters are added here.
        weight: (k, d) initial reward weights.
        objective_weights: (k,) weights of the squared errors.
        feature_norm: mean L1 norm of the features.
    """

    objective_weights: torch.Tensor
    accepts_loss_kwargs = False  # the Trainer then averages over the batches of a step

    def __init__(
        self,
        model: Any,
        section: FinetuneSection,
        weight: torch.Tensor,
        objective_weights: np.ndarray,
        feature_norm: float,
    ) -> None:
        super().__init__()
        k, d = weight.shape
        self.head_rate = section.head_learning_rate / feature_norm
        _freeze(model, section.frozen_layers)
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if section.method == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model,
                LoraConfig(
                    r=section.lora_rank,
                    lora_alpha=section.lora_alpha,
                    lora_dropout=section.lora_dropout,
                    target_modules="all-linear",
                ),
            )
        self.decoder = model
        self.rewards = torch.nn.Linear(d, k, bias=False)
        self.score = torch.nn.Linear(d, 1, bias=False)
        with torch.no_grad():
            self.rewards.weight.copy_(weight)
            self.score.weight.zero_()
        self.register_buffer("objective_weights", torch.from_numpy(objective_weights).float(), persistent=False)

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        leaf_rows: torch.Tensor,
        leaf_columns: torch.Tensor,
        items: torch.Tensor,
        divisor: torch.Tensor,
        ratings: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch: pairs (m, 2) without ratings, rated rows (m, 1) with them.

        Args:
            divisor: mean number of items, or ratings, per batch; a constant, so that the weight of an item does not
                depend on its batch.
            ratings: (l, k) of the leaves, NaN where missing.
        """
        hidden = self.decoder(**inputs, use_cache=False).last_hidden_state
        features = hidden[leaf_rows, leaf_columns].float()
        if ratings is None:
            scores = self.score(features)[:, 0]
            loss = functional.softplus(scores[items[:, 1]] - scores[items[:, 0]]).sum()
        else:
            loss = masked_squared_error(self.rewards(features), ratings, self.objective_weights)
        return {"loss": loss / divisor}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters only."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in super().state_dict(*args, **kwargs).items() if name in trained}

    def merged(self) -> Any:
        """The decoder as a plain model, with adapters merged."""
        model = self.decoder.merge_and_unload() if hasattr(self.decoder, "merge_and_unload") else self.decoder
        return model.requires_grad_(True).cpu().eval()

    def rating_weight(self) -> np.ndarray:
        """Reward weights (k, d) float32."""
        return self.rewards.weight.detach().float().cpu().numpy()


def masked_squared_error(rewards: torch.Tensor, ratings: torch.Tensor, objective_weights: torch.Tensor) -> torch.Tensor:
    """Sum over rated entries of v_j (reward - rating)^2, for rewards and ratings (l, k) and weights (k,)."""
    rated = ~ratings.isnan()
    error = torch.where(rated, rewards - torch.where(rated, ratings, 0.0), 0.0)
    return (error.square() * objective_weights).sum()


def _freeze(model: Any, count: int) -> None:
    """Freeze the embeddings and the first `count` layers."""
    if not count:
        return
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [getattr(inner, name) for name in ("layers", "h", "blocks") if hasattr(inner, name)]
    if not found:
        raise BackboneError(f"finetune.frozen_layers: {model.config.model_type} has no known list of layers")
    if count >= len(found[0]):
        raise BackboneError(f"finetune.frozen_layers: found {count}, the backbone has {len(found[0])} layers")
    for module in (model.get_input_embeddings(), *found[0][:count]):
        module.requires_grad_(False)


class TreeBatches(Dataset):
    """Batches of preference pairs, or with ratings of rated rows. Batches are fixed; the Trainer shuffles whole ones.

    Args:
        trees: trees of all items.
        share: whether the decoder supports trees.
        few_shapes: pad batches to one of few shapes (`tree_tensors`).
        ratings: (conversations, k) mapped, NaN where missing; None for pairs.
    """

    def __init__(
        self,
        encoded: Sequence[EncodedConversation],
        trees: Sequence[PromptTree],
        section: FinetuneSection,
        seed: int,
        share: bool,
        few_shapes: bool = False,
        ratings: np.ndarray | None = None,
    ) -> None:
        self.encoded, self.share = encoded, share
        self.filled = section.batch_tokens if few_shapes else 0
        self.batches = tree_batches(trees, section.batch_tokens, seed, step=WIDTH_STEP if few_shapes else 1)
        self.section, self.seed, self.ratings = section, seed, ratings
        every = [tree for batch in self.batches for tree in batch]
        if ratings is None:
            count = sum(len(tree.items) for tree in every)
        else:
            count = int((~np.isnan(ratings[[row for tree in every for row in tree.rows]])).sum())
        self.divisor = count / len(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tensors = tree_tensors(self.encoded, self.batches[index], share=self.share, budget=self.filled)
        batch = {
            "inputs": tensors.inputs,
            "leaf_rows": tensors.leaf_rows,
            "leaf_columns": tensors.leaf_columns,
            "items": tensors.items,
            "divisor": torch.tensor(self.divisor),
        }
        return batch if self.ratings is None else batch | {"ratings": torch.from_numpy(self.ratings[tensors.rows])}


def run_trainer(
    learner: Learner, batches: TreeBatches, epochs: float, folder: Path, *, device: torch.device, bfloat16: bool
) -> list[dict[str, float]]:
    """Train, resuming from the last complete checkpoint in the folder.

    Returns:
        `step`, `epoch`, `loss`, `learning_rate` and `grad_norm`, every few steps.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    section = batches.section
    a_pass = -(-len(batches) // section.accumulation)
    steps = max(1, round(epochs * a_pass))
    stable = section.schedule == "stable"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=section.accumulation,
        learning_rate=section.learning_rate,
        max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay" if stable else section.schedule,
        lr_scheduler_kwargs={"num_decay_steps": round(section.decay * steps), "decay_type": "linear"} if stable else {},
        warmup_steps=min(steps - 1, round(section.warmup * steps)),
        logging_steps=max(1, steps // 50),
        save_steps=section.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        seed=batches.seed,
        bf16=bfloat16,
        use_cpu=device.type == "cpu",
        report_to=list(section.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        label_names=[],
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would split the batches
    with progress("fine-tuning", steps, "steps") as advance:

        class Progress(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                advance(1)

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                advance(state.global_step)

        trainer = Trainer(
            model=learner,
            args=arguments,
            train_dataset=batches,
            data_collator=itemgetter(0),
            optimizers=(_optimizer(learner, section), None),
            callbacks=[Progress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    names = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return [{n: entry[n] for n in names if n in entry} for entry in trainer.state.log_history if "loss" in entry]


def _optimizer(learner: Learner, section: FinetuneSection) -> torch.optim.Optimizer:
    """AdamW with separate learning rates for the heads; only matrices have weight decay."""
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
