"""decode_recon_loss: `recon_loss` of `sparse_decode` in one op, for a step that has no other use for the output.

Axes: B tokens · O flattened output dims · L latents · X crosscoding positions · N stored entries.

    per_x[x] = (1 / B) sum over b and o in segment x of ((a W_dec + b_dec)_bo - target_bo)^2;  loss = sum of per_x

Shapes: Latents over L, W_dec_LO, b_dec_O (optional), target_BO, segments -> as `recon_loss`.
Saved for backward: the residual, the sparse batch and W_dec; the output is neither kept nor, where the kernel manages, written.
Dense latents and batches without entries take the two ops one after the other. Gradients are theirs. Under autocast latents and
weights are cast, and the residual is of the target's dtype.
Errors (ValueError): theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import autocast_dtype, check_float, check_segments
from crosscode_kernels.decode_recon_loss.autograd import decode_recon
from crosscode_kernels.encoder import autocast
from crosscode_kernels.opset import door
from crosscode_kernels.recon_loss import ReconLoss, recon_loss
from crosscode_kernels.sparse import DenseLatents, Latents
from crosscode_kernels.sparse_decode import check_decoder, sparse_decode
from crosscode_kernels.sparse_decode.autograd import ordered_entries


@door
def decode_recon_loss(
    latents: Latents,
    W_dec_LO: Tensor,
    b_dec_O: Tensor | None,
    target_BO: Tensor,
    segments: Sequence[int],
    *,
    backend: AnyBackend = "auto",
) -> ReconLoss:
    """The reconstruction loss of `a W_dec + b_dec`."""
    backend = backend_for(backend, target_BO)
    if backend.name == "reference" or isinstance(latents, DenseLatents) or latents.value_N.shape[0] == 0:
        y_BO = sparse_decode(latents, W_dec_LO, b_dec_O, backend=backend)
        return recon_loss(y_BO, target_BO, segments, backend=backend)
    value_N, W_dec_LO, b_dec_O = autocast(backend, latents.value_N, W_dec_LO, b_dec_O)
    check_decoder("sparse_decode", latents.n_latents, value_N, W_dec_LO, b_dec_O)
    check_target("recon_loss", "target_BO", target_BO, latents.batch_size, W_dec_LO)
    check_segments("recon_loss", "target_BO", target_BO.shape[1], segments)
    entries = ordered_entries(replace(latents.with_int32(), value_N=value_N), W_dec_LO, backend)
    loss, per_x_X, residual_BO = decode_recon(entries, W_dec_LO, b_dec_O, target_BO, list(segments), backend=backend)
    return ReconLoss(loss, per_x_X, residual_BO.detach())


def check_target(op: str, name: str, target_BO: Tensor, n_tokens: int, W_dec_LO: Tensor) -> None:
    """`target_BO`, named as it is in the op, is of the output's shape; and of its dtype, unless autocast is on."""
    expected = (n_tokens, W_dec_LO.shape[1])
    if tuple(target_BO.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(target_BO.shape)}; must be {expected}")
    if autocast_dtype(target_BO.device.type) is None:
        check_float(op, **{name: target_BO, "W_dec_LO": W_dec_LO})
    else:  # the target keeps its own, in which the residual is
        check_float(op, **{name: target_BO})
