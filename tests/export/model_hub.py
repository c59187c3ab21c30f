"""The small Hub on loopback, spoken to about models: the same endpoints under their names for models."""

import hashlib
import json
import re

from tests.cache.hub_server import HubServer, Repository, _git_oid, _Handler

_LARGE = (".safetensors", ".gguf")


class ModelHub(HubServer):
    """``with ModelHub() as hub``; see `HubServer`."""

    def __init__(self):
        super().__init__()
        hub = self

        class Handler(_ModelHandler):
            owner = hub

        self._server.RequestHandlerClass = Handler


class _ModelHandler(_Handler):
    def _serve(self):
        # Of data sets it is known already; what is asked of models is the same.
        self.path = re.sub(r"^/api/models/", "/api/datasets/", self.path)
        self.path = re.sub(r"^/([^/]+/[^/]+)\.git/", r"/datasets/\1.git/", self.path)
        if self.path.startswith("/api/repos/create"):
            return self._create()
        if "/preupload/" in self.path:
            return self._preupload()
        if self.path.startswith("/api/validate-yaml"):
            assert self._asked()["repoType"] == "model"
            return self._json({"errors": [], "warnings": []})
        return super()._serve()

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _asked(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.calls.append((self.command, self.path))
        return json.loads(self.body)

    def _create(self):
        asked = self._asked()
        if (status := self.owner.refuse(self.command, self.path)) is not None:
            return self._json({"error": "no"}, status)
        assert asked.get("type", "model") == "model"
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.owner.repositories else 200
        if status == 200:
            self.owner.repositories[name] = Repository(private=asked["visibility"] == "private")
        return self._json({"url": f"{self.owner.url}/{name}", "name": name}, status)

    def _preupload(self):
        asked = self._asked()
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/(.+)", self.path)
        if state := self._state(*found.groups()):
            answer = []
            for file in asked["files"]:
                large = file["path"].endswith(_LARGE)
                old = state[2].get(file["path"])
                oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_oid(old)
                answer.append(
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if large else "regular",
                        "shouldIgnore": False,
                        "oid": oid,
                    }
                )
            self._json({"files": answer})
