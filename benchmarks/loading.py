"""Memory used by loading a checkpoint in the released layout.

Writes a checkpoint with random bfloat16 weights to a temporary folder and loads it in a separate process. Prints the
size of the weights and the peak resident memory of that process (beyond that after its imports), for loading alone and
with one forward pass.

    python benchmarks/loading.py --hidden 1536 --layers 16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, LlamaConfig

from armorm.files import write_json
from armorm.model.released import GATE_PATTERNS
from armorm.model.remote_code import GatingNetwork
from peak import environment

# Run in a separate process, because peak resident memory never falls.
_LOADER = """
import json, resource, sys, time
import torch
from peak import peak_bytes as peak
from armorm.model.modeling import ArmoRMForSequenceClassification

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before, start = resident(), time.perf_counter()
model = ArmoRMForSequenceClassification.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - start
assert model.model.dtype == torch.bfloat16
loaded = peak() - before
with torch.inference_mode():
    model(torch.tensor([json.loads(sys.argv[2])]))
print(json.dumps({"loading": loaded, "with one forward pass": peak() - before, "seconds": seconds}))
"""


def write_checkpoint(folder: Path, hidden: int, layers: int) -> int:
    """Write random weights in the released layout in about four shards; returns their size in bytes."""
    from huggingface_hub import save_torch_state_dict

    config = LlamaConfig(
        vocab_size=128257, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 512, pad_token_id=128256, bos_token_id=128000,
        eos_token_id=128001, max_position_embeddings=8192,
    )  # fmt: skip
    backbone = AutoModel.from_config(config, dtype=torch.bfloat16)
    state = {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    gate = GatingNetwork(hidden, 19, hidden_size=1024, hidden_layers=3, temperature=10)
    state |= {f"gating.{name}": tensor for name, tensor in gate.state_dict().items()}
    state["regression_layer.weight"] = torch.randn(19, hidden)
    state["reward_transform_matrix"] = torch.eye(19)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    save_torch_state_dict(state, folder, max_shard_size=size // 4 + 1)
    settings = config.to_dict() | {
        "architectures": ["LlamaForRewardModelWithGating"], "torch_dtype": "float32", "num_objectives": 19,
        "gating_temperature": 10, "gating_hidden_dim": 1024, "gating_n_hidden": 3,
    }  # fmt: skip
    write_json(folder / "config.json", settings)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loading.json"))
    arguments = parser.parse_args()
    ids = [5, 6, 7, *GATE_PATTERNS["llama"], 8, 9]
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), arguments.hidden, arguments.layers)
        done = subprocess.run(
            [sys.executable, "-c", _LOADER, folder, json.dumps(ids)],
            check=True,
            capture_output=True,
            text=True,
            env=environment(),
        )
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found.pop("seconds")
    table = Table("", "bytes", "relative to weights", box=None, pad_edge=False, header_style="bold")
    for label, count in ({"weights": size} | found).items():
        table.add_row(label, f"{count:,}", f"{count / size:.3f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"loaded in {seconds:.1f} s")
    write_json(arguments.output, {"weights": size, "peak": found, "ratios": {k: v / size for k, v in found.items()}})
    console.print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
