"""The data sets that can be built, and the public repositories that they are read from."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_sources import benchmarks, preferences, ratings
from data_sources.rows import Row, SourceError, has_response, last_prompt

Reader = Callable[[Path], Iterator[Row]]


@dataclass(frozen=True)
class Repository:
    """A public repository. The commit is the one that the readers were tested with; empty: none."""

    address: str
    commit: str
    licence: str


REPOSITORIES = {
    "truthfulqa": Repository("https://github.com/sylinrl/TruthfulQA", "", "Apache-2.0"),
    "DiaSafety": Repository("https://github.com/thu-coai/DiaSafety", "5106a041b1c7e36f30e02a97c44897a7f2057278", "Apache-2.0"),
    "HaluEval": Repository("https://github.com/RUCAIBox/HaluEval", "b7253db3cdaa0ab2c382f92b26b390109174f77e", "MIT"),
    "grade-school-math": Repository("https://github.com/openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c", "MIT"),
    "ice-score": Repository("https://github.com/terryyz/ice-score", "4e45c6dcd0a31cf62488619ce23cecc032263d8b", "MIT"),
    "just-eval": Repository("https://github.com/Re-Align/just-eval", "3e1a1265e210be1d6ad71624c91da3efc36493ca", "MIT"),
    "UniEval": Repository("https://github.com/maszhongming/UniEval", "d33e7b6cfebe97b2bafe435adbd818230d5a416a", "MIT"),
    "DialoFlow": Repository("https://github.com/ictnlp/DialoFlow", "a86140824890ad5a09b764181d305a1d97eb1dd3", "MIT"),
    "full": Repository("https://github.com/maximedb/full", "c66eba64cca6c434ebb6ddefca5cd518bb2090d4", "MIT"),
    "ALCE": Repository("https://github.com/princeton-nlp/ALCE", "246c476a4edfc564266b7346b6e29ef4861ae937", "MIT"),
    "prometheus-eval": Repository("https://github.com/prometheus-eval/prometheus-eval", "dcfb44272d5d0414832f5dbb8c2a05ebc2614234", "Apache-2.0"),
    "GPTFuzz": Repository("https://github.com/sherdencooper/GPTFuzz", "1eddeb565740ae311b5f4950492b011a6f866fe7", "MIT"),
    "hh-rlhf": Repository("https://github.com/anthropics/hh-rlhf", "354e5c3cb8960630860dd5774a6ac2a58313bf4d", "MIT"),
    "acl2016-convincing-arguments": Repository("https://github.com/UKPLab/acl2016-convincing-arguments", "ca9d24e41b8805ff2e1d3585d552b49bb64a65f7", "CC BY 4.0"),
    "PandaLM": Repository("https://github.com/WeOpenML/PandaLM", "3871806e72b4832f815ecafd24d3503c73403f48", "Apache-2.0"),
    "FineGrainedRLHF": Repository("https://github.com/allenai/FineGrainedRLHF", "a1469d4eba0b3754bcb343beb88f0aca24bf4848", "Apache-2.0"),
    "qlora": Repository("https://github.com/artidoro/qlora", "7f4e95a68dc076bea9b3a413d2b512eca6d004e5", "MIT"),
    "alpaca_eval": Repository("https://github.com/tatsu-lab/alpaca_eval", "cd543a149df89434d8a54582c0151c0b945c3d20", "CC BY-NC 4.0"),
    "LLMBar": Repository("https://github.com/princeton-nlp/LLMBar", "900616bff90b6c6c8e1681f7d079250637c55992", "MIT"),
    "octopack": Repository("https://github.com/bigcode-project/octopack", "e17a8f6470264286bc6a52eb8263582083bf3bf6", "MIT"),
    "RM-Bench": Repository("https://github.com/THU-KEG/RM-Bench", "73c52d7b27b361621361ec959ac6c0eb9bb7a689", "prompts are compared, nothing is written"),
}  # fmt: skip

# Folder and reader of each data set, and the repository that it is read from.
SOURCES: dict[str, tuple[str, Reader, str]] = {
    "truthfulqa": ("ratings", ratings.truthfulqa, "truthfulqa"),
    "diasafety": ("ratings", ratings.diasafety, "DiaSafety"),
    "halueval": ("ratings", ratings.halueval, "HaluEval"),
    "gsm8k": ("ratings", ratings.gsm8k, "grade-school-math"),
    "humaneval": ("ratings", ratings.humaneval, "ice-score"),
    "justeval": ("ratings", ratings.justeval, "just-eval"),
    "unieval_d2t": ("ratings", ratings.unieval_d2t, "UniEval"),
    "topicalchat": ("ratings", ratings.topicalchat, "UniEval"),
    "qags": ("ratings", ratings.qags, "UniEval"),
    "dstc9": ("ratings", ratings.dstc9, "DialoFlow"),
    "fed": ("ratings", ratings.fed, "full"),
    "alce": ("ratings", ratings.alce, "ALCE"),
    "vicunabench": ("ratings", ratings.vicunabench, "prometheus-eval"),
    "gptfuzz": ("ratings", ratings.gptfuzz, "GPTFuzz"),
    "hh_harmless": ("preferences", preferences.hh_harmless, "hh-rlhf"),
    "convarg": ("preferences", preferences.convarg, "acl2016-convincing-arguments"),
    "pandalm": ("preferences", preferences.pandalm, "PandaLM"),
    "finegrained": ("preferences", preferences.finegrained, "FineGrainedRLHF"),
    "oasst_models": ("preferences", preferences.oasst_models, "qlora"),
    "vicuna_judged": ("preferences", preferences.vicuna_judged, "qlora"),
    "alpacaeval": ("preferences", preferences.alpacaeval, "alpaca_eval"),
    "llmbar": ("benchmarks", benchmarks.llmbar, "LLMBar"),
    "humanevalpack": ("benchmarks", benchmarks.humanevalpack, "octopack"),
    "finegrained_spans": ("benchmarks", benchmarks.finegrained_spans, "FineGrainedRLHF"),
}
# Sets without a prompt of Auto-J's test pairs; with True, without those of its ties as well.
_APART_FROM_AUTO_J = {"vicunabench": True, "vicuna_judged": False}
_BENCHMARK_REPOSITORIES = ("LLMBar", "octopack", "RM-Bench")


def repositories_of(name: str) -> list[str]:
    """Folders of the clones that a data set needs, with those of the benchmarks that it is kept apart from."""
    folder, _, repository = SOURCES[name]
    needed = [repository]
    if folder != "benchmarks":
        needed += _BENCHMARK_REPOSITORIES
    if name in _APART_FROM_AUTO_J:
        needed.append("prometheus-eval")
    return list(dict.fromkeys(needed))


def benchmark_prompts(clones: Path) -> set[str]:
    """Normalised prompts that no training or test row may have: those of llmbar, humanevalpack and RM-Bench's chat."""
    rows = (row for reader in (benchmarks.llmbar, benchmarks.humanevalpack) for row in reader(clones))
    return {*map(last_prompt, rows), *benchmarks.rm_bench_prompts(clones)}


def build(name: str, clones: Path, apart: set[str]) -> Iterator[Row]:
    """Rows of one data set.

    Parameters
    ----------
    name
        A key of `SOURCES`.
    clones
        Folder with one clone per repository.
    apart
        Normalised prompts whose rows are left out; benchmarks are not filtered.
    """
    folder, reader, _ = SOURCES[name]
    if name in _APART_FROM_AUTO_J:
        apart = apart | set(benchmarks.auto_j_prompts(clones, ties=_APART_FROM_AUTO_J[name]))
    for row in reader(clones):
        if folder == "benchmarks" or (has_response(row) and last_prompt(row) not in apart):
            yield row


def clone(name: str, clones: Path) -> None:
    """Clone a repository that `clones` lacks, at its commit; raises SourceError where git fails."""
    repository, target = REPOSITORIES[name], clones / name
    if target.exists():
        return
    commands = [["git", "clone", "--quiet", repository.address, str(target)]]
    if repository.commit:
        commands.append(["git", "-C", str(target), "checkout", "--quiet", repository.commit])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SourceError(f"{' '.join(command)}: {done.stderr.strip() or 'failed'}")
