"""How long the explorer's table of 131,072 latents takes in headless Chromium: first paint, sort, search, scroll.

    python benches/explorer_table.py RUN/report [--rows 131072]

The rows of a report's own table are repeated, each number a little changed. Each action is timed from the event until the
browser has painted the frame after the rows were drawn; median and largest of several. Beside it stands the largest CPU time of
the page's main thread, all its tasks together, which other processes do not change as much.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from browser import Browser

TIMED = """
const [act] = arguments, table = document.getElementById("table");
return new Promise(done => {
  let last = performance.now();
  const start = last, watcher = new MutationObserver(() => { last = performance.now(); });
  watcher.observe(table, { childList: true, subtree: true });
  new Function(act)();
  const settle = () => performance.now() - last < 60 ? setTimeout(settle, 10) : (watcher.disconnect(), done(last - start));
  requestAnimationFrame(() => requestAnimationFrame(() => { last = Math.max(last, performance.now()); settle(); }));
});
"""


def grown(report: Path, n_rows: int, folder: Path) -> Path:
    shutil.copytree(report, folder / "report")
    file = folder / "report" / "data" / "table.js"
    start, _, rest = file.read_text().partition(",")
    table = json.loads(rest.rpartition(")")[0])
    rng = random.Random(0)
    for column in table["columns"]:
        values, is_text = column["values"], "texts" in column
        column["values"] = [
            value if is_text or not isinstance(value, float) else float(f"{value * rng.uniform(0.5, 2):.4g}")
            for value in (values[i % len(values)] for i in range(n_rows))
        ]
    if "search" in table:
        table["search"] = [table["search"][i % len(table["search"])] for i in range(n_rows)]
    file.write_text(f"{start},{json.dumps(table)});\n")
    return folder / "report" / "index.html"


def timed(window: Browser, act: str) -> tuple[float, float]:
    """Milliseconds until it is drawn, and of CPU."""
    before = cpu_ms(window)
    took = window.run(TIMED, act)
    return took, cpu_ms(window) - before


def cpu_ms(window: Browser) -> float:
    found = window.devtools("Performance.getMetrics", {})["metrics"]
    return 1000 * next(one["value"] for one in found if one["name"] == "TaskDuration")


def main(report: Path, n_rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Browser() as window:
        window.devtools("Performance.enable", {"timeDomain": "threadTicks"})
        url = grown(report, n_rows, Path(folder)).as_uri()
        window.open(url)
        paint = window.run("return performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        print(f"first paint of the overview: {paint:.0f} ms")
        window.open("about:blank")
        window.open(f"{url}#/latents")
        window.wait(f"document.getElementById('found').textContent.startsWith('{n_rows:,}')", seconds=60)
        first = window.run("return performance.now()")
        print(f"table of {n_rows:,} rows shown {first:.0f} ms after the page began")
        names = window.run("return [...document.getElementById('sort').options].map(one => one.value)")
        change = "const one = document.getElementById('{}'); one.value = '{}'; one.dispatchEvent(new Event('{}'))"
        sort = [change.format("sort", name, "change") for name in names[::-1]]
        turn = [change.format("dir", way, "change") for way in ("desc", "asc", "desc", "asc")]
        head = "document.querySelectorAll('.tabulator-col')[{}].click()"
        heads = [head.format(i) for i in (2, 2, 3, 3, 4)]
        search = [
            change.format("search", text, "input") for text in ("s", "se", "sel", "self", "density>0.01 self", "")
        ]
        scroll = [f"document.querySelector('.tabulator-tableholder').scrollTop = {y}" for y in (400, 1500, 2500, 0)]
        page = ["document.querySelector('.tabulator-page[data-page=next]').click()"] * 4
        for name, acts in {
            "sort by each column": sort, "turn it round": turn, "click on a head": heads, "search": search,
            "scroll": scroll, "next page": page,
        }.items():  # fmt: skip
            took, cpu = zip(*(timed(window, act) for act in acts), strict=True)
            shown = f"median {statistics.median(took):4.0f} ms, largest {max(took):4.0f} ms of {len(took)}"
            print(f"{name:<20} {shown}; CPU {max(cpu):4.0f} ms")
        print("script errors:", window.errors())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("--rows", type=int, default=131_072)
    arguments = parser.parse_args()
    main(arguments.report, arguments.rows)
