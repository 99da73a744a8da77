"""The repository holds no secrets, and its metadata is true. (Unsafe calls and grammar newer than 3.10: ruff.)"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from armorm import __version__

ROOT = Path(__file__).parents[2]
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


def test_metadata_says_what_is_true():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10"' in text
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert named == ["3.10", "3.11", "3.12", "3.13"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
