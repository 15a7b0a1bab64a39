"""Notebooks of examples/: run them, keep what they print, and make pages of them.

    python docs/tools/notebooks.py examples/own_tensors.ipynb ...      run, and keep the result in build/notebooks
    python docs/tools/notebooks.py --strip examples/*.ipynb            take outputs out of the files themselves

A result is kept for as long as the notebook and the sources of crosscode are what they were.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "notebooks"
MINUTES = 5


_STRICT = """
def _system(command, run=get_ipython().system):
    run(command)
    if status := get_ipython().user_ns["_exit_code"]:
        raise RuntimeError(f"exit status {status} of {command}")
get_ipython().system = _system
"""
"""Makes `!command` an error where it fails."""


def executed(source: Path) -> Any:
    """The notebook with its outputs, run in a fresh folder if it was not before.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its traceback.
    """
    key = key_of_sources(source)
    kept = RESULTS / source.name
    if kept.is_file() and (result := nbformat.read(kept, as_version=4)).metadata.get("made_from") == key:
        return result
    from nbclient import NotebookClient

    notebook, started = nbformat.read(source, as_version=4), time.monotonic()
    # `!crosscode` is the one of this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(_STRICT))
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=60 * MINUTES, resources={"metadata": {"path": folder}}).execute()
    del notebook.cells[0]
    notebook.metadata["made_from"] = key
    RESULTS.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    print(f"{source.name}: {time.monotonic() - started:.0f} s")
    return notebook


def key_of_sources(*more: Path) -> str:
    """Of crosscode as it is, and further files."""
    sources = [file for package in ("crosscode", "kernels") for file in (ROOT / package).rglob("*.py")]
    digest = hashlib.sha256()
    for file in [*more, *sorted(sources)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def strip(source: Path) -> bool:
    """Take outputs and counts out of a notebook's file; whether there were any."""
    notebook = nbformat.read(source, as_version=4)
    stale = [cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
    for cell in stale:
        cell.outputs, cell.execution_count = [], None
    if stale:
        nbformat.write(notebook, source)
    return bool(stale)


def title(source: Path) -> tuple[str, str]:
    """A notebook's heading, and the paragraph below it."""
    heading, _, rest = nbformat.read(source, as_version=4).cells[0].source.partition("\n")
    return heading.removeprefix("# "), rest.strip().split("\n\n")[0]


def overview(notebooks: list[Path]) -> str:
    """The page that lists all."""
    lines = [
        "# Examples",
        "",
        "Each is a notebook that the checks run as it stands, without a GPU, on the models that come with",
    ]
    lines += ["crosscode: `jupyter lab examples`.", ""]
    for source in notebooks:
        heading, question = title(source)
        lines += [f"- [{heading}]({source.stem}.md): {' '.join(question.split())}"]
    return "\n".join(lines) + "\n"


def as_markdown(source: Path, with_outputs: bool, folder: Path, links: Callable[[str], str]) -> str:
    """A page of the notebook, its text through `links`; its pictures go into `folder`."""
    notebook = executed(source) if with_outputs else nbformat.read(source, as_version=4)
    parts = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(links(cell.source))
        else:
            parts.append(f"```python\n{cell.source}\n```")
            parts += [_shown(output, folder, f"{source.stem}_{i}") for output in _joined(cell.outputs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _joined(outputs: list[Any]) -> list[Any]:
    """What was printed bit by bit, in one."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and output.name != "stdout":
            continue
        if found and output.output_type == found[-1]["output_type"] == "stream":
            found[-1]["text"] += output["text"]
        else:
            found.append(nbformat.NotebookNode(output))
    return found


def _shown(output: Any, folder: Path, name: str) -> str:
    if output.output_type == "stream":
        return f"```text\n{_as_a_terminal_shows(output['text'])}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(base64.b64decode(data["image/png"]))
        return f"![{name}]({name}.png)"
    if "<table" in data.get("text/html", ""):
        return re.sub(r'<style.*?</style>\s*| border="1" class="dataframe"|\n', "", data["text/html"], flags=re.DOTALL)
    return f"```text\n{data['text/plain']}\n```" if "text/plain" in data else ""


def _as_a_terminal_shows(text: str) -> str:
    return "\n".join(line.rpartition("\r")[2] for line in text.rstrip().splitlines())


if __name__ == "__main__":
    files = [Path(word).resolve() for word in sys.argv[1:] if not word.startswith("--")]
    for each in files:
        strip(each) if "--strip" in sys.argv else executed(each)
