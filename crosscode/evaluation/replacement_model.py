"""The replacement model of "Circuit Tracing" (Anthropic, March 2025): a language model that runs on what a transcoder of
several layers makes of its *own* outputs.

Splicing reconstructions of clean activations flatters: here each layer's output is computed from inputs that earlier
replaced outputs have changed. The same figures are given in three ways:

- `from_clean_inputs`: all outputs replaced at once by reconstructions from the clean model's activations, as in splicing;
- `from_own_outputs`: layer after layer, from what the replaced layers before have made;
- `with_error_terms`: the same, plus the error that the reconstruction has in the clean model: that reproduces the language
  model to rounding, which is a check of everything that is computed here.

Outputs are replaced at usable positions alone, and predictions are counted as in `loss_recovered`.

H harvest batch (sequences) · S sequence · V vocabulary · B usable tokens · P hookpoints · D width · X output positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.norms import NormLimit
from crosscode.data.text.token_batch import TokenBatch
from crosscode.evaluation.precision import full_precision
from crosscode.evaluation.splicing import Change, Splicer, replacement
from crosscode.evaluation.text_parts import TextPart, kl_N, text_parts
from crosscode.groups import ByGroup, Groupings
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split

log = logging.getLogger("crosscode")

WAYS: tuple[str, ...] = ("from_clean_inputs", "from_own_outputs", "with_error_terms")


@dataclass(frozen=True)
class ReplacementModel:
    """Means over predicted tokens, nats; by way (see the module)."""

    n_tokens: int
    ce_clean: float
    ce: dict[str, float]
    kl: dict[str, float]
    """KL(language model || replaced)"""
    top1_agreement: dict[str, float]
    """share of predictions whose most probable token stays the same"""
    groups: dict[str, dict[str, ReplacementModel]] = field(default_factory=dict)
    """of the predictions of each group's tokens, by kind and group, where there are several"""


@full_precision()
@torch.no_grad()
def measure_replacement_model(
    model: BaseCrosscoder,
    harvester: ActivationHarvester,
    batches: Iterable[TokenBatch],
    split: Split,
    n_tokens: int = 4096,
    limit: NormLimit | None = None,
    groupings: Groupings | None = None,
) -> ReplacementModel | None:
    """Figures for a model whose outputs are several and none of its inputs; None for all others. None, too, and the log
    says so, where latents are selected over layers that are not computed yet (TopK with `topk_scope: all_layers`), or an
    output comes before an input that it is computed from.

    Args:
        model: folded.
        n_tokens: usable tokens after which no further batch is taken.
        limit: tokens beyond it count as unusable.
        groupings: ways to group predicted tokens, of which the figures are given apart, too.
    """
    places = _Places.of(split, harvester)
    if places is None:
        return None
    was_training = model.training
    model.eval()
    try:
        selection = model.activation_fns[0].selection()
        if model.selects_over_parts and len(model.parts) > 1 and selection is not None:
            log.info("replacement model: not measured, as TopK over all layers selects over layers that come later")
            return None
        splicer, sums = Splicer(harvester, 0), _Sums(groupings)
        for part in text_parts(harvester, batches, n_tokens, limit):
            _add(sums, part, model, harvester, splicer, places, split)
    except _OutOfOrder as error:
        log.warning("replacement model: not measured, as %s", error)
        return None
    finally:
        model.train(was_training)
    return sums.result() if sums.n else None


class _OutOfOrder(Exception):
    """An output that cannot be computed when it is wanted."""


@dataclass(frozen=True)
class _Places:
    """Hookpoints of the inputs (by source) and of the outputs (by output position)."""

    inputs: list[int]
    outputs: list[int]

    @classmethod
    def of(cls, split: Split, harvester: ActivationHarvester) -> _Places | None:
        M, P, _ = harvester.dims
        inputs, outputs = ([p for _, p in places(M, P)] for places in (split.input_places, split.output_places))
        return cls(inputs, outputs) if M == 1 and len(outputs) > 1 and not {*inputs} & {*outputs} else None


def _add(
    sums: _Sums,
    part: TextPart,
    model: BaseCrosscoder,
    harvester: ActivationHarvester,
    splicer: Splicer,
    places: _Places,
    split: Split,
) -> None:
    input_BXiDi, target_BXoDo = split.activations(part.usable().to(model.device))
    recon_BXD = model(input_BXiDi).reshape(target_BXoDo.shape)
    clean_HSV = splicer.logits(part.tokens_HS, part.segments_HS)
    recon_HSXD = part.everywhere(recon_BXD)
    spliced = {p: replacement(recon_HSXD[:, :, x], part.mask_HS) for x, p in enumerate(places.outputs)}
    changes = (
        spliced,
        _LayerByLayer(model, harvester, places, part.mask_HS, None).changes(),
        _LayerByLayer(model, harvester, places, part.mask_HS, target_BXoDo - recon_BXD).changes(),
    )
    logits = {
        way: splicer.logits_changed(part.tokens_HS, part.segments_HS, change)
        for way, change in zip(WAYS, changes, strict=True)
    }
    sums.add(_figures(part, clean_HSV, logits), part.predicted_groups())


class _LayerByLayer:
    """One run of the language model: each input is encoded when it comes by, and what its latents write is kept for the
    outputs behind it."""

    def __init__(
        self,
        model: BaseCrosscoder,
        harvester: ActivationHarvester,
        places: _Places,
        mask_HS: Tensor,
        error_BXD: Tensor | None,
    ):
        self._model, self._hookpoints, self._places = model, harvester.hookpoints, places
        self._mask_HS, self._error_BXD = mask_HS, error_BXD
        self._read: set[int] = set()
        shape = (int(mask_HS.sum()), len(places.outputs), model.d_out)
        self._output_BXD = torch.zeros(shape, device=model.device, dtype=model.dtype)
        if model.parts[0] is not model and model.b_dec_XoDo is not None:
            self._output_BXD += model.b_dec_XoDo  # of a compound model, whose parts have none

    def changes(self) -> dict[int, Change]:
        """By hookpoint: inputs are read and stay as they are, outputs are replaced."""
        sources = {p: self._reader(source) for source, p in enumerate(self._places.inputs[: len(self._model.parts)])}
        return sources | {p: self._writer(x) for x, p in enumerate(self._places.outputs)}

    def _reader(self, source: int) -> Change:
        part, outputs = self._model.parts[source], self._model.outputs_of_parts[source]

        def read(act: Tensor) -> Tensor:
            x_BD = act.reshape(*self._mask_HS.shape, -1)[self._mask_HS.to(act.device)].to(self._output_BXD)
            written_BXD = part.decode(part.encode_latents(x_BD), x_BD).reshape(x_BD.shape[0], -1, part.d_out)
            self._output_BXD[:, outputs] += written_BXD
            self._read.add(source)
            return act

        return read

    def _writer(self, x: int) -> Change:
        n_outputs = len(self._places.outputs)
        writing = {s for s, to in enumerate(self._model.outputs_of_parts) if x in range(n_outputs)[to]}

        def write(act: Tensor) -> Tensor:
            if not writing <= self._read:
                p = self._places.outputs[x]
                raise _OutOfOrder(f"{self._hookpoints[p]!r} comes before an input that it is computed from")
            y_BD = self._output_BXD[:, x]
            if self._error_BXD is not None:
                y_BD = y_BD + self._error_BXD[:, x]
            flat_HSD = act.reshape(*self._mask_HS.shape, -1).clone()
            flat_HSD[self._mask_HS.to(act.device)] = y_BD.to(act)
            return flat_HSD.reshape(act.shape)

        return write


def _figures(part: TextPart, clean_HSV: Tensor, logits: dict[str, Tensor]) -> Tensor:
    """`figure_NF` of each prediction: CE of the clean model, then CE, KL and agreement of each way."""
    clean_NV = part.predictions(clean_HSV)
    next_N1 = part.predicted().to(clean_NV.device)[:, None]
    figures = [-clean_NV.gather(1, next_N1)[:, 0]]
    for logits_HSV in logits.values():
        found_NV = part.predictions(logits_HSV)
        same_N = (found_NV.argmax(-1) == clean_NV.argmax(-1)).to(found_NV)
        figures += [-found_NV.gather(1, next_N1)[:, 0], kl_N(clean_NV, found_NV), same_N]
    return torch.stack(figures, 1).double().cpu()


class _Sums:
    """Sums over predictions, in all and for each group."""

    def __init__(self, groupings: Groupings | None = None) -> None:
        self.n, self._sum_F = 0, torch.zeros(1 + 3 * len(WAYS), dtype=torch.float64)
        self._groups = ByGroup(groupings, _Sums)

    def add(self, figure_NF: Tensor, group_NG: Tensor | None) -> None:
        self.n += len(figure_NF)
        self._sum_F += figure_NF.sum(0)
        for sums, of_group_N in self._groups.of(group_NG):
            sums.add(figure_NF[of_group_N.cpu()], None)

    def result(self) -> ReplacementModel:
        ce_clean, *means = (self._sum_F / self.n).tolist()
        ce, kl, same = (dict(zip(WAYS, means[i::3], strict=True)) for i in range(3))
        groups = self._groups.result(_Sums.result)
        return ReplacementModel(self.n, ce_clean, ce, kl, same, groups)
