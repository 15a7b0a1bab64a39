"""Run the commands that pages show, and compare what they print with what stands there.

    python docs/tools/outputs.py [PAGE.md ...]       what differs; without pages: all of docs/

A block of the kind `console` holds commands (`$ ...`) and their output; a block below `<!-- file: NAME -->` is such a file. All
blocks of all pages run in one folder, in the order of the pages; `benches/` in it is that of the repository, `runs/demo` is what
`crosscode demo` makes (once for all pages), `runs/tuned` what `crosscode train demo_tuned` makes. Numbers may differ, as machines
round differently, and so may lines for which `...` stands. A comment before a block says more:

    <!-- texts vary -->             only lines that begin like a heading (`==`, `--`) are compared
    <!-- texts of WORD vary -->     of lines that begin with it, only that there are some
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import notebooks

ROOT = Path(__file__).parents[2]
FILE = re.compile(r"<!-- file: ([\w.]+) -->\n+```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n+)?^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d_,]*(\.\d+)?(e[-+]?\d+)?")

RUNS = {"demo": "demo", "tuned": "train demo_tuned"}
"""Runs that pages look at, and the commands that make them."""
PRINTED = "printed.txt"


@dataclass(frozen=True)
class Shown:
    """One command of a page, and what the page says that it prints."""

    page: str
    command: str
    output: list[str]
    comment: str


def shown_in(page: Path) -> Iterator[Shown]:
    """The commands of a page, in order."""
    for comment, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Shown(page.name, command.partition("   #")[0].strip(), output.rstrip().splitlines(), comment)


def run(shown: Shown, folder: Path) -> list[str]:
    """What the command prints; where it fails, what it says instead, and its exit code. What makes a run is not run again."""
    for name, command in RUNS.items():
        if shown.command == f"crosscode {command}":
            return (made_run(name, command) / PRINTED).read_text(encoding="utf-8").splitlines()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "110",
    }
    done = subprocess.run(shown.command, shell=True, cwd=folder, env=environment, text=True, capture_output=True)
    if done.returncode:
        return [*map(str.rstrip, done.stderr.splitlines()), f"exit code {done.returncode}"]
    return [line.rstrip() for line in done.stdout.splitlines()]


def made_run(name: str, command: str) -> Path:
    """What a command makes, by the sources as they are; made where it is not there yet."""
    kept = ROOT / "build" / name / notebooks.key_of_sources()[:16]
    if not (kept / "final").is_dir():
        made = run(Shown("", f"crosscode {command} --run_dir {kept}", [], ""), ROOT)
        if not (kept / "final").is_dir():
            raise RuntimeError("\n".join([f"crosscode {command} failed:", *made]))
        text = "\n".join(made).replace(str(kept), f"runs/{name}")
        (kept / PRINTED).write_text(text, encoding="utf-8")
    return kept


def prepare(folder: Path) -> None:
    """The files that pages show, into `folder`, and the runs that they look at, into `folder/runs`."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for name, text in FILE.findall(page.read_text(encoding="utf-8")):
            (folder / name).write_text(text, encoding="utf-8")
    (folder / "benches").symlink_to(ROOT / "benches")
    commands = " ".join(shown.command for page in pages for shown in shown_in(page))
    for name, command in RUNS.items():
        if f"runs/{name}" in commands:
            shutil.copytree(made_run(name, command), folder / "runs" / name)


def differences(shown: Shown, printed: list[str]) -> list[str]:
    """Lines of the page that the command did not print, in their order."""
    wanted = shown.output
    if varying := re.fullmatch(r"texts of (\w+) vary", shown.comment):
        wanted, printed = (_without_texts(lines, varying[1]) for lines in (wanted, printed))
    if shown.comment == "texts vary":
        if printed and printed[-1].startswith("exit code"):
            return printed
        wanted, printed = ([line for line in lines if line.startswith(("==", "--"))] for lines in (wanted, printed))
    here, missing, skipping = 0, [], False
    for line in wanted:
        if line.strip() == "...":
            skipping = True
            continue
        found = next((i for i in range(here, len(printed)) if _masked(printed[i]) == _masked(line)), None)
        if found is None or (found > here and not skipping and shown.comment != "texts vary"):
            missing.append(line)
        else:
            here, skipping = found + 1, False
    return missing


def _without_texts(lines: list[str], word: str) -> list[str]:
    """Of neighbouring lines that begin with a word, the word alone, once."""
    cut = [word if line.startswith(f"{word} ") else line for line in lines]
    return [line for i, line in enumerate(cut) if line != word or cut[i - 1 : i] != [word]]


def _masked(line: str) -> str:
    """Numbers are alike, and so is the white space around them."""
    return " ".join(NUMBER.sub("0", line).split())


def main() -> int:
    folder = Path(tempfile.mkdtemp())
    prepare(folder)
    pages = [Path(word).resolve() for word in sys.argv[1:]] or sorted((ROOT / "docs").glob("*.md"))
    wrong = 0
    for shown in [shown for page in pages for shown in shown_in(page)]:
        printed = run(shown, folder)
        missing = differences(shown, printed)
        if missing:
            wrong += 1
            print(f"{shown.page}: $ {shown.command}", *[f"  not printed: {line}" for line in missing], sep="\n")
            print(*[f"  printed: {line}" for line in printed], sep="\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
