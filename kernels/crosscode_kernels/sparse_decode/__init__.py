"""sparse_decode: latents to output.

Axes: B tokens · O flattened output dims · L latents · N stored entries.

    y_b = sum over the entries n of token b of a_n W_dec[l_n]  (+ b_dec)

Shapes: Latents over L, W_dec_LO, b_dec_O (optional) -> y_BO.
Dtypes: one of float16, bfloat16, float32, float64 for all; sums in float32 or wider, cast once at the end.
Gradients: to the values (`dy_b . W_dec[l]`), to W_dec (sum of a dy over a latent's entries, 0 for a latent without), to b_dec.
Dense latents are a dense product; where an encoder says which few of them are active (torch on a CPU), forward and weight
gradient are sparse.
Errors (ValueError): shapes that do not match, mixed dtypes or devices.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from torch import Tensor

from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.checks import check_dims, check_float
from crosscode_kernels.encoder import autocast
from crosscode_kernels.opset import door
from crosscode_kernels.sparse import DenseLatents, Latents
from crosscode_kernels.sparse_decode import reference
from crosscode_kernels.sparse_decode.autograd import latents_decode
from crosscode_kernels.sparse_decode.mixed import mixed_decode


@door
def sparse_decode(
    latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None = None, *, backend: AnyBackend = "auto"
) -> Tensor:
    """`y_BO = a W_dec + b_dec`. Sparse latents: forward and backward touch active rows only."""
    backend = backend_for(backend, latents)
    value, W_dec_LO, b_dec_O = autocast(backend, latents.value, W_dec_LO, b_dec_O)
    check_decoder("sparse_decode", latents.n_latents, value, W_dec_LO, b_dec_O)
    if backend.name == "reference":
        return reference.sparse_decode(latents, W_dec_LO, b_dec_O)
    if not isinstance(latents, DenseLatents):
        if not (value.shape[0] or value.requires_grad):  # no entries by construction: nothing depends on W_dec
            y_BO = value.new_zeros(latents.batch_size, W_dec_LO.shape[1])
            return y_BO if b_dec_O is None else y_BO + b_dec_O
        return latents_decode(replace(latents.with_int32(), value_N=value), W_dec_LO, b_dec_O, backend)
    if backend.name == "triton" and latents.active is not None and value is latents.value_BL:
        return importlib.import_module("crosscode_kernels.capacity").decode(value, latents.active, W_dec_LO, b_dec_O)
    if latents.active is not None and value is latents.value_BL:
        return mixed_decode(value, latents.active, W_dec_LO, b_dec_O, backend)
    return torch.nn.functional.linear(value, W_dec_LO.T, b_dec_O)


def check_decoder(op: str, n_latents: int, value: Tensor, W_dec_LO: Tensor, b_dec_O: Tensor | None) -> None:
    """A decoder of `n_latents` rows, of the dtype and device of `value`."""
    check_dims(op, "W_dec_LO", W_dec_LO, 2)
    if n_latents != W_dec_LO.shape[0]:
        raise ValueError(f"{op}: latents are over {n_latents} and W_dec_LO has {W_dec_LO.shape[0]} rows; must be equal")
    if b_dec_O is not None and tuple(b_dec_O.shape) != (W_dec_LO.shape[1],):
        raise ValueError(f"{op}: b_dec_O has shape {tuple(b_dec_O.shape)}; must be ({W_dec_LO.shape[1]},)")
    check_float(op, latents=value, W_dec_LO=W_dec_LO, b_dec_O=b_dec_O)
