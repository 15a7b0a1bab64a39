"""Build the site in `build/site`: `make docs`.

Its sources are the pages that a git host shows as well: README.md, CONTRIBUTING.md, docs/*.md, the notebooks in examples/.
They are copied side by side into `build/pages`, with their links following and formulas as MathML. Written here, at each
build: every field of a config and every public name. A link that leads nowhere, a page that is in no menu, or a public name
without a docstring ends the build.

    python docs/tools/build_site.py [--no-outputs]      notebooks without their outputs, which saves running them
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import generated
import notebooks
from latex2mathml.converter import convert as mathml

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"
CONFIG = ROOT / "zensical.toml"
FENCED = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$([^$\n]+)\$")
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def sources() -> dict[Path, str]:
    """Where each page of the repository goes."""
    pages = {ROOT / "README.md": "index.md", ROOT / "kernels" / "README.md": "kernels.md"}
    pages |= {ROOT / f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG")}
    pages |= {file: file.name for file in sorted((ROOT / "docs").glob("*.md"))}
    pages |= {file: f"examples/{file.stem}.md" for file in sorted((ROOT / "examples").glob("*.ipynb"))}
    return pages | {ROOT / "examples": "examples/index.md", ROOT / "crosscode" / "recipes": "recipes.md"}


def with_links(text: str, source: Path, page: str, pages: dict[Path, str]) -> str:
    """Links of a page, from its new place. What is no page of the site (a table of figures, a licence) is copied beside it.

    Raises:
        SystemExit: a link leads nowhere in the repository.
    """

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[2]).resolve()
        if not target.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: {match[2]} leads nowhere")
        if target not in pages:
            if target.is_dir():
                raise SystemExit(f"{source.relative_to(ROOT)}: {match[2]} is a folder; link to a file in it")
            (PAGES / "files" / target.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, PAGES / "files" / target.relative_to(ROOT))
        place = pages.get(target, f"files/{target.relative_to(ROOT)}")
        return f"{match[1]}{os.path.relpath(place, Path(page).parent)}{match[3]}"

    parts = FENCED.split(text)
    return "".join(part if FENCED.fullmatch(part) else LINK.sub(moved, part) for part in parts)


def with_formulas(text: str) -> str:
    """`$LaTeX$`, which git hosts show as formulas, as MathML, which browsers do without a script.

    Each in a span: Markdown takes an element of mathematics at the beginning of a line for a paragraph of its own.
    """

    def spanned(match: re.Match[str]) -> str:
        return f"<span>{mathml(match[1])}</span>"

    return "".join(part if FENCED.fullmatch(part) else FORMULA.sub(spanned, part) for part in FENCED.split(text))


def collect(with_outputs: bool) -> None:
    """Write all pages into `build/pages`."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = sources()
    written = generated.pages()
    for source, page in pages.items():
        if source.suffix == ".ipynb":
            links = partial(with_links, source=source, page=page, pages=pages)
            written[page] = notebooks.as_markdown(source, with_outputs, PAGES / "examples", links)
        elif source.is_file():
            written[page] = with_formulas(with_links(source.read_text(encoding="utf-8"), source, page, pages))
    written["examples/index.md"] = notebooks.overview(sorted((ROOT / "examples").glob("*.ipynb")))
    (PAGES / "site.css").write_bytes(Path(__file__).with_name("site.css").read_bytes())
    for page, text in written.items():
        (PAGES / page).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / page).write_text(text, encoding="utf-8")
    forgotten = written.keys() - set(menu(tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]["nav"]))
    if forgotten:
        raise SystemExit(f"{CONFIG.relative_to(ROOT)}: nav has no place for {', '.join(sorted(forgotten))}")


def menu(entry: object) -> list[str]:
    """Pages of the menu."""
    if isinstance(entry, str):
        return [entry]
    inner = entry.values() if isinstance(entry, dict) else entry
    return [page for each in inner for page in menu(each)]  # pyright: ignore[reportGeneralTypeIssues]


def main() -> int:
    bare = generated.undocumented()
    if bare:
        raise SystemExit(f"no docstring: {', '.join(bare)}")
    collect(with_outputs="--no-outputs" not in sys.argv)
    shutil.rmtree(SITE, ignore_errors=True)
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(CONFIG)]
    done = subprocess.run(zensical, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode or "griffe:" in done.stdout:  # a docstring that names arguments which are not there
        return 1
    missing = generated.missing_from(SITE)
    if missing:
        raise SystemExit(f"not in the API reference: {', '.join(missing)}")
    print(f"{SITE.relative_to(ROOT)}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
