"""All that a report says about latents, from the weights and one pass over held-out text.

Axes: L latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from crosscode.analysis.diffing import DiffTable, FiringStats, diff_latents
from crosscode.analysis.encoded import Collector, HeldoutBatch, collect, encode_heldout
from crosscode.analysis.example_pool import Example
from crosscode.analysis.examples import QuantileExamples, TopExamples
from crosscode.analysis.geometry import decoder_vectors_LXD
from crosscode.analysis.latent_scaling import LatentScaling
from crosscode.analysis.reads import readers
from crosscode.analysis.verdict import Verdict, verdicts_on
from crosscode.analysis.wording import latent_name
from crosscode.config.hookpoints import layer_of
from crosscode.groups import Groupings
from crosscode.models.architecture import ARCHITECTURES
from crosscode.models.base import BaseCrosscoder
from crosscode.models.decoder_vectors import may_write_LX
from crosscode.models.split import Split

MAX_PAIRS = 6
"""All of four models at one hookpoint."""


@dataclass(frozen=True)
class LatentsPass:
    """Results of `study_latents`."""

    position_names: list[str]
    firing: FiringStats
    decoder_norm_LX: Tensor
    """in the scale of training, float64"""
    pairs: list[DiffTable]
    verdicts: list[Verdict]
    """on each two models of `pairs` (or hookpoints of one model)"""
    without_verdict: str
    """why latents of two models have none, so that all of them are undecided; empty: they have, or there is nothing to judge"""
    layers: list[tuple[str, int]] | None
    """of a compound model each latent's source layer and its number there; None: the model is not compound"""
    top: TopExamples
    quantiles: QuantileExamples
    apart: Mapping[str, Mapping[str, list[Verdict]]] = field(default_factory=dict)
    """`verdicts` on the tokens of each group alone, by its kind (source, role) and name"""
    own_text: Mapping[str, FiringStats] = field(default_factory=dict)
    """of what each language model writes itself, where that was looked at"""
    not_compared: Sequence[tuple[str, str]] = ()
    """pairs of positions that were too many"""
    readers: Sequence[str] = ()
    """of what examples say that a latent reads it there; see `analysis.reads`"""

    def examples(self, latent: int) -> dict[str, list[Example]]:
        """Its largest activations, and some from each quarter of its firings."""
        quarters = self.quantiles.examples(latent, n_quantiles=4, per_quantile=2)
        return {"Top activations": self.top.examples(latent)} | {
            f"Quarter {i + 1}": one for i, one in enumerate(quarters)
        }

    def name_of(self, latent: int) -> str:
        """See `latent_name`."""
        return latent_name(latent, self.layers)

    @property
    def n_tokens(self) -> int:
        return self.firing.n_tokens


def pairs_to_compare(position_names: Sequence[str]) -> list[tuple[int, int]]:
    """Which output positions can be compared: each two models at each hookpoint, those with the first model first; of one
    model its first and last hookpoint.

    Names are "<model>/<hookpoint>".
    """
    models: dict[str, list[int]] = {}
    for i, name in enumerate(position_names):
        models.setdefault(name.rpartition("/")[0], []).append(i)
    if len(models) > 1:
        return [pair for two in combinations(models.values(), 2) for pair in zip(*two, strict=True)]
    (only,) = models.values()
    return [(only[0], only[-1])] if len(only) > 1 else []


def study_latents(
    model: BaseCrosscoder,
    heldout: Iterable[HeldoutBatch],
    split: Split,
    position_names: Sequence[str],
    more: Sequence[Collector] = (),
    groupings: Groupings | None = None,
) -> LatentsPass:
    """One pass over held-out text: firing, examples, and a diffing table with latent scaling for each pair: the first
    `MAX_PAIRS` of `pairs_to_compare`. `more` collectors see it too. `groupings`: as of `FiringStats`."""
    names = list(position_names)
    may_LX = may_write_LX(model)
    # Of which some latent may write to both.
    pairs = [(a, b) for a, b in pairs_to_compare(names) if bool((may_LX[:, a] & may_LX[:, b]).any())]
    pairs, others = pairs[:MAX_PAIRS], [(names[a], names[b]) for a, b in pairs[MAX_PAIRS:]]
    firing = FiringStats(model.n_latents, groupings)
    of_readers = readers(model, names)
    top = TopExamples(model.n_latents, n_readers=len(of_readers))
    quantiles = QuantileExamples(model.n_latents, n_readers=len(of_readers))
    scalings = [LatentScaling(model, a, b, groupings=groupings) for a, b in pairs]
    collectors: list[Collector] = [firing, top, quantiles, *scalings, *more]
    collect(encode_heldout(model, heldout, split, readers=[*of_readers.values()]), *collectors)
    tables = [diff_latents(model, names, *scaling.positions, firing, scaling.result()) for scaling in scalings]
    norms_LX = decoder_vectors_LXD(model).double().norm(dim=-1).cpu()
    layers = layers_of(model, names)
    verdicts = verdicts_on(tables, layers=layers)
    of_groups = [scaling.groups() for scaling in scalings]

    def verdicts_in(kind: str, name: str, own: FiringStats) -> list[Verdict]:
        own_scalings = [of_group[kind][name] for of_group in of_groups]
        own_tables = [replace(t, firings=own.counts_L, scaling=s) for t, s in zip(tables, own_scalings, strict=True)]
        return verdicts_on(own_tables, layers=layers)

    apart = {
        kind: {name: verdicts_in(kind, name, own) for name, own in of_kind.items()}
        for kind, of_kind in firing.groups().items()
    }
    reason = ARCHITECTURES.config_class(split.type).without_verdict
    found = LatentsPass(names, firing, norms_LX, tables, verdicts, reason, layers, top, quantiles, apart)
    return replace(found, not_compared=others, readers=[*of_readers])


def with_own_text(
    study: LatentsPass, model: BaseCrosscoder, own_text: Mapping[str, Iterable[HeldoutBatch]], split: Split
) -> LatentsPass:
    """The same, with how often latents fire on what each language model writes itself."""
    firing = {name: FiringStats(model.n_latents) for name in own_text}
    for name, batches in own_text.items():
        collect(encode_heldout(model, batches, split), firing[name])
    if not firing:
        return study
    return replace(study, own_text=firing, verdicts=verdicts_on(study.pairs, firing, study.layers))


def layers_of(model: BaseCrosscoder, position_names: Sequence[str]) -> list[tuple[str, int]] | None:
    """The number of the layer that each latent of a compound model reads, as its hookpoint names it (where it names none,
    its place), and the latent's number there; None: the model is not compound."""
    if len(model.parts) < 2:
        return None
    numbers = [layer_of(name.rpartition("/")[2]) for name in position_names]
    layers = [str(place if found is None else found) for place, found in enumerate(numbers)]
    return [(layer, i) for part, layer in zip(model.parts, layers, strict=False) for i in range(part.n_latents)]


def spread_over_density(firing: FiringStats, n: int, min_firings: int) -> list[int]:
    """n latents at even steps from the most to the least frequent of those that fire enough."""
    alive = (firing.counts_L >= max(min_firings, 1)).nonzero().squeeze(1)
    order = alive[torch.sort(firing.counts_L[alive], descending=True, stable=True).indices].tolist()
    if len(order) <= n:
        return order
    return [order[round(i * (len(order) - 1) / (n - 1))] for i in range(n)] if n > 1 else order[:1]
