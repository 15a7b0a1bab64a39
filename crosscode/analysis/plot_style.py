"""One look for all plots of the report, and the way from matplotlib to the page.

Colours are Okabe and Ito's set, told apart by colour-blind readers. Each stands in the SVG as a CSS variable with the
light colour as its fallback, so that one picture serves light and dark pages. Text stays text.
"""

from __future__ import annotations

import html
import io
import re
from contextlib import AbstractContextManager
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID = "#24292f", "#656d76", "#d9dee3"
SIDE_A, SIDE_B, SHARED = "#0072b2", "#d55e00", "#808b96"
SERIES = ("#0072b3", "#d55e01", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#6f4e7c", "#24292e")
"""One shade off other colours where they would be equal: roles are found by colour."""
CSS_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SIDE_A: "--side-a", SIDE_B: "--side-b", SHARED: "--shared",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES)},
}  # fmt: skip

_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "crosscode",
    "font.size": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "path.simplify": True,
}


def style() -> AbstractContextManager[None]:
    """Matplotlib's settings for the report, for as long as a plot is drawn."""
    return matplotlib.rc_context(_RC)


def new_figure(height: float = 2.9) -> tuple[Figure, Axes]:
    """An empty figure, sizes in inches; no background, no frame at the top and the right."""
    with style():
        figure = Figure(figsize=(5.6, height), layout="constrained")
        figure.patch.set_visible(False)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes


def finish(
    figure: Figure, axes: Axes, xlabel: str, ylabel: str, label: str, grid: Literal["x", "y", "both"] = "y"
) -> str:
    """Label the axes and turn the figure into an `<svg>` element that says `label` to those who cannot see it."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_axisbelow(True)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.7)
    axes.tick_params(length=0 if grid == "y" else 3)
    buffer = io.StringIO()
    # all None: no metadata block, so no link, date or version in the page
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=metadata, transparent=True, dpi=160)
    return _themed(buffer.getvalue(), label)


def _themed(svg: str, label: str) -> str:
    """Matplotlib's file as an element of a page: no prologue, colours as variables, ids that no other plot uses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    prefix = re.sub(r"\W+", "-", label.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(f": {colour}", f": var({variable}, {colour})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--font, sans-serif)", svg)
    opening = re.match(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', svg)
    assert opening is not None
    rest = svg[opening.end() :].strip()
    return f'<svg class="plot" viewBox="{opening[1]}" role="img" aria-label="{html.escape(label)}">{rest}'


def plain(text: str) -> str:
    """Text without matplotlib's mathematics: a `$` in a name is a dollar sign."""
    return text.replace("$", r"\$")
