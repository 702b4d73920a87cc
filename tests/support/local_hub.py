"""A server with the parts of the Hugging Face hub's protocol that downloads need."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"commit").hexdigest()


class Refusal:
    """Answer to every request about a repository: an HTTP status, and the hub's error code."""

    def __init__(self, status: int, code: str | None = None) -> None:
        self.status, self.code = status, code


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes] | Refusal]) -> Iterator[str]:
    """Start a server of repositories and yield its URL.

    A repository maps the names of its files to their contents, or is a refusal of every request. It
    has one revision, "main". Other repositories and revisions do not exist.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            found = re.fullmatch(
                r"(?:/api/models)?/([^/]+/[^/]+)(?:/(tree|revision|resolve)/([^/]+)(?:/(.+))?)?",
                path,
            )
            if not found:
                return self.answer(404)
            repo_id, what, revision, file = found.groups(default="")
            files = repositories.get(repo_id, Refusal(404, "RepoNotFound"))
            if isinstance(files, Refusal):
                return self.answer(files.status, headers={"X-Error-Code": files.code or ""})
            if revision not in ("", "main", COMMIT):
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            if what == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(x), "oid": _blob(x)}
                    for name, x in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode())
            if what in ("", "revision"):
                siblings = [{"rfilename": name} for name in files]
                info = {"_id": "0", "id": repo_id, "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(info).encode())
            contents = files.get(file)
            if contents is None:
                return self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            headers = {"ETag": f'"{_blob(contents)}"', "X-Repo-Commit": COMMIT}
            return self.answer(200, contents, headers)

        do_HEAD = do_GET

        def answer(
            self, status: int, contents: bytes = b"", headers: Mapping[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(contents))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(contents)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _blob(contents: bytes) -> str:
    return hashlib.sha1(contents).hexdigest()
