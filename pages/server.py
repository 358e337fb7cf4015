"""A server for one person's browser on this machine: files, and calls that answer in JSON.

Other sites can send requests to 127.0.0.1 as well. So every address starts with a secret token, and
Host and Origin must be this server's. A request is a name and settings, as in TOKEN/state?x=1. It
has no body, and its name is a file of FILES or a call, never a path of the disk.
"""

import hmac
import json
import mimetypes
import secrets
import sys
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qsl

FILES = ("style.css", "common.js", "label.html", "label.js", "play.html", "play.js")


class Server(ThreadingHTTPServer):
    """Serves FILES and calls, functions of a request's settings {name: text, "" for none}.

    A call returns a dict, which is sent as JSON, bytes, or a function that sends several lines of
    JSON by the function send(dict) that it gets. It may raise ValueError or OSError."""

    def __init__(self, page, calls):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls = {call.__name__: call for call in calls}
        self.lock = Lock()  # one call at a time
        self.token = secrets.token_urlsafe(16)
        self.host = f"127.0.0.1:{self.server_port}"
        self.address = f"http://{self.host}/{self.token}/{page}"
        print(f"open {self.address} in a browser; Ctrl-C ends", flush=True)

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # the browser closed the connection
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds without a byte

    def do_GET(self):
        path, _, query = self.path.partition("?")
        token, _, name = path[1:].partition("/")
        headers, origins = self.headers, (None, f"http://{self.server.host}")
        if headers["Host"] != self.server.host or headers["Origin"] not in origins:
            self.send({"error": "requests of other sites are refused"}, 403)
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self.send({"error": "open the address that the command printed"}, 403)
        elif headers.get("Content-Length", "0") != "0" or headers["Transfer-Encoding"]:
            self.send({"error": "a request must have no body"}, 413)
        elif name in FILES:
            kind, _ = mimetypes.guess_type(name)
            self.send(Path(__file__).with_name(name).read_bytes(), kind=kind)
        elif name in self.server.calls and self.command == "POST":
            with self.server.lock:
                try:
                    self.send(self.server.calls[name](defaultdict(str, parse_qsl(query))))
                except (ValueError, OSError) as error:
                    self.send({"error": str(error)}, 400)
        else:
            self.send({"error": "there is nothing at this address"}, 404)

    do_POST = do_GET

    def send(self, answer, status=200, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        if isinstance(answer, dict):
            answer = json.dumps(answer).encode()
        if callable(answer):
            answer(lambda line: self.wfile.write(json.dumps(line).encode() + b"\n"))
        else:
            self.wfile.write(answer)

    def log_message(self, *args):
        pass
