"""A Hub on this machine: repositories in memory, behind as much of the Hub's HTTP interface as a push and a load use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.helpers.local_http import QuietHandler, local_server


class LocalHub:
    """Repositories by id: branches by name, each a dictionary of file contents; and what was said about them.

    Attributes:
        repositories: `{repo_id: {branch: {file: bytes}}}`.
        messages: (repo_id, branch, message) of every commit.
        private: ids of private repositories.
        tokens: every token that was shown.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.messages: list[tuple[str, str, str]] = []
        self.private: set[str] = set()
        self.tokens: set[str] = set()
        self.endpoint = ""

    def create(self, body: bytes) -> tuple[int, dict]:
        asked = json.loads(body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.repositories:
            return 409, {"error": "exists", "url": f"{self.endpoint}/{repo_id}"}
        self.repositories[repo_id] = {"main": {}}
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repo_id)
        return 200, {"url": f"{self.endpoint}/{repo_id}"}

    def branch(self, repo_id: str, name: str) -> tuple[int, dict]:
        branches = self.repositories[repo_id]
        if name in branches:
            return 409, {"error": "exists"}
        branches[name] = dict(branches["main"])
        return 200, {}

    def commit(self, repo_id: str, branch: str, body: bytes) -> tuple[int, dict]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.messages.append((repo_id, branch, value["summary"]))
            else:
                assert line["key"] == "file", line["key"]
                self.repositories[repo_id][branch][value["path"]] = base64.b64decode(value["content"])
        oid = self.revision_of(repo_id, branch)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}

    def revision_of(self, repo_id: str, branch: str) -> str:
        files = self.repositories[repo_id][branch]
        return hashlib.sha1(repr(sorted((name, hash(content)) for name, content in files.items())).encode()).hexdigest()

    def file(self, repo_id: str, revision: str, name: str) -> tuple[bytes, str] | None:
        """Content and revision of a file of a branch, or of the branch that stands at a revision."""
        for branch, files in self.repositories.get(repo_id, {}).items():
            if revision in (branch, self.revision_of(repo_id, branch)) and name in files:
                return files[name], self.revision_of(repo_id, branch)
        return None


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A Hub that answers at `endpoint` while the block runs."""
    hub = LocalHub()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization", ""))
            body, path = self.read(), self.path.partition("?")[0]
            if path == "/api/repos/create":
                status, said = hub.create(body)
            elif path == "/api/validate-yaml":
                status, said = 200, {"errors": [], "warnings": []}
            else:
                found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
                assert found, path
                repo_id, action, branch = found.groups()
                if action == "branch":
                    status, said = hub.branch(repo_id, branch)
                elif action == "commit":
                    status, said = hub.commit(repo_id, branch, body)
                else:
                    names = [file["path"] for file in json.loads(body)["files"]]
                    modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                    status, said = 200, {"files": modes}
            self.answer(status, json.dumps(said).encode(), {"Content-Type": "application/json"})

        def do_GET(self) -> None:
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
            file = hub.file(*found.groups()) if found else None
            if file is None:
                self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
                return
            content, revision = file
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, {"ETag": etag, "X-Repo-Commit": revision})

        def read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

    with local_server(Handler) as hub.endpoint:
        yield hub
