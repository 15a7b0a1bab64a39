"""The latents that a report shows one by one, with their text, and the table of many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crosscode.analysis.diffing import DiffTable
from crosscode.analysis.example_pool import Example
from crosscode.analysis.latent_plots import CSS_OF_TAG
from crosscode.analysis.latent_scaling import Share
from crosscode.analysis.latents_pass import LatentsPass, spread_over_density
from crosscode.analysis.records import OtherText
from crosscode.analysis.tokens import DisplayToken, TokenDisplay
from crosscode.analysis.verdict import MIN_FIRINGS, TAGS, Verdict
from crosscode.analysis.wording import number_text

N_PER_SIDE = 5
N_CARDS = 10
N_TABLE_ROWS = 150


@dataclass(frozen=True)
class ShownToken:
    """A token with the strength of its highlight, 0 to 1."""

    token: DisplayToken
    shade: float

    @property
    def css(self) -> str:
        """Classes of its span."""
        classes = {"hit": self.shade > 0, "peak": self.token.is_peak, "special": self.token.is_special}
        return " ".join(name for name, applies in classes.items() if applies)

    @property
    def indentation(self) -> str:
        """A long run of spaces at the end, which is shown narrower: it would push the text out of sight."""
        text = self.token.text
        n_spaces = len(text) - len(text.rstrip(" "))
        return " " * n_spaces if n_spaces >= 4 else ""

    @property
    def text(self) -> str:
        """What is shown before the indentation."""
        return self.token.text.removesuffix(self.indentation)


@dataclass(frozen=True)
class Snippet:
    value: str
    lines: list[tuple[str, list[ShownToken]]]
    """the text in the tokens of each tokenizer, with the names of the models that read them where there are several"""


@dataclass(frozen=True)
class Card:
    """One latent."""

    latent: int
    name: str
    css: str
    tag: str
    why: str
    facts: list[tuple[str, str]]
    top: list[Snippet]
    range: list[tuple[str, list[Snippet]]]
    """examples by share of the firings, strongest first"""


@dataclass(frozen=True)
class CardGroup:
    heading: str
    intro: str
    cards: list[Card]


@dataclass(frozen=True)
class Column:
    title: str
    hint: str


@dataclass(frozen=True)
class LatentTable:
    """Cells are (shown, sort key)."""

    heading: str
    columns: list[Column]
    rows: list[list[tuple[str, float | None]]]
    css: list[str]
    note: str


@dataclass(frozen=True)
class _Show:
    """Examples in the tokens of each tokenizer."""

    first: TokenDisplay
    others: Sequence[OtherText]

    def __call__(self, example: Example, largest: float) -> Snippet:
        scale = 1 / largest if largest > 0 else 0.0
        lines = [
            (self.others[0].beside if self.others else "", self.first(example.tokens, example.strengths, example.peak))
        ]
        lines += [(other.names, other.shown(example)) for other in self.others]
        shown = [
            (names, [ShownToken(token, round(min(1.0, token.strength * scale), 3)) for token in tokens])
            for names, tokens in lines
        ]
        return Snippet(number_text(example.value), shown)


def card_groups(study: LatentsPass, tokenizer: Any, others: Sequence[OtherText] = ()) -> list[CardGroup]:
    """The first latents of either side's ranking; for a single output position, latents from frequent to rare. `others`: the
    text in other tokens than `tokenizer`'s."""
    show = _Show(TokenDisplay(tokenizer), others)
    if not study.verdicts:
        latents = spread_over_density(study.firing, N_CARDS, MIN_FIRINGS)
        cards = [_card(study, show, latent, None) for latent in latents]
        intro = f"Evenly spaced from most to least frequent, of those active on at least {MIN_FIRINGS} held-out tokens."
        return [CardGroup("Latents from frequent to rare", intro, cards)]
    several = len(study.verdicts) > 1
    groups = []
    for verdict in study.verdicts:
        for name, other in ((verdict.name_b, verdict.name_a), (verdict.name_a, verdict.name_b)):
            specific = verdict.specific(name)
            latents = (specific or verdict.ranking(name))[:N_PER_SIDE]
            heading = f"{'Most specific' if specific else 'Leaning most'} to {name}{several * f', against {other}'}"
            cards = [_card(study, show, latent, verdict) for latent in latents]
            groups.append(CardGroup(heading, _intro(name, bool(specific), bool(cards)), cards))
    return groups


def _intro(name: str, specific: bool, any_cards: bool) -> str:
    if not any_cards:
        return f"No latent that fires at least {MIN_FIRINGS} times leans to {name}."
    order = f"By how large a vector {name} has, and the other lacks, where they fire."
    return order if specific else f"No latent is specific to {name}. {order}"


def _card(study: LatentsPass, show: _Show, latent: int, verdict: Verdict | None) -> Card:
    firing = study.firing
    largest = float(firing.max_L[latent])
    facts = [
        ("active on", f"{_percent(firing.density_L[latent])} of tokens"),
        ("largest activation", number_text(largest)),
    ]
    css, tag, why = "shared", "undecided" if study.without_verdict else "", ""
    if verdict is not None:
        css, tag = CSS_OF_TAG.get(verdict.tag[latent], "shared"), verdict.name_of(verdict.tag[latent])
        table, why = verdict.table_of(latent), verdict.why[latent]
        shown = (("relative norm", table.relative_norm, "{:.3f}"), ("decoder cosine", table.decoder_cosine, "{:.2f}"))
        shown += tuple((f"ν {kind}", share.nu_L, "{:.2f}") for kind, share in _shares(table).items())
        facts = [*((key, _cell(column[latent], form.format)[0]) for key, column, form in shown), *facts]

    def snippets(examples: Sequence[Example]) -> list[Snippet]:
        return [show(example, largest) for example in examples]

    shares = study.quantiles.examples(latent, n_quantiles=4, per_quantile=2)
    names = ("strongest quarter", "second quarter", "third quarter", "weakest quarter")
    in_range = [(name, snippets(share)) for name, share in zip(names, shares, strict=True) if share]
    return Card(latent, study.name_of(latent), css, tag, why, facts, snippets(study.top.examples(latent)), in_range)


# ---- table


def latent_tables(study: LatentsPass) -> list[LatentTable]:
    """For each two models that are compared rows for the first latents of both rankings; where none are, one table from the most
    frequent latents to the rarest."""
    alive = int((study.firing.counts_L > 0).sum())
    if not study.verdicts:
        order = spread_over_density(study.firing, N_TABLE_ROWS, 1)
        rows = [_density_row(study, latent) for latent in order]
        note = f"{len(rows)} of {alive:,} active latents, evenly spaced from frequent to rare."
        return [LatentTable("Table of latents", _DENSITY_COLUMNS, rows, ["shared"] * len(rows), note)]
    return [_pair_table(study, verdict, alive) for verdict in study.verdicts]


def _pair_table(study: LatentsPass, verdict: Verdict, alive: int) -> LatentTable:
    a, b = verdict.name_a, verdict.name_b
    firsts = {name: verdict.ranking(name)[: N_TABLE_ROWS // 2] for name in (b, a)}
    columns = [
        Column("latent", "index of the latent"),
        Column("verdict", "whom it belongs to"),
        Column("effect", "size of what one side has and the other lacks, where it fires"),
        Column("relative norm", f"0 = written to {a} alone, 1 = to {b} alone"),
        Column(f"norm {a}", "decoder norm, scale of training"),
        Column(f"norm {b}", "decoder norm, scale of training"),
        Column("cosine", "of the two decoder vectors"),
        Column("enc. cosine", "of the two encoder vectors"),
        *(Column(f"ν {kind}", "latent scaling: other / owner") for kind in _shares(verdict.tables[0])),
        Column("density", "share of held-out tokens on which it is active"),
        Column("max", "largest activation"),
    ]
    counts = " and the ".join(f"{len(some)} that lean most to {name}" for name, some in firsts.items())
    note = f"Of {alive:,} active latents the {counts}, by rank."
    if len(verdict.tables) > 1:
        note += " Norms, cosines and ν are those of the hookpoint from which the verdict is read."
    order = [latent for some in firsts.values() for latent in some]
    css = [CSS_OF_TAG.get(verdict.tag[latent], "shared") for latent in order]
    heading = "Table of latents" + (f": {a} against {b}" if len(study.verdicts) > 1 else "")
    return LatentTable(heading, columns, [_pair_row(study, verdict, latent) for latent in order], css, note)


_DENSITY_COLUMNS = [
    Column("latent", "index of the latent"),
    Column("density", "share of held-out tokens on which it is active"),
    Column("mean", "mean activation where it is active"),
    Column("max", "largest activation"),
    Column("decoder norm", "sum over output positions, scale of training"),
]


def _pair_row(study: LatentsPass, verdict: Verdict, latent: int) -> list[tuple[str, float | None]]:
    table, tag = verdict.table_of(latent), verdict.tag[latent]
    values: list[tuple[Tensor, Callable[[float], str]]] = [
        (verdict.effect_L, number_text),
        (table.relative_norm, "{:.3f}".format),
        (table.decoder_norm_a, number_text),
        (table.decoder_norm_b, number_text),
        (table.decoder_cosine, "{:.2f}".format),
        (table.encoder_cosine, "{:.2f}".format),
        *((share.nu_L, "{:.2f}".format) for share in _shares(table).values()),
        (study.firing.density_L, _percent),
        (study.firing.max_L, number_text),
    ]
    row = [(study.name_of(latent), float(latent)), (verdict.name_of(tag), float(TAGS.index(tag)))]
    return [*row, *(_cell(column[latent], form) for column, form in values)]


def _shares(table: DiffTable) -> dict[str, Share]:
    return {} if table.scaling is None else table.scaling.shares


def _density_row(study: LatentsPass, latent: int) -> list[tuple[str, float | None]]:
    firing = study.firing
    numbers = (firing.mean_active_L[latent], firing.max_L[latent], study.decoder_norm_LX[latent].sum())
    density = _cell(firing.density_L[latent], _percent)
    return [(study.name_of(latent), latent), density, *(_cell(number, number_text) for number in numbers)]


def _cell(value: Tensor | float, form: Callable[[float], str]) -> tuple[str, float | None]:
    """What to show, and the number to sort by; a dash for an undefined one."""
    number = float(value)
    return (form(number), number) if math.isfinite(number) else ("–", None)


def _percent(share: Tensor | float) -> str:
    return f"{number_text(100 * float(share))} %"
