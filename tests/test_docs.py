"""Documentation: code blocks run or state why not, names of modules and files exist, and the site builds."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from armorm.files import DEFAULT_REWARD_MODEL
from tests.helpers.docs_blocks import DOCS, Block, blocks

ROOT = DOCS.parent
PAGES = sorted(DOCS.rglob("*.md"))
# Names that code blocks use without defining them.
BEFORE = """
import json
from armorm import ArmoRM
from armorm.conversation import Conversation

rm = ArmoRM.from_pretrained("armorm-tiny-rm")
folder = DIR = path = "runs/real"
conversation = messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
conversations = [conversation, conversation]
"""
FILES = {
    "preferences.jsonl": '{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n' * 3,
    "responses.jsonl": '{"prompt": "2+2?", "response": "4"}\n',
    "samples.jsonl": '{"prompt": "2+2?", "responses": ["4", "5", "22"]}\n',
    "candidates.jsonl": '{"prompt": "2+2?", "responses": ["4", "5", "22"]}\n',
    "my_module.py": "def my_function(conversations):\n    return [float(len(c[-1]['content'])) for c in conversations]\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_run) -> Path:
    """A folder with the files that code blocks use."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("docs", "recipes", "benchmarks", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name in ("real", "other"):
        shutil.copytree(small_run, folder / "runs" / name, ignore=shutil.ignore_patterns("work"))
    # Read in place of the hub's set, as any folder of that name is.
    (folder / "allenai" / "reward-bench").mkdir(parents=True)
    rows = DOCS.parent / "tests" / "evaluation" / "fixtures" / "rewardbench.jsonl"
    shutil.copy(rows, folder / "allenai" / "reward-bench" / "filtered-00000.jsonl")
    (folder / "MODEL").symlink_to(folder / "runs" / "real")
    return folder


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_blocks_that_are_not_run_say_why_and_programs_are_programs(path):
    text = path.read_text(encoding="utf-8")
    found = blocks(path)
    assert text.count("<!-- not run:") == sum(bool(block.reason) for block in found), "a mark without a block below it"
    for block in found:
        assert block.text.strip(), f"{block.page}:{block.line} is empty"
        assert not re.search(r"^\$ ", block.text, re.M), f"{block.page}:{block.line}: a prompt $ cannot be copied"
        if block.reason:
            assert len(block.reason) > 10
        if block.language == "python":
            ast.parse(block.text)


def test_the_pages_have_blocks():
    assert sum(len(blocks(path)) for path in PAGES) > 20


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p)], ids=lambda path: path.relative_to(DOCS).as_posix())
def test_every_command_of_a_page_runs(path, place):
    program, unfinished = BEFORE, False
    for block in [block for block in blocks(path) if not block.reason]:
        if block.language == "python":  # with the next ones, in one process
            program += f"\n# {where(block)}\n{block.text}"
            unfinished = True
            continue
        if unfinished:
            run(place, program, [sys.executable, "-c", program])
            unfinished = False
        run(place, f"{where(block)}\n{block.text}", ["bash", "-e", "-o", "pipefail", "-c", block.text])
    if unfinished:
        run(place, program, [sys.executable, "-c", program])


# Pages outside docs/ are checked too; these files are written by armorm or by the reader.
TEXTS = (*(page for page in PAGES), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
WRITTEN = ("my_module.py", "modeling_armorm.py", "modeling_custom.py", "benchmarks/results/ablation-other.json")
_MODULE = re.compile(r"(?<![\w./-])armorm(?:\.\w+)+")
_IN_REPOSITORY = re.compile(r"(?<![\w./-])(?:src|tests|docs|benchmarks|tools|recipes|deploy)/[\w./@=-]*\w")
_PROGRAM = re.compile(r"(?<![\w/-])(?:\.\.\./)?(?:\w[\w-]*/)*\w[\w-]*\.py\b")


def current_text(path: Path) -> str:
    """A page without the first column of the tables of moved modules, and without placeholders."""
    text = path.read_text(encoding="utf-8")
    if path.name == "migration.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    return re.sub(r"\S*NAME\S*", "", text)


def test_modules_and_files_that_pages_name_exist():
    files = [file.relative_to(ROOT).as_posix() for file in ROOT.glob("[bdst]*/**/*.py")]
    absent = []
    for path in TEXTS:
        text = current_text(path)
        named = [name for name in _MODULE.findall(text) if not module_or_name_exists(name)]
        named += [name for name in _IN_REPOSITORY.findall(text) if not (ROOT / name).exists()]
        programs = [name.removeprefix(".../") for name in _PROGRAM.findall(text)]
        named += [name for name in programs if not any(f"/{file}".endswith(f"/{name}") for file in files)]
        absent += [f"{path.name}: {name}" for name in dict.fromkeys(named) if name not in WRITTEN]
    assert not absent


def test_the_page_on_verbosity_has_the_figures_of_the_default_model():
    page = (DOCS / "verbosity.md").read_text(encoding="utf-8")
    folder = ROOT / "src" / "armorm" / "embedded_models" / DEFAULT_REWARD_MODEL
    objectives = json.loads((folder / "config.json").read_text(encoding="utf-8"))["objectives"]
    (verbosity,) = (objective for objective in objectives if objective["name"] == "verbosity")
    low, high = verbosity["low"], verbosity["high"]
    for name, raw, reward in (
        ("1st percentile", low, "0"),
        ("middle of the scale", (low + high) / 2, "0.5"),
        ("99th percentile", high, "1"),
    ):
        assert f"| {name} | {raw:.3f} | {math.expm1(raw):.0f} | {reward} |" in page
    assert f"One unit of reward is {high - low:.2f} in the logarithm" in page
    assert f"(R2 {verbosity['reliability']['r2']:.3f} in `{DEFAULT_REWARD_MODEL}`)" in page
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"correlation with response tokens is (\S+) \((\S+) without debiasing\), within prompts (\S+) \((\S+)\)", card
    )
    assert found
    pooled, pooled_before, within, within_before = found.groups()
    assert f"| over all responses | {pooled} | {pooled_before} |" in page
    assert f"| between responses to one prompt | {within} | {within_before} |" in page


def module_or_name_exists(name: str) -> bool:
    """Whether a dotted name is a module of the package, or a name at the top level of one."""
    parts, place = name.split("."), ROOT / "src"
    for count, part in enumerate(parts, 1):
        place /= part
        if place.is_dir():
            continue
        module = place.with_suffix(".py")
        if module.is_file():
            return count == len(parts) or has_word(module, parts[count])
        return has_word(place.parent / "__init__.py", part)
    return True


def has_word(path: Path, word: str) -> bool:
    return re.search(rf"\b{word}\b", path.read_text(encoding="utf-8")) is not None


def where(block: Block) -> str:
    return f"docs/{block.page}, line {block.line}"


def run(place: Path, text: str, command: list[str]) -> None:
    """Run a command in that folder, with the programs of this interpreter first and no network for hub calls."""
    paths = [str(ROOT / "src"), str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_the_site_builds_strictly_with_every_page_in_its_navigation(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    front = (tmp_path / "site" / "index.html").read_text()
    for page in PAGES:
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        assert name == "index" or f'href="{name}/"' in front, f"{name} is not in the navigation"
    reference = (tmp_path / "site" / "reference" / "recipe" / "index.html").read_text()
    assert "max_pairs_per_prompt" in reference
    command_line = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert "armorm init" in command_line
    assert "nvidia/HelpSteer" in (tmp_path / "site" / "datasets" / "index.html").read_text()
    outside = re.findall(r'(?:src|href)="(https?://[^"]+)"', front)
    assert not [link for link in outside if link.endswith((".js", ".css", ".woff2"))], "the site fetches from elsewhere"


def test_references_name_every_key_and_every_command():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import docs_hooks
    finally:
        sys.path.pop(0)
    from armorm.cli.app import app
    from armorm.training.recipe import Recipe
    from armorm.training.schema import GatingSection

    recipe, commands = docs_hooks.recipe_reference(), docs_hooks.cli_reference()
    assert all(f"`{key}`" in recipe for key in (*Recipe.model_fields, *GatingSection.model_fields))
    assert all(re.search(rf"^\| `{key}` \| .*\w", recipe, re.MULTILINE) for key in Recipe.model_fields), (
        "a kind is missing"
    )
    assert recipe.index("## Backbone") < recipe.index("## Ratings") < recipe.index("## Gating")
    assert all(f"## armorm {command.name}" in commands for command in app.registered_commands)
    assert "1,000,000,000" in docs_hooks.scale_table()
