"""The map of images in a browser, served on this machine.

The server only serves its own static files, and images by row number; a path is never part of an address. The page
loads nothing from elsewhere, which a content security policy enforces.
"""

import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import socketserver
import sys
import tempfile
import webbrowser
from functools import lru_cache, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, final
from urllib.parse import parse_qs, urlsplit

import torch

from moco.data import BadImage
from moco.data.decode import decode, quiet_pillow
from moco.explore.atlas import Atlas, page_data
from moco.explore.single_file import SCRIPTS, read_page
from moco.explore.thumbnails import large

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LARGEST_UPLOAD = 32 * 2**20
"""Most bytes of an image to search by."""
KEPT = 128
"""Number of answers that are cached, most of them sheets of thumbnails of about 160 kB."""
STATIC = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css")} | {
    f"/{name}": (name, "text/javascript") for name in SCRIPTS
}
_LOG = logging.getLogger("moco")


class Answer(NamedTuple):
    """Status, media type and body of an answer; `lasting`: it stays the same while the server runs."""

    status: HTTPStatus
    kind: str
    body: bytes
    lasting: bool = False


def serve(atlas: Atlas, *, host: str = "127.0.0.1", port: int = 0) -> "Server":
    """Start listening; the server has a `.url`, answers in `.serve_forever()`, and is closed as a context manager.

    On any but a loopback address, a random token is required, which is part of the URL.

    Args:
        atlas: the map to show.
        host: address of this machine to listen on.
        port: port to listen on; 0: any free port.

    Raises:
        ValueError: the port is in use, or the address does not belong to this machine.

    Example:
        >>> with serve(open_atlas("emb/")) as server:                                        # doctest: +SKIP
        ...     print(server.url)
        ...     server.serve_forever()
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; expected 1 to 65535, or 0 for any free port")
    try:
        return Server(atlas, host, port)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host} port {port} ({error.strerror}); give another --port (0: any free one) or --host"
        ) from None


def show(url: str) -> bool:
    """Open a browser if there is a display for one; returns whether it did."""
    if sys.platform not in ("darwin", "win32") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False  # a text browser would take the terminal
    return webbrowser.open(url)


@final
class Server(ThreadingHTTPServer):
    """Serves one map; made by `serve`."""

    daemon_threads = True

    def __init__(self, atlas: Atlas, host: str, port: int):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.atlas, self.respond = atlas, lru_cache(KEPT)(partial(respond, atlas))
        self.session = f'"{secrets.token_hex(8)}"'
        self.data = json.dumps(page_data(atlas, whole=False), separators=(",", ":")).encode()
        loopback = _is_loopback(self.server_address[0])
        self.token = None if loopback else secrets.token_urlsafe(24)
        number = self.server_address[1]
        self.hosts = frozenset(f"{name}:{number}" for name in ("127.0.0.1", "localhost", "[::1]", _bracketed(host)))
        everywhere = host in ("0.0.0.0", "::", "")
        shown = f"http://{socket.gethostname() if everywhere else _bracketed(host)}:{number}/"
        self.url = shown if self.token is None else f"{shown}?token={self.token}"

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `shutdown`; warning filters belong to the process, so they are set once around all threads."""
        with quiet_pillow():
            super().serve_forever(poll_interval)

    def server_bind(self) -> None:
        """Bind without looking up a name for the address, which might query a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not report it as an error when a browser closes the connection."""
        _LOG.debug("request from %s not answered", client_address, exc_info=True)


def respond(atlas: Atlas, path: str) -> Answer | None:
    """Answer a GET of anything but data.json, inside `quiet_pillow`; None: not found.

    Args:
        atlas: the map to show.
        path: path of the request, as received.
    """
    if path in STATIC:
        name, kind = STATIC[path]
        return Answer(HTTPStatus.OK, f"{kind}; charset=utf-8", read_page(name).encode(), lasting=True)
    found = re.fullmatch(r"/(image|sheet|neighbours)/(0|[1-9][0-9]{0,8})", path, re.ASCII)
    if not found or int(found[2]) >= (atlas.num_sheets if found[1] == "sheet" else len(atlas)):
        return None
    number = int(found[2])
    if found[1] == "image":
        try:
            return Answer(HTTPStatus.OK, *large(atlas.images, number), lasting=True)
        except BadImage:
            return None
    return _json(atlas.sheet(number) if found[1] == "sheet" else atlas.neighbours(number)._asdict(), lasting=True)


def search_upload(atlas: Atlas, content: bytes) -> Answer:
    """Neighbours of an uploaded image; inside `quiet_pillow`."""
    if atlas.encoder is None:
        return _plain(HTTPStatus.NOT_FOUND, "The encoder of these embeddings is not available.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image"
        file.write_bytes(content)
        try:
            pixels = torch.from_numpy(decode(str(file), atlas.encoder.channels))
        except BadImage as bad:
            return _plain(HTTPStatus.BAD_REQUEST, f"This cannot be read as an image: {bad.reason}")
        return _json(atlas.search(pixels)._asdict())


@final
class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "moco", ""
    timeout = 60  # seconds of a connection on which nothing comes

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        token = self._here.token
        if token and path == "/" and _same(parse_qs(query).get("token", [""])[0], token):
            # From now on, the browser has it as a cookie, and it need not be in the address bar or the history.
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", "./")
            self.send_header("Set-Cookie", f"{self._cookie}={token}; HttpOnly; SameSite=Strict; Path=/")
            self._finish(b"", "no-store")
        elif self._allowed():
            if path == "/data.json":
                self._send(Answer(HTTPStatus.OK, "application/json", self._here.data, lasting=True))
            else:
                found = self._here.respond(path)
                self._send(found or _plain(HTTPStatus.NOT_FOUND, "Not found."))

    def do_POST(self) -> None:
        # A body that is refused unread would be taken for the next request.
        self.close_connection = True
        length = self.headers.get("Content-Length", "")
        if not self._allowed():
            return
        if self.path != "/search":
            self._send(_plain(HTTPStatus.NOT_FOUND, "Not found."))
        elif not (length.isascii() and length.isdigit()):
            self._send(_plain(HTTPStatus.LENGTH_REQUIRED, "Content-Length is required."))
        elif int(length[:12]) > LARGEST_UPLOAD:
            most = LARGEST_UPLOAD // 2**20
            self._send(_plain(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"The file is larger than {most} MiB; shrink it."))
            for _ in range(8 * most):  # a browser reads no answer before it has sent most of the body
                if not self.rfile.read(2**17):
                    break
        else:
            self._send(search_upload(self._here.atlas, self.rfile.read(int(length))))

    @property
    def _here(self) -> Server:
        assert isinstance(self.server, Server)
        return self.server

    @property
    def _cookie(self) -> str:
        # Cookies do not distinguish ports.
        return f"moco-{self._here.server_address[1]}"

    def _allowed(self) -> bool:
        """Refuses a foreign Host, another origin, or a missing token."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            self._send(_plain(HTTPStatus.FORBIDDEN, "Request from another page refused."))
        elif self._here.token is None:
            # A foreign name that resolves to this machine would let another page pass for ours (DNS rebinding).
            if host.lower() in self._here.hosts:
                return True
            self._send(_plain(HTTPStatus.FORBIDDEN, "Wrong address: open the one that the program printed."))
        else:
            pairs = (pair.strip().partition("=") for pair in self.headers.get("Cookie", "").split(";"))
            if any(name == self._cookie and _same(value, self._here.token) for name, _, value in pairs):
                return True
            self._send(_plain(HTTPStatus.FORBIDDEN, "Open the address with the token, as the program printed it."))
        return False

    def _send(self, found: Answer) -> None:
        # Row numbers mean different images in another session, so a browser must ask whether its cache is still valid.
        session = self._here.session
        known = found.lasting and self.headers.get("If-None-Match") == session
        self.send_response(HTTPStatus.NOT_MODIFIED if known else found.status)
        if found.lasting:
            self.send_header("ETag", session)
        if not known:
            self.send_header("Content-Type", found.kind)
        self._finish(None if known else found.body, "private, no-cache" if found.lasting else "no-store")

    def _finish(self, body: bytes | None, kept: str) -> None:
        for name, value in (
            ("Content-Security-Policy", POLICY),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", kept),
        ):
            self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: Any) -> None:
        _LOG.debug(format, *args)


def _json(value: Any, *, lasting: bool = False) -> Answer:
    return Answer(HTTPStatus.OK, "application/json", json.dumps(value).encode(), lasting)


def _plain(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", text.encode())


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def _is_loopback(address: Any) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
