"""Plots over all latents, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from crosscode.analysis import plots
from crosscode.analysis.diffing import DiffTable
from crosscode.analysis.latent_scaling import THRESHOLD
from crosscode.analysis.latents_pass import LatentsPass
from crosscode.analysis.plots import Plot
from crosscode.analysis.verdict import MIN_FIRINGS, TAGS, Tag, Verdict
from crosscode.analysis.wording import FigureTable, percent_text, short_names


@dataclass(frozen=True)
class PairSection:
    """The verdict on two models (or two hookpoints of one), and the plots behind it."""

    heading: str
    headline: str
    intro: str
    counts: list[tuple[str, str, int, str]]
    """(CSS class, tag, latents, share)"""
    apart: FigureTable | None = None
    """on the tokens of each text and role alone"""
    plots: list[Plot] = field(default_factory=list)


def latents_section(study: LatentsPass | None) -> list[Plot]:
    """Firing density, and the decoder's use of the output positions where there are several."""
    if study is None:
        return []
    found = [
        Plot(
            "Firing density",
            plots.density_histogram(study.firing.density_L.numpy(), n_tokens=study.n_tokens, label="Firing density"),
            f"On how many of {study.n_tokens:,} held-out tokens each latent is active. A healthy run has one broad "
            "hump; silent latents at the left are wasted capacity, and those near 100 % are always on and say little.",
        )
    ]
    if len(study.position_names) > 2:
        alive_L = study.firing.counts_L > 0
        mean_X = study.decoder_norm_LX[alive_L].mean(0) if bool(alive_L.any()) else study.decoder_norm_LX.mean(0)
        svg = plots.bars(study.position_names, mean_X.tolist(), ylabel="mean decoder norm", label="Decoder norms")
        found.append(
            Plot(
                "Decoder norm by position",
                svg,
                "Mean norm of the decoder vectors of active latents, in the scale of training, where every position "
                "has the same mean activation norm. Longer bars: the latents write more there.",
            )
        )
    return found


CSS_OF_TAG = {"A-specific": "a", "B-specific": "b"}
"""Class of what is shown of a latent; "shared" for the other tags."""


def pair_sections(study: LatentsPass) -> list[PairSection]:
    """One for each two models that are compared."""
    return [replace(pair_section(one), apart=_apart(study, i)) for i, one in enumerate(study.verdicts)]


def _apart(study: LatentsPass, i: int) -> FigureTable | None:
    """The i-th verdict on each group of tokens; None where there is nothing to tell apart."""
    firing, (a, b) = study.firing.groups(), (study.verdicts[i].name_a, study.verdicts[i].name_b)
    columns = [("on tokens of", ""), ("tokens", "held-out tokens of this group")]
    columns += [("activations differ", "squared difference of both sides' activations, in their variance there")]
    columns += [(f"{name}-specific", f"latents that are {name}-specific on these tokens") for name in (a, b)]
    columns += [(f"first of {b}", f"first latents of the ranking of those that lean to {b}, on these tokens")]
    rows = []
    for kind, of_kind in study.apart.items():
        for name, verdicts in of_kind.items():
            own, first = verdicts[i], ", ".join(map(study.name_of, verdicts[i].ranking(b)[:5]))
            counts = [f"{len(own.specific(side)):,}" for side in (a, b)]
            n_tokens = firing[kind][name].n_tokens
            rows.append([f"{kind}: {name}", f"{n_tokens:,}", percent_text(own.difference), *counts, first or "none"])
    return FigureTable(columns, rows) if rows else None


def pair_section(verdict: Verdict) -> PairSection:
    """Counts by tag, and the plots of each hookpoint that is compared."""
    n_latents, a, b = len(verdict.tag), verdict.name_a, verdict.name_b
    counts = [
        (CSS_OF_TAG.get(tag, tag), verdict.name_of(tag), n, percent_text(n / n_latents))
        for tag in TAGS
        if (n := verdict.counts[tag]) or tag != "structural"
    ]
    intro = (
        f"All {n_latents:,} latents. One is “{verdict.name_of('A-specific')}” or “{verdict.name_of('B-specific')}” where the "
        f"other side surely has less than two thirds of it: in its error, its reconstruction and its activations (latent "
        f"scaling, on at least {MIN_FIRINGS} firings). What is not sure is undecided. Each latent’s page says why."
    )
    tables = verdict.tables
    heading = f"{a} against {b}" + (_shared_hook(tables[0]) if len(tables) == 1 else "")
    found = [plot for table in tables for plot in _plots(verdict, table, several=len(tables) > 1)]
    return PairSection(heading, verdict.headline(), intro, counts, plots=found)


def _plots(verdict: Verdict, table: DiffTable, *, several: bool) -> list[Plot]:
    """Histograms of relative norm and cosine, and latent scaling, of latents that fire."""
    a, b = short_names(table.name_a, table.name_b)
    at = _shared_hook(table) if several else ""
    names = verdict.tag_names
    alive = (table.firings > 0).numpy()
    tags: list[Tag] = [tag for tag, is_alive in zip(verdict.tag, alive, strict=True) if is_alive]
    key = f"{table.name_a} and {table.name_b}"
    histogram = partial(plots.tagged_histogram, tags=tags, tag_names=names)
    found = [
        Plot(
            f"Relative decoder norm{at}",
            histogram(
                table.relative_norm.numpy()[alive],
                limits=(0, 1),
                xlabel="relative decoder norm",
                label=f"Relative norm {key}",
                ends=(f"← written to {a} alone", f"to {b} alone →"),
            ),
            f"n({b}) / (n({a}) + n({b})), the share of a latent's decoder norm that lies in {b}. It points from {a} on "
            f"the left (0) to {b} on the right (1); latents at 0.5 write equally strongly to both. Colours are verdicts.",
        ),
        Plot(
            f"Decoder cosine{at}",
            histogram(
                table.decoder_cosine.numpy()[alive],
                limits=(-1, 1),
                xlabel="cosine of the two decoder vectors",
                label=f"Decoder cosine {key}",
            ),
            f"Right (1): the latent has the same direction in {a} and {b}. Near 0: it means different things, or one "
            "of its vectors is too short to have a meaningful direction.",
        ),
    ]
    scaling = table.scaling
    if scaling is not None and bool(scaling.error.nu_L.isfinite().any()):
        nu_error, nu_reconstruction = (one.nu_L.numpy()[alive] for one in (scaling.error, scaling.reconstruction))
        label = f"Latent scaling {key}"
        found.append(
            Plot(
                f"Latent scaling{at}",
                plots.scaling_scatter(nu_error, nu_reconstruction, tags, tag_names=names, label=label),
                "How well a latent explains the side that it belongs to less, relative to the one that it belongs to "
                "more. Near (1, 1): equally present in both, whatever its norms say. Bottom left, inside the dotted "
                f"corner (both below {THRESHOLD:.2f}): specific to one, where its activations and enough firings bear it "
                "out. Values beyond the frame are drawn at its edge.",
            )
        )
    return found


def _shared_hook(table: DiffTable) -> str:
    hook_a, hook_b = table.name_a.rpartition("/")[2], table.name_b.rpartition("/")[2]
    return f" at {hook_a}" if hook_a == hook_b and hook_a != table.name_a else ""
