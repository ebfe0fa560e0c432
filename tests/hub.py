"""A small model and dataset hub on loopback, for the real huggingface_hub and datasets clients.

    with serve(root) as url:   # root/models/ORG/NAME/files…  root/datasets/ORG/NAME/files…
        run([python, ...], env={**os.environ, **client_env(url, tmp_path)})

The clients read HF_ENDPOINT and the cache folders when they are imported, so use a subprocess.
A file named `.gated` in a repository makes its files refused as those of a gated one are, one named
`.private` has it seen with a token alone. `serve(root, Pushes(token))` takes pushes too.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from hub_pushes import Pushes

MARKS = (".gated", ".private")  # files of a repository that say how it is seen


@contextmanager
def serve(root: Path, pushes: "Pushes | None" = None) -> Iterator[str]:
    """Serve the repositories below `root`; yields the address to use as HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _requests_for(root, pushes))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def client_env(url: str, home: Path) -> dict[str, str]:
    """The environment that turns the clients to the server, with caches of their own."""
    return {
        "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1",
    }


def files_of(repo: Path) -> dict[str, Path]:
    """The files of a repository by name."""
    found = {p.relative_to(repo).as_posix(): p for p in sorted(repo.rglob("*")) if p.is_file()}
    return {name: p for name, p in found.items() if name not in MARKS}


def git_id(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_of(repo: Path) -> str:
    """A name for the state of the repository: another one for other files."""
    told = "".join(f"{n}\0{git_id(p.read_bytes())}\n" for n, p in files_of(repo).items())
    return hashlib.sha1(told.encode()).hexdigest()


def _entry(name: str, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}


def _tree(repo: Path, under: str, recursive: bool) -> list[dict[str, Any]]:
    """Files (and folders) below `under`, as the hub's tree listing gives them."""
    prefix = f"{under}/" if under else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, path in files_of(repo).items():
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix):].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            entries[folder] = {"type": "directory", "path": folder, "size": 0,
                               "oid": hashlib.sha1(folder.encode()).hexdigest()}
        if recursive or len(parts) == 1:
            entries[name] = _entry(name, path)
    return list(entries.values())


def _requests_for(root: Path, pushes: "Pushes | None") -> type[BaseHTTPRequestHandler]:
    class Requests(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet: pytest shows what the test prints."""

        def _known(self, pushes: "Pushes | None") -> bool:
            return pushes is not None and pushes.knows(self.headers.get("Authorization"))

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: Any, **headers: str) -> None:
            self._send(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

        def _refuse(self, status: int, code: str, message: str) -> None:
            self._send(status, b"", X_Error_Code=code, X_Error_Message=message)

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if pushes is not None:
                told = pushes.answer(self.command, self.path, dict(self.headers.items()), body)
                if told is not None:
                    status, value, more = told
                    more |= {"Content_Type": "application/json"} if status != 204 else {}
                    return self._send(status, json.dumps(value).encode(), **more)
            address = urlsplit(self.path)
            parts = [unquote(part) for part in address.path.strip("/").split("/")]
            is_api = parts[0] == "api"
            parts = parts[1:] if is_api else parts
            kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
            repo = root / kind / "/".join(parts[:2])
            hidden = (repo / ".private").exists() and not self._known(pushes)
            if len(parts) < 2 or not repo.is_dir() or hidden:
                # What the real hub tells anonymous callers, who may not know if it exists.
                return self._refuse(401, "RepoNotFound", "Repository not found")
            verb, *rest = parts[2:] or ["info"]
            revision = rest.pop(0) if rest else "main"
            branch = repo.parent / f".{repo.name}@{revision}"
            repo = branch if branch.is_dir() else repo
            commit = commit_of(repo)
            if revision not in ("main", commit) and not branch.is_dir():
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            query = parse_qs(address.query)
            if is_api and verb in ("info", "revision"):
                return self._json(self._info(repo, "/".join(parts[:2]), commit))
            if is_api and verb == "tree":
                recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                return self._tree(repo, "/".join(rest), recursive)
            if is_api and verb == "paths-info":
                return self._paths(repo, parse_qs(body.decode()).get("paths", []))
            if not is_api and verb == "resolve":
                return self._file(repo, "/".join(rest), commit)
            return self._refuse(404, "EntryNotFound", f"no such address: {self.path}")

        def _info(self, repo: Path, name: str, commit: str) -> dict[str, Any]:
            gated = "manual" if (repo / ".gated").exists() else False
            siblings = [{"rfilename": n} for n in files_of(repo)]
            private, card = (repo / ".private").exists(), repo / "README.md"
            head = card.read_text().split("---\n") if card.exists() else []
            about = {"cardData": yaml.safe_load(head[1])} if len(head) > 2 else {}
            return {**about, "_id": commit[:24], "id": name, "modelId": name, "sha": commit,
                    "private": private, "disabled": False, "gated": gated, "tags": [],
                    "downloads": 0, "likes": 0, "siblings": siblings,
                    "lastModified": "2024-01-01T00:00:00.000Z"}

        def _tree(self, repo: Path, under: str, recursive: bool) -> None:
            entries = _tree(repo, under, recursive)
            if under and not entries:
                return self._refuse(404, "EntryNotFound", f"{under} does not exist")
            self._json(entries)

        def _paths(self, repo: Path, paths: list[str]) -> None:
            files = files_of(repo)
            folders = {e["path"]: e for e in _tree(repo, "", True) if e["type"] == "directory"}
            asked = [p.strip("/") for p in paths]
            self._json([folders[p] if p in folders else _entry(p, files[p])
                        for p in asked if p in files or p in folders])

        def _file(self, repo: Path, name: str, commit: str) -> None:
            if (repo / ".gated").exists():
                return self._refuse(403, "GatedRepo", "Access to this repository is restricted.")
            if name not in files_of(repo):
                return self._refuse(404, "EntryNotFound", f"Entry not found: {name}")
            data = files_of(repo)[name].read_bytes()
            common = {"ETag": f'"{git_id(data)}"', "X_Repo_Commit": commit,
                      "Accept_Ranges": "bytes"}
            asked = self.headers.get("Range", "")
            if not asked.startswith("bytes="):
                return self._send(200, data, **common)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                return self._send(416, b"", Content_Range=f"bytes */{len(data)}")
            span = f"bytes {start}-{stop - 1}/{len(data)}"
            return self._send(206, data[start:stop], Content_Range=span, **common)

    return Requests
