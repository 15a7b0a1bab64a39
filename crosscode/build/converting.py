"""Another activation for a trained model, with thresholds that are found on held-out text.

Axes: B tokens · M models · P hookpoints · D width · Xi/Xo input/output crosscoding dims · L latents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crosscode.build.around import checked_around, values_around, write_run_around
from crosscode.build.finished import FinishedRun
from crosscode.build.heldout import AnyExperiment
from crosscode.build.resume import config_values
from crosscode.errors import InputError
from crosscode.evaluation.heldout import EvaluationResult, measure_reconstruction
from crosscode.models import ACTIVATIONS, BaseCrosscoder
from crosscode.trainers.progress import Progress
from crosscode.trainers.warm_start import threshold_for


@dataclass(frozen=True)
class Conversion:
    """Held-out figures before and after, and where the run with the new activation is."""

    before: EvaluationResult
    after: EvaluationResult
    path: Path


def convert(run: FinishedRun, activation: str, out: Path) -> Conversion:
    """Write a run that holds the model of another with the activation "jumprelu" or "batch_topk".

    What has thresholds keeps them. Those of a TopK are found: the value that k latents a token exceed on average, over
    held-out activations.

    Raises:
        InputError: an activation that cannot become this one; the folder `out` is there already.
    """
    experiment, model = run.experiment, run.model
    converted = with_activation(model, activation, experiment)
    values = values_around(config_values(run.config), converted, out)
    values["name"] = run.config.name
    config = checked_around(values)
    before = measure_reconstruction(model, _heldout(experiment, "before"), experiment.split, experiment.output_names())
    after = write_run_around(config, converted, experiment, "convert")
    return Conversion(before, after, out)


def _heldout(experiment: AnyExperiment, what: str) -> Iterator[Tensor]:
    """Held-out activations, counted where they are used."""
    with Progress(experiment.config.evaluation.n_tokens, what=what, unit="token") as shown:
        for batch in shown.through(experiment.heldout_batches()):
            yield batch.usable()


@torch.no_grad()
def with_activation(model: BaseCrosscoder, name: str, experiment: AnyExperiment) -> BaseCrosscoder:
    """A copy of a folded model with another activation, in eval mode."""
    old = model.activation_fns[0]
    if name not in ("jumprelu", "batch_topk"):
        raise InputError(f"activation = {name!r}: a trained model can become 'jumprelu', and a topk 'batch_topk'")
    if name == old.type_name() or (name == "batch_topk" and not old.keeps_k):
        raise InputError(f"activation = {name!r}: the model's is {old.type_name()!r}, which cannot become that")
    config = {"type": name, "k": old.k} if name == "batch_topk" else {"type": name}
    converted = model.clone().eval()
    if name == "jumprelu":
        converted.select_by_part_()

    def samples():
        batches = _heldout(experiment, "thresholds")
        return ((input_.to(model.device), target) for input_, target in map(experiment.split.activations, batches))

    for index, (part, new) in enumerate(zip(model.parts, converted.parts, strict=True)):
        own = range(len(model.parts)) if model.selects_over_parts else range(index, index + 1)
        theta = _theta(model, part.activation_fn, part.ranking_norms_L(), own, samples)
        selects = {"selects_from": model.n_latents} if converted.selects_over_parts else {}
        new.activation_fn = ACTIVATIONS.build(config, n_latents=part.n_latents, **selects)
        if not new.activation_fn.keeps_k:
            new.prefix_thresholds_S = None  # of a selection of k
        new.activation_fn.to_param_dtype(model.dtype).to(model.device)
        new.activation_fn.set_cutoffs_(theta if name == "jumprelu" else theta.flatten()[0])
    return converted.eval()


def _theta(model: BaseCrosscoder, activation, n_L: Tensor, own: Sequence[int], samples) -> Tensor:
    """Threshold of each latent of one part."""
    theta_L = activation.cutoffs_L(n_L if activation.uses_decoder_norms else None)
    if theta_L is not None:
        return theta_L.to(model.device)
    if not activation.keeps_k:
        raise InputError(
            f"activation: a {activation.type_name()!r} has no threshold that lets through what it keeps; train on with "
            "finetune_from"
        )
    return threshold_for(model, own, activation.k, samples).expand(activation.n_latents).clone()
