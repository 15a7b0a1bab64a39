"""The triton backend: fused kernels for CUDA and ROCm, and their interpreter for tests on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosscode_kernels.aux_topk import triton_impl as _aux_topk  # noqa: F401
from crosscode_kernels.backends.fused import FusedOpSet, autocast
from crosscode_kernels.decoder_norms import spec as decoder_norms_spec
from crosscode_kernels.decoder_norms import triton_impl as _decoder_norms  # noqa: F401
from crosscode_kernels.encode_batch_topk import triton_impl as _encode_batch_topk  # noqa: F401
from crosscode_kernels.encode_groupmax import triton_impl as _encode_groupmax  # noqa: F401
from crosscode_kernels.encode_threshold import spec as encode_threshold_spec
from crosscode_kernels.encode_threshold.triton_impl import encode_threshold
from crosscode_kernels.encode_topk import triton_impl as _encode_topk  # noqa: F401
from crosscode_kernels.jumprelu import triton_impl as _jumprelu  # noqa: F401
from crosscode_kernels.jumprelu_penalties import triton_impl as _jumprelu_penalties  # noqa: F401
from crosscode_kernels.opset import DecoderNorms, NormMode
from crosscode_kernels.pre_act import triton_impl as _pre_act  # noqa: F401
from crosscode_kernels.recon_loss import triton_impl as _recon_loss  # noqa: F401
from crosscode_kernels.segments import triton_impl as _segments  # noqa: F401
from crosscode_kernels.sparse import Latents, SparseLatents
from crosscode_kernels.sparse_decode import spec as sparse_decode_spec
from crosscode_kernels.sparse_decode import triton_impl as _sparse_decode  # noqa: F401
from crosscode_kernels.sparse_decode.triton_norms import decode_with_norms
from crosscode_kernels.triton_common.launch import INTERPRETED
from crosscode_kernels.weighted_l1 import triton_impl as _weighted_l1  # noqa: F401
from crosscode_kernels.weighted_tanh import triton_impl as _weighted_tanh  # noqa: F401

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What `benches/static_compile.py` compiles for, and CUDA devices after the first of these, which have all that it has.
_LOWEST_CAPABILITY, _ROCM_ARCHITECTURES = (8, 0), ("gfx942",)


class TritonOpSet(FusedOpSet):
    """Triton kernels, and the vendor's GEMM for dense products. Importing this module registers the kernels."""

    name = "triton"

    def encode_threshold(
        self,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        threshold: Tensor,
        rank_scale_L: Tensor | None = None,
    ) -> Latents:
        wants_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x_BI, W_enc_LI, b_enc_L)
        )
        if wants_grad or torch.compiler.is_compiling() or x_BI.shape[0] == 0:
            return super().encode_threshold(x_BI, W_enc_LI, b_enc_L, threshold, rank_scale_L)
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        encode_threshold_spec.check(x_BI, W_enc_LI, b_enc_L, threshold, rank_scale_L)
        return encode_threshold(x_BI, W_enc_LI, b_enc_L, threshold, rank_scale_L)

    def decode_with_norms(
        self, latents: SparseLatents, W_dec_LO: Tensor, b_dec_O: Tensor | None, segments: Sequence[int], mode: NormMode
    ) -> tuple[Tensor, DecoderNorms]:
        """`decode` and `decoder_norms` as one op: one gradient of W_dec is written instead of two, and their sum."""
        (W_LO,) = autocast(W_dec_LO)
        if latents.value_N.shape[0] == 0 or W_LO is not W_dec_LO:
            return self.decode(latents, W_dec_LO, b_dec_O), self.decoder_norms(W_dec_LO, segments, mode)
        sparse_decode_spec.check(latents, W_dec_LO, b_dec_O)
        decoder_norms_spec.check(W_dec_LO, segments, mode)
        return decode_with_norms(latents, W_dec_LO, b_dec_O, list(segments), mode, self.name)


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve tensors of `dtype` on `device`; None where they can."""
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not float16, bfloat16 or float32"
    if device.type == "cuda":
        if INTERPRETED:
            return "kernels run in the interpreter here (TRITON_INTERPRET is set)"
        return _unsupported_gpu(device)
    if device.type == "cpu":
        return None if INTERPRETED else "on the CPU kernels run in the interpreter only: set TRITON_INTERPRET=1"
    return f"device {device} is neither CUDA nor ROCm"


def _unsupported_gpu(device: torch.device) -> str | None:
    """Why the kernels do not run on this GPU; None where they do."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA or ROCm device"
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if architecture not in _ROCM_ARCHITECTURES:
            return (
                f"architecture {architecture} is not among those it is compiled for: {', '.join(_ROCM_ARCHITECTURES)}"
            )
        return None
    capability, lowest = torch.cuda.get_device_capability(device), _LOWEST_CAPABILITY
    if capability < lowest:
        return "compute capability {}.{} is below {}.{}".format(*capability, *lowest)
    return None
