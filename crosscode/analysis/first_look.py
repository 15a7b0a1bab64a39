"""What a report names first: where two models differ most, in words.

Axes: L latents · E ends of a list of logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crosscode.analysis.latents_pass import LatentsPass
from crosscode.analysis.records import LatentRecords
from crosscode.analysis.tokens import TokenDisplay
from crosscode.analysis.verdict import NO_DIFFERENCE, Verdict

N_LATENTS, N_COMMON, N_TOKENS = 3, 10, 4
_BEFORE, _AFTER = 8, 4
_RUN, _LONGEST = 4, 60
"""Tokens of a text that latents have in common: fewest and most."""

Steered = Callable[[int, str], str]
"""What adding a latent does to a model, of which the name is given, as a sentence."""


@dataclass(frozen=True)
class Look:
    """A heading, and a sentence for each of the first latents."""

    heading: str
    sentences: list[str]

    @property
    def lines(self) -> list[str]:
        return [self.heading, *self.sentences]


def first_looks(
    study: LatentsPass, records: LatentRecords, tokenizer: Any, steered: Steered | None = None
) -> list[Look]:
    """For each two models that are compared, about the first latents in the ranking of the second one; none where nothing is
    specific to it and their activations are the same."""
    several, show = len(study.verdicts) > 1, TokenDisplay(tokenizer)
    found = (_look(study, records, show, verdict, steered, several=several) for verdict in study.verdicts)
    return [look for look in found if look is not None]


def _look(
    study: LatentsPass,
    records: LatentRecords,
    show: TokenDisplay,
    verdict: Verdict,
    steered: Steered | None,
    *,
    several: bool,
) -> Look | None:
    a, b = verdict.name_a, verdict.name_b
    specific = verdict.specific(b)
    latents = (specific or verdict.ranking(b))[:N_LATENTS]
    if not latents or (not specific and verdict.difference < NO_DIFFERENCE):
        return None
    heading = f"Where {b} differs most from {a}:"
    if specific:
        one, text = len(specific) == 1, _text(study, show, specific[:N_COMMON])
        found = f"{len(specific):,} of {len(verdict.tag):,} learned features (latents) {'is' if one else 'are'} specific to it"
        against = f", against {a}" if several else ""
        heading = f"{b} has something of its own{against}. {found}: {a} has less than two thirds of {'it' if one else 'each'}."
        if text:
            who, end = "It fires" if one else "Most of them fire", "" if text.endswith(".") else "."
            heading += f" {who} most around “{text}”{end}"
        heading += "" if one else " The first:"
    return Look(heading, [_sentence(study, records, show, verdict, latent, steered) for latent in latents])


def _text(study: LatentsPass, show: TokenDisplay, latents: Sequence[int]) -> str:
    """The text that latents have in common: the few tokens that stand around most of their strongest firings (of a single
    latent around most of its examples), continued as most of the examples with them go on; empty: none."""
    found = [study.top.examples(latent) for latent in latents]
    strongest = found[0] if len(found) == 1 else [some[0] for some in found]
    counted = Counter(run for one in strongest for run in {run for _, run in _runs(one.tokens)})
    text, n = max(counted.items(), key=lambda one: (one[1], one[0]), default=((), 0))
    if n < 2 or 2 * n < len(strongest):
        return ""
    examples = [one.tokens for some in found for one in some]
    starts = [(i, at) for i, tokens in enumerate(examples) for at, run in _runs(tokens) if run == text]
    for step in (-1, 1):
        ends = [(i, at if step < 0 else at + _RUN - 1) for i, at in starts]
        while len(text) < _LONGEST:
            ends = [(i, at + step) for i, at in ends if 0 <= at + step < len(examples[i])]
            ((token, n),) = Counter(examples[i][at] for i, at in ends).most_common(1) or [(-1, 0)]
            if n < 2 or 2 * n <= len(ends):
                break
            ends = [(i, at) for i, at in ends if examples[i][at] == token]
            text = (token, *text) if step < 0 else (*text, token)
    return "".join(one.text for one in show(text, [0.0] * len(text)) if not one.is_special).strip("↵→ ")


def _runs(tokens: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    for at in range(len(tokens) - _RUN + 1):
        yield at, tuple(tokens[at : at + _RUN])


def _sentence(
    study: LatentsPass,
    records: LatentRecords,
    show: TokenDisplay,
    verdict: Verdict,
    latent: int,
    steered: Steered | None,
) -> str:
    strongest = study.top.examples(latent)[0]
    shown = [token for token in show(strongest.tokens, strongest.strengths, strongest.peak) if not token.is_special]
    peak = next((i for i, token in enumerate(shown) if token.is_peak), 0)
    text = "".join(
        f"«{token.text}»" if token.is_peak else token.text
        for token in shown[max(0, peak - _BEFORE) : peak + _AFTER + 1]
    )
    parts = [f"Latent {study.name_of(latent)} fires most on “{text.strip()}”."]
    logits = records.logits.get(verdict.table_of(latent).name_b)
    if logits is not None:
        top = [(logits.display or show).text(int(token)) for token in logits.top_id_LE[latent][:N_TOKENS]]
        parts.append(f"It promotes the next tokens {', '.join(f'“{token}”' for token in top)}.")
    if steered is not None:
        parts.append(steered(latent, verdict.table_of(latent).name_b.rpartition("/")[0]))
    return " ".join(parts)
