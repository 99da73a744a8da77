"""What is in the tree: no secrets, nothing that loads code from data, a grammar that Python 3.10 reads."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from armorm import __version__

ROOT = Path(__file__).parents[2]
PYTHON = sorted(path for part in ("src", "tools", "benchmarks") for path in (ROOT / part).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"), ("yaml", "load_all"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("os", "system"),
    ("os", "popen"), ("subprocess", "getoutput"), ("pd", "read_pickle"),
}  # fmt: skip
ADDRESS = "a password in an address"
SECRETS = {
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a token of the hub": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a token of GitHub": re.compile(rb"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}"),
    "a key of a cloud": re.compile(rb"\bAKIA[0-9A-Z]{16}\b|\bAIza[0-9A-Za-z_-]{35}\b"),
    "a key of a model service": re.compile(rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
    ADDRESS: re.compile(rb"https?://[^\s/:@\"'<>]+:[^\s/@\"'<>]{6,}@"),
}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unsafe(module: ast.Module) -> list[str]:
    """Calls that run data as code."""
    found = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in UNSAFE_CALLS:
            found.append(f"line {node.lineno}: {function.id}()")
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            pair = (function.value.id, function.attr)
            loader = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("Loader", "")
            if pair == ("torch", "load") and "weights_only=True" in ast.unparse(node):
                continue
            if pair in UNSAFE_ATTRIBUTES or (pair == ("yaml", "load") and loader not in ("UniqueKeys", "SafeLoader")):
                found.append(f"line {node.lineno}: {'.'.join(pair)}()")
            if any(keyword.arg == "shell" and ast.unparse(keyword.value) == "True" for keyword in node.keywords):
                found.append(f"line {node.lineno}: shell=True")
    return found


@pytest.mark.parametrize("path", PYTHON, ids=place)
def test_no_data_is_run_as_code(path):
    assert unsafe(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "program",
    [
        "eval(text)",
        "import torch\ntorch.load(path)",
        "yaml.load(text)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_scan_sees_what_it_looks_for(program):
    assert unsafe(ast.parse(program))


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_no_file_of_the_tree_holds_a_secret():
    found = []
    for path in tracked():
        if path.is_file() and path.suffix != ".safetensors":
            content = path.read_bytes()
            # Tests of what is hidden from logs have made-up passwords in addresses.
            kinds = [kind for kind in SECRETS if not (kind == ADDRESS and place(path).startswith("tests/"))]
            found += [f"{place(path)} holds {kind}" for kind in kinds if SECRETS[kind].search(content)]
    assert found == []


def test_the_scan_for_secrets_sees_them():
    for kind, secret in (("a token of the hub", b"hf_" + b"a" * 34), ("a key of a cloud", b"AKIA" + b"A" * 16)):
        assert SECRETS[kind].search(b"x = '" + secret + b"'")


@pytest.mark.parametrize("path", [*PYTHON, *TESTS], ids=place)
def test_every_file_is_python_3_10(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_metadata_says_what_is_true():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in text
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert named == ["3.10", "3.11", "3.12", "3.13"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
