"""Plots of what `bench_ops.py` and `bench_train_step.py` measured.

    python benches/plots.py [--results benches/results] [--out DIR]

Reads `bench_ops.json` and `bench_train_step.json` (pytest-benchmark's format), writes
- `step_time.png`: the training step against L, k and B, medians with quartiles;
- `step_memory.png`: its peak memory and what it keeps for backward, against L, k and B;
- `step_ratio.png`: the reference's time over a backend's, per scheme;
- `op_ratio.png`: the same per op, forward and backward.
A ratio above 1 means faster than the reference.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLOURS = {"reference": "#808b96", "torch": "#0072b2", "triton": "#d55e00"}
"""From Okabe and Ito's set, told apart by colour-blind readers."""
AXES = {"L": "latents", "k": "active latents per token", "B": "tokens in a batch"}
Row = dict[str, Any]


def read(path: Path) -> tuple[list[Row], str]:
    """One row a benchmark (its facts, `median_ms`, `q1_ms`, `q3_ms`), and a line that says where they come from."""
    stored = json.loads(path.read_text())
    rows = [
        bench["extra_info"] | {f"{name}_ms": 1e3 * bench["stats"][name] for name in ("median", "q1", "q3")}
        for bench in stored["benchmarks"]
    ]
    machine, commit = stored["machine_info"], stored["commit_info"]["id"][:9]
    device = machine["gpu"] or f"{machine['threads']} CPU threads, {machine['cpu'].get('brand_raw', '')}"
    return rows, f"{device} · torch {machine['torch']} · commit {commit}"


def backends(rows: list[Row]) -> list[str]:
    """Those that have rows, in the order of the legend."""
    return [name for name in COLOURS if any(row["backend"] == name for row in rows)]


def _panels(n: int, title: str, width: float = 3.4, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * n, height), layout="constrained", dpi=130)
    unbroken = " · ".join(part.replace(" ", "\xa0") for part in title.split(" · "))
    lines = textwrap.wrap(unbroken, int(19 * width * n))
    figure.suptitle("\n".join(lines), fontsize=8, color="#656d76")
    axes = list(figure.subplots(1, n, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, color="#d9dee3", linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def _powers(axes: Axes, values: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value // 1024}k" if value >= 1024 else str(value) for value in values])
    axes.minorticks_off()


def _sweep(rows: list[Row], axis: str) -> list[Row]:
    """The rows along one axis: those that agree with the base, the most frequent value, in the others."""
    rows = [row for row in rows if row["scheme"] == "topk"]
    for other in AXES.keys() - {axis}:
        values = [row[other] for row in rows]
        base = max(set(values), key=values.count)
        rows = [row for row in rows if row[other] == base]
    return sorted(rows, key=lambda row: row[axis])


def _lines(axes: Axes, rows: list[Row], axis: str, value: Callable[[Row], float], label: str, **style: Any) -> None:
    for name in backends(rows):
        mine = [row for row in rows if row["backend"] == name]
        x, y = [row[axis] for row in mine], [value(row) for row in mine]
        axes.plot(x, y, marker="o", markersize=4, color=COLOURS[name], label=f"{name}{label}", **style)


def step_time(rows: list[Row], title: str) -> Figure:
    figure, panels = _panels(len(AXES), f"Training step, median and quartiles · {title}")
    for axes, (axis, meaning) in zip(panels, AXES.items(), strict=True):
        swept = _sweep(rows, axis)
        _lines(axes, swept, axis, lambda row: row["median_ms"], "")
        for name in backends(swept):
            mine = [row for row in swept if row["backend"] == name]
            low, high = [row["q1_ms"] for row in mine], [row["q3_ms"] for row in mine]
            axes.fill_between([row[axis] for row in mine], low, high, color=COLOURS[name], alpha=0.25, linewidth=0)
        _powers(axes, sorted({row[axis] for row in swept}))
        axes.set_xlabel(f"{axis}: {meaning}")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("ms a step")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def step_memory(rows: list[Row], title: str) -> Figure:
    figure, panels = _panels(len(AXES), f"Memory of a training step above parameters, gradients and moments · {title}")
    for axes, (axis, meaning) in zip(panels, AXES.items(), strict=True):
        swept = _sweep(rows, axis)
        _lines(axes, swept, axis, lambda row: row["peak_mib"], ", peak")
        _lines(axes, swept, axis, lambda row: row["saved_mib"], ", kept for backward", linestyle=":")
        _powers(axes, sorted({row[axis] for row in swept}))
        axes.set_yscale("log")
        axes.set_xlabel(f"{axis}: {meaning}")
    panels[0].set_ylabel("MiB")
    panels[-1].legend(frameon=False, fontsize=7)
    return figure


def _ratios(rows: list[Row], same: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, float]]:
    """Reference's median over each backend's, by the facts named in `same`."""
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in same), {})[row["backend"]] = row["median_ms"]
    return {
        key: {name: times["reference"] / time for name, time in times.items() if name != "reference"}
        for key, times in groups.items()
        if "reference" in times
    }


def _bars(axes: Axes, ratios: dict[str, dict[str, float]]) -> None:
    names = [name for name in COLOURS if any(name in found for found in ratios.values())]
    height = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        y = [place + i * height for place, found in enumerate(ratios.values()) if name in found]
        values = [found[name] for found in ratios.values() if name in found]
        axes.barh(y, [value - 1 for value in values], height, 1, align="edge", color=COLOURS[name], label=name)
        for place, value in zip(y, values, strict=True):
            text = f" {value:.2g}x " if value < 10 else f" {value:.0f}x "
            axes.text(value, place + height / 2, text, va="center", ha="left" if value >= 1 else "right", fontsize=6.5)
    axes.set_yticks([place + 0.4 for place in range(len(ratios))], list(ratios), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#24292f", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 2)
    if axes.get_xlim()[1] < 20:
        axes.set_xticks([value for value in (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16) if low / 2 <= value <= high * 2])
    axes.grid(False, axis="y")


def step_ratio(rows: list[Row], title: str) -> Figure:
    schemes: dict[tuple[Any, ...], set[str]] = {}
    for row in rows:
        schemes.setdefault(tuple(row[axis] for axis in AXES), set()).add(row["scheme"])
    shared = max(schemes, key=lambda sizes: len(schemes[sizes]))
    at_base = [row for row in rows if tuple(row[axis] for axis in AXES) == shared]
    base = at_base[0]
    ratios = {str(key[0]): found for key, found in _ratios(at_base, ("scheme",)).items()}
    figure, (axes,) = _panels(1, f"Training step: reference's time over ours · {title}", 6.4, 2.6)
    _bars(axes, ratios)
    axes.set_xlabel(f"x faster (B={base['B']}, I={base['I']}, O={base['O']}, L={base['L']}, k={base['k']})")
    return figure


def op_ratio(rows: list[Row], title: str) -> Figure:
    figure, panels = _panels(2, f"Ops: reference's time over ours · {title}", 4.6, 5.2)
    for axes, direction in zip(panels, ("forward", "forward+backward"), strict=True):
        mine = [row for row in rows if row["direction"] == direction]
        _bars(axes, {str(key[0]): found for key, found in _ratios(mine, ("op",)).items()})
        axes.set_title(direction, fontsize=9)
        axes.set_xlabel("x faster")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, default=None, help="default: where the results are")
    arguments = parser.parse_args()
    out = arguments.out or arguments.results
    plots = {"bench_train_step": (step_time, step_memory, step_ratio), "bench_ops": (op_ratio,)}
    for stem, drawn in plots.items():
        rows, title = read(arguments.results / f"{stem}.json")
        dtypes = sorted({row["dtype"] for row in rows})
        for dtype in dtypes:
            suffix = "" if len(dtypes) == 1 else f"_{dtype}"
            for draw in drawn:
                path = out / f"{draw.__name__}{suffix}.png"
                draw([row for row in rows if row["dtype"] == dtype], f"{title} · {dtype}").savefig(path)
                print(path)


if __name__ == "__main__":
    main()
