"""A small server on loopback that speaks the Hub's endpoints which publishing and reading a data set, and loading a model, call.

Repositories of data sets, private or not, and of models, which are only read, with commits, tags, and contents that are uploaded before the commit that names them (git
LFS). What it does not know it answers with 501 and remembers, so that a test can say that nothing else was called.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Repository:
    """Commits, oldest first, each with its files; tags name commits."""

    def __init__(self, private):
        self.private = private
        self.commits = []
        self.tags = {}
        self.add({".gitattributes": b"*.zst filter=lfs\n"}, "initial commit")

    def add(self, files, summary):
        names = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
        oid = hashlib.sha1(f"{len(self.commits)} {names}".encode()).hexdigest()
        self.commits.append((oid, dict(files), summary))
        return oid

    def files(self, revision):
        """(commit, files) of a branch, tag or commit, or None."""
        oid = self.commits[-1][0] if revision == "main" else self.tags.get(revision, revision)
        return next(((o, files) for o, files, _ in self.commits if o == oid), None)


class HubServer:
    """``with HubServer() as hub``: ``hub.url``, ``hub.repositories``, ``hub.calls``, ``hub.unknown``, ``hub.refuse``.

    A model's key in ``hub.repositories`` is ``models/OWNER/NAME``, a data set's ``OWNER/NAME``.
    """

    def __init__(self):
        self.repositories = {}
        self.contents = {}
        self.calls, self.unknown, self.tokens = [], [], set()
        self.refuse = lambda method, path: None
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: HubServer

    def log_message(self, *arguments):
        """Silent."""

    def _serve(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urlsplit(self.path)
        path = unquote(split.path)
        self.query = parse_qs(split.query)
        self.owner.calls.append((self.command, path))
        if not path.startswith("/contents/"):  # whose addresses are their own permission
            self.owner.tokens.add(self.headers.get("Authorization"))
        if (status := self.owner.refuse(self.command, path)) is not None:
            self._json({"error": "no"}, status)
            return
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                action(self, *found.groups())
                return
        self.owner.unknown.append((self.command, path))
        self._json({"error": "not spoken here"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, data, status=200, **headers):
        self.send_response_only(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value, status=200, **headers):
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _state(self, repository, revision):
        """The repository with commit and files of a revision; answers 404 itself and gives None otherwise."""
        known = self.owner.repositories.get(repository)
        state = known and known.files(revision)
        if not state:
            self._json({"error": "not found"}, 404, X_Error_Code="RevisionNotFound" if known else "RepoNotFound")
            return None
        return known, *state

    def create(self):
        asked = json.loads(self.body)
        assert asked["type"] == "dataset"
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.owner.repositories:
            # The client reads the address out of this answer too.
            self._json(
                {"error": "You already created this dataset repo", "url": f"{self.owner.url}/datasets/{name}"}, 409
            )
            return
        self.owner.repositories[name] = Repository(private=asked["visibility"] == "private")
        self._json({"url": f"{self.owner.url}/datasets/{name}", "name": name})

    def info(self, repository, revision="main"):
        if state := self._state(repository, revision):
            known, oid, files = state
            siblings = [{"rfilename": name} for name in sorted(files)]
            self._json({"id": repository, "sha": oid, "private": known.private, "siblings": siblings, "tags": []})

    def validate(self):
        assert json.loads(self.body)["repoType"] == "dataset"
        self._json({"errors": [], "warnings": []})

    def preupload(self, repository, revision):
        if state := self._state(repository, revision):
            answer = []
            for asked in json.loads(self.body)["files"]:
                large = asked["path"].endswith(".zst")
                old = state[2].get(asked["path"])
                oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _git_oid(old)
                mode = "lfs" if large else "regular"
                answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._json({"files": answer})

    def batch(self, repository):
        answer = []
        for asked in json.loads(self.body)["objects"]:
            known = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.owner.contents:
                known["actions"] = {"upload": {"href": f"{self.owner.url}/contents/{asked['oid']}"}}
            answer.append(known)
        self._json({"transfer": "basic", "objects": answer})

    def upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._json({"error": "other bytes"}, 400)
            return
        self.owner.contents[oid] = self.body
        self._send(b"")

    def commit(self, repository, revision):
        if not (state := self._state(repository, revision)):
            return
        known, oid, files = state
        files, summary = dict(files), None
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
                if value.get("parentCommit") not in (None, oid):
                    self._json({"error": "the branch has moved"}, 412)
                    return
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.owner.contents[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise AssertionError(entry["key"])
        made = known.add(files, summary)
        self._json(
            {"success": True, "commitOid": made, "commitUrl": f"{self.owner.url}/datasets/{repository}/commit/{made}"}
        )

    def tag(self, repository, revision):
        if state := self._state(repository, revision):
            name = json.loads(self.body)["tag"]
            if name in state[0].tags:
                self._json({"error": "Tag already exists"}, 409)
                return
            state[0].tags[name] = state[1]
            self._json({})

    def tree(self, repository, revision, folder=""):
        if state := self._state(repository, revision):
            prefix = f"{folder}/" if folder else ""
            inside = {n.removeprefix(prefix): data for n, data in state[2].items() if n.startswith(prefix)}
            found = [_entry(prefix + n, data) for n, data in inside.items() if "/" not in n]
            found += [
                {"type": "directory", "path": prefix + n, "oid": "0" * 40, "size": 0}
                for n in {n.partition("/")[0] for n in inside if "/" in n}
            ]
            if folder and not inside:
                self._json({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
                return
            self._json(found)

    def paths(self, repository, revision):
        if state := self._state(repository, revision):
            asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            self._json([_entry(name, state[2][name]) for name in asked if name in state[2]])

    def resolve(self, repository, revision, name):
        if not (state := self._state(repository, revision)):
            return
        data = state[2].get(name)
        if data is None:
            self._json({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
            return
        about = {"ETag": f'"{_git_oid(data)}"', "X_Repo_Commit": state[1], "Accept_Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            self._send(data[start : end + 1], 206, Content_Range=f"bytes {start}-{end}/{len(data)}", **about)
            return
        self._send(data, **about)

    def resolve_model(self, repository, revision, name):
        self.resolve(f"models/{repository}", revision, name)


def _git_oid(data):
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(name, data):
    entry = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
    if name.endswith(".zst"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


_NAME = r"([^/]+/[^/]+)"
_MODEL = r"(models/[^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/{_MODEL}", _Handler.info),
    ("GET", f"/api/{_MODEL}/revision/(.+)", _Handler.info),
    ("GET", f"/api/{_MODEL}/tree/([^/]+)/?", _Handler.tree),
    ("GET", f"/api/{_MODEL}/tree/([^/]+)/(.+)", _Handler.tree),
    ("POST", f"/api/{_MODEL}/paths-info/(.+)", _Handler.paths),
    ("GET", f"/api/datasets/{_NAME}", _Handler.info),
    ("GET", f"/api/datasets/{_NAME}/revision/(.+)", _Handler.info),
    ("POST", f"/api/datasets/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/datasets/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/contents/([0-9a-f]{64})", _Handler.upload),
    ("POST", f"/api/datasets/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", f"/api/datasets/{_NAME}/tag/(.+)", _Handler.tag),
    ("GET", f"/api/datasets/{_NAME}/tree/([^/]+)/?", _Handler.tree),
    ("GET", f"/api/datasets/{_NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    ("POST", f"/api/datasets/{_NAME}/paths-info/(.+)", _Handler.paths),
    ("GET HEAD", f"/datasets/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve_model),
]
