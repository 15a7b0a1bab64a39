"""What the pages show is what happens: notebooks run, commands print what stands below them, configs are valid."""

from __future__ import annotations

import re
from pathlib import Path

import notebooks
import outputs
import pytest
import yaml

from crosscode.build.schema import check_config
from crosscode.models import ACTIVATIONS, ARCHITECTURES
from crosscode.objectives import TERMS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [
    (page.name, text)
    for page in PAGES
    for text in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if re.search(r"^train:", text, re.MULTILINE)
]
COMMANDS = [shown for page in PAGES for shown in outputs.shown_in(page) if shown.is_run]


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_stands(notebook):
    import nbformat

    if "import peft" in notebook.read_text(encoding="utf-8"):
        pytest.importorskip("peft")
    kept = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in kept), "python docs/tools/notebooks.py --strip"
    cells = [cell for cell in notebooks.executed(notebook).cells if cell.cell_type == "code"]
    failed = [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not failed and any(cell.outputs for cell in cells)
    assert not re.search(
        r"unknown option|unknown field|command not found|Traceback", "".join(_printed(cell) for cell in cells)
    )


def _printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


@pytest.mark.parametrize(("page", "text"), CONFIGS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(CONFIGS)])
def test_a_whole_config_on_a_page_is_valid(page, text):
    check_config(yaml.safe_load(text))


@pytest.mark.parametrize("registry", [ACTIVATIONS, ARCHITECTURES, TERMS], ids=lambda one: one.section)
def test_the_page_of_formulas_has_every_name(registry):
    text = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
    assert [name for name in registry if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands of all pages run, with the runs that they look at."""
    folder = tmp_path_factory.mktemp("pages")
    outputs.copy_runs(folder)
    return folder


@pytest.mark.parametrize("shown", COMMANDS, ids=lambda shown: f"{shown.page}: {shown.command}"[:80])
def test_a_command_prints_what_the_page_shows(shown, folder):
    printed = outputs.run(shown, folder)
    assert outputs.differences(shown, printed) == [], "\n".join(printed)


@pytest.mark.parametrize(
    ("page", "printed", "missing"),
    [
        ("a 1.5\nb", ["a 2e-3", "b"], []),
        ("a 1.5\nb", ["a 1.5", "c"], ["b"]),
        ("a\n...\nb", ["a", "x", "y", "b"], []),
        ("a\nb", ["a", "x", "b"], ["b"]),
        ("a\nb", [], ["a", "b"]),
    ],
)
def test_a_page_that_is_out_of_date_is_noticed(page, printed, missing):
    assert outputs.differences(outputs.Shown("page.md", "command", page.splitlines(), ""), printed) == missing
