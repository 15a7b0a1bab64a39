"""The pictures of the README and of docs/latents.md, taken of a run's report in a headless Chromium.

    crosscode demo && python docs/tools/pictures.py runs/demo 334

`docs/report.webp` is the top of its first page, `docs/latent.webp` the page of one latent, with what the explorer says of the
token under the pointer. WebP without loss takes a third of a PNG's size.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1]
sys.path.insert(0, str(DOCS.parent / "tests" / "helpers"))

from browser import Browser  # noqa: E402  # pyright: ignore[reportMissingImports]


def take(run: Path, latent: int, folder: Path = DOCS) -> None:
    """Both pictures, into `folder`."""
    with Browser(1240, 1972) as page:
        page.resize(1240, 1972)
        page.open((run / "report.html").resolve().as_uri())
        keep(page, folder / "report.webp")
        page.resize(1100, 1107)
        page.open(f"{(run / 'report' / 'index.html').resolve().as_uri()}#/latent/{latent}")
        page.wait("document.querySelectorAll('#latent .snippets .peak').length > 0")
        page.run("document.querySelector('#latent .snippets .peak').focus()")
        keep(page, folder / "latent.webp")


def keep(page: Browser, path: Path) -> None:
    """What the window shows."""
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(shown := Path(folder) / "shown.png")
        Image.open(shown).convert("RGB").save(path, lossless=True, quality=100, method=6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with a report")
    parser.add_argument("latent", type=int, help="the latent whose page is shown")
    given = parser.parse_args()
    take(given.run, given.latent)
