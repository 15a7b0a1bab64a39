"""`crosscode view`: files, notes and prompts for the explorer's own page; nothing for anybody else."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crosscode.build.finished import FinishedRun
from crosscode.commands.cli import main
from crosscode.commands.parts.reading import latents_of_text
from crosscode.commands.parts.viewing import ReportServer
from crosscode.commands.report import report_run
from crosscode.errors import InputError
from crosscode.runs.run_files import find_files, remove_files

FIXTURE = Path(__file__).parents[2] / "fixtures" / "v1" / "run"


@pytest.fixture
def run(tmp_path):
    """A run with a report that is a page alone."""
    shutil.copytree(FIXTURE, tmp_path / "run")
    (tmp_path / "run" / "report" / "data").mkdir(parents=True)
    (tmp_path / "run" / "report" / "index.html").write_text("<p>page</p>")
    (tmp_path / "run" / "report" / "data" / "table.js").write_text("crosscodeData()")
    return tmp_path / "run"


@pytest.fixture
def ask():
    """`ask(run, method, path, body, **headers)`: status, headers and body of the answer, by a server in a thread."""
    servers = {}

    def ask(run, method, path, body=None, **headers):
        if run not in servers:
            servers[run] = ReportServer(run, 0)
            threading.Thread(target=servers[run].serve_forever, kwargs={"poll_interval": 0.01}).start()
        host = servers[run].url.removeprefix("http://").rstrip("/")
        connection = http.client.HTTPConnection(host, timeout=60)
        sent = {"Host": host}
        if method == "POST":
            sent |= {"Origin": f"http://{host}", "Content-Type": "application/json"}
        body = body if body is None or isinstance(body, str) else json.dumps(body)
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {name: value for name, value in sent.items() if value is not None})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()

    yield ask
    for server in servers.values():
        server.shutdown()
        server.server_close()


def test_the_page_of_a_report_notes_and_prompts(run, ask):
    shutil.rmtree(run / "report")
    report_run(run, n_tokens=64)
    for path in ("/", *(f"/{file.relative_to(run / 'report')}" for file in (run / "report").rglob("*.*"))):
        status, headers, body = ask(run, "GET", path)
        name = "index.html" if path == "/" else path[1:]
        assert status == 200 and body == (run / "report" / name).read_bytes(), path
        assert (
            headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Content-Type-Options"] == "nosniff"
        )
    assert ask(run, "GET", "/")[1]["Content-Type"] == "text/html; charset=utf-8"

    text = "def main(): return"
    status, _, body = ask(run, "POST", "/encode", {"text": text})
    found, expected = json.loads(body), latents_of_text(FinishedRun(run), text)
    assert status == 200 and found["tokens"] == expected.tokens
    assert found["strongest"] == [
        [list(pair) for pair in expected.strongest(position)] for position in range(len(expected.tokens))
    ]
    assert any(found["strongest"])
    status, _, body = ask(run, "POST", "/encode", {"text": text, "chat": True})
    assert status == 400 and "chat template" in json.loads(body)["error"]
    status, _, body = ask(run, "POST", "/encode", {"text": "def " * 2000})
    assert status == 400 and json.loads(body)["error"].startswith("text: 2")


def test_notes_are_kept_in_the_run_and_go_with_it(run, ask):
    assert ask(run, "GET", "/notes")[::2] == (200, b"{}")
    for latent, text in ((5, "five"), (2, "«two»"), (3, "three")):
        assert ask(run, "POST", "/notes", {"latent": latent, "text": text})[0] == 200
    assert ask(run, "POST", "/notes", {"latent": 3, "text": " "})[0] == 200
    notes = {"2": "«two»", "5": "five"}
    assert json.loads(ask(run, "GET", "/notes")[2]) == notes
    assert json.loads((run / "report" / "notes.json").read_text()) == notes
    status, _, body = ask(run, "POST", "/notes", {"latent": 5, "text": "of another tab", "was": "four"})
    assert status == 400 and "latent 5 has another note since this page was opened: 'five'" in json.loads(body)["error"]
    assert json.loads(ask(run, "GET", "/notes")[2]) == notes
    assert ask(run, "POST", "/notes", {"latent": 5, "text": "six", "was": "five"})[0] == 200
    assert not find_files(run).foreign
    remove_files(run)
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("status", "reason", "body", "headers"),
    [
        (403, "Origin", None, {"Origin": "http://evil.example"}),
        (403, "Origin", None, {"Origin": "null"}),
        (403, "Origin", None, {"Origin": None}),
        (403, "Host", None, {"Host": "evil.example", "Origin": "http://evil.example"}),
        (415, "Content-Type", None, {"Content_Type": "text/plain"}),
        (413, "at most", "x" * 70_000, {}),
        (411, "Content-Length", None, {"Content_Length": "-1"}),
        (400, "JSON", "{", {}),
        (400, "note: latent = -1", {"latent": -1, "text": "x"}, {}),
        (400, "latent = 1000000: must be below", {"latent": 10**6, "text": "x"}, {}),
        (400, "note: latent = ", {"latent": "../x", "text": "x"}, {}),
        (400, "note: text = ", {"latent": 1, "text": "x" * 10_001}, {}),
        (400, "note: text = ", '{"latent": 1, "text": "\\ud800"}', {}),
        (400, "JSON", "[" * 60_000, {}),
    ],
)
def test_what_is_posted_from_elsewhere_or_badly_is_refused(run, ask, status, reason, body, headers):
    found, _, answer = ask(run, "POST", "/notes", {"latent": 1, "text": "x"} if body is None else body, **headers)
    error = json.loads(answer)["error"]
    assert found == status and reason in error and "\n" not in error
    assert not (run / "report" / "notes.json").exists()


def test_only_files_of_the_report_are_served(run, ask, tmp_path):
    (tmp_path / "secret.js").write_text("secret")
    (run / "report" / "mine.txt").write_text("mine")
    for path in (
        "/../config.yaml",
        "/data/../../config.yaml",
        "/%2e%2e/config.yaml",
        "//etc/passwd",
        "/..\\config.yaml",
        "/mine.txt",
        "/data",
        "/data/",
        "/data/texts.js",
        "/encode",
    ):
        status, _, body = ask(run, "GET", path)
        assert status == 404 and json.loads(body) == {"error": "not found"}, path
    assert ask(run, "GET", "/data/table.js?x=1")[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example", ""):
        assert ask(run, "GET", "/", Host=host)[0] == 403
    assert ask(run, "GET", "/", Host="localhost:9000")[0] == 200, "the other end of ssh has its own port"
    (run / "report" / "data" / "texts.js").symlink_to(tmp_path / "secret.js")
    status, _, body = ask(run, "GET", "/data/texts.js")
    assert status == 400 and "is a link" in json.loads(body)["error"]
    (run / "report" / "notes.json").symlink_to(tmp_path / "notes.json")
    assert ask(run, "POST", "/notes", {"latent": 1, "text": "x"})[0] == 400
    assert not (tmp_path / "notes.json").exists()
    assert ask(run, "DELETE", "/")[0] == 501


def test_no_report_and_a_port_in_use_are_one_line(run, capsys):
    with ReportServer(run, 0) as server:
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"
        assert main(["view", str(run), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"crosscode: port = {port}: is in use already; choose another, or 0 for a free one\n"
    )
    (run / "report" / "index.html").unlink()
    assert main(["view", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"crosscode: run: {str(run)!r} has no report yet; write it with: crosscode report {run}\n"
    )


def test_figures_of_a_damaged_model_are_not_shown(run):
    (run / "final" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"final': damaged \(model.safetensors is missing\)"):
        ReportServer(run, 0).server_close()


def test_a_signal_ends_it_with_one_line(run):
    command = [sys.executable, "-m", "crosscode.commands.cli", "view", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    _, problem = process.communicate(timeout=60)
    assert process.returncode == 143 and problem.splitlines()[-1] == "crosscode: stopped by SIGTERM"
