"""How much of a language model's ability survives when its activations are replaced by reconstructions.

For each output position (a language model and a hookpoint) the model runs three times on held-out text: as it is, with
the reconstruction spliced in, and with zeros spliced in. Reconstructions come from clean activations.

    loss_recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)

Of a difference between two models, 0 and reconstruction are added to the first model's activations, and the sum is spliced
into the second: 0 puts the first model's activations in the place of the second's.

Only usable positions are replaced: the crosscoder never sees the others (position 0, padding, masked tokens).
Cross-entropy and KL are means over the predictions that are made at a usable position of a usable token; of a model with a
tokenizer of its own these are its own tokens.
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
from crosscode.data.text.token_batch import TokenBatch
from crosscode.evaluation.bootstrap import interval_95, resampled_means
from crosscode.evaluation.precision import full_precision
from crosscode.evaluation.raw_model import RawModel
from crosscode.evaluation.splicing import Splicer
from crosscode.evaluation.text_parts import TextPart, kl_N, text_parts
from crosscode.groups import ByGroup, Groupings
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split

ALL_HOOKPOINTS = "all hookpoints"


@dataclass(frozen=True)
class LossRecovered:
    """Means over predicted tokens, nats. `ci95`: for some of the figures a 95 % interval by the bootstrap over
    sequences. `loss_recovered` is None where zeros do not hurt, or hurt without bound. `groups`: of the predictions of each
    group's tokens, by kind and group, where there are several; in all of them everything is spliced in."""

    n_tokens: int
    n_sequences: int
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    kl_spliced: float
    kl_zero: float
    loss_recovered: float | None
    ci95: dict[str, list[float]]
    groups: dict[str, dict[str, LossRecovered]] = field(default_factory=dict)


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
    groupings: Groupings | None = None,
) -> dict[str, LossRecovered]:
    """By name of the output position, of models that are here; a model with several has an entry `<model>/all hookpoints` as
    well, where all of its reconstructions are spliced in at once.

    Args:
        model: either folded, or in training, with the scaling in `scaling_MP`.
        n_tokens: usable tokens after which no further batch is taken.
        limit: tokens beyond it count as unusable.
        groupings: ways to group predicted tokens, of which the figures are given apart, too.
    """
    places_M = _places(harvester, split, names_MP)
    sums = {name: _SequenceSums(groupings) for places in places_M for name in places}
    here = [bool(places) and lm.is_here for places, lm in zip(places_M, harvester.models, strict=True)]
    splicers = [Splicer(harvester, m) if is_here else None for m, is_here in enumerate(here)]
    with RawModel(model, split, scaling_MP) as raw_model:
        for part in text_parts(harvester, batches, n_tokens, limit):
            recon_HSXD = reconstruct(raw_model, part.acts_HSMPD, part.mask_HS)
            beside = split.beside(part.acts_HSMPD)
            zero_HSXD = torch.zeros_like(recon_HSXD) if beside is None else beside.reshape(recon_HSXD.shape)
            for splicer, places, reads in zip(splicers, places_M, harvester.reads_M, strict=True):
                if splicer is not None:
                    spliced = [recon_HSXD + zero_HSXD, zero_HSXD]
                    spliced = [part.others[reads - 1].moved(one) for one in spliced] if reads else spliced
                    _add_part(sums, splicer, places, part.read_by(reads), *spliced)
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
        figure_NF = _figures(part, clean_HSV, spliced_HSV, zero_HSV)
        sums[name].add(part, figure_NF, torch.ones(len(figure_NF), dtype=torch.bool))


FIGURES = ("ce_clean", "ce_spliced", "ce_zero", "kl_spliced", "kl_zero")


def _figures(part: TextPart, *logits: Tensor) -> Tensor:
    """`figure_NF` of each prediction, from the clean, the spliced and the zeroed model's `logits_HSV`."""
    clean_NV, *others = (part.predictions(logits_HSV) for logits_HSV in logits)
    next_N1 = part.predicted().to(clean_NV.device)[:, None]
    figures = [-log_prob_NV.gather(-1, next_N1)[:, 0] for log_prob_NV in (clean_NV, *others)]
    return torch.stack([*figures, *(kl_N(clean_NV, other_NV) for other_NV in others)], 1).cpu()


class _SequenceSums:
    """For each sequence the number of predictions and the sum of each figure over them, in all and for each group."""

    def __init__(self, groupings: Groupings | None = None):
        self._n_H: list[Tensor] = []
        self._sums_HF: list[Tensor] = []
        self._groups = ByGroup(groupings, _SequenceSums)

    @property
    def n_predictions(self) -> int:
        return sum(int(n_H.sum()) for n_H in self._n_H)

    def add(self, part: TextPart, figure_NF: Tensor, counted_N: Tensor) -> None:
        self._n_H.append(part.by_sequence(counted_N))
        self._sums_HF.append(part.by_sequence(figure_NF.where(counted_N[:, None], 0)))
        for sums, of_group_N in self._groups.of(part.predicted_groups()):
            sums.add(part, figure_NF, of_group_N)

    def result(self) -> LossRecovered:
        n_Q, sums_QF = torch.cat(self._n_H), torch.cat(self._sums_HF)
        sums_QF, n_Q = sums_QF[n_Q > 0], n_Q[n_Q > 0]
        means = dict(zip(FIGURES, (sums_QF.sum(0) / n_Q.sum()).tolist(), strict=True))
        return LossRecovered(
            n_tokens=int(n_Q.sum()),
            n_sequences=n_Q.shape[0],
            **means,
            loss_recovered=_recovered(means["ce_clean"], means["ce_spliced"], means["ce_zero"]),
            ci95=_intervals(n_Q, sums_QF),
            groups=self._groups.result(_SequenceSums.result),
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
