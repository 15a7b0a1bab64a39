"""Plots of the report, drawn with matplotlib's object API: no state outside a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from crosscode.analysis.latent_scaling import THRESHOLD
from crosscode.analysis.plot_style import INK, MUTED, SERIES, SHARED, SIDE_A, SIDE_B, finish, new_figure, plain, style
from crosscode.analysis.verdict import Tag

TAG_COLOURS: dict[Tag, str] = {
    "A-specific": SIDE_A, "shared": SHARED, "B-specific": SIDE_B, "undecided": MUTED, "structural": MUTED,
}  # fmt: skip
_PAINTED = ("undecided", "structural", "shared", "A-specific", "B-specific")
"""What is drawn over what."""
_MAX_POINTS = 600
_MAX_VECTOR_POINTS = 800


@dataclass(frozen=True)
class Plot:
    """An inline SVG with a title and a sentence on how to read it."""

    title: str
    svg: str
    caption: str


Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def curves(
    series: Series,
    *,
    xlabel: str,
    ylabel: str,
    label: str,
    log_y: bool = False,
    marks: Series | None = None,
    total: str | None = None,
    least_top: float = 0.0,
) -> str:
    """Lines over the course of training. `marks` are points measured apart from the lines (held-out figures), in the
    colour of the line of the same name, and `total` the name of a line that the others add up to. On a log axis, values
    that are not positive are left out."""
    if log_y:
        positive = {name: [(x, y) for x, y in zip(*points, strict=True) if y > 0] for name, points in series.items()}
        series = {name: ([x for x, _ in points], [y for _, y in points]) for name, points in positive.items() if points}
    figure, axes = new_figure()
    with style():
        others = [name for name in dict.fromkeys([*series, *(marks or {})]) if name != total]
        names = [total, *others] if total is not None and total in series else others
        for i, name in enumerate(names):
            colour = INK if name == total else SERIES[others.index(name) % len(SERIES)]
            label_once = _legend(name)
            # earlier ones are drawn wider, so that equal curves are all seen
            if name in series:
                axes.plot(*_thin(*series[name]), color=colour, linewidth=max(1.4, 2.8 - 0.7 * i), label=label_once)
            if marks and name in marks:
                label_once = None if name in series else label_once
                axes.plot(*marks[name], "o", color=colour, markersize=max(4.0, 6.5 - 1.5 * i), label=label_once)
        all_y = [v for _, ys in [*series.values(), *(marks or {}).values()] for v in ys]
        if log_y and all_y and min(all_y) > 0:
            _log_axis(axes, min(all_y), max(all_y))
        else:
            bottom, top = min([0.0, *all_y]), max([least_top, *all_y])
            axes.set_ylim(bottom, top + 0.05 * ((top - bottom) or 1))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: si_number(v)))
        if len(names) > 1:
            axes.legend(fontsize=8, loc="best", handlelength=1.6)
        return finish(figure, axes, xlabel, ylabel, label)


def density_histogram(density: ArrayLike, *, label: str, n_tokens: int) -> str:
    """Latents by firing density, logarithmic; silent ones in a bar of their own at the left."""
    values = np.asarray(density, dtype=float)
    alive = values[values > 0]
    figure, axes = new_figure()
    with style():
        lowest = 1 / max(n_tokens, 1)
        edges = np.logspace(np.log10(lowest) - 0.05, 0.0, 45)
        axes.hist(alive, bins=list(edges), color=SERIES[0])
        n_silent = int((values <= 0).sum())
        if n_silent:
            left = edges[0] / 3
            axes.bar(left, n_silent, width=left * 0.9, color=SHARED)
            axes.annotate(
                f"{n_silent:,} silent", (left, n_silent), ha="center", va="bottom", fontsize=8, xytext=(0, 2),
                textcoords="offset points",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=10, numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        return finish(figure, axes, "share of held-out tokens on which a latent is active", "latents", label)


def tagged_histogram(
    values: ArrayLike,
    tags: Sequence[Tag],
    *,
    tag_names: Mapping[Tag, str],
    limits: tuple[float, float],
    xlabel: str,
    label: str,
    ends: tuple[str, str] | None = None,
) -> str:
    """Latents by a value, one outline per tag (stacked bars would mislead on the logarithmic axis). `ends` are written
    below the two ends of the axis."""
    x, tag = np.asarray(values, dtype=float), np.asarray(tags)
    inside = (x >= limits[0]) & (x <= limits[1])
    figure, axes = new_figure()
    with style():
        edges = list(np.linspace(*limits, 81))
        for t in TAG_COLOURS:
            data = x[(tag == t) & inside]
            if len(data):
                axes.hist(data, bins=edges, color=TAG_COLOURS[t], alpha=0.3)
                axes.hist(data, bins=edges, color=TAG_COLOURS[t], histtype="step", linewidth=1.4)
                axes.plot([], [], color=TAG_COLOURS[t], linewidth=5, label=_legend(tag_names[t]))
        axes.set_xlim(*limits)
        if inside.any():
            axes.set_yscale("log", nonpositive="clip")
            axes.set_ylim(bottom=0.7)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: si_number(v)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.legend(fontsize=8, loc="best", handlelength=1.0)
        if ends:
            axes.xaxis.labelpad = 14
            for x_at, align, text, colour in ((0.0, "left", ends[0], SIDE_A), (1.0, "right", ends[1], SIDE_B)):
                at = {"transform": axes.transAxes, "ha": align, "va": "top"}
                axes.text(x_at, -0.17, plain(text), fontsize=8, color=colour, **at)
        return finish(figure, axes, xlabel, "latents (log scale)", label)


def scaling_scatter(
    nu_error: ArrayLike, nu_reconstruction: ArrayLike, tags: Sequence[Tag], *, tag_names: Mapping[Tag, str], label: str
) -> str:
    """Latents by the two latent-scaling ratios; the corner of specific ones is outlined."""
    x, y, tag = np.asarray(nu_reconstruction, float), np.asarray(nu_error, float), np.asarray(tags)
    low, high = -0.5, 1.5
    figure, axes = new_figure(height=3.4)
    with style():
        finite = np.isfinite(x) & np.isfinite(y)
        xs, ys = x.clip(low, high), y.clip(low, high)
        for t in sorted(TAG_COLOURS, key=_PAINTED.index):
            here = finite & (tag == t)
            if here.any():
                axes.plot(
                    xs[here], ys[here], ".", color=TAG_COLOURS[t], markersize=4, alpha=0.65, markeredgewidth=0,
                    label=_legend(tag_names[t]), rasterized=int(here.sum()) > _MAX_VECTOR_POINTS,
                )  # fmt: skip
        axes.plot([THRESHOLD, THRESHOLD, low], [low, THRESHOLD, THRESHOLD], color=INK, linewidth=1, linestyle=":")
        pad = 0.04
        axes.set_xlim(low - pad, high + pad)
        axes.set_ylim(low - pad, high + pad)
        if finite.any():
            axes.legend(fontsize=8, loc="upper left", handlelength=1, markerscale=2)
        return finish(figure, axes, "ν of the reconstruction", "ν of the error", label, grid="both")


def bars(names: Sequence[str], values: Sequence[float], *, ylabel: str, label: str) -> str:
    """One bar per name, lying, in the given order from the top."""
    figure, axes = new_figure(height=max(1.2, 0.6 + 0.28 * len(names)))
    with style():
        axes.barh(range(len(names)), list(values), color=SERIES[0], height=0.66)
        axes.set_yticks(range(len(names)), [plain(name) for name in names])
        axes.invert_yaxis()
        return finish(figure, axes, ylabel, "", label, grid="x")


def si_number(value: float) -> str:
    """12,300,000 -> "12.3M"."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """At most `_MAX_POINTS` points, the last one among them."""
    if len(x) <= _MAX_POINTS:
        return x, y
    index = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).astype(int))
    return [x[i] for i in index], [y[i] for i in index]


def _log_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    # decades alone would leave a narrow range with one label or none
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if high / low < 8 else (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: si_number(v)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(name: str) -> str:
    # a leading underscore hides a label from the legend
    return plain(name.lstrip("_") or name)
