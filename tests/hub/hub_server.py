"""A local Hub server with the API that `huggingface_hub` uses for model repositories, including large files (LFS).

Clients use it with HF_ENDPOINT=URL and HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "user", "hf_secret_of_the_test"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png")


@dataclass
class File:
    """A file of a commit; `oid` is the SHA-256 of an LFS file, otherwise `None`."""

    content: bytes
    oid: str | None = None

    @property
    def blob_id(self) -> str:
        """Id of the file in git."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        """HTTP ETag, which identifies the content."""
        return self.oid or self.blob_id


@dataclass
class Repository:
    """A repository: its commits, oldest first, each with all of its files."""

    private: bool
    commits: list[tuple[str, dict[str, File]]] = field(default_factory=lambda: [("0" * 39 + "1", {})])

    def files(self, revision: str = "main") -> dict[str, File] | None:
        """Returns the files of a commit; `None` if the commit does not exist."""
        return self.commits[-1][1] if revision == "main" else dict(self.commits).get(revision)

    def commit(self, files: dict[str, File]) -> str:
        """Adds a commit and returns its id."""
        self.commits.append((hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest(), files))
        return self.commits[-1][0]


class HubServer:
    """A server in a thread; `refused_uploads` is the number of next LFS uploads that fail."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.uploads: list[str] = []  # SHA-256 of every successful LFS upload
        self.refused_uploads = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Stops the server."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return answer(self, *match.groups())
        return self.fail(404, f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def reply(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value, status: int = 200, **headers: str) -> None:
        self.reply(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def fail(self, status: int, message: str, code: str = "") -> None:
        self.reply_json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, write: bool = False) -> Repository | None:
        """Returns the repository; otherwise sends an error and returns `None`, also for other users' private ones."""
        found = self.hub.repositories.get(name)
        if found is None or ((write or found.private) and not self.authorized()):
            self.fail(404 if self.authorized() else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    def whoami(self) -> None:
        if self.authorized():
            self.reply_json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        else:
            self.fail(401, "Invalid credentials")

    def validate_yaml(self) -> None:
        card = json.loads(self.body)["content"]
        good = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
        self.reply_json({"errors": [], "warnings": [] if good else [{"message": "empty metadata"}]})

    def create(self) -> None:
        if not self.authorized():
            return self.fail(401, "Invalid credentials")
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        if name in self.hub.repositories:
            return self.reply_json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = Repository(private=request.get("visibility") == "private")
        self.reply_json({"url": f"{self.hub.url}/{name}"})

    def info(self, name: str, revision: str | None) -> None:
        if (repository := self.repository(name)) is None:
            return
        files = repository.files(revision or "main")
        if files is None:
            return self.fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = repository.commits[-1][0] if revision in (None, "main") else revision
        siblings = [{"rfilename": path} for path in files]
        self.reply_json(
            {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        )

    def tree(self, name: str, revision: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        entries = []
        for path, file in (repository.files(revision) or {}).items():
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
            if file.oid:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        self.reply_json(entries)

    def preupload(self, name: str, revision: str) -> None:
        if self.repository(name, write=True) is None:
            return
        files = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"}
            for file in json.loads(self.body)["files"]
        ]  # fmt: skip
        self.reply_json({"files": files})

    def lfs_batch(self, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.hub.refused_uploads:
            self.hub.refused_uploads -= 1
            return self.fail(400, "the upload broke off")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "the content is not what was announced")
        self.hub.objects[oid] = self.body
        self.hub.uploads.append(oid)
        self.reply(b"")

    def lfs_download(self, oid: str) -> None:
        self.reply(self.hub.objects[oid])

    def commit(self, name: str, revision: str) -> None:
        if (repository := self.repository(name, write=True)) is None:
            return
        files = dict(repository.files() or {})
        for operation in map(json.loads, self.body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.fail(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], value["oid"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        self.reply_json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        files = repository.files(revision)
        if files is None:
            return self.fail(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = repository.commits[-1][0] if revision == "main" else revision
        if path not in files:
            return self.reply_json(
                {"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit
            )
        file = files[path]
        headers = {"X_Repo_Commit": commit, "ETag": f'"{file.etag}"'}
        if file.oid:  # large files are on another host, to which the client does not send its token
            headers |= {"X_Linked_ETag": f'"{file.oid}"', "X_Linked_Size": str(len(file.content))}
            location = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/lfs/{file.oid}"
            return self.reply(b"", 302, Location=location, **headers)
        self.reply(file.content, **headers)


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", r"/api/repos/create", _Handler.create),
    ("GET", rf"/api/models/{NAME}(?:/revision/([^/]+))?", _Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_upload),
    ("GET HEAD", r"/lfs/([0-9a-f]{64})", _Handler.lfs_download),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
