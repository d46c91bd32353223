"""The test Hub's answers: repositories, trees, commits, pull requests, and Git LFS with multipart uploads.

Paths, keys, headers and error codes are those that huggingface_hub 2.4 sends and reads; what it does not use is left
out.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode

import yaml

from tests.hub.repos import LFS_BYTES, LFS_SUFFIXES, MAIN, Blob, Commit, Repo, Store, large, small

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


@dataclass
class Reply:
    """An answer; the body is bytes, or the range [start, stop) of a file that may be large."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    path: Path | None = None
    start: int = 0
    stop: int = 0

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.body) if self.path is None else self.stop - self.start

    def pieces(self) -> Iterator[bytes]:
        """The body, a megabyte at a time."""
        if self.path is None:
            yield self.body
            return
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left and (piece := file.read(min(left, 2**20))):
                left -= len(piece)
                yield piece


class RefusedError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.reply = _json({"error": message}, status)
        self.reply.headers["X-Error-Message"] = message
        if code:
            self.reply.headers["X-Error-Code"] = code


def _json(value: object, status: int = 200) -> Reply:
    return Reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


@dataclass
class Api:
    """One request's way to the store."""

    store: Store
    users: dict[str, str]
    hub_url: str
    storage_url: str
    page_size: int
    multipart_bytes: int
    user: str | None = None

    def answer(
        self,
        host: str,
        method: str,
        path: str,
        query: dict[str, list[str]],
        headers: dict[str, str],
        body: bytes,
    ) -> Reply:
        """Answer a request."""
        self._query, self._headers, self._body, self._path = query, headers, body, path
        try:
            if host == "hub":
                self._authenticate()
            for methods, pattern, handler in _ROUTES[host]:
                match = re.fullmatch(pattern, path)
                if match and method in methods.split():
                    return handler(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        except RefusedError as refusal:
            return refusal.reply
        return RefusedError(404, f"no such path: {method} {path}").reply

    def _authenticate(self) -> None:
        authorization = self._headers.get("authorization")
        if authorization is None:
            return
        self.user = self.users.get(authorization.removeprefix("Bearer "))
        if self.user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.store.repos.get(repo_id)
        if repo is None or (repo.private and self.user != "me"):
            raise RefusedError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != "me":
            raise RefusedError(403 if self.user else 401, "You don't have the rights to write to this repository")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.commit_of(revision)
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create_repo(self) -> Reply:
        asked = json.loads(self._body)
        if self.user is None:
            raise RefusedError(401, "Unauthorized")
        if self.user != "me":
            raise RefusedError(403, "You don't have the rights to create a model under this namespace")
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        if repo_id in self.store.repos:
            url = f"{self.hub_url}/{repo_id}"
            return _json({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.store.create(repo_id, private=private)
        return _json({"url": f"{self.hub_url}/{repo_id}", "name": repo_id})

    def model_info(self, repo: str, revision: str = "") -> Reply:
        found = self._repo(repo)
        commit = self._commit(found, revision or "main")
        siblings = [{"rfilename": name} for name in commit.tree]
        return _json({"id": repo, "sha": commit.oid, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str) -> Reply:
        """A page of the listing, and a link to the next."""
        files = self._commit(self._repo(repo), revision).tree
        entries: list[dict[str, object]] = []
        seen: set[str] = set()
        for name, blob in files.items():
            parts = name.split("/")
            for depth in range(1, len(parts)):
                above = "/".join(parts[:depth])
                if above not in seen:
                    seen.add(above)
                    entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": above})
            entries.append(blob.to_json(name))
        if self._query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in str(entry["path"])]
        start = int(self._query.get("cursor", ["0"])[0])
        reply = _json(entries[start : start + self.page_size])
        if start + self.page_size < len(entries):
            again = {name: values[0] for name, values in self._query.items()} | {"cursor": str(start + self.page_size)}
            reply.headers["Link"] = f'<{self.hub_url}{self._path}?{urlencode(again)}>; rel="next"'
        return reply

    def paths_info(self, repo: str, revision: str) -> Reply:
        files = self._commit(self._repo(repo), revision).tree
        names = parse_qs(self._body.decode()).get("paths", [])
        return _json([files[name].to_json(name) for name in names if name in files])

    def refs(self, repo: str) -> Reply:
        found = self._repo(repo)

        def shown(prefix: str) -> list[dict[str, str]]:
            refs = [(ref, oid) for ref, oid in found.refs.items() if ref.startswith(prefix)]
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in refs]

        return _json({"branches": shown("refs/heads/"), "converts": [], "tags": [], "pullRequests": shown("refs/pr/")})

    def create_branch(self, repo: str, branch: str) -> Reply:
        found = self._repo(repo, write=True)
        start = json.loads(self._body or b"{}").get("startingPoint") or "main"
        ref = f"refs/heads/{branch}"
        if ref in found.refs:
            raise RefusedError(409, f"Reference already exists: {ref}")
        found.refs[ref] = self._commit(found, start).oid
        return _json({})

    def delete_branch(self, repo: str, branch: str) -> Reply:
        found = self._repo(repo, write=True)
        ref = f"refs/heads/{branch}"
        if ref == MAIN or ref not in found.refs:
            raise RefusedError(404 if ref != MAIN else 403, f"Cannot delete {ref}")
        del found.refs[ref]
        return _json({})

    def preupload(self, repo: str, revision: str) -> Reply:
        found = self._repo(repo, write=True)
        tree = self._commit(found, revision).tree
        files = []
        for file in json.loads(self._body)["files"]:
            blob = tree.get(file["path"])
            is_large = file["size"] > LFS_BYTES or file["path"].endswith(LFS_SUFFIXES)
            mode = "lfs" if is_large else "regular"
            files.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": blob.oid if blob else None}
            )
        return _json({"files": files, "commitOid": self._commit(found, revision).oid})

    def lfs_batch(self, repo: str) -> Reply:
        found = self._repo(repo, write=True)
        objects = []
        for wanted in json.loads(self._body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in found.lfs:
                answer["actions"] = self._upload_actions(found, oid, size)
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def _upload_actions(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        put = f"{self.storage_url}/upload/{quote(repo.repo_id, safe='')}/{oid}"
        if size <= self.multipart_bytes:
            return {
                "upload": {"href": f"{put}/0?X-Amz-Signature=s3cr3t"},
                "verify": {"href": f"{self.hub_url}/{repo.repo_id}.git/info/lfs/objects/verify"},
            }
        parts = -(-size // self.multipart_bytes)
        header = {"chunk_size": str(self.multipart_bytes)}
        header |= {str(n + 1): f"{put}/{n + 1}?X-Amz-Signature=s3cr3t" for n in range(parts)}
        return {
            "upload": {"href": f"{self.hub_url}/{repo.repo_id}.git/info/lfs/complete?parts={parts}", "header": header}
        }

    def lfs_complete(self, repo: str) -> Reply:
        """All parts of a large file are there: put them together."""
        found, asked = self.store.repos[repo], json.loads(self._body)
        if len(asked["parts"]) != int(self._query["parts"][0]):
            raise RefusedError(400, "parts are missing")
        paths = [self._part(repo, asked["oid"], str(part["partNumber"])) for part in asked["parts"]]
        whole, digest = self._part(repo, asked["oid"], "whole"), hashlib.sha256()
        with whole.open("wb") as file:
            for path in paths:
                data = path.read_bytes()
                digest.update(data)
                file.write(data)
                path.unlink()
        if digest.hexdigest() != asked["oid"]:
            raise RefusedError(400, "The content does not have this sha256")
        whole.replace(self.store.object_path(asked["oid"]))
        found.lfs.add(asked["oid"])
        return _json({})

    def lfs_verify(self, repo: str) -> Reply:
        if self.user is None:
            raise RefusedError(401, "Unauthorized")
        asked = json.loads(self._body)
        if asked["oid"] not in self._repo(repo, write=True).lfs:
            raise RefusedError(404, "no such object")
        return _json({})

    def upload(self, repo: str, oid: str, part: str) -> Reply:
        """Storage takes the bytes of a large file, or a part of them; nobody logs in here."""
        if part == "0":
            self._keep(self.store.repos[repo], oid, self._body)
        else:
            self._part(repo, oid, part).write_bytes(self._body)
        return Reply(200, {"ETag": f'"{hashlib.md5(self._body, usedforsecurity=False).hexdigest()}"'})

    def _part(self, repo: str, oid: str, part: str) -> Path:
        return self.store.folder / f"{quote(repo, safe='')}.{oid}.{part}.part"

    def _keep(self, repo: Repo, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusedError(400, "The content does not have this sha256")
        self.store.object_path(oid).write_bytes(data)
        repo.lfs.add(oid)

    def commit(self, repo: str, revision: str) -> Reply:
        """Apply the operations of a commit, all or none."""
        found = self._repo(repo, write=True)
        lines = [json.loads(line) for line in self._body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = self._commit(found, revision)
        ref = found.ref(revision)
        if ref is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if header.get("parentCommit") not in (None, parent.oid):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(parent.tree)
        for line in lines:
            self._apply(found, tree, line["key"], line["value"])
        pull = None
        if self._query.get("create_pr") == ["1"]:
            pull = len(found.pulls) + 1
            found.pulls[pull] = header["summary"]
            ref = f"refs/pr/{pull}"
            found.refs[ref] = parent.oid
        commit = found.add_commit(ref, header["summary"], tree)
        url = f"{self.hub_url}/{repo}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        return _json(answer | ({"pullRequestUrl": f"{url}/discussions/{pull}"} if pull else {}))

    def _apply(self, repo: Repo, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            tree[value["path"]] = small(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.lfs:
                raise RefusedError(400, f"LFS pointer {value['path']} points to no object")
            tree[value["path"]] = large(value["oid"], self.store.object_path(value["oid"]).stat().st_size)
        elif key == "deletedFile" and tree.pop(value["path"], None) is None:
            raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")

    def validate_yaml(self) -> Reply:
        content = json.loads(self._body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if match is None:
            return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            if not isinstance(yaml.safe_load(match[1]), dict):
                raise ValueError("metadata is no mapping")
        except (ValueError, yaml.YAMLError) as error:
            return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def resolve(self, repo: str, revision: str, name: str) -> Reply:
        """A small file's content, or where the content of a large one is."""
        commit = self._commit(self._repo(repo), revision)
        blob = commit.tree.get(name)
        if blob is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"'}
        if blob.sha256 is None:
            return self._ranged(Reply(200, headers, blob.data))
        headers |= {
            "Location": f"{self.storage_url}/objects/{blob.sha256}?X-Amz-Signature=s3cr3t",
            "X-Linked-Size": str(blob.size),
            "X-Linked-ETag": f'"{blob.sha256}"',
        }
        return Reply(302, headers)

    def object(self, oid: str) -> Reply:
        path = self.store.object_path(oid)
        return self._ranged(Reply(200, {"ETag": f'"{oid}"'}, path=path, stop=path.stat().st_size))

    def _ranged(self, whole: Reply) -> Reply:
        match, size = _RANGE.match(self._headers.get("range", "")), whole.size
        if match is None:
            return whole
        start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
        if start >= size:
            return Reply(416, {"Content-Range": f"bytes */{size}"})
        headers = whole.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return Reply(206, headers, whole.body[start:stop], whole.path, start, stop)


_MODELS = f"/api/models/{_REPO}"
_Route = tuple[str, str, Callable[..., Reply]]
_ROUTES: dict[str, list[_Route]] = {
    "hub": [
        ("POST", "/api/repos/create", Api.create_repo),
        ("POST", "/api/validate-yaml", Api.validate_yaml),
        ("GET", _MODELS, Api.model_info),
        ("GET", f"{_MODELS}/revision/(?P<revision>[^/]+)", Api.model_info),
        ("GET", f"{_MODELS}/tree/(?P<revision>[^/]+)", Api.tree),
        ("POST", f"{_MODELS}/paths-info/(?P<revision>[^/]+)", Api.paths_info),
        ("GET", f"{_MODELS}/refs", Api.refs),
        ("POST", f"{_MODELS}/branch/(?P<branch>[^/]+)", Api.create_branch),
        ("DELETE", f"{_MODELS}/branch/(?P<branch>[^/]+)", Api.delete_branch),
        ("POST", f"{_MODELS}/preupload/(?P<revision>[^/]+)", Api.preupload),
        ("POST", f"{_MODELS}/commit/(?P<revision>[^/]+)", Api.commit),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Api.lfs_batch),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", Api.lfs_verify),
        ("POST", rf"/{_REPO}\.git/info/lfs/complete", Api.lfs_complete),
        ("GET HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Api.resolve),
    ],
    "storage": [
        ("PUT", "/upload/(?P<repo>[^/]+)/(?P<oid>[0-9a-f]{64})/(?P<part>[0-9]+)", Api.upload),
        ("GET HEAD", "/objects/(?P<oid>[0-9a-f]{64})", Api.object),
    ],
}
