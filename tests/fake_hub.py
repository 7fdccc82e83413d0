"""As much of the hub's HTTP as an upload and a download need, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub(ThreadingHTTPServer):
    """A hub of public models with one commit each.

    Attributes:
        models: files of each model by path.
        private: whether each was created private.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str) -> str:
        """A digest of all files, as long as a commit's."""
        return hashlib.sha1(json.dumps(sorted(self.models[name])).encode()).hexdigest()


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub on a free port of this machine, for the time of the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer good":
            return self._answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.models.setdefault(name, {})
            self.server.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            return self._answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":  # the front matter of README.md
            return self._answer(200, {"errors": [], "warnings": []})
        _, _, _, owner, name, verb, *_ = path.split("/")
        if verb == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.models[f"{owner}/{name}"][entry["value"]["path"]] = content
        commit = self.server.commit(f"{owner}/{name}")
        url = f"{self.server.url}/{owner}/{name}/commit/{commit}"
        return self._answer(200, {"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def do_HEAD(self) -> None:
        self._give_file(body=False)

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            return self._give_file(body=True)
        parts = self.path.partition("?")[0].split("/")
        name = "/".join(parts[3:5])
        if name not in self.server.models:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        contents = self.server.models[name]
        if "/tree/" in self.path:
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in contents.items()
            ]
            return self._answer(200, tree)
        files = [{"rfilename": path} for path in contents]
        return self._answer(200, {"id": name, "sha": self.server.commit(name), "private": False, "siblings": files})

    def _give_file(self, body: bool) -> None:
        model, _, rest = self.path.partition("?")[0].strip("/").partition("/resolve/")
        content = self.server.models.get(model, {}).get(rest.partition("/")[2])
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": self.server.commit(model), "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return self._send(200, content, {**headers, "Content-Type": "application/octet-stream"}, body)

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)
