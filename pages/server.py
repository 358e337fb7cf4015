"""A server for one person's browser on this machine: a page, calls that answer in JSON, and files.

Other sites can send requests to 127.0.0.1 as well. So every address starts with a secret token, and
Host and Origin must be this server's. A request names a call, never a path of the disk.
"""

import hmac
import json
import mimetypes
import re
import secrets
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from runtime.cli import BadInput

MOST_BYTES = 4096  # of a request's body
PARTS = {
    path.name: path for path in Path(__file__).parent.iterdir() if path.suffix in (".css", ".js")
}
HEADERS = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """Refused(HTTP status, one line that says why)."""


class Server(ThreadingHTTPServer):
    """A page of this folder, and calls: {"GET name" or "POST name": function of a dict, which holds
    query and JSON body, to a dict, sent as JSON, or the Path of a file}. It may raise Refused or
    BadInput, whose line the page gets."""

    def __init__(self, page, calls, port):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise BadInput(f"--port {port}: {error}; 0 takes any free port") from None
        files = PARTS | {"": Path(__file__).with_name(page)}
        self.calls = {
            f"GET {name}": lambda _, path=path: path for name, path in files.items()
        } | calls
        self.token = secrets.token_urlsafe(16)
        self.hosts = [f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"]

    def serve(self):
        """Answers until Ctrl-C."""
        print(f"open http://{self.hosts[0]}/{self.token}/ in a browser; Ctrl-C ends", flush=True)
        with self, suppress(KeyboardInterrupt):
            self.serve_forever()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # of a browser that left in the middle
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds without a byte

    def do_GET(self):
        status, headers = 200, HEADERS | {"Content-Type": "application/json"}
        try:
            answer = self.call()
            is_file = isinstance(answer, Path)
            content = answer.read_bytes() if is_file else json.dumps(answer).encode()
        except (Refused, BadInput, OSError) as error:
            self.close_connection = True  # part of the request may not have been read
            status = error.args[0] if isinstance(error, Refused) else 409
            is_file, content = False, json.dumps({"error": str(error.args[-1])}).encode()
        if is_file:
            headers["Content-Type"] = mimetypes.guess_type(answer.name)[0] or "video/mp4"
            part = re.fullmatch("bytes=([0-9]{1,15})-([0-9]{0,15})", self.headers.get("Range", ""))
            if part and int(part[1]) < len(content):  # a player that goes on in the middle
                first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
                status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(content)}"
                content = content[first : last + 1]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def call(self):
        hosts, length = self.server.hosts, self.headers.get("Content-Length", "0")
        origin = self.headers.get("Origin", f"http://{hosts[0]}")
        if self.headers.get("Host") not in hosts or origin.removeprefix("http://") not in hosts:
            raise Refused(403, "requests of other sites are refused")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,15}", length):
            raise Refused(411, "Content-Length must say how long the body is")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"a body has at most {MOST_BYTES} bytes")
        try:
            url = urlsplit(self.path)
            _, token, name = url.path.split("/", 2)
            data = dict(parse_qsl(url.query)) | json.loads(self.rfile.read(int(length)) or "{}")
        except (
            ValueError,
            TypeError,
            RecursionError,
        ):  # JSON that is no object, or nested too deep
            raise Refused(400, "this request cannot be read") from None
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(403, "open the address that the command printed")
        if f"{self.command} {name}" not in self.server.calls:
            raise Refused(404, "there is nothing at this address")
        return self.server.calls[f"{self.command} {name}"](data)

    def log_message(self, *args):
        pass
