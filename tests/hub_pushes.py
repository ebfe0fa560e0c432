"""What the small hub of tests/hub.py needs to take pushes of the real client, without xet.

Repositories are folders below `root/models`; the branch B of ORG/NAME is the folder `ORG/.NAME@B`.
"""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from hub import commit_of, files_of, git_id

Answer = tuple[int, Any, dict[str, str]]


@dataclass
class Pushes:
    """Takes what holders of `token` send, and remembers it.

    `readers` are tokens that may read alone. `log` has the method, path and bytes of every request,
    `created` the bodies of those that made a repository, `commits` what each commit held, `stored`
    the weights by SHA-256. With `most` set, larger weights end in 500.
    """

    root: Path
    token: str
    readers: tuple[str, ...] = ()
    most: int | None = None
    log: list[tuple[str, str, int]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def knows(self, authorization: str | None) -> bool:
        """Whether the header holds a token that may at least read."""
        return authorization in {f"Bearer {one}" for one in (self.token, *self.readers)}

    def sent(self, method: str, part: str) -> list[int]:
        """The bytes of the requests whose path holds `part`."""
        return [size for how, path, size in self.log if how == method and part in path]

    def answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Answer | None:
        """Status, JSON and headers; None for what is read as from any other hub."""
        with self.lock:
            self.log.append((method, path, len(body)))
            parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
            given = headers.get("Authorization", headers.get("authorization"))
            if parts[0] == "stored":  # an address that the hub gave out, without a token of its own
                return self._store(parts[1], body)
            if given is not None and not self.knows(given):
                said = "Invalid credentials in Authorization header"
                return 401, {"error": said}, {"X_Error_Message": said}
            if method != "POST" or "paths-info" in parts:
                return None
            if given != f"Bearer {self.token}":
                return 403, {"error": "You don't have the rights to write here"}, {}
            return self._post(parts, headers, body)

    def _post(self, parts: list[str], headers: Mapping[str, str], body: bytes) -> Answer:
        if parts == ["api", "validate-yaml"]:
            return self._validated(json.loads(body)["content"])
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body), headers["Host"])
        if parts[-3:] == ["lfs", "objects", "batch"]:
            return self._batch(json.loads(body), headers["Host"])
        organization, name, verb, revision = parts[2:6]
        place = self._place(f"{organization}/{name}", revision)
        if verb == "branch" and place.exists():
            return 409, {"error": "Reference already exists"}, {}
        if verb == "branch":
            shutil.copytree(self._place(f"{organization}/{name}", "main"), place)
            return 200, {}, {}
        if not place.is_dir():
            return 404, {}, {"X_Error_Code": "RevisionNotFound"}
        if verb == "preupload":
            return self._modes(place, json.loads(body)["files"])
        assert verb == "commit", parts
        return self._commit(place, body, f"{organization}/{name}", headers["Host"])

    def _place(self, repo: str, revision: str) -> Path:
        whole = self.root / "models" / repo
        branch = whole.parent / f".{whole.name}@{revision}"
        return whole if revision == "main" else branch

    def _validated(self, content: str) -> Answer:
        try:
            data = yaml.safe_load(content.split("---\n")[1])
        except (yaml.YAMLError, IndexError) as error:
            return 400, {"errors": [{"message": str(error)}]}, {}
        wrong = [key for key in ("license", "base_model") if not isinstance(data.get(key, ""), str)]
        if wrong:
            return 400, {"errors": [{"message": f"{wrong[0]} must be a string"}]}, {}
        return 200, {"errors": [], "warnings": []}, {}

    def _create(self, asked: dict[str, Any], host: str) -> Answer:
        self.created.append(asked)
        name = f"{asked['organization']}/{asked['name']}"
        place = self._place(name, "main")
        if place.exists():
            return 409, {"error": "You already created this model repo"}, {}
        place.mkdir(parents=True)
        (place / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        if asked.get("visibility") == "private":
            (place / ".private").touch()
        return 200, {"url": f"http://{host}/{name}", "name": name}, {}

    def _modes(self, place: Path, asked: list[dict[str, Any]]) -> Answer:
        held, found = files_of(place), []
        for one in asked:
            lfs = one["path"].endswith(".safetensors")
            about = {"path": one["path"], "uploadMode": "lfs" if lfs else "regular",
                     "shouldIgnore": False}  # fmt: skip
            if one["path"] in held:
                data = held[one["path"]].read_bytes()
                about["oid"] = hashlib.sha256(data).hexdigest() if lfs else git_id(data)
            found.append(about)
        return 200, {"files": found}, {}

    def _batch(self, asked: dict[str, Any], host: str) -> Answer:
        objects = []
        for one in asked["objects"]:
            href = f"http://{host}/stored/{one['oid']}"
            new = {} if one["oid"] in self.stored else {"actions": {"upload": {"href": href}}}
            objects.append({"oid": one["oid"], "size": one["size"], **new})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _store(self, oid: str, body: bytes) -> Answer:
        if self.most is not None and len(body) > self.most:
            return 500, {"error": "no room"}, {}
        assert hashlib.sha256(body).hexdigest() == oid
        self.stored[oid] = body
        return 200, {}, {}

    def _commit(self, place: Path, body: bytes, name: str, host: str) -> Answer:
        lines = [json.loads(line) for line in body.splitlines()]
        told: dict[str, Any] = {"summary": lines[0]["value"]["summary"], "files": [], "gone": []}
        for line in lines[1:]:
            value = line["value"]
            file = place / value["path"]
            if line["key"] == "deletedFile":
                file.unlink()
                told["gone"].append(value["path"])
                continue
            lfs = line["key"] == "lfsFile"
            data = self.stored[value["oid"]] if lfs else base64.b64decode(value["content"])
            file.write_bytes(data)
            told["files"].append(value["path"])
        self.commits.append(told)
        oid = commit_of(place)
        url = f"http://{host}/{name}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url}, {}
