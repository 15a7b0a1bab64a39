"""The one verdict on every latent of a comparison: whom it belongs to, why, and in what order to look.

What a report, the explorer, the table of latents and `closes` say of a latent comes from here.

A latent is specific to its owner, the side with the larger decoder norm, where all of this holds:

- it fires at least `MIN_FIRINGS` times on held-out text;
- what is written to the other side is little, or the owner has it, too: at least `LEAN` of both decoder norms is the owner's,
  or nu of the activations along the other's vector is surely above `RETURNED`;
- what the other side has of it (nu, see `latent_scaling`) in its error, its reconstruction and its activations is below
  `THRESHOLD`, and the owner's own share above 0, by `SURE` standard errors: few firings are wide errors.

It is shared where one of these nu is above it by as many, and else undecided. That the decoder is tied, or that a
partition gave the latent to some models, is said and proves nothing. What an architecture cannot write to is no finding.
Of one model beside itself nu of the activations is 1, so that nothing is specific, however the dictionary came out.

Axes: L latents.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from crosscode.analysis.diffing import DiffTable, FiringStats
from crosscode.analysis.wording import join_and, latent_name, percent_text, short_names
from crosscode.errors import InputError

Tag = Literal["A-specific", "B-specific", "shared", "undecided", "structural"]
TAGS: tuple[Tag, ...] = ("A-specific", "B-specific", "shared", "undecided", "structural")
MIN_FIRINGS = 20
LEAN = 0.6
SURE = 2.5
NO_DIFFERENCE = 1e-3
"""Below this share of variance two models are called equal."""
_ORDER = {"A-specific": 0, "B-specific": 0, "undecided": 1, "shared": 2}


@dataclass(frozen=True)
class Verdict:
    """On all latents, of two models or of two hookpoints of one, `name_a` and `name_b`: a `tag` for each."""

    name_a: str
    name_b: str
    tables: list[DiffTable]
    """what it was read from: one for each hookpoint that both models have"""
    tag: Sequence[Tag]
    why: Sequence[str]
    """one sentence for each latent"""
    at: Sequence[int]
    """which of `tables` each tag was read from"""
    layers: Sequence[tuple[str, int]] | None = None
    """of a compound model (layer, index) of each latent"""

    def table_of(self, latent: int) -> DiffTable:
        """What its tag was read from."""
        return self.tables[self.at[latent]]

    def name_of(self, tag: Tag) -> str:
        """A tag in the names of what is compared."""
        names = {"A-specific": f"{self.name_a}-specific", "B-specific": f"{self.name_b}-specific"}
        return (names | {"structural": "cannot write to both"}).get(tag, tag)

    @property
    def names(self) -> list[str]:
        """`name_of` of each latent."""
        names = self.tag_names
        return [names[tag] for tag in self.tag]

    @property
    def tag_names(self) -> dict[Tag, str]:
        """Each tag in the names of what is compared."""
        return {tag: self.name_of(tag) for tag in TAGS}

    @cached_property
    def counts(self) -> Counter[Tag]:
        """Latents by tag."""
        return Counter(self.tag)

    @property
    def difference(self) -> float:
        """Squared difference of both sides' activations, in their variance: the largest over the hookpoints; NaN: not looked
        at."""
        return max((t.scaling.difference for t in self.tables if t.scaling is not None), default=math.nan)

    @cached_property
    def effect_L(self) -> Tensor:
        """Of what the side that the latent leans to has and the other one lacks: root mean square where it fires, over all
        hookpoints; of a single one, negative where the other side has more."""
        if len(self.tables) == 1:
            return self.tables[0].effect_L
        return _joined([
            table.effect_L.clamp(min=0) * ((table.decoder_norm_b > table.decoder_norm_a) == self.leans_to_b_L)
            for table in self.tables
        ])  # fmt: skip

    @cached_property
    def leans_to_b_L(self) -> Tensor:
        """Whether a latent is specific to b; of one that is specific to neither, whether b's decoder norm, over all hookpoints,
        is the larger."""
        norm_a_L, norm_b_L = (
            _joined([getattr(table, name) for table in self.tables]) for name in ("decoder_norm_a", "decoder_norm_b")
        )
        leans_L = norm_b_L > norm_a_L
        for tag in ("A-specific", "B-specific"):
            leans_L[torch.tensor([one == tag for one in self.tag])] = tag == "B-specific"
        return leans_L

    def ranking(self, name: str) -> list[int]:
        """Latents that lean to one side and fire often enough, those that are specific to it first, then undecided ones, then
        shared ones; each by effect, largest first.

        Raises:
            InputError: `name` is not compared.
        """
        if name not in (self.name_a, self.name_b):
            raise InputError(f"ranking: compared are {self.name_a!r} and {self.name_b!r}, got {name!r}")
        leans_L = self.leans_to_b_L if name == self.name_b else ~self.leans_to_b_L
        enough_L = (self.tables[0].firings >= MIN_FIRINGS) & self.effect_L.isfinite()
        order_L = np.array([_ORDER.get(tag, 3) for tag in self.tag])
        some = np.flatnonzero((leans_L & enough_L).numpy() & (order_L < 3))
        return some[np.lexsort((some, -self.effect_L.numpy()[some], order_L[some]))].tolist()

    def specific(self, name: str) -> list[int]:
        """Latents that are specific to one side, best first."""
        return self.ranking(name)[: self.counts["B-specific" if name == self.name_b else "A-specific"]]

    def rank_L(self, name: str) -> Tensor:
        """Place in `ranking`, from 1; NaN for those that are not in it."""
        ranking = self.ranking(name)
        rank_L = torch.full((len(self.tag),), torch.nan, dtype=torch.float64)
        rank_L[ranking] = torch.arange(1, len(ranking) + 1, dtype=torch.float64)
        return rank_L

    def _first(self, name: str, n: int = 3) -> str:
        return ", ".join(latent_name(latent, self.layers) for latent in self.ranking(name)[: min(n, 3)])

    def _leaning(self, name: str) -> str:
        first = self._first(name)
        return f"{first} (they lean to {name})" if first else f"none that leans to {name}"

    def headline(self) -> str:
        """What was found, in one sentence."""
        found = {self.name_b: self.counts["B-specific"], self.name_a: self.counts["A-specific"]}
        n_judged = len(self.tag) - self.counts["undecided"] - self.counts["structural"]
        if not n_judged:
            return "Nothing can be said: of no latent is there enough evidence."
        if not any(found.values()):
            none = f"of {n_judged:,} latents with enough evidence, none is specific to either side."
            if self.difference < NO_DIFFERENCE:
                return f"No difference found: {none}"
            differ = f"the activations differ by {percent_text(self.difference)} of variance"
            if math.isnan(self.difference):
                differ = "the models are of different width"
            first = f"Look first at {self._leaning(self.name_b)}, and at {self._leaning(self.name_a)}."
            return f"No specific latent: {differ}, but {none} {first}"
        parts = [
            f"{n:,} {'is' if n == 1 else 'are'} specific to {name} ({'first ' * (n > 3)}{self._first(name, n)})"
            for name, n in found.items()
            if n
        ]
        rest = join_and([f"{self.counts[tag]:,} {self.name_of(tag)}" for tag in TAGS[2:] if self.counts[tag]])
        return f"Of {len(self.tag):,} latents, {join_and(parts)}{rest and f'; {rest}'}."


def verdict_on(
    tables: Sequence[DiffTable],
    own_text: Mapping[str, FiringStats] = MappingProxyType({}),
    layers: Sequence[tuple[str, int]] | None = None,
) -> Verdict:
    """The verdict on two models from the tables of all hookpoints that are compared.

    A latent is specific to a model if it is so at one hookpoint and at none shared or the other model's.
    """
    name_a, name_b = short_names(tables[0].name_a, tables[0].name_b)
    judged = [_Judge(table, own_text).all() for table in tables]
    hooks = [table.name_b.rpartition("/")[2] for table in tables]
    tag, why, at = zip(*(_join(hooks, each) for each in zip(*judged, strict=True)), strict=True)
    return Verdict(name_a, name_b, list(tables), tag, why, at, layers)


def verdicts_on(
    tables: Sequence[DiffTable],
    own_text: Mapping[str, FiringStats] = MappingProxyType({}),
    layers: Sequence[tuple[str, int]] | None = None,
) -> list[Verdict]:
    """One for each two models that are compared (or hookpoints of one model). `own_text`: firing on what each writes."""
    of_pair: dict[tuple[str, str], list[DiffTable]] = {}
    for table in tables:
        of_pair.setdefault(short_names(table.name_a, table.name_b), []).append(table)
    return [verdict_on(some, own_text, layers) for some in of_pair.values()]


def _joined(columns_L: Sequence[Tensor]) -> Tensor:
    """Norm over hookpoints; what is undefined at one is left out."""
    return torch.stack([column_L.nan_to_num(0) for column_L in columns_L]).norm(dim=0)


def _join(hooks: Sequence[str], said: Sequence[tuple[Tag, str]]) -> tuple[Tag, str, int]:
    """Of one latent, from what is said at each hookpoint; and the hookpoint's number."""
    if len(hooks) == 1:
        return *said[0], 0
    for tags in (("shared",), ("A-specific", "B-specific"), ("undecided",), ("structural",)):
        found = {i: one for i, one in enumerate(said) if one[0] in tags}
        if not found:
            continue
        first, (tag, reason) = next(iter(found.items()))
        if len({one for one, _ in found.values()}) > 1:
            return "undecided", f"It is specific to another model at {join_and([hooks[i] for i in found])}.", first
        return tag, f"At {hooks[first]}: {reason}", first
    raise AssertionError("a latent has a tag at each hookpoint")


class _Judge:
    """Judges the latents of one table."""

    def __init__(self, table: DiffTable, own_text: Mapping[str, FiringStats]):
        self._table = table
        self._names = short_names(table.name_a, table.name_b)
        self._relative_L, self._cosine_L = table.relative_norm.tolist(), table.decoder_cosine.tolist()
        self._firings_L, self._tied_L = table.firings.tolist(), table.tied_L.tolist()
        self._may_write_L2, self._given_L2 = table.may_write_L2.tolist(), table.given_L2.tolist()
        shares = {} if table.scaling is None else table.scaling.shares
        self._returned = (
            [(math.nan, math.nan)] * table.n_latents
            if table.scaling is None
            else list(zip(table.scaling.returned.nu_L.tolist(), table.scaling.returned.below_z_L.tolist(), strict=True))
        )
        self._shares = {
            kind: list(zip(share.nu_L.tolist(), share.owner_z_L.tolist(), share.below_z_L.tolist(), strict=True))
            for kind, share in shares.items()
        }

        rates = [own_text[name].density_L.tolist() for name in self._names if name in own_text]
        self._own_rates_2L = rates if len(rates) == 2 else None

    def all(self) -> list[tuple[Tag, str]]:
        return [self._one(latent) for latent in range(self._table.n_latents)]

    def _one(self, latent: int) -> tuple[Tag, str]:
        firings, relative = self._firings_L[latent], self._relative_L[latent]
        blocked = [name for name, may in zip(self._names, self._may_write_L2[latent], strict=True) if not may]
        if blocked:
            return "structural", f"The architecture cannot write it to {join_and(blocked)}: that is no finding."
        if firings < MIN_FIRINGS:
            seen = f"It fires on only {firings} held-out tokens" if firings else "It never fires on the held-out text"
            return "undecided", f"{seen}; {MIN_FIRINGS} are needed."
        if relative != relative or not self._shares:
            return "undecided", "It writes to neither." if relative != relative else "Its firings were not looked at."
        at_b = relative > 0.5
        owner, other = reversed(self._names) if at_b else self._names
        of_owner = relative if at_b else 1 - relative
        beside = self._beside(latent)
        shares = {kind: of_all[latent] for kind, of_all in self._shares.items()}
        said = ", ".join(f"{kind} {nu:.2f}" for kind, (nu, _, _) in shares.items())
        has_too = [kind for kind, (_, own_z, below_z) in shares.items() if own_z > SURE and below_z < -SURE]
        if has_too:
            share = f" (of its decoder norms {100 * of_owner:.0f} % are {owner}'s)" if of_owner > LEAN else ""
            return (
                "shared",
                f"{other} has it, too: ν of the {has_too[0]} is {shares[has_too[0]][0]:.2f}{share}.{beside}",
            )
        unsure = [kind for kind, (_, own_z, below_z) in shares.items() if not (own_z > SURE and below_z > SURE)]
        if unsure:
            return "undecided", f"{firings} firings do not settle ν of the {join_and(unsure)} ({said}).{beside}"
        returned_nu, returned_z = self._returned[latent]
        if of_owner < LEAN and not returned_z < -SURE:
            cosine = self._cosine_L[latent]
            ways = "of two widths" if math.isnan(cosine) else f"in two directions (cosine {cosine:.2f})"
            return "undecided", f"It writes vectors of like norm {ways}.{beside}"
        tag: Tag = "B-specific" if at_b else "A-specific"
        lean = (
            f"{100 * of_owner:.0f} % of its decoder norms are {owner}'s"
            if of_owner >= LEAN
            else f"what it writes to {other}, {owner} has, too (ν {returned_nu:.2f})"
        )
        return tag, f"{other} has less than two thirds of it: ν is {said}; {lean}.{beside}"

    def _beside(self, latent: int) -> str:
        """What is known beside the measures of latent scaling."""
        said = " Its decoder is tied." if self._tied_L[latent] else ""
        given = [name for name, is_given in zip(self._names, self._given_L2[latent], strict=True) if is_given]
        if len(given) == 1:
            said += f" The partition gave it to {given[0]}, which proves nothing."
        if self._own_rates_2L is not None:
            rates = zip(self._names, self._own_rates_2L, strict=True)
            said += " It fires on {}.".format(
                join_and([f"{percent_text(rate_L[latent])} of what {name} writes" for name, rate_L in rates])
            )
        return said
