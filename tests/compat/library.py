"""A program: what a user does with armorm, written down to be compared between versions of transformers.

    python library.py TASK.json RESULTS.json

TASK: `folder` of a saved model, `conversations`, `saved` where to save; RESULTS: scores and what they are made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from armorm import ArmoRM, ArmoRMForSequenceClassification


def scored(rm: ArmoRM, conversations: list[Any]) -> dict[str, Any]:
    batch = rm.score(conversations)
    names = ("scores", "rewards", "gating_weights", "contributions")
    return {name: getattr(batch, name).tolist() for name in names}


def auto(folder: str, ids: list[int], **options: Any) -> dict[str, Any]:
    """The model that the Auto class of transformers loads."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return {"class": type(model).__name__, "score": float(model(torch.tensor([ids])).logits[0, 0])}


def main() -> None:
    torch.set_num_threads(1)
    task = json.loads(Path(sys.argv[1]).read_text())
    folder, saved, conversations = task["folder"], task["saved"], task["conversations"]
    rm = ArmoRM.from_pretrained(folder, dtype="float32", device="cpu")
    steered = rm.steer({"ultra-helpful": 3.0}, drop=["code-style"])
    rm.save_pretrained(saved)
    read = ArmoRM.from_pretrained(saved, dtype="float32", device="cpu")
    narrow = ArmoRMForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    state = narrow.state_dict()
    ids = rm.tokenizer.apply_chat_template(conversations[0], tokenize=False)
    ids = rm.tokenizer(ids, add_special_tokens=False)["input_ids"]
    found = {
        "transformers": transformers.__version__,
        "scored": scored(rm, conversations),
        "explained": rm.explain(conversations[0]).to_dict(),
        "steered": scored(steered, conversations),
        "again": scored(read, conversations),
        "normalized": rm.score(conversations, normalize=True).scores.tolist(),
        "auto": auto(folder, ids),
        "auto with remote code": auto(folder, ids, trust_remote_code=True),
        "backbone in bfloat16": sorted({str(t.dtype) for name, t in state.items() if name.startswith("model.")}),
        "heads in bfloat16": sorted({str(t.dtype) for name, t in state.items() if not name.startswith("model.")}),
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
