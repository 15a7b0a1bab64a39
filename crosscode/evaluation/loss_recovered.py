"""How much of a language model's ability survives when its activations are replaced by reconstructions.

For each output position (a language model and a hookpoint) the model runs three times on held-out text: as it is, with
the reconstruction spliced in, and with zeros spliced in. Reconstructions come from clean activations.

    loss_recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)

Of a difference between two models, 0 and reconstruction are added to the first model's activations, and the sum is spliced
into the second: 0 puts the first model's activations in the place of the second's.

Only usable positions are replaced: the crosscoder never sees the others (position 0, padding, masked tokens).
Cross-entropy and KL are means over the predictions that are made at a usable position of a usable token.
A hookpoint that is a module's input replaces what this module reads; where the residual stream passes beside the
module (`hook_resid_mid`), that stream stays clean. A model that is harvested in TransformerBridge is spliced in it.

H harvest batch (sequences) · S sequence · V vocabulary · M models · P hookpoints · D width ·
Xi/Xo input/output crosscoding dims · X flattened Xo · Q all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.norms import NormLimit
from crosscode.data.text.tokens import TokenBatch
from crosscode.evaluation.bootstrap import interval_95, resampled_means
from crosscode.evaluation.precision import full_precision
from crosscode.evaluation.raw_model import RawModel
from crosscode.evaluation.splicing import Splicer
from crosscode.evaluation.text_parts import TextPart, text_parts
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split

ALL_HOOKPOINTS = "all hookpoints"


@dataclass(frozen=True)
class LossRecovered:
    """Means over predicted tokens, nats. `ci95`: for some of the figures a 95 % interval by the bootstrap over
    sequences. `loss_recovered` is None where zeros do not hurt, or hurt without bound."""

    n_tokens: int
    n_sequences: int
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    kl_spliced: float
    kl_zero: float
    loss_recovered: float | None
    ci95: dict[str, list[float]]


@full_precision()
def measure_loss_recovered(
    model: BaseCrosscoder,
    harvester: ActivationHarvester,
    batches: Iterable[TokenBatch],
    split: Split,
    names_MP: Sequence[Sequence[str]],
    scaling_MP: Tensor | None = None,
    n_tokens: int = 4096,
    limit: NormLimit | None = None,
) -> dict[str, LossRecovered]:
    """By name of the output position; a model with several has an entry `<model>/all hookpoints` as well, where all of
    its reconstructions are spliced in at once.

    Args:
        model: either folded, or in training, with the scaling in `scaling_MP`.
        n_tokens: usable tokens after which no further batch is taken.
        limit: tokens beyond it count as unusable.
    """
    places_M = _places(harvester, split, names_MP)
    sums = {name: _SequenceSums() for places in places_M for name in places}
    splicers = [Splicer(harvester, m) if places else None for m, places in enumerate(places_M)]
    with RawModel(model, split, scaling_MP) as raw_model:
        for part in text_parts(harvester, batches, n_tokens, limit):
            recon_HSXD = reconstruct(raw_model, part.acts_HSMPD, part.mask_HS)
            beside = split.beside(part.acts_HSMPD)
            zero_HSXD = torch.zeros_like(recon_HSXD) if beside is None else beside.reshape(recon_HSXD.shape)
            for splicer, places in zip(splicers, places_M, strict=True):
                if splicer is not None:
                    _add_part(sums, splicer, places, part, recon_HSXD + zero_HSXD, zero_HSXD)
    return {name: found.result() for name, found in sums.items() if found.n_predictions}


Places = dict[str, dict[int, int]]
"""What is replaced at once in one language model, by name: for each of its hookpoints p the output position x."""


def _places(harvester: ActivationHarvester, split: Split, names_MP: Sequence[Sequence[str]]) -> list[Places]:
    M, P, _ = harvester.dims
    positions_M: list[dict[int, int]] = [{} for _ in range(M)]
    for x, (m, p) in enumerate(split.output_places(M, P)):
        positions_M[m][p] = x
    places_M = [{names_MP[m][p]: {p: x} for p, x in positions.items()} for m, positions in enumerate(positions_M)]
    for names_P, places, positions in zip(names_MP, places_M, positions_M, strict=True):
        if len(positions) > 1:
            short_name = names_P[0].removesuffix(f"/{harvester.hookpoints[0]}")
            places[f"{short_name}/{ALL_HOOKPOINTS}"] = positions
    return places_M


@torch.no_grad()
def reconstruct(raw_model: RawModel, acts_HSMPD: Tensor, mask_HS: Tensor, max_rows: int = 4096) -> Tensor:
    """`recon_HSXD`: raw reconstructions at usable positions, 0 elsewhere."""
    mask_HS = mask_HS.to(acts_HSMPD.device)
    model, parts = raw_model.model, []
    for raw_BMPD in acts_HSMPD[mask_HS].split(max_rows):
        output_BXoDo = raw_model.raw(model(raw_model.input(raw_BMPD.to(model.device))))
        parts.append(output_BXoDo.reshape(raw_BMPD.shape[0], -1, model.d_out))
    output_BXD = torch.cat(parts).to(acts_HSMPD)
    recon_HSXD = output_BXD.new_zeros(*mask_HS.shape, *output_BXD.shape[1:])
    recon_HSXD[mask_HS] = output_BXD
    return recon_HSXD


def _add_part(
    sums: dict[str, _SequenceSums],
    splicer: Splicer,
    places: Places,
    part: TextPart,
    recon_HSXD: Tensor,
    zero_HSXD: Tensor,
) -> None:
    tokens_HS, mask_HS, segments_HS = part.tokens_HS, part.mask_HS, part.segments_HS
    clean_HSV = splicer.logits(tokens_HS, segments_HS)
    for name, positions in places.items():
        spliced = {p: recon_HSXD[:, :, x] for p, x in positions.items()}
        zeros = {p: zero_HSXD[:, :, x] for p, x in positions.items()}
        spliced_HSV = splicer.logits(tokens_HS, segments_HS, spliced, mask_HS)
        zero_HSV = splicer.logits(tokens_HS, segments_HS, zeros, mask_HS)
        sums[name].add(tokens_HS, mask_HS, clean_HSV, spliced_HSV, zero_HSV)


FIGURES = ("ce_clean", "ce_spliced", "ce_zero", "kl_spliced", "kl_zero")


@dataclass
class _SequenceSums:
    """For each sequence the number of predictions and the sum of each figure over them."""

    n_H: list[Tensor] = field(default_factory=list)
    sums_HF: list[Tensor] = field(default_factory=list)

    @property
    def n_predictions(self) -> int:
        return sum(int(n_H.sum()) for n_H in self.n_H)

    def add(self, tokens_HS: Tensor, mask_HS: Tensor, clean_HSV: Tensor, spliced_HSV: Tensor, zero_HSV: Tensor) -> None:
        counted = (mask_HS[:, :-1] & mask_HS[:, 1:]).to(clean_HSV.device)
        next_HS1 = tokens_HS[:, 1:].to(clean_HSV.device)[..., None]
        log_probs = [logits_HSV[:, :-1].log_softmax(-1) for logits_HSV in (clean_HSV, spliced_HSV, zero_HSV)]
        figures = [-log_prob_HSV.gather(-1, next_HS1)[..., 0] for log_prob_HSV in log_probs]
        clean = log_probs[0]
        figures += [(clean.exp() * (clean - other)).sum(-1) for other in log_probs[1:]]
        self.sums_HF.append(torch.stack([(figure * counted).double().sum(1) for figure in figures], 1).cpu())
        self.n_H.append(counted.sum(1).cpu())

    def result(self) -> LossRecovered:
        n_Q, sums_QF = torch.cat(self.n_H), torch.cat(self.sums_HF)
        sums_QF, n_Q = sums_QF[n_Q > 0], n_Q[n_Q > 0].double()
        means = dict(zip(FIGURES, (sums_QF.sum(0) / n_Q.sum()).tolist(), strict=True))
        return LossRecovered(
            n_tokens=int(n_Q.sum()),
            n_sequences=n_Q.shape[0],
            **means,
            loss_recovered=_recovered(means["ce_clean"], means["ce_spliced"], means["ce_zero"]),
            ci95=_intervals(n_Q, sums_QF),
        )


def _recovered(ce_clean: float, ce_spliced: float, ce_zero: float) -> float | None:
    hurts = math.isfinite(ce_zero) and ce_zero > ce_clean
    return (ce_zero - ce_spliced) / (ce_zero - ce_clean) if hurts else None


def _intervals(n_Q: Tensor, sums_QF: Tensor) -> dict[str, list[float]]:
    if n_Q.shape[0] < 2:
        return {}
    means_RF = resampled_means(n_Q, sums_QF)
    columns: dict[str, Tensor] = dict(zip(FIGURES, means_RF.unbind(1), strict=True))
    span_R = columns["ce_zero"] - columns["ce_clean"]
    if bool((span_R > 0).all()):
        columns["loss_recovered"] = (columns["ce_zero"] - columns["ce_spliced"]) / span_R
    finite = {name: column_R for name, column_R in columns.items() if bool(column_R.isfinite().all())}
    return {name: interval_95(column_R) for name, column_R in finite.items()}
