"""decoder_norms: how large each latent's decoder vector is, per crosscoding position and in total.

Axes: L latents · O flattened output dims · X crosscoding positions.

    norms[l, x] = ||W_dec[l, segment x]||_2
    n[l] = sum over x of norms[l, x]                "sum": lets a latent be exclusive to a position (crosscoders)
    n[l] = ||W_dec[l]||_2                           "joint": norm of the concatenation (cross-layer transcoders)

Shapes: W_dec_LO, segments (widths along O) -> norms_LX, n_L, both float32 (float64 for float64).
Gradients: `dn W / ||W||`, and 0 for a segment or row whose norm is 0.
Errors (ValueError): segments that are not positive or do not sum to O, an unknown mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_choice, check_dims, check_float, check_segments
from crosscode_kernels.decoder_norms import autograd, reference
from crosscode_kernels.opset import door

NormMode = Literal["sum", "joint"]


class DecoderNorms(NamedTuple):
    """Norms of decoder rows: `norms_LX` per crosscoding position, `n_L` per latent (sum of them, or joint)."""

    norms_LX: Tensor
    n_L: Tensor


@door
def decoder_norms(
    W_dec_LO: Tensor, segments: Sequence[int], mode: NormMode, *, backend: AnyBackend = "auto"
) -> DecoderNorms:
    """Norms of the rows of `W_dec_LO` by position and in total."""
    backend = backend_for(backend, W_dec_LO)
    check_dims("decoder_norms", "W_dec_LO", W_dec_LO, 2)
    check_float("decoder_norms", W_dec_LO=W_dec_LO)
    check_segments("decoder_norms", "W_dec_LO", W_dec_LO.shape[1], segments)
    check_choice("decoder_norms", "mode", mode, get_args(NormMode))
    if backend.name == "reference":
        return DecoderNorms(*reference.decoder_norms(W_dec_LO, list(segments), mode == "joint"))
    return DecoderNorms(*autograd.decoder_norms(W_dec_LO, list(segments), mode == "joint", backend=backend))
