"""The torch backend: the sparse formulation in stock PyTorch ops, for CPU, MPS and any GPU without Triton.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from crosscode_kernels.aux_topk import torch_impl as _aux_topk  # noqa: F401
from crosscode_kernels.backends.fused import FusedOpSet, autocast
from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.decoder_norms import torch_impl as _decoder_norms  # noqa: F401
from crosscode_kernels.encode_batch_topk import torch_impl as _encode_batch_topk  # noqa: F401
from crosscode_kernels.encode_groupmax import torch_impl as _encode_groupmax  # noqa: F401
from crosscode_kernels.encode_jumprelu import measured
from crosscode_kernels.encode_jumprelu import spec as encode_jumprelu_spec
from crosscode_kernels.encode_jumprelu.support import ModeLog
from crosscode_kernels.encode_topk import screened as _screened  # noqa: F401
from crosscode_kernels.encode_topk import torch_impl as _encode_topk  # noqa: F401
from crosscode_kernels.encode_topk.torch_impl import dense_preacts
from crosscode_kernels.jumprelu import torch_impl as _jumprelu  # noqa: F401
from crosscode_kernels.jumprelu_penalties import torch_impl as _jumprelu_penalties  # noqa: F401
from crosscode_kernels.pre_act import torch_impl as _pre_act  # noqa: F401
from crosscode_kernels.recon_loss import torch_impl as _recon_loss  # noqa: F401
from crosscode_kernels.segments import torch_impl as _segments  # noqa: F401
from crosscode_kernels.sparse import DenseLatents, Latents
from crosscode_kernels.sparse_decode import spec as sparse_decode_spec
from crosscode_kernels.sparse_decode.mixed import mixed_decode
from crosscode_kernels.weighted_l1 import spec as weighted_l1_spec
from crosscode_kernels.weighted_l1 import torch_impl as _weighted_l1  # noqa: F401
from crosscode_kernels.weighted_tanh import torch_impl as _weighted_tanh  # noqa: F401


class TorchOpSet(FusedOpSet):
    """Stock PyTorch ops. Importing this module registers their kernels.

    `screened_encode`: pre-activations are screened in bfloat16 and only candidates computed in full; rows where that is not
    proven to give the same selection are done densely. A speed-up where bfloat16 products are fast.
    `row_sparse_grads`: weight gradients of sparse latents are sparse COO tensors over the touched rows, for
    `RowSparseAdam`. Eager only: while compiling they are dense.
    """

    name = "torch"

    def __init__(self, *, screened_encode: bool = False, row_sparse_grads: bool = False) -> None:
        options = [option for option, on in (("screened", screened_encode), ("rows", row_sparse_grads)) if on]
        self._log = ModeLog()
        self._backend = f"torch:{'+'.join(options)}" if options else "torch"

    @property
    def backend(self) -> str:
        return self._backend

    def encode_relu(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None) -> Latents:
        if not _may_measure(x_BI):
            return super().encode_relu(x_BI, W_enc_LI, b_enc_L)
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        h_BL = self.preacts(x_BI, W_enc_LI, b_enc_L)
        latents = measured.encode_relu(x_BI, W_enc_LI, b_enc_L, h_BL.detach(), self.backend, self._log)
        return DenseLatents(self.relu(h_BL)) if latents is None else latents

    def encode_jumprelu(
        self,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        t_L: Tensor,
        eps: float,
        ste: Literal["anthropic", "gdm"],
    ) -> Latents:
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        encode_jumprelu_spec.check(x_BI, W_enc_LI, b_enc_L, t_L, eps, ste)
        encoder, options = (x_BI, W_enc_LI, b_enc_L), (float(eps), ste == "gdm", self.backend)
        may_measure = _may_measure(x_BI)
        with torch.no_grad():
            h_BL = dense_preacts(*encoder) if may_measure else self.preacts(*encoder)
        if not may_measure:
            return measured.encode_jumprelu_dense(*encoder, h_BL, t_L, *options)
        return measured.encode_jumprelu(*encoder, h_BL, t_L, *options, self._log)

    def decode(self, latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None = None) -> Tensor:
        if not isinstance(latents, DenseLatents) or latents.active is None or W_dec_LO.dtype != latents.value_BL.dtype:
            return super().decode(latents, W_dec_LO, b_dec_O)
        sparse_decode_spec.check(latents, W_dec_LO, b_dec_O)
        return mixed_decode(latents.value_BL, latents.active, W_dec_LO, b_dec_O, self.backend)

    def weighted_l1(self, latents: Latents, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        if not isinstance(latents, DenseLatents):
            return super().weighted_l1(latents, n_L, lambda_L)
        weighted_l1_spec.check(latents, n_L, lambda_L)
        dtype = acc_dtype(latents.value_BL.dtype)
        # Linear in the sum over the batch, whose gradient is a view: no B x L tensor each way.
        sum_L = latents.value_BL.sum(0, dtype=dtype)
        return torch.dot(sum_L * n_L.to(dtype), lambda_L.detach().to(dtype)) / max(latents.batch_size, 1)


def _may_measure(x_BI: Tensor) -> bool:
    """Looking at the data is free on the CPU, and impossible while tracing."""
    return x_BI.device.type == "cpu" and not torch.compiler.is_compiling() and x_BI.shape[0] > 0
