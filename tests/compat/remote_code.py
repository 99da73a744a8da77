"""A program: load self-contained models without armorm, and write down what they give.

    python remote_code.py TASK.json RESULTS.json

TASK: `jobs`, a list of {name, source, dtype, options, inputs, texts, save}; RESULTS: what each gave, by name.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class WithoutArmorm(importlib.abc.MetaPathFinder):
    """Hides armorm, which the main environment has."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] == "armorm":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, WithoutArmorm())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline  # noqa: E402


def load(source: str, dtype: str | None, options: dict[str, Any]) -> Any:
    asked = {} if dtype is None else {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    return AutoModelForSequenceClassification.from_pretrained(source, trust_remote_code=True, **asked, **options)


@torch.no_grad()
def outputs(model: Any, inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, dict):
        inputs = {name: torch.tensor(values) for name, values in inputs.items()}
    try:
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    except ValueError as error:
        return {"error": str(error)}
    return {name: output[name].float().tolist() for name in output}


def run(job: dict[str, Any]) -> dict[str, Any]:
    options = job.get("options", {})
    try:
        model = load(job["source"], job.get("dtype"), options)
    except ValueError as error:
        return {"error": str(error)}
    state = model.state_dict()
    found = {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "backbone": sorted({str(tensor.dtype) for name, tensor in state.items() if name.startswith("model.")}),
        "heads": sorted({str(tensor.dtype) for name, tensor in state.items() if not name.startswith("model.")}),
        "training": model.training,
        "outputs": [outputs(model, inputs) for inputs in job.get("inputs", [])],
    }
    if "texts" in job:
        tokenizer = AutoTokenizer.from_pretrained(job["source"], **options)
        batch = tokenizer(job["texts"], padding=True, add_special_tokens=False, return_tensors="pt")
        found["ids"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
        found["rendered"] = tokenizer.apply_chat_template(job["conversation"], tokenize=False)
        found["mapping"] = outputs(model, batch)
        scorer = pipeline("text-classification", model=model, tokenizer=tokenizer)
        found["pipeline"] = [scorer(text)[0] for text in job["texts"]]
        scorer = pipeline("text-classification", model=job["source"], trust_remote_code=True)
        found["pipeline of the folder"] = [scorer(text)[0] for text in job["texts"]]
    if "save" in job:
        model.save_pretrained(job["save"])
        found["again"] = outputs(load(job["save"], job.get("dtype"), {}), job["inputs"][0])
    return found


def main() -> None:
    torch.set_num_threads(1)
    task = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, Any] = {"transformers": transformers.__version__, "armorm": "armorm" in sys.modules}
    found |= {job["name"]: run(job) for job in task["jobs"]}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
