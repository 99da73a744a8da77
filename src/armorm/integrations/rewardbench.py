"""rewardbench: evaluate a self-contained model with rewardbench's own program.

    python -m armorm.integrations.rewardbench --model DIR --trust_remote_code --dataset pairs.jsonl --load_json

DIR is a folder written by `armorm export --self-contained`; arguments and results are rewardbench's. `register(DIR)`
does the same for programs that call rewardbench themselves.

rewardbench pins transformers 4.51, on which armorm does not run, so the model comes from the folder's own code; of
armorm only this file is used. rewardbench's default entry moves everything to `cuda`, loads in 8 bits or float16, and
only warns about a doubled BOS. Here texts are not truncated (one longer than `--max_length` is an error if truncation
is requested, and is passed whole otherwise), there is one BOS, and the weights keep their stored dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from armorm.errors import ArmormError


class TruncationError(ArmormError, ValueError):
    """A text that would have to be truncated."""


class RewardPipeline:
    """The pipeline that rewardbench calls: scores (n,) of rendered texts."""

    def __init__(self, task: str, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer  # replaced by rewardbench after moving the model

    @torch.no_grad()
    def __call__(self, samples: str | Sequence[str], **options: Any) -> torch.Tensor:
        """Scores of rendered texts.

        Raises:
            TruncationError: for a text longer than `max_length` if `truncation` is requested.
        """
        texts = [samples] if isinstance(samples, str) else list(samples)
        rows = [self._ids(text) for text in texts]
        limit = options.get("max_length") if options.get("truncation") else None
        for row, ids in enumerate(rows):
            if limit is not None and len(ids) > limit:
                raise TruncationError(
                    f"text {row} of a batch: found {len(ids)} tokens, expected at most {limit} (--max_length)"
                )
        size = int(options.get("batch_size") or len(rows) or 1)
        scores = [self._scores(rows[start : start + size]) for start in range(0, len(rows), size)]
        return torch.cat(scores) if scores else torch.empty(0)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        adds = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return [bos, *ids] if adds and ids[:1] != [bos] else ids

    def _scores(self, rows: list[list[int]]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        return self.model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask).score.float()


def register(model: str) -> None:
    """Add a self-contained model to rewardbench's registry, under its folder or hub id."""
    from rewardbench import REWARD_MODEL_CONFIG
    from transformers import AutoModelForSequenceClassification

    REWARD_MODEL_CONFIG[model] = {
        "model_builder": AutoModelForSequenceClassification.from_pretrained,
        "pipeline_builder": RewardPipeline,
        "quantized": False,
        "custom_dialogue": False,
        "model_type": "Seq. Classifier",
        "torch_dtype": "auto",
    }


def main() -> None:
    """Run rewardbench's program with the model of `--model` registered."""
    from rewardbench import rewardbench as program

    for place, argument in enumerate(sys.argv[:-1]):
        if argument == "--model":
            register(sys.argv[place + 1])
    program.main()


if __name__ == "__main__":
    main()
