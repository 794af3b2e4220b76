"""
A stand-in for the Hub on 127.0.0.1, in memory: what `huggingface_hub`, `transformers`, `datasets` and `evaluate` ask
of the real one to create a repository, upload to it, list it and download from it.

    with HubStub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "any", "HF_HUB_DISABLE_XET": "1"}

`hub.requests` lists what was asked. `hub.uploads_until_failure = n` lets n large files in and refuses the next one.
A repository is a chain of commits, each a mapping of paths to contents; branches point at commits. Large files (by
their suffix) go the way of git LFS, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2026-01-01T00:00:00.000Z"
LARGE = (".safetensors", ".parquet", ".png")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repository:
    id: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        names = f"{self.id} {branch} {len(self.commits)} {sorted(files)}"
        self.branches[branch] = oid = hashlib.sha1(names.encode()).hexdigest()
        self.commits[oid] = files
        return oid

    def resolve(self, revision: str | None) -> str | None:
        revision = unquote(revision or "main")
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubStub:
    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.uploads_until_failure: int | None = None
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubStub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, kind: str, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Paths and contents of a `kind` ("model", "dataset", "space") of repository."""
        found = self.repositories[kind, repository]
        return found.commits[found.resolve(revision)]


class _NotFound(Exception):
    """The error code that the clients look at, in the header of a 404."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _handle(self):
        self.hub: HubStub = self.server.hub
        self.address = urlsplit(self.path)
        self.body = self._read_body()
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            for pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, self.address.path)
                if match:
                    return answer(self, **match.groupdict())
            raise _NotFound("RepoNotFound")
        except _NotFound as error:
            self._send({"error": str(error)}, status=404, headers={"X-Error-Code": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: bytes | dict | list, status: int = 200, headers: dict | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, value in (defaults | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _find(self, kind: str | None, repository: str, revision: str | None = None) -> tuple[Repository, str]:
        found = self.hub.repositories.get(((kind or "models")[:-1], unquote(repository)))
        if found is None:
            raise _NotFound("RepoNotFound")
        commit = found.resolve(revision)
        if commit is None:
            raise _NotFound("RevisionNotFound")
        return found, commit

    def who_am_i(self):
        token = {"type": "access_token", "accessToken": {"displayName": "stub", "role": "write"}}
        self._send({"type": "user", "id": "1", "name": "user", "fullname": "user", "orgs": [], "auth": token})

    def validate_card(self):
        self._send({"errors": [], "warnings": []})

    # ------------------------------------------------------------ upload

    def create(self):
        options = json.loads(self.body)
        kind = options.get("type") or "model"
        name = f"{options.get('organization') or 'user'}/{options['name']}"
        exists = (kind, name) in self.hub.repositories
        if not exists:
            private = options.get("private", options.get("visibility") == "private")
            self.hub.repositories[kind, name] = repository = Repository(name, private)
            repository.commit("main", {".gitattributes": b""})
        path = name if kind == "model" else f"{kind}s/{name}"
        self._send({"url": f"{self.hub.url}/{path}", "name": name, "id": name}, status=409 if exists else 200)

    def create_branch(self, kind, repository, branch):
        found, commit = self._find(kind, repository)
        exists = unquote(branch) in found.branches
        found.branches.setdefault(unquote(branch), commit)
        self._send({}, status=409 if exists else 200)

    def announce(self, kind, repository, revision):
        found, commit = self._find(kind, repository, revision)
        known, answer = found.commits[commit], []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], file["path"].endswith(LARGE)
            answer.append({"path": path, "shouldIgnore": False, "uploadMode": "lfs" if large else "regular"})
            if path in known:
                answer[-1]["oid"] = (lfs_oid if large else git_oid)(known[path])
        self._send({"files": answer})

    def offer_uploads(self, kind, repository):
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.large_files:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
        self._send({"transfer": "basic", "objects": objects})

    def upload(self, oid):
        with self.hub.lock:
            left = self.hub.uploads_until_failure
            self.hub.uploads_until_failure = left - 1 if left else None
        if left == 0:
            return self._send({"error": "refused"}, status=403)
        assert lfs_oid(self.body) == oid
        self.hub.large_files[oid] = self.body
        self._send(b"")

    def commit(self, kind, repository, revision):
        found, parent = self._find(kind, repository, revision)
        files = dict(found.commits[parent])
        for line in filter(bytes.strip, self.body.splitlines()):
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = found.commit(unquote(revision), files)
        url = f"{self.hub.url}/{found.id}/commit/{oid}"
        self._send({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})

    # ---------------------------------------------------------- download

    def describe(self, kind, repository, revision):
        found, commit = self._find(kind, repository, revision)
        self._send(
            {
                **{"_id": found.id, "id": found.id, "modelId": found.id, "author": "user", "sha": commit},
                **{"private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0},
                **{"tags": [], "lastModified": DATE, "createdAt": DATE, "xetEnabled": False},
                "siblings": [{"rfilename": path} for path in sorted(found.commits[commit])],
            }
        )

    def list_branches(self, kind, repository):
        found, _ = self._find(kind, repository)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in found.branches.items()
        ]
        self._send({"branches": branches, "tags": [], "converts": []})

    def list_paths(self, kind, repository, revision):
        found, commit = self._find(kind, repository, revision)
        entries = _entries(found.commits[commit])
        wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
        self._send([entries[path.strip("/")] for path in wanted if path.strip("/") in entries])

    def list_tree(self, kind, repository, revision, folder):
        found, commit = self._find(kind, repository, revision)
        entries, folder = _entries(found.commits[commit]), unquote(folder or "").strip("/")
        if folder and folder not in entries:
            raise _NotFound("EntryNotFound")
        recursive = parse_qs(self.address.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        start = f"{folder}/" if folder else ""
        inside = [path for path in entries if path.startswith(start)]
        self._send([entries[path] for path in inside if recursive or "/" not in path[len(start) :]])

    def download(self, kind, repository, revision, path):
        found, commit = self._find(kind, repository, revision)
        content = found.commits[commit].get(unquote(path))
        if content is None:
            raise _NotFound("EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_oid(content)}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{lfs_oid(content)}"', "X-Linked-Size": str(len(content))}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return self._send(content, headers=headers)
        start, end = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(content[start : end + 1], status=206, headers=headers)


def _entries(files: dict[str, bytes]) -> dict[str, dict]:
    """Files and folders by path, as the Hub lists them."""
    entries = {}
    for path, content in sorted(files.items()):
        parts = path.split("/")
        for i in range(1, len(parts)):
            folder = "/".join(parts[:i])
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": git_oid(folder.encode())}
        entries[path] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LARGE):
            entries[path]["lfs"] = {"oid": lfs_oid(content), "size": len(content), "pointerSize": 134}
    return entries


_REPOSITORY = r"/api/(?P<kind>models|datasets|spaces)/(?P<repository>[^/]+/[^/]+)"
_FILES = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repository>[^/]+/[^/]+)"
_ROUTES = [
    (r"/api/whoami-v2", _Handler.who_am_i),
    (r"/api/validate-yaml", _Handler.validate_card),
    (r"/api/repos/create", _Handler.create),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    (_FILES + r"\.git/info/lfs/objects/batch", _Handler.offer_uploads),
    (_REPOSITORY + r"/branch/(?P<branch>.+)", _Handler.create_branch),
    (_REPOSITORY + r"/preupload/(?P<revision>[^/]+)", _Handler.announce),
    (_REPOSITORY + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    (_REPOSITORY + r"/refs", _Handler.list_branches),
    (_REPOSITORY + r"/paths-info/(?P<revision>[^/]+)", _Handler.list_paths),
    (_REPOSITORY + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", _Handler.list_tree),
    (_REPOSITORY + r"(?:/revision/(?P<revision>[^/]+))?", _Handler.describe),
    (_FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.download),
]
