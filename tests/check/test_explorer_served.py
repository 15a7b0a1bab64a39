"""The explorer behind `crosscode view`, in a real browser: a note that is kept in the run, a typed prompt."""

import json
import shutil
import threading
from pathlib import Path

import browser
import pytest

from crosscode.commands.parts.viewing import ReportServer
from crosscode.commands.report import report_run

pytestmark = pytest.mark.skipif(bool(browser.MISSING), reason=f"the explorer in a browser: {browser.MISSING}")
RUN = Path(__file__).parents[1] / "fixtures" / "v1" / "run"


def test_notes_and_prompts_reach_the_run(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    report_run(run, n_tokens=64)
    with ReportServer(run, 0) as server, browser.Browser() as window:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        window.open(f"{server.url}#/latent/5")
        window.wait("document.getElementById('note')")
        window.run("note.value = 'mine'; note.dispatchEvent(new Event('change'))")
        window.wait("document.getElementById('saved').textContent === 'saved in the run'")
        assert json.loads((run / "report" / "notes.json").read_text()) == {"5": "mine"}
        window.run("document.getElementById('prompt-link').click()")
        window.wait("!document.getElementById('prompt').hidden")
        window.run("document.getElementById('prompt-text').value = 'def main(): return'")
        window.run("document.querySelector('#prompt-form button').click()")
        window.wait("document.querySelectorAll('#encoded a').length > 0", seconds=60)
        assert "return" in window.run("return document.getElementById('encoded').textContent")
        assert window.errors() == []
        server.shutdown()
