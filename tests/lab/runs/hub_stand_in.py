"""The hub's interface as far as an upload needs it, on this machine."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to whoami, a new repository, preupload and commit."""

    def do_GET(self):
        if self.path.startswith("/api/whoami"):
            return self._answer({"name": "someone", "type": "user", "orgs": []})
        return self._answer({"error": self.path}, 404)

    def do_POST(self):
        held = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        if self.path == "/api/repos/create":
            asked = json.loads(held)
            server.repos.append(asked)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            return self._answer({"url": f"{server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            files = json.loads(held)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in files]  # fmt: skip
            return self._answer({"files": modes})
        if "/commit/" in self.path:
            if server.full:
                return self._answer({"error": "no room"}, 507)
            for line in held.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
            return self._answer({
                "commitUrl": f"{server.address}/someone/own/commit/1", "commitOid": "1" * 40,
                "hookOutput": "", "success": True,
            })  # fmt: skip
        return self._answer({"error": self.path}, 404)

    def _answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def hub():
    """A server; its ``address``, the ``repos`` asked for and the ``files`` committed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.files, server.full = [], {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
