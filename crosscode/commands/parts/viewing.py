"""The explorer behind a server: its files, notes that are kept in the run, and prompts that are encoded live.

A page from elsewhere that the same browser shows must neither read nor write here. So the server listens on loopback
alone, answers to loopback names alone (another site's name may be made to mean 127.0.0.1), lets no other origin load its
files, and takes what is posted from its own pages alone. It serves files by exact name, never through a link.
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Annotated, Any

from pydantic import Field

from crosscode.build.finished import FinishedRun
from crosscode.commands.parts.reading import latents_of_text
from crosscode.errors import CrosscodeError, InputError, first_line
from crosscode.files import check_is_no_link, json_text, write_json
from crosscode.models.checkpoint import read_config
from crosscode.runs.run_files import is_ours
from crosscode.stored import Count, Stored, parse_json

log = logging.getLogger("crosscode")

_LOOPBACK = "127.0.0.1"
_HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")
_LARGEST_BODY = 1 << 16
_N_STRONGEST = 10
_TYPES = {".html": "text/html", ".js": "text/javascript", ".json": "application/json"}
_Text = Annotated[str, Field(max_length=10_000)]
Notes = dict[str, str]
"""`report/notes.json`: what somebody wrote on latents, by number"""


class Note(Stored):
    """What `POST notes` takes; an empty text removes the note. `was`: what stood there when the page was opened; where something
    else stands there now, it stays."""

    latent: Count
    text: _Text
    was: _Text | None = None


class TypedPrompt(Stored):
    """What `POST encode` takes. `chat`: the text is what a user says."""

    text: _Text
    chat: bool = False


class ReportServer(ThreadingTCPServer):
    """Serves `report/` of a run on 127.0.0.1. `port` 0: a free one; `url` says which.

    Raises:
        InputError: no run there, no report in it yet, its model is damaged, or the port cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, run_dir: str | Path, port: int, trust_remote_code: bool = False):
        self.run = FinishedRun(run_dir, trust_remote_code)
        self._notes_lock, self._encode_lock = threading.Lock(), threading.Lock()
        if not (self.run.path / "report" / "index.html").is_file():
            raise InputError(f"run: {str(run_dir)!r} has no report yet; write it with: crosscode report {run_dir}")
        self.run.check_whole()
        try:
            super().__init__((_LOOPBACK, port), _Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is in use already" if taken else error.strerror
            raise InputError(f"port = {port}: {reason}; choose another, or 0 for a free one") from error

    @property
    def url(self) -> str:
        return f"http://{_LOOPBACK}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error of ours; nothing else gets here."""
        log.debug("view: a connection broke", exc_info=True)

    # ---- what is asked for

    def file(self, path: str) -> bytes:
        """A file of the report.

        Raises:
            FileNotFoundError: no file of ours is called that.
            InputError: there is a link on the way.
        """
        relative = Path(f"report{path}")
        if not is_ours(relative):
            raise FileNotFoundError
        for part in (*reversed(relative.parents), relative):
            check_is_no_link(self.run.path / part)
        return (self.run.path / relative).read_bytes()

    def notes(self) -> Notes:
        """Notes by latent."""
        try:
            return parse_json(self.file("/notes.json"), Notes, "report/notes.json")
        except FileNotFoundError:
            return {}

    def write_note(self, note: dict[str, Any]) -> dict[str, Any]:
        latent, text = note["latent"], note["text"]
        n_latents = read_config(self.run.model_folder)["model"]["n_latents"]
        if latent >= n_latents:
            raise InputError(f"latent = {latent}: must be below {n_latents}")
        with self._notes_lock, self.run.directory.held():
            self.file("/index.html")  # neither replaced by a link nor gone
            found = self.notes()
            now, was = found.get(str(latent), ""), note.get("was")
            if was is not None and now.strip() != was.strip():
                raise InputError(f"latent {latent} has another note since this page was opened: {now[:80]!r}")
            found[str(latent)] = text
            kept = {key: found[key] for key in sorted(found, key=lambda key: (len(key), key)) if found[key].strip()}
            write_json(self.run.path / "report" / "notes.json", kept)
        return {"latent": latent}

    def encode(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """`tokens` (S) as text, and for each the `strongest` pairs of latent and activation. The first call loads the
        models."""
        text = [{"role": "user", "content": prompt["text"]}] if prompt.get("chat") else prompt["text"]
        with self._encode_lock:
            found = latents_of_text(self.run, text)
        return {
            "tokens": found.tokens,
            "strongest": [found.strongest(position, _N_STRONGEST) for position in range(len(found.tokens))],
        }


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "crosscode", ""
    timeout = 30

    def do_GET(self) -> None:
        self._answer(self._got)

    def do_POST(self) -> None:
        self._answer(self._posted)

    def _answer(self, respond: Callable[[], tuple[str, bytes]]) -> None:
        try:
            kind, body = respond()
        except _Refused as refused:
            self.send_error(refused.status, str(refused))
        except FileNotFoundError:
            self.send_error(HTTPStatus.NOT_FOUND, "not found")
        except CrosscodeError as error:
            self.send_error(HTTPStatus.BAD_REQUEST, first_line(error))
        except Exception as error:  # of any library that has a part in it
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {first_line(error)}")
        else:
            self._send(HTTPStatus.OK, kind, body)

    def _got(self) -> tuple[str, bytes]:
        self._check_host()
        path = self.path.partition("?")[0]
        if path == "/notes":
            return _json(self.server.notes())
        path = "/index.html" if path == "/" else path
        return _TYPES.get(Path(path).suffix, "text/plain"), self.server.file(path)

    def _posted(self) -> tuple[str, bytes]:
        body = self._body()  # read in any case: the answer to what was not read may be lost
        host = self._check_host()
        if self.headers.get_all("Origin") != [f"http://{host}"]:
            raise _Refused(HTTPStatus.FORBIDDEN, "Origin: only this server's own pages may post")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type: must be application/json")
        if self.path == "/notes":
            return _json(self.server.write_note(parse_json(body, Note, "note")))
        if self.path == "/encode":
            return _json(self.server.encode(parse_json(body, TypedPrompt, "prompt")))
        raise FileNotFoundError

    def _check_host(self) -> str:
        host = self.headers.get_all("Host") or []
        if len(host) != 1 or not _HOSTS.fullmatch(host[0]):
            raise _Refused(HTTPStatus.FORBIDDEN, "Host: must be localhost or 127.0.0.1")
        return host[0]

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length: required")
        if int(length) > _LARGEST_BODY:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_LARGEST_BODY} bytes may be posted")
        return self.rfile.read(int(length))

    # ---- answers

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """One line, as JSON; also of what the library refuses by itself."""
        status = HTTPStatus(code)
        self._send(status, *_json({"error": message or status.phrase}))

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing of single requests."""


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json_text(value, indent=None).encode()
