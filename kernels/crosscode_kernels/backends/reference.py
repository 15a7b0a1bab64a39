"""The reference backend: dense and obvious; what every other backend is tested against."""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.aux_topk.reference import aux_topk
from crosscode_kernels.decoder_norms.reference import decoder_norms
from crosscode_kernels.encode_batch_topk.reference import encode_batch_topk
from crosscode_kernels.encode_groupmax.reference import encode_groupmax
from crosscode_kernels.encode_jumprelu.reference import encode_jumprelu, encode_relu, pre_act_penalty
from crosscode_kernels.encode_threshold.reference import encode_threshold
from crosscode_kernels.encode_topk.reference import encode_topk
from crosscode_kernels.jumprelu.reference import jumprelu
from crosscode_kernels.jumprelu_penalties.reference import jumprelu_penalties
from crosscode_kernels.pre_act.reference import pre_act, preacts
from crosscode_kernels.recon_loss.reference import recon_loss
from crosscode_kernels.sparse_decode.reference import decode, decode_recon_loss
from crosscode_kernels.weighted_l1.reference import weighted_l1
from crosscode_kernels.weighted_tanh.reference import weighted_tanh


class ReferenceOpSet:
    """Every op as its spec says it, on dense tensors. Encoders return `DenseLatents`; either form is taken."""

    name = "reference"

    encode_topk = staticmethod(encode_topk)
    encode_batch_topk = staticmethod(encode_batch_topk)
    encode_groupmax = staticmethod(encode_groupmax)
    encode_threshold = staticmethod(encode_threshold)
    aux_topk = staticmethod(aux_topk)
    preacts = staticmethod(preacts)
    encode_relu = staticmethod(encode_relu)
    encode_jumprelu = staticmethod(encode_jumprelu)
    pre_act_penalty = staticmethod(pre_act_penalty)
    decode = staticmethod(decode)
    jumprelu = staticmethod(jumprelu)
    decoder_norms = staticmethod(decoder_norms)
    weighted_l1 = staticmethod(weighted_l1)
    weighted_tanh = staticmethod(weighted_tanh)
    pre_act = staticmethod(pre_act)
    jumprelu_penalties = staticmethod(jumprelu_penalties)
    recon_loss = staticmethod(recon_loss)
    decode_recon_loss = staticmethod(decode_recon_loss)

    @staticmethod
    def relu(h_BL: Tensor) -> Tensor:
        return h_BL.relu()
