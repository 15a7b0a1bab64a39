"""What a report names first: where two models differ most, in words.

Axes: L latents · E ends of a list of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosscode.analysis.latents_pass import LatentsPass
from crosscode.analysis.records import LatentRecords
from crosscode.analysis.tokens import TokenDisplay
from crosscode.analysis.verdict import NO_DIFFERENCE

N_LATENTS, N_TOKENS = 3, 4
_BEFORE, _AFTER = 8, 4

Steered = Callable[[int], str]
"""What adding a latent does to the second model, as a sentence."""


def first_looks(
    study: LatentsPass, records: LatentRecords, tokenizer: Any, steered: Steered | None = None
) -> list[str]:
    """A heading, and a sentence for each of the first latents in the ranking of the second model; nothing where two models
    are not compared, or where their activations are the same."""
    verdict = study.verdicts[0] if study.verdicts else None
    if verdict is None or verdict.difference < NO_DIFFERENCE:
        return []
    a, b = verdict.name_a, verdict.name_b
    specific = verdict.specific(b)
    latents = (specific or verdict.ranking(b))[:N_LATENTS]
    if not latents:
        return []
    n = f"{len(specific):,} of {len(verdict.tag):,} latents"
    return [
        f"{n} are specific to {b}: {a} has less than half of each. The first:"
        if specific
        else f"Where {b} differs most from {a}:",
        *(_sentence(study, records, TokenDisplay(tokenizer), latent, steered) for latent in latents),
    ]


def _sentence(
    study: LatentsPass, records: LatentRecords, show: TokenDisplay, latent: int, steered: Steered | None
) -> str:
    strongest = study.top.examples(latent)[0]
    shown = [token for token in show(strongest.tokens, strongest.strengths, strongest.peak) if not token.is_special]
    peak = next((i for i, token in enumerate(shown) if token.is_peak), 0)
    text = "".join(
        f"«{token.text}»" if token.is_peak else token.text
        for token in shown[max(0, peak - _BEFORE) : peak + _AFTER + 1]
    )
    parts = [f"Latent {study.name_of(latent)} fires most on “{text.strip()}”."]
    logits = records.logits.get(study.verdicts[0].tables[0].name_b)
    if logits is not None:
        top = [(logits.display or show).text(int(token)) for token in logits.top_id_LE[latent][:N_TOKENS]]
        parts.append(f"It promotes the next tokens {', '.join(f'“{token}”' for token in top)}.")
    if steered is not None:
        parts.append(steered(latent))
    return " ".join(parts)
