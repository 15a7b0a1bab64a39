"""What the pages show is what happens: notebooks run, commands print what stands below them, configs are valid."""

from __future__ import annotations

import re
from pathlib import Path

import notebooks
import outputs
import pytest
import yaml

from crosscode.build.schema import check_config, experiment_class
from crosscode.commands.parts.options import annotations_at
from crosscode.config.language_models import LanguageModelConfig
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
COMMANDS = [shown for page in PAGES for shown in outputs.shown_in(page)]


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


# ---- what a page is made of


GUIDE = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_a_page_starts_from_a_question_and_shows_what_a_command_prints(page):
    title, question, *_ = re.split(r"\n\n+", page.read_text(encoding="utf-8"))
    assert title.startswith("# ") and re.fullmatch(r"\*[^*]+\?\*", question, re.DOTALL), question
    assert any(shown.output for shown in outputs.shown_in(page)), "no block of the kind console with an output"


COMMAND = re.compile(
    r"(^|[`$ /])(python (-m |benches/)|pytest |crosscode [a-z]|make [a-z])|benches/\w+\.py", re.MULTILINE
)
NUMBER = re.compile(r"[-+<]?\d[\d,]*(\.\d+)?( ?(x|%|[mM]?s|[KMG]i?B(/s)?|nats))?")
MEASURED = re.compile(r"\d ?(ms|[MG]i?B(/s)?|tokens/s|activations/s|nats|minutes)\b|\d\.\d+x\b")


def figures_without_command(text):
    """Tables of figures and paragraphs with measured ones that name no command: in themselves, in the block behind them or the
    two before them. Of several tables with one head the first is asked."""
    blocks, heads = re.split(r"\n\n+", text), set()
    for i, block in enumerate(blocks):
        if block.startswith("```"):
            continue
        head, *rows = [line for line in block.splitlines() if line.startswith("|")] or [""]
        cells = [re.split(r" [(±]", cell)[0].strip(" *") for row in rows for cell in row.strip("|").split("|")[1:]]
        is_table = sum(NUMBER.fullmatch(cell) is not None for cell in cells) >= 3 and head not in heads
        heads |= {head} if is_table else set()
        is_measured = not head and MEASURED.search(re.sub(r"`[^`]*`", "", block))
        if (is_table or is_measured) and not COMMAND.search("\n\n".join(blocks[max(0, i - 2) : i + 2])):
            yield block.splitlines()[0]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "kernels" / "README.md"], ids=lambda page: page.parent.name + page.stem
)
def test_every_figure_names_the_command_that_made_it(page):
    assert list(figures_without_command(page.read_text(encoding="utf-8"))) == []


def test_a_figure_without_its_command_is_found():
    table = "| a | b | c |\n|---|---|---|\n| x | 1.5 | 20 ms |\n| y | 2 % | 4 |"
    for text in (table, "It took 3 ms.", f"Text.\n\n{table}\n\nMore."):
        assert list(figures_without_command(text)) and not list(figures_without_command(f"`make bench`:\n\n{text}"))
    assert list(figures_without_command(f"`make bench`\n\na\n\nb\n\nc\n\n{table}\n\n{table}")) == ["| a | b | c |"]
    assert list(figures_without_command("| a | b |\n|---|---|\n| x | text |\n\nNothing is measured in `3 ms`.")) == []


def fields_named(cell):
    """Paths of config fields in a cell: `data.source`, `expansion_factor` (beside the one before it),
    `train.optimizer: {type: adam, lr}`."""
    section = ""
    for words in re.findall(r"`([^`]+)`", cell):
        path, _, inner = words.partition(":")
        if path.startswith("--") or not re.fullmatch(r"[\w.]+", path):
            continue
        path = path if "." in path or not section else f"{section}.{path}"
        section = path.rpartition(".")[0]
        yield path
        yield from (f"{path}.{name}" for name in re.findall(r"(?:^|[{,]) *(\w+)(?=[:,}])", inner.strip().strip("[]")))


def test_names_on_the_page_for_users_of_other_libraries_exist():
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| ")]
    named = [(cell, path) for cell in cells for path in fields_named(cell.replace("of the architecture", ""))]
    assert len(named) > 30
    for cell, path in named:
        path = {"use_pre_bias": "crosscoder.use_pre_bias"}.get(path, path)
        whole = [LanguageModelConfig] if path.startswith("language_models.") else [experiment_class()]
        assert annotations_at(whole, path.removeprefix("language_models.").split(".")), f"{cell.strip()}: {path}"


def test_only_fields_that_exist_are_found_there():
    assert list(fields_named("`a.b`, `c`, `--x`, `d: {type: e, f}`")) == ["a.b", "a.c", "a.d", "a.d.type", "a.d.f"]
    assert not annotations_at([experiment_class()], ["train", "lr"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands of all pages run, with the runs that they look at."""
    folder = tmp_path_factory.mktemp("pages")
    outputs.prepare(folder)
    return folder


@pytest.mark.parametrize("shown", COMMANDS, ids=lambda shown: f"{shown.page}: {shown.command}"[:80])
def test_a_command_prints_what_the_page_shows(shown, folder):
    printed = outputs.run(shown, folder)
    assert outputs.differences(shown, printed) == [], "\n".join(printed)


def test_texts_of_a_word_may_vary_and_the_rest_may_not():
    shown = outputs.Shown("page.md", "command", ["run  a", "found  x 1", "found  y", "end"], "texts of found vary")
    assert outputs.differences(shown, ["run  a", "found  z", "end"]) == []
    assert outputs.differences(shown, ["run  a", "end"]) == ["found"]
    assert outputs.differences(shown, ["run  b", "found  z", "end"]) == ["run  a", "found", "end"]


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
