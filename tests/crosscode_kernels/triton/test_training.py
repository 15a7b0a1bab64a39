"""Training steps: the interpreted kernels give the reference's losses; what only this backend has.

Axes: B tokens · I flattened input dims · L latents · X crosscoding positions.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import SparseLatents, resolve_backend

SEGMENTS = (6, 10)
L, K = 20, 3


class Trainee:
    """A tiny crosscoder with Adam; `losses` runs a few steps on fixed data."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ops = resolve_backend(backend, "cpu", dtype)
        width = sum(SEGMENTS)
        self.W_dec_LO = (0.3 * torch.randn(L, width, generator=generator)).to(dtype).requires_grad_()
        self.W_enc_LI = self.W_dec_LO.detach().clone().requires_grad_()
        self.b_enc_L = torch.zeros(L, dtype=dtype, requires_grad=True)
        self.b_dec_O = torch.zeros(width, dtype=dtype, requires_grad=True)
        self.t_L = torch.full((L,), -1.0, requires_grad=True)
        self.parameters = [self.W_enc_LI, self.W_dec_LO, self.b_enc_L, self.b_dec_O, self.t_L]
        self.x_SBI = torch.randn(3, 6, width, generator=generator).to(dtype)
        self.lambda_L = torch.full((L,), 0.05)

    def loss(self, scheme: str, x_BI: torch.Tensor) -> torch.Tensor:
        ops, penalty = self.ops, torch.zeros(())
        n_L = ops.decoder_norms(self.W_dec_LO, SEGMENTS, "sum").n_L
        encoder = (x_BI, self.W_enc_LI, self.b_enc_L)
        if scheme == "jumprelu":
            latents = ops.encode_jumprelu(*encoder, self.t_L, 2.0, "anthropic")
            penalty = ops.weighted_tanh(latents, n_L, self.lambda_L, 4.0)
            penalty = penalty + ops.pre_act_penalty(latents, self.t_L, n_L, self.lambda_L)
        elif scheme == "l1":
            latents = ops.encode_relu(*encoder)
            penalty = ops.weighted_l1(latents, n_L, self.lambda_L)
        else:
            scale = (n_L.detach(),) if scheme == "encode_batch_topk" else ()
            latents = getattr(ops, scheme)(*encoder, 2 if scheme == "encode_groupmax" else K, *scale)
        y_BO = ops.sparse_decode(latents, self.W_dec_LO, self.b_dec_O)
        loss = ops.recon_loss(y_BO, x_BI, SEGMENTS).loss + penalty
        if scheme == "encode_topk":
            dead_L = latents.firing_counts_L() == 0
            aux = ops.aux_topk(*encoder, dead_L, 4)
            error_BO = (x_BI - y_BO).detach()
            loss = loss + ops.recon_loss(ops.sparse_decode(aux, self.W_dec_LO), error_BO, SEGMENTS).loss / 32
        return loss

    def losses(self, scheme: str) -> list[float]:
        optimizer = torch.optim.Adam(self.parameters, lr=0.01)
        found = []
        for x_BI in self.x_SBI:
            optimizer.zero_grad()
            loss = self.loss(scheme, x_BI)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found


SCHEMES = ["encode_topk", "encode_batch_topk", "encode_groupmax", "l1", "jumprelu"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_are_those_of_the_reference(scheme):
    assert Trainee("triton").losses(scheme) == pytest.approx(Trainee("reference").losses(scheme), rel=2e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_threshold_encode_agrees_with_the_reference(scaled, dtype):
    one = Trainee("triton", dtype)
    scale_L = torch.linspace(0.5, 2, L) if scaled else None
    arguments = (one.x_SBI[0], one.W_enc_LI.detach(), one.b_enc_L.detach(), torch.tensor(0.6), scale_L)
    ops, reference = one.ops, resolve_backend("reference", "cpu")
    kept = ops.encode_threshold(*arguments)
    assert isinstance(kept, SparseLatents) and 0 < kept.value_N.shape[0] < 6 * L
    torch.testing.assert_close(kept.to_dense(), reference.encode_threshold(*arguments).to_dense())


def test_slices_of_the_width_add_up(monkeypatch):
    from crosscode_kernels.segments import triton_impl
    from crosscode_kernels.sparse_decode.triton_impl import sparse_decode_backward
    from crosscode_kernels.triton_common.heuristics import SegmentConfig

    latents = SparseLatents.from_topk(torch.rand(4, L).argsort(1)[:, :K], torch.rand(4, K), L)
    arguments = (latents.entries(latents.transpose()), torch.randn(4, 150), torch.randn(L, 150))
    whole = sparse_decode_backward(*arguments)
    monkeypatch.setattr(triton_impl, "segment_config", lambda *_: SegmentConfig(2, 32, 64))
    sliced = sparse_decode_backward(*arguments)
    for one, other in zip(sliced, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_chunks_of_latents_give_the_same_selection(monkeypatch):
    from crosscode_kernels.selection import triton_impl

    ops = resolve_backend("triton", "cpu")
    x_BI = (2 * torch.randn(3, 8)).round()
    W_LI = torch.randn(30, 8).round()
    whole = [ops.encode_topk(x_BI, W_LI, None, 5), ops.encode_groupmax(x_BI, W_LI, None, 10)]
    monkeypatch.setattr(triton_impl, "preacts_at_a_time", lambda fixed, cut, unit=1: 4 * unit)
    chunked = [ops.encode_topk(x_BI, W_LI, None, 5), ops.encode_groupmax(x_BI, W_LI, None, 10)]
    for one, other in zip(chunked, whole, strict=True):
        assert torch.equal(one.latent_idx_N, other.latent_idx_N) and torch.equal(one.value_N, other.value_N)


def test_an_unsupported_request_says_why():
    with pytest.raises(ValueError, match="float64 is not float16, bfloat16 or float32"):
        resolve_backend("triton", "cpu", torch.float64)
    with pytest.raises(ValueError, match="neither CUDA nor ROCm"):
        resolve_backend("triton", "mps")
