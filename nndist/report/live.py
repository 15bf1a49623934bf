"""The pages of runs, served while they train: `nndist watch`.

A page is made from its folder when it is asked for, and kept while nothing in the folder changes. page.js asks for the
page again and takes over what is new. The server only reads, answers GET and HEAD, and hands out nothing but pages and
the files of figures/. A web page elsewhere can point a name of its own at this machine (DNS rebinding), so a request
must name this server by one of its own names.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from ..errors import UserError, first_line
from ..files import read_bytes
from ..runs.reading import is_run, read_run, run_folders
from . import index_page, run_page
from .index_page import Entry
from .markup import page, text

LOOPBACK = ("localhost", "127.0.0.1", "::1")
FIGURES = {".png": "image/png", ".gif": "image/gif"} | dict.fromkeys((".csv", ".txt"), "text/plain; charset=utf-8")
MAX_KEPT = 16  # pages
SILENT_SECONDS = 30.0  # of a connection, after which it is closed
HEADERS = {
    "Cache-Control": "no-cache",
    "Connection": "close",  # no thread waits for a window's next request
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Answer:
    """What a request gets. version: changes when the content does; "" for what is not kept."""

    status: int
    kind: str
    content: bytes
    version: str = ""


class Pages:
    """The pages of a folder of runs, or of one run, by their addresses; raises UserError if there is no such folder."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; name the folder of all runs, such as runs, or of one")
        self.root = root
        self.single = is_run(root)
        self._kept: dict[str, Answer] = {}
        self._entries: dict[Path, tuple[str, Entry]] = {}
        self._making = threading.Lock()

    def answer(self, address: str) -> Answer:
        """The page or file at an address, such as /mnist_cnn/first/report.html; raises nothing, whatever is there."""
        parts = [os.fsdecode(unquote_to_bytes(part)) for part in urlsplit(address).path.split("/")[1:]]
        if not address.startswith("/") or not all(map(is_plain, parts[:-1])):
            return _nothing()
        *above, last = parts
        try:
            if self.single and not above and last in ("", "report.html"):
                return self._page(address, self.root, self._run)
            if not self.single and not above and last in ("", "index.html"):
                return self._page(address, self.root, self._index)
            if not self.single and len(above) == 2 and last == "report.html":
                return self._page(address, self.root.joinpath(*above), self._run)
            if len(above) == (1 if self.single else 3) and above[-1] == "figures" and is_plain(last):
                return self._figure(self.root.joinpath(*above[:-1]), last)
        except (OSError, ValueError):  # gone, or a name that no file can have
            pass
        return _nothing()

    def _page(self, address: str, folder: Path, make: Callable[[Path, str], str]) -> Answer:
        with self._making:  # several windows don't make the same page at the same time
            version = self._version(folder)
            kept = self._kept.pop(address, None)
            if kept is None or kept.version != version:
                try:
                    status, html = 200, make(folder, version)
                except UserError as error:
                    status, html = 200 if folder == self.root else 404, _problem(str(error), version)
                except Exception as error:  # whatever is wrong with one run, the others can be watched
                    status, html = 500, _problem(f"{folder}: {type(error).__name__}: {first_line(error)}", version)
                kept = Answer(status, "text/html; charset=utf-8", html.encode("utf-8", "replace"), version)
            self._kept[address] = kept  # the last used is the last to go
            while len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            return kept

    def _run(self, folder: Path, version: str) -> str:
        return run_page.html_of(read_run(folder), version=version, up=not self.single)

    def _index(self, folder: Path, version: str) -> str:
        now = {one: self._entry(one) for one in run_folders(folder)}
        self._entries = now
        return index_page.html_of(folder, version=version, entry=lambda one: now[one][1])

    def _entry(self, folder: Path) -> tuple[str, Entry]:
        """A run in the index; read again only if it has changed."""
        version = version_of(files_of_run(folder))
        kept = self._entries.get(folder)
        return kept if kept and kept[0] == version else (version, index_page.entry_of(folder, self.root, live=True))

    def _version(self, folder: Path) -> str:
        if folder != self.root or self.single:
            return version_of(files_of_run(folder))
        found = sorted(folder.glob("*/*")) if folder.is_dir() else []
        return version_of([folder, *(file for one in found for file in (one / "run.json", one / "metrics.jsonl", one))])

    def _figure(self, folder: Path, name: str) -> Answer:
        path = folder / "figures" / name
        kind = FIGURES.get(path.suffix.lower())
        if kind is None or not is_run(folder) or not path.resolve().is_relative_to(folder.resolve()):
            return _nothing()
        return Answer(200, kind, read_bytes(path, follow=False))


def is_plain(part: str) -> bool:
    """Whether a part of an address can only be the name of something in a folder."""
    return bool(part) and not part.startswith(".") and not set(part) & set("/\\\0:" if os.name == "nt" else "/\\\0")


def files_of_run(folder: Path) -> list[Path]:
    """The files that a run's page is made of."""
    figures = sorted((folder / "figures").glob("*")) if (folder / "figures").is_dir() else []
    return [folder / "run.json", folder / "metrics.jsonl", folder / "checkpoints", *figures]


def version_of(files: Iterable[Path]) -> str:
    """A text that changes when one of the files does, appears or vanishes."""
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        try:
            found = file.stat()
        except (OSError, ValueError):
            continue
        digest.update(repr((str(file), found.st_ino, found.st_size, found.st_mtime_ns)).encode())
    return digest.hexdigest()


def _problem(line: str, version: str) -> str:
    """A page that says why there is no other; it asks again, too."""
    body = f"<header><h1>nndist</h1><p>{text(line)}</p></header>"
    return page("nndist", body, {"page": "problem", "version": version})


def _nothing() -> Answer:
    return Answer(404, "text/plain; charset=utf-8", b"there is no such page\n")


class Server(ThreadingHTTPServer):
    """Serves pages at one address of this machine; raises UserError if it can't be used.

    host: a name or number of this machine. port: 0 for a free one; afterwards the one in use.
    """

    daemon_threads = True
    allow_reuse_port = False
    allow_reuse_address = os.name != "nt"  # where it would share the address with another server

    def __init__(self, pages: Pages, host: str, port: int):
        self.pages, self.host = pages, host
        if not 0 <= port < 65536:
            raise UserError(f"--port {port}: must be from 0, for a free one, to 65535")
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.address_family = family
            super().__init__((str(place[0]), port), Handler)
        except OSError as error:
            if isinstance(error, socket.gaierror):
                raise UserError(
                    f"--host {host}: no name or number of this machine; leave it out for 127.0.0.1"
                ) from error
            reason = error.strerror or error
            raise UserError(f"--host {host} --port {port}: {reason}; --port 0 takes a free one") from error
        self.port = int(self.server_address[1])
        self.is_local = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's also asks for the host's full name, which may take long
        self.server_name, self.server_port = self.host, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a window that was closed
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    def is_named(self, header: str) -> bool:
        """Whether a request's Host is a name or address of this server; a rebound name is neither."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in LOOPBACK or name == self.host.lower():
            return True
        if self.is_local:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in (socket.gethostname().lower(), socket.getfqdn().lower())
        return True


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "nndist", ""
    timeout = SILENT_SECONDS
    server: Server

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.is_named(hosts[0]):
            said = f"this server is {self.server.url} and has no other name (nndist watch --host)\n"
            return self._send(Answer(421, "text/plain; charset=utf-8", said.encode()))
        answer = self.server.pages.answer(self.path)
        same = answer.version and self.headers.get("If-None-Match") == f'"{answer.version}"'
        self._send(Answer(304, answer.kind, b"", answer.version) if same else answer)

    do_HEAD = do_GET

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        rest = "" if answer.kind.startswith("text/html") else "default-src 'none'; "  # a page has a policy of its own
        self.send_header("Content-Security-Policy", f"{rest}frame-ancestors 'none'")
        if answer.version:
            self.send_header("ETag", f'"{answer.version}"')
        if answer.status != 304:
            self.send_header("Content-Type", answer.kind)
            self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: a line per request would hide the address."""
