"""Curves over training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from crosscode.analysis import plots
from crosscode.analysis.metrics_file import Metrics
from crosscode.analysis.plots import Plot
from crosscode.analysis.wording import distinct_labels

Lines = dict[str, tuple[list[float], list[float]]]


def training_figures(metrics: Metrics, callback_figures: Iterable[str] = ()) -> list[Plot]:
    """Curves over training; those without data are left out. `callback_figures`: names of further ones."""
    x = "tokens" if metrics.last("tokens") is not None else "step"
    x_label = "training tokens" if x == "tokens" else "training step"
    found: list[Plot] = []

    def add(title: str, lines: Lines, caption: str, y_label: str, *, marks: Lines | None = None, **options: Any):
        lines = {name: points for name, points in lines.items() if points[0]}
        marks = {name: points for name, points in (marks or {}).items() if points[0]}
        if lines or marks:
            svg = plots.curves(lines, xlabel=x_label, ylabel=y_label, label=title, marks=marks, **options)
            found.append(Plot(title, svg, caption))

    terms = [key.removeprefix("loss/") for key in metrics.keys() if key.startswith("loss/")]  # noqa: SIM118
    loss = {"total": metrics.series("loss", x)}
    if len(terms) > 1:
        loss |= {term: _weighted_term(metrics, term, x) for term in terms}
    caption = "Training loss" + (" and its terms, each times its coefficient." if len(loss) > 1 else ".")
    add("Loss", loss, caption + " Log scale.", "loss per token", log_y=True, total="total")
    positions = [key.removeprefix("fvu/") for key in metrics.keys() if key.startswith("fvu/")]  # noqa: SIM118
    labels = distinct_labels(positions)
    fvu = {labels[p] or p: metrics.series(f"fvu/{p}", x) for p in positions} or {"FVU": metrics.series("fvu", x)}
    held_out = {labels[p] or p: metrics.series(f"eval/fvu/{p}", x) for p in positions}
    held_out = held_out or {"FVU": metrics.series("eval/fvu", x)}
    add(
        "Fraction of variance unexplained",
        fvu,
        "Lower is better; 1 is no better than the mean. Lines: training batches. Dots: held-out text. Log scale.",
        "FVU",
        log_y=True,
        marks=held_out,
    )
    add(
        "L0",
        {"L0": metrics.series("l0", x)},
        "Active latents per token. Line: training batches. Dots: held-out text.",
        "active latents per token",
        marks={"L0": metrics.series("eval/l0", x)},
    )
    dead_x, dead = metrics.series("dead_fraction", x)
    add(
        "Dead latents",
        {"dead": (dead_x, [100 * value for value in dead])},
        "Share of latents that have not been active for the number of tokens set as dead_after_tokens.",
        "% of latents",
        least_top=1.0,
    )
    for name in callback_figures:
        add(name, {name: metrics.series(name, x)}, f"{name}, as a callback gave it.", name)
    return found


def _weighted_term(metrics: Metrics, term: str, x: str) -> tuple[list[float], list[float]]:
    xs, values = metrics.series(f"loss/{term}", x)
    weights = dict(zip(*metrics.series(f"weight/{term}", x), strict=True))
    return xs, [value * weights.get(at, 1.0) for at, value in zip(xs, values, strict=True)]
