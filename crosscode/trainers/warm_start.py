"""Weights from a model that was trained before, with another activation function if need be.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di width · L latents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from crosscode_kernels import AnyBackend
from torch import Tensor

from crosscode.errors import InputError, readable
from crosscode.models.activations.base import ActivationFunction
from crosscode.models.base import BaseCrosscoder
from crosscode.models.checkpoint import load_model
from crosscode.models.elsewhere import elsewhere
from crosscode.models.initialization.base import SampleBatches
from crosscode.runs.checkpoints import Checkpoints
from crosscode.runs.directory import RunDirectory
from crosscode.weight_files import has_weights

log = logging.getLogger("crosscode")

N_SAMPLE_TOKENS = 8192


def warm_start(
    model: BaseCrosscoder, source: str, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor, samples: SampleBatches
) -> None:
    """Fill `model` with the weights of `source`, in the scaling of the new run.

    Args:
        source: a run directory, one of its checkpoints, or a folder written by `save`.
        samples: scaled activations, for thresholds that must be found.

    Thresholds: an activation of the same type takes over what it has. A TopK or BatchTopK becomes a JumpReLU whose
    threshold lets through k latents a token on average: BatchTopK's own threshold, or for TopK the one that does so
    on a sample. Where k latents of all source layers are kept, it is k of all of them.

    Raises:
        InputError: no model there, another architecture or size, or activations that cannot be converted.
    """
    old = load_folded(find_model(source), backend=model.backend, device=model.device)
    _check_fits(source, old, model)
    params = dict(old.named_parameters())
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "activation_fn" not in name:
                param.copy_(params[name])
        model.scale_weights_(1 / scaling_in_Xi.to(model.device), 1 / scaling_out_Xo.to(model.device))
        for part in model.parts:  # a compound model folds its parts, which is not what happened here
            part.folded_scaling_in_Xi = part.folded_scaling_out_Xo = None
        for part, (old_part, part_model) in enumerate(zip(old.parts, model.parts, strict=True)):
            own = range(len(model.parts)) if old.selects_over_parts else range(part, part + 1)
            _convert_activation(source, old_part, part_model, lambda k, own=own: threshold_for(model, own, k, samples))


def find_model(source: str, field: str = "finetune_from") -> Path:
    """The folder of the saved model that `source` names: itself, a run's `final/`, or its newest whole checkpoint.
    `field` is where it was named, for messages."""
    with readable(f"{field} = {source!r}"):
        return _find_model(source, field)


def _find_model(source: str, field: str) -> Path:
    path = Path(source).expanduser()
    if has_weights(path):
        return path
    run = RunDirectory(path)
    if run.has_final():
        run.check_final()
        return run.final
    step = Checkpoints(run).newest_whole()
    if step is not None:
        if (run.path / "summary.json").is_file():
            log.warning("run %s: its trained model, final/, is gone; that of checkpoint %d is taken", run.path, step)
        return run.checkpoint(step)
    if path.exists() and elsewhere("recognise")(path) is not None:
        return path
    if not path.exists() and elsewhere("is_repo")(source):
        return elsewhere("fetch")(source)
    raise InputError(f"{field} = {source!r}: holds neither a saved model nor a run with one")


def _check_fits(source: str, old: BaseCrosscoder, new: BaseCrosscoder) -> None:
    old_shapes = {n: tuple(p.shape) for n, p in old.named_parameters() if "activation_fn" not in n}
    new_shapes = {n: tuple(p.shape) for n, p in new.named_parameters() if "activation_fn" not in n}
    differ = [
        f"{name} is {old_shapes.get(name, 'absent')}, needed {new_shapes.get(name, 'absent')}"
        for name in sorted(old_shapes.keys() | new_shapes.keys())
        if old_shapes.get(name) != new_shapes.get(name)
    ]
    if old.kind != new.kind or differ:
        reason = "; ".join(differ) or f"it holds a {old.kind!r}, not a {new.kind!r}"
        raise InputError(f"finetune_from = {source!r}: the saved model does not fit this config: {reason}")


def load_folded(folder: Path, backend: AnyBackend, device: torch.device, *, checked: bool = False) -> BaseCrosscoder:
    """A saved model of which it is known that it takes raw activations. `checked`: as of `load_model`."""
    model = load_model(BaseCrosscoder, folder, backend=backend, device=device, checked=checked)
    if not model.is_folded:
        raise InputError(
            f"{str(folder)!r} is a model without folded scaling, and nothing there says what the scaling was; take the "
            "run's final/ instead"
        )
    return model


def _convert_activation(
    source: str,
    old: BaseCrosscoder,
    new: BaseCrosscoder,
    threshold_for: Callable[[int], Tensor],
) -> None:
    before, after = old.activation_fn, new.activation_fn
    if type(before) is type(after):
        state, learned = before.state_dict(), before.log_thresholds_L()
        if learned is not None and state.keys() != after.state_dict().keys():  # their log against themselves
            after.set_thresholds_(learned.exp())
        else:
            after.load_state_dict(state)
        return
    if after.log_thresholds_L() is None:
        if any(True for _ in after.parameters()):
            raise _cannot(source, before, after)
        return
    threshold = before.tracked_threshold()
    if threshold is not None:
        threshold_L = threshold.expand(new.n_latents)
        if before.uses_decoder_norms:
            threshold_L = threshold_L / old.ranking_norms_L().clamp(min=1e-12)
    elif before.keeps_k:
        threshold_L = threshold_for(before.k).expand(new.n_latents)
    else:
        raise _cannot(source, before, after)
    after.set_thresholds_(threshold_L.clamp(min=1e-8))


def _cannot(source: str, before: ActivationFunction, after: ActivationFunction) -> InputError:
    return InputError(
        f"finetune_from = {source!r}: activation {before.type_name()!r} cannot become {after.type_name()!r}; "
        "thresholds are known for topk, batch_topk and jumprelu"
    )


def threshold_for(model: BaseCrosscoder, own: Sequence[int], k: int, samples: SampleBatches) -> Tensor:
    """The value that `k` latents of a token exceed on average, over a sample. `own`: the parts that they are of."""
    largest, n_tokens = [], 0
    for input_BXiDi, _ in samples():
        input_BXiDi, n = input_BXiDi.to(model.device), input_BXiDi.shape[0]
        for part in own:
            coder = model.parts[part]
            own_BXiDi = model.inputs_of_parts(input_BXiDi)[part]
            latents_BL = coder.ops.preacts(coder.encoder_input(own_BXiDi), coder.W_enc_LI, coder.b_enc_L).relu()
            # More than k * B of a batch are never needed, unless batches differ a lot.
            largest.append(latents_BL.flatten().topk(min(4 * k * n, latents_BL.numel())).values)
        n_tokens += n
        if n_tokens >= N_SAMPLE_TOKENS:
            break
    values_N = torch.cat(largest)
    return values_N.topk(min(k * n_tokens, values_N.numel())).values[-1]
