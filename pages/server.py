"""A server for one person's browser on this machine: files, and calls that answer in JSON.

Other sites can send requests to 127.0.0.1 as well. So every address starts with a secret token, and
Host and Origin must be this server's. A request names a call, never a path of the disk.
"""

import hmac
import json
import mimetypes
import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

MOST_BYTES = 4096  # of a request's body
SUFFIXES = (".html", ".css", ".js")
FILES = {path.name: path for path in Path(__file__).parent.iterdir() if path.suffix in SUFFIXES}
POLICY = "default-src 'self'; img-src data:; media-src blob:; frame-ancestors 'none'"


class Server(ThreadingHTTPServer):
    """Serves the files of this folder, and calls: {name: function of a dict, the request's JSON}.

    A call returns a dict, which is sent as JSON, bytes, or a function that answers in several lines
    of JSON by the function send(dict) that it gets. It may raise ValueError or OSError."""

    def __init__(self, page, calls):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls, self.lock = calls, Lock()  # one call at a time
        self.token = secrets.token_urlsafe(16)
        self.hosts = [f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"]
        self.address = f"http://{self.hosts[0]}/{self.token}/{page}"
        print(f"open {self.address} in a browser; Ctrl-C ends", flush=True)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # the browser closed the connection
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte

    def do_GET(self):
        token, _, name = self.path[1:].partition("/")
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        length = self.headers.get("Content-Length", "0")
        if host not in self.server.hosts or origin not in (None, f"http://{host}"):
            self.send({"error": "requests of other sites are refused"}, 403)
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self.send({"error": "open the address that the command printed"}, 403)
        elif name not in (FILES if self.command == "GET" else self.server.calls):
            self.send({"error": "there is nothing at this address"}, 404)
        elif not (length.isascii() and length.isdigit()) or float(length) > MOST_BYTES:
            self.send({"error": f"a body must have at most {MOST_BYTES} bytes"}, 413)
        elif self.command == "GET":
            self.send(FILES[name].read_bytes(), kind=mimetypes.guess_type(name)[0])
        else:
            self.call(self.server.calls[name], self.rfile.read(int(length)))

    do_POST = do_GET

    def call(self, function, body):
        try:
            data = json.loads(body)
            if not isinstance(data, dict):
                raise ValueError("the body must be a JSON object")
            with self.server.lock:
                answer = function(data)
        except (ValueError, RecursionError, OSError) as error:
            return self.send({"error": str(error)}, 400)
        self.send(answer)

    def send(self, answer, status=200, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Referrer-Policy", "no-referrer")  # the address holds the token
        self.end_headers()
        if isinstance(answer, dict):
            answer = json.dumps(answer).encode()
        if callable(answer):
            answer(lambda line: self.wfile.write(json.dumps(line).encode() + b"\n"))
        else:
            self.wfile.write(answer)

    def log_message(self, *args):
        pass
