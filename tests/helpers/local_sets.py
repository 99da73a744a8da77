"""A Hub of data sets on this machine: folders behind as much of the Hub's HTTP interface as streaming uses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.local_http import QuietHandler, local_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalSets:
    """Sets by id, each a folder.

    Attributes:
        folders: of each hub id.
        revisions: every revision that was asked for, by hub id.
        endpoint: where it answers.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.revisions: dict[str, set[str]] = {}
        self.endpoint = ""

    def files(self, hub_id: str) -> dict[str, Path]:
        folder = self.folders[hub_id]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def information(self, hub_id: str) -> dict:
        siblings = [{"rfilename": name} for name in self.files(hub_id)]
        settled = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        return {"id": hub_id, "sha": COMMIT, "siblings": siblings, **settled}

    def tree(self, hub_id: str, below: str, recursive: bool) -> list[dict] | None:
        """What stands in a folder of a set; None where there is none."""
        start = f"{below}/" if below else ""
        found: dict[str, dict] = {}
        for name, path in self.files(hub_id).items():
            if not name.startswith(start):
                continue
            parts = name[len(start) :].split("/")
            for depth in range(1, len(parts)):
                folder = start + "/".join(parts[:depth])
                if depth == 1 or recursive:
                    found[folder] = {"type": "directory", "path": folder, "oid": COMMIT, "size": 0}
            if len(parts) == 1 or recursive:
                found[name] = {"type": "file", "path": name, "oid": COMMIT, "size": path.stat().st_size}
        return list(found.values()) or None


@contextmanager
def local_sets(folders: dict[str, Path]) -> Iterator[LocalSets]:
    """A Hub that answers at `endpoint` while the block runs."""
    hub = LocalSets(folders)

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def answer_json(self, found: object) -> None:
            if found is None:
                self.answer(404, b'{"error": "not found"}', {"X-Error-Code": "EntryNotFound"})
            else:
                self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            path = unquote(asked.path)
            if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                self.note(match[1], match[2])
                self.answer_json(hub.information(match[1]) if match[1] in hub.folders else None)
            elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
                recursive = parse_qs(asked.query).get("recursive") == ["true"]
                self.answer_json(hub.tree(match[1], match[3] or "", recursive))
            elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.note(match[1], match[2])
                self.file(match[3], hub.files(match[1]).get(match[3]) if match[1] in hub.folders else None)
            else:
                self.answer_json(None)

        def note(self, hub_id: str, revision: str | None) -> None:
            if revision not in (None, COMMIT):
                hub.revisions.setdefault(hub_id, set()).add(revision)

        def file(self, name: str, path: Path | None) -> None:
            if path is None:
                self.answer_json(None)
                return
            content = path.read_bytes()
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                self.answer(200, content, headers)
                return
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], headers)

    with local_server(Handler) as hub.endpoint:
        yield hub
