"""Builds the corpus that armorm-tiny is trained on: conversations of the training splits, and documentation.

Reads the folder of real rating and preference sets (docs/data.md) and documentation packages of a Debian archive, which
are fetched with `apt-get download` and unpacked without installing. Writes `chat.jsonl` (one {"messages", "source",
"held_out"} per line), `docs.jsonl` ({"text", "source", "held_out"}) and `sources.json` (sources with licences).

Only training splits are read, never test splits, benchmarks or alpacaeval (its licence forbids commercial use). Only
documentation under permissive licences is used, so that the weights can be redistributed. Two percent of the prompts
and one percent of the documents are held out for measuring.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

CHAT_SETS = {
    "ratings/truthfulqa": "Apache-2.0",
    "ratings/diasafety": "Apache-2.0",
    "ratings/halueval": "MIT",
    "ratings/gsm8k": "MIT",
    "ratings/humaneval": "MIT",
    "ratings/justeval": "MIT",
    "ratings/unieval_d2t": "MIT",
    "ratings/topicalchat": "MIT",
    "preferences/convarg": "CC BY 4.0",
    "preferences/hh_harmless": "MIT",
    "preferences/pandalm": "Apache-2.0",
}
# package -> (licence, glob of the pages, maximum number of characters)
DOC_PACKAGES = {
    "wordnet-base": ("WordNet 3.0", "usr/share/wordnet/data.*", 16_000_000),
    "python3.11-doc": ("PSF-2.0", "**/_sources/**/*.rst.txt", 12_000_000),
    "python-django-doc": ("BSD-3-Clause", "**/html/**/*.html", 8_000_000),
    "postgresql-doc-15": ("PostgreSQL", "**/*.html", 6_000_000),
    "sqlite3-doc": ("public domain", "**/*.html", 5_000_000),
    "rust-doc": ("MIT or Apache-2.0", "**/html/{book,rust-by-example,reference,nomicon,embedded-book,cargo}/**/*.html", 6_000_000),
    "nodejs-doc": ("MIT", "**/*.html", 3_000_000),
    "apache2-doc": ("Apache-2.0", "**/manual/en/**/*.html", 4_000_000),
    "python-flask-doc": ("BSD-3-Clause", "**/_sources/**/*.txt", 3_000_000),
    "python-requests-doc": ("Apache-2.0", "**/_sources/**/*.txt", 3_000_000),
    "python-click-doc": ("BSD-3-Clause", "**/_sources/**/*.txt", 3_000_000),
    "python-tornado-doc": ("Apache-2.0", "**/_sources/**/*.txt", 3_000_000),
    "python-sqlalchemy-doc": ("MIT", "usr/share/doc/python-sqlalchemy-doc/rst/**/*.rst*", 3_000_000),
    "python-pandas-doc": ("BSD-3-Clause", "**/_sources/{user_guide,getting_started,development,whatsnew}/**/*.txt", 3_000_000),
}  # fmt: skip


class _PageText(HTMLParser):
    """Readable text of a documentation page: navigation, scripts and styles are skipped."""

    _BLOCKS = {"p", "div", "li", "pre", "h1", "h2", "h3", "h4", "tr", "dt", "dd", "br", "table", "ul"}
    _DROPPED = {"script", "style", "nav", "header", "footer", "head", "button", "svg"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._dropping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self._DROPPED:
            self._dropping += 1
        elif tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._DROPPED:
            self._dropping = max(0, self._dropping - 1)
        elif tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._dropping:
            self.parts.append(data)


def page_text(html: str) -> str:
    """Text of an HTML page, blank lines collapsed."""
    parser = _PageText()
    parser.feed(html)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts)).strip()


def _expand(pattern: str) -> list[str]:
    """`a/{b,c}/d` -> [`a/b/d`, `a/c/d`]: pathlib's glob has no braces."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if not found:
        return [pattern]
    return [pattern[: found.start()] + word + pattern[found.end() :] for word in found[1].split(",")]


def _wordnet_texts(files: list[Path]) -> Iterator[str]:
    """Dictionary lines out of WordNet's data files, fifty to a document."""
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for file in files:
        lines: list[str] = []
        for raw in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if raw.startswith("  ") or "|" not in raw:
                continue
            fields, gloss = raw.split("|", 1)
            columns = fields.split()
            words = [columns[4 + 2 * i].replace("_", " ") for i in range(int(columns[3], 16))]
            words = [re.sub(r"\([a-z]+\)$", "", word) for word in words]
            lines.append(f"{', '.join(words)} ({kinds[file.suffix[1:]]}): {gloss.strip()}.")
        for start in range(0, len(lines), 50):
            yield "\n".join(lines[start : start + 50])


def doc_texts(package: str, root: Path, pattern: str) -> Iterator[str]:
    """Documents of one unpacked package, in the order of their paths."""
    files = sorted({path for part in _expand(pattern) for path in root.glob(part) if path.is_file()})
    if package == "wordnet-base":
        yield from _wordnet_texts(files)
        return
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        yield page_text(text) if file.suffix == ".html" else text


def fetch_docs(cache: Path) -> None:
    """Download and unpack every missing documentation package."""
    cache.mkdir(parents=True, exist_ok=True)
    for package in DOC_PACKAGES:
        target = cache / package
        if target.is_dir():
            continue
        subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], cwd=cache, check=True)
        archive = next(cache.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)


def _share(text: str) -> float:
    """A number in [0, 1) that depends only on the text, for a stable split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def chat_rows(data_root: Path) -> Iterator[dict]:
    """Distinct training conversations, held out by prompt."""
    seen: set[str] = set()
    for name in CHAT_SETS:
        with gzip.open(data_root / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["split"] != "train":
                    continue
                if "messages" in row:
                    conversations = [row["messages"]]
                else:
                    conversations = [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
                for messages in conversations:
                    key = json.dumps(messages)
                    if key not in seen:
                        seen.add(key)
                        held_out = _share(json.dumps(messages[:-1])) < 0.02
                        yield {"messages": messages, "source": name, "held_out": held_out}


def build(data_root: Path, cache: Path, output: Path) -> None:
    """Write chat.jsonl, docs.jsonl and sources.json under `output`."""
    output.mkdir(parents=True, exist_ok=True)
    sources: dict[str, dict] = {}
    with open(output / "chat.jsonl", "w", encoding="utf-8") as chat:
        for row in chat_rows(data_root):
            entry = sources.setdefault(row["source"], {"licence": CHAT_SETS[row["source"]], "texts": 0, "bytes": 0})
            entry["texts"] += 1
            entry["bytes"] += sum(len(message["content"].encode()) for message in row["messages"])
            chat.write(json.dumps(row) + "\n")
    fetch_docs(cache)
    seen: set[str] = set()
    with open(output / "docs.jsonl", "w", encoding="utf-8") as docs:
        for package, (licence, pattern, limit) in DOC_PACKAGES.items():
            entry = sources.setdefault(package, {"licence": licence, "texts": 0, "bytes": 0})
            for text in doc_texts(package, cache / package, pattern):
                if len(text) < 400 or text in seen:
                    continue
                seen.add(text)
                if entry["bytes"] > limit:
                    break
                entry["texts"] += 1
                entry["bytes"] += len(text.encode())
                docs.write(json.dumps({"text": text, "source": package, "held_out": _share(text) < 0.01}) + "\n")
    (output / "sources.json").write_text(json.dumps(sources, indent=1))
    for name, entry in sources.items():
        print(f"{name:28} {entry['licence']:20} {entry['texts']:7,} texts {entry['bytes'] / 1e6:7.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("runs/tiny/packages"))
    parser.add_argument("--output", type=Path, default=Path("runs/tiny/corpus"))
    arguments = parser.parse_args()
    build(arguments.data_root, arguments.cache, arguments.output)
