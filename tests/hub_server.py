"""A small Hugging Face Hub on the loopback interface, for clients in processes of their own.

It keeps its repositories in memory and speaks what ``huggingface_hub``, ``transformers`` and ``datasets`` say to the
real one when a repository is made, filled and read: who am I, create, validate a card, preupload, LFS batch, upload and
verify, commit, info, tree, paths, and resolve, where large files are answered with a redirect as the real one does.
Xet, the Hub's other storage, is a binary protocol of a client of its own; a client that has it must be told to leave it
(``HF_HUB_DISABLE_XET=1``), or the server made with ``lfs=False``, so that every file goes into the commit itself.

An endpoint that is not known here is answered with 501 and remembered in ``unknown``: no test may pass on one.
"""

import base64
import hashlib
import itertools
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER, TOKEN = "someone", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"
_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet")
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_REPO}"


@dataclass
class File:
    """What lies in a repository under one path."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Git's name for it; for a large file that of its content, which is enough to tell versions apart."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass
class Commit:
    """One commit: its message, its name, and the files that came with it."""

    summary: str
    oid: str
    files: dict[str, File]


@dataclass
class Repository:
    """One repository, with one branch."""

    kind: str
    name: str
    private: bool = False
    files: dict[str, File] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)

    def commit(self, summary: str, files: dict[str, File]) -> Commit:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {summary}".encode()).hexdigest()
        self.files |= files
        self.commits.append(Commit(summary, oid, files))
        return self.commits[-1]

    @property
    def head(self) -> str:
        return self.commits[-1].oid


class HubServer(ThreadingHTTPServer):
    """The server; enter it, and read what came.

    Attributes:
        repositories: by kind (``model``, ``dataset``) and name.
        blobs: uploaded large files by their sha256, committed or not.
        lfs: whether weights and pictures go by LFS; else everything goes into the commit.
        plan: what the coming requests of an endpoint meet, by its name, or by its name and that of a repository with a
            blank between: None for nothing, a status, or ``"drop"`` for a connection that ends without an answer; where
            a plan ends all is well again.
        requests: how often each endpoint was called, whatever it met.
        unknown: requests that nothing here answers.
        sent: every request's path and body as they came: what a client has let out.
    """

    daemon_threads = True

    def __init__(self, lfs: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lfs = lfs
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.plan: dict[str, Iterator[int | str | None]] = {}
        self.requests: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.sent: list[bytes] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store(self) -> str:
        """Where large files are: under another name of the host, as a client follows a redirect to its own at once."""
        return f"http://localhost:{self.server_address[1]}"

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> Repository:
        """Put a repository there, as if it had been pushed before."""
        made = self.repositories[kind, name] = Repository(kind, name)
        made.commit("first", {path: File(content, path.endswith(_LARGE)) for path, content in files.items()})
        return made

    def all_files(self) -> list[tuple[str, bytes]]:
        """Paths and contents of everything that was ever uploaded, large files that no commit has among them."""
        committed = [
            (f"{repository.name}/{path}", file.content)
            for repository in self.repositories.values()
            for commit in repository.commits
            for path, file in commit.files.items()
        ]
        return committed + list(self.blobs.items())

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Remember what broke, unless a client just went away."""
        import sys
        import traceback

        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.unknown.append(traceback.format_exc())


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message or code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        body, path = self._read_body(), unquote(urlsplit(self.path).path)
        matches = ((name, re.fullmatch(pattern, path)) for methods, pattern, name in _ROUTES if self.command in methods)
        name, found = next(((name, match) for name, match in matches if match), ("", None))
        if found is None:
            self.server.unknown.append(f"{self.command} {self.path}")
            self._send(501, {"error": f"hub_server.py knows no {self.command} {self.path}"})
            return
        with self.server.lock:
            self.server.requests[name] += 1
            self.server.sent.append(self.path.encode() + body)
            plans = [self.server.plan.get(key) for key in (name, f"{name} {found.groupdict().get('repo')}")]
            fates = [next(plan, None) for plan in plans if plan is not None]
        fate = next((fate for fate in fates if fate is not None), None)
        if fate == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fate is not None:
            self._send(int(fate), {"error": "as planned"})
            return
        act: Callable[..., None] = getattr(self, f"_on_{name}")
        try:
            with self.server.lock:
                act(body, **{key: value for key, value in found.groupdict().items() if value is not None})
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        length = {"Content-Length": str(len(data)), "X-Request-Id": "loopback"}
        for name, value in (length | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _must_be_owner(self) -> None:
        if not self._is_owner():
            raise _Refused(401, "", "Invalid credentials in Authorization header")

    def _repository(self, kind: str, repo: str, revision: str | None = None) -> Repository:
        found = self.server.repositories.get((kind, repo))
        if found is None or (found.private and not self._is_owner()):
            raise _Refused(404 if self._is_owner() else 401, "RepoNotFound", "Repository not found")
        if revision not in (None, "main", *(commit.oid for commit in found.commits[-1:])):
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _on_harnesses(self, body: bytes) -> None:
        self._send(200, {"standardEnvVars": [], "harnesses": {}})

    def _on_whoami(self, body: bytes) -> None:
        self._must_be_owner()
        self._send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def _on_create(self, body: bytes) -> None:
        self._must_be_owner()
        asked = json.loads(body)
        kind, name = asked.get("type") or "model", f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"}
        if (kind, name) in self.server.repositories:
            self._send(409, url | {"error": "You already created this model repo"})
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        made = self.server.repositories[kind, name] = Repository(kind, name, private)
        made.commit("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs\n", False)})
        self._send(200, url)

    def _on_validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        if re.match(r"---\n.+?\n---\n", content, re.DOTALL) is None:
            self._send(400, {"errors": [{"message": "no metadata at the top"}], "warnings": []})
            return
        self._send(200, {"errors": [], "warnings": []})

    def _on_preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        self._must_be_owner()
        there = self._repository(kind, repo, revision).files
        answers = []
        for asked in json.loads(body)["files"]:
            path, large = asked["path"], self.server.lfs and asked["path"].endswith(_LARGE)
            oid = there[path].etag if path in there and there[path].large == large else None
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answers})

    def _on_batch(self, body: bytes, repo: str, kinds: str = "") -> None:
        self._must_be_owner()
        self._repository(kinds.removesuffix("s/") or "model", repo)
        answers = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.blobs:
                links = ("upload", "verify")
                answer["actions"] = {link: {"href": f"{self.server.url}/lfs/{link}/{asked['oid']}"} for link in links}
            answers.append(answer)
        self._send(200, {"transfer": "basic", "objects": answers})

    def _on_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "", "the content is not what its sha256 says")
        self.server.blobs[oid] = body
        self._send(200)

    def _on_verify(self, body: bytes, oid: str) -> None:
        self._must_be_owner()
        asked = json.loads(body)
        if len(self.server.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "", "not uploaded")
        self._send(200, {})

    def _on_commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        self._must_be_owner()
        repository = self._repository(kind, repo, revision)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise _Refused(400, "", f"{value['path']} was never uploaded")
                files[value["path"]] = File(self.server.blobs[value["oid"]], True)
            else:
                raise NotImplementedError(f"commit with {line['key']}")
        made = repository.commit(header["value"]["summary"], files)
        url = f"{self.server.url}/{repo}/commit/{made.oid}"
        self._send(200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def _on_info(self, body: bytes, kind: str, repo: str, revision: str | None = None) -> None:
        found = self._repository(kind, repo, revision)
        siblings = [{"rfilename": path} for path in sorted(found.files)]
        answer = {"_id": "0", "id": repo, "author": repo.split("/")[0], "sha": found.head, "private": found.private}
        date = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        more = {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}
        self._send(200, answer | date | more)

    def _on_tree(self, body: bytes, kind: str, repo: str, revision: str, path: str = "") -> None:
        found = self._repository(kind, repo, revision)
        prefix = f"{path}/" if path else ""
        inside = sorted(name for name in found.files if name.startswith(prefix))
        if not inside:
            raise _Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = "recursive=true" in self.path.lower()
        folders = {prefix + name.removeprefix(prefix).rpartition("/")[0].split("/")[0] for name in inside}
        entries = [_entry(name, None) for name in sorted(folders - {prefix})]
        chosen = [name for name in inside if recursive or "/" not in name.removeprefix(prefix)]
        self._send(200, entries + [_entry(name, found.files[name]) for name in chosen])

    def _on_paths(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        found = self._repository(kind, repo, revision)
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(body)["paths"]
        else:
            asked = [unquote(pair.partition("=")[2]) for pair in body.decode().split("&") if pair.startswith("paths=")]
        asked = [asked] if isinstance(asked, str) else asked
        entries = [_entry(path, found.files[path]) for path in asked if path in found.files]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in found.files)]
        self._send(200, entries + [_entry(path, None) for path in folders])

    def _on_resolve(self, body: bytes, repo: str, revision: str, path: str, kinds: str = "") -> None:
        found = self._repository(kinds.removesuffix("s/") or "model", repo, revision)
        if path not in found.files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        file, headers = found.files[path], {"X-Repo-Commit": found.head, "Accept-Ranges": "bytes"}
        if file.large:
            linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            self.server.blobs[file.sha256] = file.content
            self._send(302, headers=headers | linked | {"Location": f"{self.server.store}/cdn/{file.sha256}"})
            return
        self._send_part(file.content, headers | {"ETag": f'"{file.etag}"'})

    def _on_cdn(self, body: bytes, oid: str) -> None:
        self._send_part(self.server.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send_part(self, content: bytes, headers: dict[str, str]) -> None:
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            self._send(200, content, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], headers | span)


def _entry(path: str, file: File | None) -> dict[str, Any]:
    if file is None:
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    entry = {"type": "file", "oid": file.oid, "size": len(file.content), "path": path}
    lfs = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
    return entry | ({"lfs": lfs} if file.large else {})


_READ, _WRITE = ("GET", "HEAD"), ("POST",)
_ROUTES = [
    (_READ, "/api/agent-harnesses", "harnesses"),
    (_READ, "/api/whoami-v2", "whoami"),
    (_WRITE, "/api/repos/create", "create"),
    (_WRITE, "/api/validate-yaml", "validate"),
    (_WRITE, rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    (_WRITE, rf"/(?P<kinds>datasets/)?{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/lfs/upload/(?P<oid>[0-9a-f]{64})", "upload"),
    (_WRITE, r"/lfs/verify/(?P<oid>[0-9a-f]{64})", "verify"),
    (_WRITE, rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
    (_READ, rf"{_API}(?:/revision/(?P<revision>[^/]+))?", "info"),
    (_READ, rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    (_WRITE, rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths"),
    (_READ, rf"/(?P<kinds>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    (_READ, r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
]


def always(fate: int | str) -> Iterator[int | str]:
    """A plan that never ends."""
    return itertools.repeat(fate)
