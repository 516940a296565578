"""A stand-in for the model hub on loopback: what huggingface_hub asks to push and to fetch."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory.

    Attributes:
        repos: owner/name → file name → its bytes.
        private: the names of repositories that were made private.
        tokens: what callers of each request said they are.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.uploaded, self.private, self.tokens = {}, {}, set(), []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        super().__exit__(*error)


SHA = "0123456789" * 4


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):
        hub, body = self.server, self.body()
        hub.tokens.append(self.headers.get("Authorization"))
        if hub.tokens[-1] != "Bearer secret":
            return self.reply({"error": "who are you?"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            hub.repos.setdefault(name, {})
            return self.reply({"url": f"{hub.url}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return self.reply({"files": modes})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    **o,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}},
                }
                for o in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            files = hub.repos[found[1]]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.uploaded[value["oid"]]
            url = f"{hub.url}/{found[1]}/commit/{SHA}"
            return self.reply({"commitUrl": url, "commitOid": SHA, "success": True})
        return self.reply({"error": "not found"}, 404)

    def do_PUT(self):
        data = self.body()
        self.server.uploaded[hashlib.sha256(data).hexdigest()] = data
        self.reply(b"")

    def do_GET(self):
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/.*", self.path):
            if found[1] not in self.server.repos:
                return self.reply({"error": "no"}, 404, X_Error_Code="RepoNotFound")
            files = self.server.repos[found[1]]
            if found[2] == "tree":
                entries = [
                    {"type": "file", "path": p, "size": len(f), "oid": SHA}
                    for p, f in files.items()
                ]
                return self.reply(entries)
            siblings = [{"rfilename": p} for p in files]
            return self.reply({"id": found[1], "sha": SHA, "siblings": siblings})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            data = self.server.repos.get(found[1], {}).get(found[2])
            if data is not None:
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                return self.reply(data, ETag=etag, X_Repo_Commit=SHA)
        return self.reply({"error": "no"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815
